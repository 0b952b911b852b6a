"""What a run was begun with, written into its folder, so that it goes on as it began."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from training.methods import FineTuneRequest
from training.state import environment

BEGUN: Final = "begun.json"


class RunMismatch(Exception):
    """The run's folder holds another run."""


@contextmanager
def as_begun(request: FineTuneRequest, folder: Path) -> Iterator[list[str]]:
    """With the threads that the run began with; gives notes on what is different now.

    Raises:
        RunMismatch: the folder holds a run with other settings.
    """
    before, path, notes = torch.get_num_threads(), folder / BEGUN, []
    asked = request.model_dump(mode="json", exclude={"compute", "dataset", "validation_dataset"})
    begun = json.loads(path.read_text()) if path.exists() else None
    if begun and begun["request"] != asked:
        raise RunMismatch(
            "the folder holds a run with other settings; begin anew in another folder"
        )
    torch.set_num_threads(
        request.compute.threads or (int(begun["environment"]["threads"]) if begun else before)
    )
    try:
        now = environment()
        if begun is None:
            staging = path.with_suffix(".writing")
            staging.write_text(json.dumps({"request": asked, "environment": now}, indent=1))
            staging.replace(path)
        else:
            notes = [
                f"begun with {name} {then} and ended with {now.get(name)}: the bits may differ "
                "from those of a run that stayed where it was"
                for name, then in begun["environment"].items()
                if now.get(name) != then
            ]
        yield notes
    finally:
        torch.set_num_threads(before)
