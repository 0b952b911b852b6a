"""An import that a second start of the same container does not repeat."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from models.checkpoint import sha256_of
from models.store import PRODUCTION, ModelStore, Version
from training.importing import ImportRequest, publish, read_import


def import_once(request: ImportRequest, store: ModelStore, name: str) -> tuple[Version, bool]:
    """The version of `name` that holds what `request` says, imported now if it is new.

    What is new becomes `production`: whoever starts with another file wants it to answer.

    Returns:
        The version, and whether it was imported now.

    Raises:
        OSError: the file cannot be read. Others as `training.importing.read_import` and `publish`.
    """
    run = _run_of(request)
    for number in reversed(store.versions(name)):
        version = store.version(name, number)
        if version.manifest().lineage.run == run:
            return version, False
    imported = read_import(request)
    lineage = imported.manifest.lineage.model_copy(update={"run": run})
    manifest = imported.manifest.model_copy(update={"lineage": lineage})
    version = publish(replace(imported, manifest=manifest), store, name)
    if store.aliases(name).get(PRODUCTION) != version.number:
        store.move_alias(name, PRODUCTION, version.number, why="imported at start")
    return version, True


def _run_of(request: ImportRequest) -> str:
    """The same file with the same words is the same import."""
    said = asdict(request)
    said["weights"] = sha256_of(Path(request.weights))
    said["labels"] = sha256_of(request.labels) if request.labels else None
    document = json.dumps(said, sort_keys=True, default=str)
    return f"import-{hashlib.sha256(document.encode()).hexdigest()[:32]}"
