"""A checkpoint from a stranger: checked step by step before anything of it is visible.

In this order, and each before what it guards takes memory: the manifest, the network that it names,
the size of the weights, their header, their digest, their numbers, and at last what they answer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from pydantic import ValidationError
from torch import Tensor

from models import checkpoint, networks
from models.checkpoint import (
    GOLDEN,
    MANIFEST,
    MAX_GOLDEN_BYTES,
    MAX_GOLDEN_SAMPLES,
    MAX_MANIFEST_BYTES,
    CheckpointError,
    sha256_of,
)
from models.intake_error import (
    CanaryFailed,
    DigestMismatch,
    FilesUnexpected,
    ManifestRefused,
    NetworkRefused,
    WeightsTooLarge,
)
from models.manifest import WEIGHTS, Manifest, sentence_of
from models.networks import NetworkError
from models.seen import SEEN, SeenDamaged, read_seen
from models.tensor_file import Expected, check_finite, check_tensor_file, parse_json_object

SLACK_BYTES: Final = 1 << 20
WIDEST_BYTES: Final = 8
MAX_SEEN_BYTES: Final = 1 << 26
"""Of a stranger's list: four million samples."""
MAX_INPUT_NUMBERS: Final = 1 << 22
"""Of one input: its activations take many times that when the canary is asked."""
CANARY_ROWS: Final = 4
CANARY_TOLERANCE: Final = 1e-3


class Intake:
    """One checkpoint on its way in.

    Args:
        text: its manifest, with or without the records of its files.

    Raises:
        ManifestRefused, NetworkRefused: nothing else need be looked at.
    """

    def __init__(self, text: bytes) -> None:
        self.manifest = _read_manifest(text)
        self._state = _state_of(self.manifest)

    @property
    def max_weights_bytes(self) -> int:
        """The most bytes that a file of this network's weights can have."""
        numbers = sum(tensor.numel() for tensor in self._state.values())
        return numbers * WIDEST_BYTES + SLACK_BYTES

    @staticmethod
    def max_golden_bytes() -> int:
        """The most bytes that a file of golden inputs can have."""
        return MAX_GOLDEN_BYTES + SLACK_BYTES

    @staticmethod
    def max_seen_bytes() -> int:
        """The most bytes that a list of seen samples can have."""
        return MAX_SEEN_BYTES + SLACK_BYTES

    def check(self, folder: Path, *, sha256: str | None = None, by: str = "local") -> Manifest:
        """Check the weights and golden inputs in `folder`, and seal it.

        Args:
            folder: holds `weights.safetensors`, perhaps `golden.safetensors` and
                `seen.safetensors`, and nothing else.
            sha256: of the weights, as the sender says.
            by: who sent it; kept in the lineage.

        Returns:
            The manifest as it was written. The run is left out: it is the store's own word for
            who made a version, and nobody may claim another's.

        Raises:
            models.intake_error.IntakeRefused: by the name of what is wrong.
        """
        self._check_weights(folder / WEIGHTS)
        self._check_digests(folder, sha256)
        check_finite(folder / WEIGHTS)
        _check_seen(folder)
        manifest = self._renewed(by)
        try:
            self._check_answers(folder, manifest)
            sealed = checkpoint.seal(folder, manifest)
            checkpoint.load(folder)
        except (CheckpointError, NetworkError, RuntimeError, ValueError, TypeError) as error:
            raise CanaryFailed(
                f"the network cannot be used as the manifest says: {_line(error)}"
            ) from error
        if self.manifest.digest not in (None, sealed.digest):
            raise DigestMismatch("the manifest's digest is not that of what it describes")
        return sealed

    def _check_weights(self, path: Path) -> None:
        if not path.is_file():
            raise FilesUnexpected(f"there is no {WEIGHTS}")
        size_bytes = path.stat().st_size
        if size_bytes > self.max_weights_bytes:
            raise WeightsTooLarge(
                f"{WEIGHTS} has {size_bytes} bytes; this network has at most "
                f"{self.max_weights_bytes}"
            )
        expected = {name: Expected.like(tensor) for name, tensor in self._state.items()}
        check_tensor_file(path, expected)

    def _check_digests(self, folder: Path, sha256: str | None) -> None:
        records = self.manifest.files
        claims = {name: record.sha256 for name, record in records.items()}
        for name in (WEIGHTS, GOLDEN, SEEN):
            path = folder / name
            wanted = {claims.get(name)} | ({sha256} if name == WEIGHTS else set())
            wanted -= {None}
            if path.is_file() and wanted and wanted != {sha256_of(path)}:
                raise DigestMismatch(f"{name} is not what its sha256 says")
            if name in claims and not path.is_file():
                raise FilesUnexpected(f"the manifest lists {name}, and it is not there")

    def _check_answers(self, folder: Path, manifest: Manifest) -> None:
        """Compare with the golden answers that came along, or make some."""
        weights = checkpoint.read_tensors(folder / WEIGHTS)
        network = checkpoint.network_with(manifest, weights)
        if not (folder / GOLDEN).is_file():
            checkpoint.write_golden(folder, network, manifest, _some_inputs(manifest))
            return
        inputs, outputs = _golden(folder / GOLDEN, manifest)
        with torch.inference_mode():
            found = network(manifest.preprocessing.finish(inputs[:CANARY_ROWS])).float()
        golden = outputs[:CANARY_ROWS]
        if found.shape != golden.shape:
            raise CanaryFailed(
                f"the network answers shape {list(found.shape)} to its golden inputs, "
                f"not {list(golden.shape)}"
            )
        change = float((found - golden).abs().max() / golden.abs().max().clamp_min(1e-6))
        if not change <= CANARY_TOLERANCE:
            raise CanaryFailed(
                f"the network answers its golden inputs differently than the checkpoint says: by "
                f"{change:.2g} of the largest output, and {CANARY_TOLERANCE} is allowed"
            )

    def _renewed(self, by: str) -> Manifest:
        lineage = self.manifest.lineage
        environment = {**lineage.environment, "uploaded_by": by}
        return self.manifest.model_copy(
            update={
                "files": {},
                "digest": None,
                "checksum": None,
                "lineage": lineage.model_copy(update={"run": None, "environment": environment}),
            }
        )


def _check_seen(folder: Path) -> None:
    if (folder / SEEN).is_file():
        try:
            read_seen(folder, [SEEN])
        except SeenDamaged as error:
            raise FilesUnexpected(str(error)) from None


def _read_manifest(text: bytes) -> Manifest:
    if len(text) > MAX_MANIFEST_BYTES:
        raise ManifestRefused(f"{MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")
    try:
        parse_json_object(text)  # a key that is there twice would mean two things
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ManifestRefused(f"{MANIFEST}: {sentence_of(error)[:500]}") from None
    except ValueError as error:
        raise ManifestRefused(f"{MANIFEST}: {str(error)[:500]}") from None
    for shape in (manifest.preprocessing.input_shape, manifest.preprocessing.raw_shape):
        total = torch.Size(shape).numel()
        if total > MAX_INPUT_NUMBERS:
            raise ManifestRefused(
                f"{MANIFEST}: one input has {total} numbers; {MAX_INPUT_NUMBERS} are allowed"
            )
    return manifest


def _state_of(manifest: Manifest) -> Mapping[str, Tensor]:
    """The network's state without memory of its own; classes are never named by strangers."""
    name = manifest.network.name
    if ":" in name or not networks.is_registered(name):
        raise NetworkRefused(
            f"the network {name[:80]!r} is none that can be uploaded: the built-in ones, "
            "torchvision's, and those that an installed package registers"
        )
    try:
        return checkpoint.empty_network(manifest).state_dict()
    except NetworkError as error:
        raise NetworkRefused(_line(error)) from error


def _golden(path: Path, manifest: Manifest) -> tuple[Tensor, Tensor]:
    if path.stat().st_size > Intake.max_golden_bytes():
        raise WeightsTooLarge(f"{GOLDEN} has more than {Intake.max_golden_bytes()} bytes")
    raw_shape, classes = manifest.preprocessing.raw_shape, len(manifest.labels)
    raw = "U8" if manifest.preprocessing.accepts_pictures else "F32"
    num = _num_golden(path)
    check_tensor_file(
        path,
        {
            "inputs": Expected((num, *raw_shape), frozenset({raw})),
            "outputs": Expected((num, classes), frozenset({"F32"})),
        },
    )
    check_finite(path)
    tensors = checkpoint.read_tensors(path)
    return tensors["inputs"], tensors["outputs"]


def _num_golden(path: Path) -> int:
    """How many there are, as the header says; what it says is checked afterwards."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, 64 * 1024))
    try:
        shape = parse_json_object(text)["outputs"]["shape"]
        num = shape[0]
    except (ValueError, KeyError, TypeError, IndexError):
        return 1
    return num if isinstance(num, int) and 1 <= num <= MAX_GOLDEN_SAMPLES else 1


def _some_inputs(manifest: Manifest) -> Tensor:
    """Inputs to remember the network by, where none came along."""
    shape = (CANARY_ROWS, *manifest.preprocessing.raw_shape)
    random = torch.Generator().manual_seed(0)
    if manifest.preprocessing.accepts_pictures:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    return torch.randn(shape, generator=random)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
