"""A checkpoint is a folder: `weights.safetensors`, `manifest.json`, `golden.safetensors`.

Saving writes the manifest last and syncs everything; loading verifies sizes and hashes, builds
the network without memory of its own where the class allows it, and maps the weights from disk.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models import networks
from models.manifest import (
    WEIGHTS,
    FileRecord,
    Manifest,
    checksum_of,
    digest_of,
    sentence_of,
)
from models.seen import SEEN, Seen
from models.sync import sync_folder as sync_folder  # where others have long found it

GOLDEN = "golden.safetensors"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 8 * 1024 * 1024
MAX_TENSORS = 20_000
MAX_GOLDEN_SAMPLES = 64
MAX_GOLDEN_BYTES = 16 * 1024 * 1024


class CheckpointError(Exception):
    """A checkpoint cannot be used."""


class ManifestInvalid(CheckpointError):
    """The manifest is missing, unreadable, or a field in it is wrong."""


class CheckpointDamaged(CheckpointError):
    """A file is missing or differs from what was recorded, the manifest included."""


class WeightsMismatch(CheckpointError):
    """The weights do not fit the network that the manifest names."""


class AnswersMismatch(CheckpointError):
    """The network does not answer with one finite number for each label."""


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs with the answers they had when the checkpoint was made.

    Attributes:
        inputs: `[n, *raw_shape]`, what preprocessing's `finish` takes; n at most 64.
        outputs: float32 `[n, classes]`, the logits in fp32 on a CPU.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint: the network is in `eval()`, on the CPU, without gradients."""

    manifest: Manifest
    network: nn.Module
    golden: Golden | None


def save(
    folder: Path,
    network: nn.Module,
    manifest: Manifest,
    golden_inputs: Tensor | None = None,
    seen: Seen | None = None,
) -> Manifest:
    """Write `network` as a checkpoint into the empty or absent `folder`.

    Args:
        folder: made where it is absent.
        network: on any device; its state_dict is stored in the types that it has.
        manifest: without digest, files and checksum.
        golden_inputs: `[n, *raw_shape]`; the first 64 are kept (fewer where pictures are large),
            and the network, brought to the CPU, answers them once.
        seen: which samples the weights were trained and selected on, where that is known.

    Returns:
        The manifest with digest, files and checksum.

    Raises:
        CheckpointError: the folder is not empty, or the state_dict cannot be stored.
        WeightsMismatch, AnswersMismatch: the network is not what the manifest says; known where
            there are golden inputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; a checkpoint needs a folder of its own")
    _write_tensors(folder / WEIGHTS, _plain(network.state_dict()))
    if golden_inputs is not None and len(golden_inputs):
        write_golden(folder, network, manifest, golden_inputs)
    if seen:
        _write_tensors(folder / SEEN, seen.tensors())
    return seal(folder, manifest)


def write_golden(
    folder: Path, network: nn.Module, manifest: Manifest, golden_inputs: Tensor
) -> None:
    """Let `network` answer `golden_inputs` on the CPU, and keep both; raises as `save` does."""
    golden = _golden(network, manifest, golden_inputs)
    _write_tensors(folder / GOLDEN, {"inputs": golden.inputs, "outputs": golden.outputs})


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Record the folder's files in `manifest` and write it as the last file; then sync all.

    Raises:
        CheckpointError: there are no weights, or the manifest is too large.
    """
    files = {
        path.name: FileRecord(size_bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    }
    if WEIGHTS not in files:
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    sealed = manifest.sealed(files)
    text = sealed.model_dump_json(indent=1).encode() + b"\n"
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"the manifest has {len(text)} bytes; {MAX_MANIFEST_BYTES} are allowed"
        )
    _write_bytes(folder / MANIFEST, text)
    sync_folder(folder)
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        ManifestInvalid: missing, too large, no JSON, or a field is missing or wrong.
        CheckpointDamaged: it was changed after it was written.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestInvalid(f"{MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")
        return parse_manifest(path.read_bytes())
    except OSError as error:
        raise ManifestInvalid(f"{MANIFEST} cannot be read: {error.strerror}") from None


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in `text`; raises as `read_manifest` does."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ManifestInvalid(f"{MANIFEST}: {sentence_of(error)}") from None
    document = json.loads(text)
    if WEIGHTS not in manifest.files:
        raise ManifestInvalid(f"{MANIFEST}: files: there is no {WEIGHTS}")
    sums = (manifest.digest, manifest.checksum)
    if sums != (digest_of(document), checksum_of(document)):
        raise CheckpointDamaged(f"{MANIFEST} was changed after it was published")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded size and hash.

    Raises:
        CheckpointDamaged: a file is missing, of another size, or of another hash.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointDamaged(f"{name} is missing")
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            raise CheckpointDamaged(
                f"{name} has {size_bytes} bytes; the manifest says {record.size_bytes}"
            )
        if sha256_of(path) != record.sha256:
            raise CheckpointDamaged(f"{name} differs from its sha256 in the manifest")


def load(folder: Path) -> Checkpoint:
    """Verify the checkpoint in `folder` and build its network with mapped weights.

    Raises:
        ManifestInvalid, CheckpointDamaged: as in `read_manifest` and `verify`.
        WeightsMismatch: missing, unexpected or differently shaped weights.
        models.networks.NetworkError: the network cannot be built.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest)
    network = network_with(manifest, read_tensors(folder / WEIGHTS))
    return Checkpoint(manifest, network, _read_golden(folder, manifest))


def network_with(manifest: Manifest, weights: Mapping[str, Tensor]) -> nn.Module:
    """The manifest's network holding `weights` themselves, not copies of them.

    Weights in another floating type than the network's (halves, to save disk) are converted.

    Raises:
        WeightsMismatch: missing, unexpected or differently shaped weights.
        models.networks.NetworkError: the network cannot be built.
    """
    network = empty_network(manifest)
    expected = network.state_dict()
    _check_names(expected, weights)
    weights = {name: _fitting(name, weights[name], like) for name, like in expected.items()}
    _assign(network, weights)
    if any(tensor.is_meta for tensor in _all_tensors(network)):
        # Some class fills a tensor outside its state_dict; now that its size is known to be that
        # of the weights, build it once for real.
        network = networks.build(manifest.network.name, manifest.network.options)
        _assign(network, weights)
    return network.eval().requires_grad_(False)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def empty_network(manifest: Manifest) -> nn.Module:
    """The network on the meta device, where its layers may have any size and take no memory."""
    spec = manifest.network
    try:
        with torch.device("meta"):
            return networks.build(spec.name, spec.options)
    except networks.BadNetworkOptions as error:
        if networks.is_built_in(spec.name) or not isinstance(error.__cause__, RuntimeError):
            raise
        # An operator's class that looks at its own numbers, which meta tensors do not have.
        return networks.build(spec.name, spec.options)


def _check_names(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or extra:
        parts = [
            f"{word} {', '.join(sorted(keys)[:5])}{' and more' if len(keys) > 5 else ''}"
            for word, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        raise WeightsMismatch(f"the weights do not fit the network: {'; '.join(parts)}")


def _fitting(name: str, weight: Tensor, like: Tensor) -> Tensor:
    if weight.shape != like.shape:
        raise WeightsMismatch(
            f"{name} has shape {list(weight.shape)}; the network needs {list(like.shape)}"
        )
    if weight.dtype != like.dtype and not (weight.is_floating_point() and like.is_floating_point()):
        raise WeightsMismatch(f"{name} has type {weight.dtype}; the network needs {like.dtype}")
    return weight.to(like.dtype)


def _assign(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise WeightsMismatch(f"the network does not take its weights: {reason}") from error


def _all_tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that a class keeps as plain attributes."""
    yield from network.parameters()
    yield from network.buffers()
    for module in network.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _golden(network: nn.Module, manifest: Manifest, inputs: Tensor) -> Golden:
    bytes_each = max(1, inputs[0].numel() * inputs.element_size())
    kept = max(1, min(MAX_GOLDEN_SAMPLES, MAX_GOLDEN_BYTES // bytes_each))
    inputs = inputs[:kept].detach().cpu().contiguous()
    # A copy through the saved form: the caller's network may be training, or on a GPU.
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    answering = network_with(manifest, weights)
    with torch.inference_mode():
        outputs = answering(manifest.preprocessing.finish(inputs)).float()
    if outputs.shape != (len(inputs), len(manifest.labels)):
        raise AnswersMismatch(
            f"the network answers {len(inputs)} inputs with shape {list(outputs.shape)}; "
            f"there are {len(manifest.labels)} labels"
        )
    if not outputs.isfinite().all():
        raise AnswersMismatch("the network answers with numbers that are not finite")
    return Golden(inputs, outputs.clone())


def _read_golden(folder: Path, manifest: Manifest) -> Golden | None:
    if GOLDEN not in manifest.files:
        return None
    tensors = read_tensors(folder / GOLDEN)
    if tensors.keys() != {"inputs", "outputs"}:
        raise CheckpointDamaged(f"{GOLDEN} must hold exactly inputs and outputs")
    golden = Golden(tensors["inputs"], tensors["outputs"])
    num = golden.outputs.shape[0] if golden.outputs.ndim else 0
    shapes = (num, *manifest.preprocessing.raw_shape), (num, len(manifest.labels))
    if not 1 <= num <= MAX_GOLDEN_SAMPLES or shapes != (golden.inputs.shape, golden.outputs.shape):
        raise CheckpointDamaged(f"{GOLDEN} has shapes that the manifest does not say")
    if golden.outputs.dtype != torch.float32:
        raise CheckpointDamaged(f"{GOLDEN} has outputs of {golden.outputs.dtype}, not of float32")
    return golden


def _plain(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"the state_dict holds {name} of type {type(tensor).__name__}; only tensors "
                "can be stored"
            )
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, mapped from disk."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise CheckpointDamaged(
                    f"{path.name} has {len(names)} tensors; {MAX_TENSORS} are allowed"
                )
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointDamaged(f"{path.name} cannot be read: {error}") from None


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} cannot be written: {error}") from None
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
