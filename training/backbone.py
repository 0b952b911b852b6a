"""Weights to begin with, found by what a person calls them.

A version of the store, or a network of torchvision with weights that are here: a file that was
named, a file in the folder of weights, or a version that was imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from models.checkpoint import Checkpoint, load
from models.manifest import NetworkSpec
from models.networks import INT8, NETWORKS, TORCHVISION
from models.preprocessing import Preprocessing
from models.seen import Seen, read_seen
from models.store import ModelStore, Version
from models.store_error import StoreError
from training.importing import METHOD, PUBLISHED, ImportRequest, read_import

WEIGHTS = "weights"
"""The folder in the home folder where an operator puts backbones, named as their networks are."""
SUFFIXES = (".safetensors", ".pth", ".pt")


class BaseUnknown(Exception):
    """Nothing here goes by the name that was given as the base."""


@dataclass(frozen=True)
class Backbone:
    """Weights to begin with.

    Attributes:
        spec: the network they are of.
        state: its weights.
        preprocessing: what it takes; None where only a network was named.
        parent: what a person calls these weights: `digits:3`, or a file.
        labels: of its outputs, in order; None where they are not known.
        notes: what was taken for granted, one sentence each.
        seen: samples that these weights were learned from and chosen by, as far as is known.
    """

    spec: NetworkSpec
    state: Mapping[str, Tensor]
    preprocessing: Preprocessing | None
    parent: str | None
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    seen: Seen = field(default_factory=Seen)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, parent: str) -> "Backbone":
        """A model of the store as the beginning of another.

        Raises:
            BaseUnknown: it computes in int8, which cannot be tuned.
        """
        manifest = checkpoint.manifest
        if manifest.network.name.startswith(INT8):
            known = manifest.lineage.parent or "the version that it was made from"
            raise BaseUnknown(f"{parent} computes in int8, which cannot be tuned; tune {known}")
        state = checkpoint.network.state_dict()
        return cls(manifest.network, state, manifest.preprocessing, parent, manifest.labels)

    @classmethod
    def of_name(cls, network: str) -> "Backbone":
        """No weights at all: the network that fresh ones are for."""
        return cls(NetworkSpec(name=network), {}, None, None)

    def spec_for(self, num_classes: int) -> NetworkSpec:
        """The same network with torchvision's own (or its own class's) head for these classes."""
        kept = {name: value for name, value in self.spec.options.items() if name != "head"}
        return NetworkSpec(name=self.spec.name, options={**kept, "num_classes": num_classes})


def find_backbone(reference: str, home: Path, weights: str | None = None) -> Backbone:
    """The weights that `reference` means.

    Args:
        reference: a version (`digits`, `digits@production`, `digits:3`), or `torchvision/NAME`.
        home: its folders `models` and `weights` are looked into.
        weights: a file of the network's weights, or the word `torchvision`.

    Raises:
        BaseUnknown: nothing is called so; the sentence says what to do.
        models.store_error.StoreError, models.checkpoint.CheckpointError: of a version.
        training.importing.ImportRefused and what `read_import` raises: of a file.
    """
    store = ModelStore(home / "models")
    if weights is not None:
        return _imported(reference, weights)
    if not reference.startswith(TORCHVISION):
        return _of_version(_resolved(store, reference))
    if (file := weights_file(reference, home)) is not None:
        return _imported(reference, str(file))
    for version in imported_versions(store):
        if version.manifest().network.name == reference:
            return _of_version(version)
    raise BaseUnknown(
        f"there are no weights of {reference} here: import them (`pytorchlib import --network "
        f"{reference} --weights FILE --name NAME`), or put the file into the folder {WEIGHTS} of "
        f"the home folder as {reference.removeprefix(TORCHVISION)}.pth"
    )


def weights_file(network: str, home: Path) -> Path | None:
    """The file of weights that an operator put there for a network of torchvision."""
    name = network.removeprefix(TORCHVISION)
    return next((path for stem, path in weights_files(home) if stem == name), None)


def weights_files(home: Path) -> list[tuple[str, Path]]:
    """Every file of weights with the name of its network, which torchvision has before a `-`."""
    folder = home / WEIGHTS
    if not folder.is_dir():
        return []
    found = (path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES)
    return [(path.stem.partition("-")[0], path) for path in found if path.is_file()]


def imported_versions(store: ModelStore) -> list[Version]:
    """Versions that were imported, the newest of each model first."""
    versions = [
        store.version(name, number)
        for name in store.names()
        for number in reversed(store.versions(name))
    ]
    return [version for version in versions if version.manifest().lineage.method == METHOD]


def _of_version(version: Version) -> Backbone:
    checkpoint = load(version.folder)
    seen = read_seen(version.folder, checkpoint.manifest.files)
    return replace(Backbone.of_checkpoint(checkpoint, str(version)), seen=seen)


def _imported(network: str, weights: str) -> Backbone:
    imported = read_import(ImportRequest(weights=weights, network=network))
    manifest = imported.manifest
    backbone = Backbone(
        manifest.network,
        imported.network.state_dict(),
        manifest.preprocessing,
        Path(weights).name if weights != PUBLISHED else network,
    )
    return replace(backbone, notes=imported.notes)


def _resolved(store: ModelStore, reference: str) -> Version:
    try:
        return store.resolve(reference)
    except StoreError as error:
        if reference in NETWORKS or ":" in reference and "." in reference:
            raise BaseUnknown(
                f"{reference} is a network without weights: only from_scratch begins with none"
            ) from None
        raise BaseUnknown(
            f"{error}; a base is a version of the store or torchvision/NETWORK"
        ) from None
