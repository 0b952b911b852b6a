"""What can be tuned here, and what is known of each: read from manifests and file headers alone."""

from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from models.checkpoint import CheckpointError
from models.manifest import WEIGHTS as WEIGHTS_FILE
from models.networks import TORCHVISION
from models.store import ModelStore, Version
from training.backbone import weights_files

MAX_LISTED: Final = 1000
IMPORTED: Final = (
    "not recorded: whoever imported these weights knows their terms, and those of the pictures "
    "they were trained on"
)
TORCHVISION_WEIGHTS: Final = (
    "not known here: torchvision's code is BSD-3-Clause, and it says that its weights may have "
    "terms of their own, from the dataset that they were trained on"
)
FRESH: Final = "trained here from fresh weights: the terms of its dataset are yours to know"


def bases(home: Path) -> list[dict[str, Any]]:
    """Versions of the store and networks of torchvision whose weights an operator put here.

    Returns:
        One JSON object each: `base` (what a request names), `kind` (`version` or `torchvision`),
        `network`, `parameters` (None where only opening the file would tell), `size_bytes`,
        `input_shape` (None where torchvision decides), `num_classes`, `licence`. At most
        `MAX_LISTED`.
    """
    files = [_file(stem, path) for stem, path in weights_files(home)]
    store = ModelStore(home / "models")
    versions = (
        store.version(name, number)
        for name in store.names()
        for number in reversed(store.versions(name))
    )
    found = [*files]
    for version in versions:
        if len(found) == MAX_LISTED:
            break
        try:
            found.append(_version(store, version))
        except (CheckpointError, OSError):
            continue  # deleted in this moment, or damaged: nothing to begin with
    return found


def _version(store: ModelStore, version: Version) -> dict[str, Any]:
    manifest, weights = version.manifest(), version.folder / WEIGHTS_FILE
    return {
        "base": str(version),
        "kind": "version",
        "network": manifest.network.name,
        "parameters": _num_parameters(weights),
        "size_bytes": weights.stat().st_size,
        "input_shape": list(manifest.preprocessing.input_shape),
        "num_classes": len(manifest.labels),
        "licence": _licence(store, version),
    }


def _file(stem: str, path: Path) -> dict[str, Any]:
    return {
        "base": TORCHVISION + stem,
        "kind": "torchvision",
        "network": TORCHVISION + stem,
        "parameters": _num_parameters(path) if path.suffix == ".safetensors" else None,
        "size_bytes": path.stat().st_size,
        "input_shape": None,
        "num_classes": None,
        "licence": TORCHVISION_WEIGHTS,
    }


def _num_parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    total = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # the file is no dictionary
            size = 1
            for side in file.get_slice(name).get_shape():
                size *= side
            total += size
    return total


def _licence(store: ModelStore, version: Version, depth: int = 0) -> str:
    """What the lineage says: that of the weights at its beginning."""
    manifest = version.manifest()
    lineage = manifest.lineage
    if lineage.method == "import":
        known = manifest.network.name.startswith(TORCHVISION)
        return TORCHVISION_WEIGHTS if known else IMPORTED
    if lineage.parent is None:
        return FRESH
    name, colon, number = lineage.parent.partition(":")
    if not colon or not number.isdecimal() or depth > 20:
        return f"begun with {lineage.parent}; {TORCHVISION_WEIGHTS}"
    if int(number) not in store.versions(name):
        return f"begun with {lineage.parent}, which is no longer here"
    return _licence(store, store.version(name, int(number)), depth + 1)
