"""Choices of a form that were made before, so that a restart and a replica choose alike at once.

One small file for each version, processor type and torch: measuring again could choose otherwise
on a busy day, and then two replicas would answer with different numbers.
"""

import hashlib
import json
import logging
import os
import uuid
from dataclasses import asdict
from pathlib import Path

import torch

from app.engine.execution import Choice, Trial
from models.device import processor_type

log = logging.getLogger(__name__)


class KnownChoices:
    """Choices in one folder, which replicas may share.

    Args:
        folder: made when something is first kept.
        wanted: the setting that choices are made under.
    """

    def __init__(self, folder: Path, wanted: str) -> None:
        self._folder = folder
        self._wanted = wanted

    def find(self, digest: str, device: torch.device) -> Choice | None:
        """What was chosen for the version with this digest on this kind of device, if anything."""
        try:
            document = json.loads(self._path(digest, device).read_bytes())
            trials = [
                Trial(**one | {"ms": {int(size): ms for size, ms in one["ms"].items()}})
                for one in document["trials"]
            ]
            return Choice(document["precision"], document["arranged"], trials)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("a kept choice of precision cannot be read, it is made again: %s", error)
            return None

    def keep(self, digest: str, device: torch.device, choice: Choice) -> None:
        """Keep a choice; a disk that is full costs only the time to choose again."""
        path = self._path(digest, device)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(asdict(choice), indent=1) + "\n")
            os.replace(aside, path)
        except OSError as error:
            log.warning("the choice of a precision could not be kept: %s", error)

    def _path(self, digest: str, device: torch.device) -> Path:
        circumstances = (digest, processor_type(device), torch.__version__, self._wanted)
        name = hashlib.sha256("\n".join(circumstances).encode()).hexdigest()
        return self._folder / f"{name[:32]}.json"
