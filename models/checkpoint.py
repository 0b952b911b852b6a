"""A checkpoint is a folder: `weights.safetensors`, `manifest.json`, `golden.safetensors`.

Saving writes the manifest last and syncs everything; loading verifies sizes and hashes, builds
the network without memory of its own where the class allows it, and maps the weights from disk.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import networks
from models.manifest import FileRecord, Manifest

WEIGHTS = "weights.safetensors"
GOLDEN = "golden.safetensors"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 32 * 1024 * 1024
MAX_GOLDEN_SAMPLES = 64
MAX_GOLDEN_BYTES = 16 * 1024 * 1024


class CheckpointError(Exception):
    """A checkpoint cannot be used."""


class ManifestInvalid(CheckpointError):
    """The manifest is missing, unreadable, or a field in it is wrong."""


class CheckpointDamaged(CheckpointError):
    """A file is missing or differs from what the manifest recorded."""


class WeightsMismatch(CheckpointError):
    """The weights do not fit the network that the manifest names."""


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
    """A loaded checkpoint: the network is in `eval()`, in fp32, on the CPU, without gradients."""

    manifest: Manifest
    network: nn.Module
    golden: Golden | None


def save(
    folder: Path, network: nn.Module, manifest: Manifest, golden_inputs: Tensor | None = None
) -> Manifest:
    """Write `network` as a checkpoint into the empty or absent `folder`.

    Args:
        folder: made where it is absent.
        network: on any device; its state_dict is stored in fp32 or whatever it has.
        manifest: without digest and files.
        golden_inputs: `[n, *raw_shape]`; the first 64 are kept (fewer where pictures are large),
            and the network, brought to the CPU, answers them once.

    Returns:
        The manifest with digest and files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / WEIGHTS, _plain(network.state_dict()))
    if golden_inputs is not None and len(golden_inputs):
        golden = _golden(network, manifest, golden_inputs)
        _write_tensors(folder / GOLDEN, {"inputs": golden.inputs, "outputs": golden.outputs})
    return seal(folder, manifest)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Record the folder's files in `manifest` and write it as the last file; then sync all."""
    files = {
        path.name: FileRecord(size_bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    sealed = manifest.model_copy(
        update={"files": files, "digest": manifest.identity(files[WEIGHTS].sha256)}
    )
    _write_bytes(folder / MANIFEST, sealed.model_dump_json(indent=1).encode() + b"\n")
    sync_folder(folder)
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        ManifestInvalid: missing, too large, no JSON, or a field is missing or wrong.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestInvalid(f"{path} has more than {MAX_MANIFEST_BYTES} bytes")
        return parse_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise ManifestInvalid(f"{path} cannot be read: {error.strerror}") from None


def parse_manifest(text: bytes, source: str) -> Manifest:
    """The manifest in `text`; `source` names it in the error.

    Raises:
        ManifestInvalid: no JSON, or a field is missing or wrong.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ManifestInvalid(f"{source}: {where}: {first['msg']}") from None


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded size and hash.

    Raises:
        CheckpointDamaged: a file is missing, of another size, or of another hash.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointDamaged(f"{folder}: {name} is missing")
        if path.stat().st_size != record.size_bytes:
            raise CheckpointDamaged(
                f"{path} has {path.stat().st_size} bytes; the manifest says {record.size_bytes}"
            )
        if sha256_of(path) != record.sha256:
            raise CheckpointDamaged(f"{path} differs from its sha256 in the manifest")
    if WEIGHTS not in manifest.files:
        raise CheckpointDamaged(f"{folder}: the manifest records no {WEIGHTS}")
    if manifest.digest != manifest.identity(manifest.files[WEIGHTS].sha256):
        raise CheckpointDamaged(f"{folder}: the manifest was changed after it was published")


def load(folder: Path) -> Checkpoint:
    """Verify the checkpoint in `folder` and build its network with mapped weights.

    Raises:
        ManifestInvalid, CheckpointDamaged: as in `read_manifest` and `verify`.
        WeightsMismatch: missing, unexpected or differently shaped weights.
        models.networks.NetworkError: the network cannot be built.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest)
    weights = _read_tensors(folder / WEIGHTS)
    network = network_with(manifest, weights)
    return Checkpoint(manifest, network, _read_golden(folder, manifest))


def network_with(manifest: Manifest, weights: dict[str, Tensor]) -> nn.Module:
    """The manifest's network holding `weights` themselves, not copies of them.

    Raises:
        WeightsMismatch: missing, unexpected or differently shaped weights.
        models.networks.NetworkError: the network cannot be built.
    """
    network = _without_memory(manifest)
    expected = network.state_dict()
    _check_names(expected, weights)
    if any(tensor.is_meta for tensor in expected.values()):
        network.load_state_dict(weights, strict=True, assign=True)
        if any(tensor.is_meta for tensor in _all_tensors(network)):
            # Some class fills a buffer outside its state_dict; build it once for real.
            network = networks.build(manifest.network.name, manifest.network.options)
            network.load_state_dict(weights, strict=True, assign=True)
    else:
        network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_memory(manifest: Manifest) -> nn.Module:
    spec = manifest.network
    try:
        with torch.device("meta"):
            return networks.build(spec.name, spec.options)
    except networks.BadNetworkOptions:
        # The class looks at its own numbers while it is built, which meta tensors do not have.
        return networks.build(spec.name, spec.options)


def _check_names(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or extra:
        parts = [
            f"{word} {', '.join(sorted(keys)[:5])}{' and more' if len(keys) > 5 else ''}"
            for word, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        raise WeightsMismatch(f"the weights do not fit the network: {'; '.join(parts)}")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise WeightsMismatch(
                f"{name} has shape {list(weights[name].shape)}; "
                f"the network needs {list(tensor.shape)}"
            )


def _all_tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _golden(network: nn.Module, manifest: Manifest, inputs: Tensor) -> Golden:
    bytes_each = max(1, inputs[0].numel() * inputs.element_size())
    kept = max(1, min(MAX_GOLDEN_SAMPLES, MAX_GOLDEN_BYTES // bytes_each))
    inputs = inputs[:kept].detach().cpu().contiguous()
    # A copy through the saved form: the caller's network may be training, or on a GPU.
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    answering = network_with(manifest, weights)
    with torch.inference_mode():
        outputs = answering(manifest.preprocessing.finish(inputs)).float()
    return Golden(inputs, outputs.clone())


def _read_golden(folder: Path, manifest: Manifest) -> Golden | None:
    if GOLDEN not in manifest.files:
        return None
    tensors = _read_tensors(folder / GOLDEN)
    if tensors.keys() != {"inputs", "outputs"}:
        raise CheckpointDamaged(f"{folder / GOLDEN} must hold exactly inputs and outputs")
    golden = Golden(tensors["inputs"], tensors["outputs"])
    raw_shape, num_classes = manifest.preprocessing.raw_shape, len(manifest.labels)
    num = len(golden.inputs)
    if golden.inputs.shape != (num, *raw_shape) or golden.outputs.shape != (num, num_classes):
        raise CheckpointDamaged(f"{folder / GOLDEN} has shapes that the manifest does not say")
    return golden


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        if own.data_ptr() in seen and own.numel():
            own = own.clone()
        seen.add(own.data_ptr())
        plain[name] = own
    return plain


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from None


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
