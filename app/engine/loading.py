"""From a version on disk to a network on the device, checked; everything that belongs in a thread.

Verify the hashes, build, move to the device, and answer the golden inputs as they were answered
when the version was published.
"""

import logging
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from app.engine.decoding import Decoder
from app.engine.device_decoding import DecodingDrift, measure_drift
from app.engine.device_error import is_device_error, is_device_lost, is_out_of_memory
from app.engine.execution import (
    TOLERANCE,
    Execution,
    Reference,
    Wanted,
    choose_form,
    chosen_before,
)
from app.engine.known_choices import KnownChoices
from app.errors import DeviceLost, LoadFailed
from models import checkpoint
from models.checkpoint import Golden
from models.forms import plain_form
from models.manifest import Manifest
from models.store import Version

log = logging.getLogger(__name__)

GOLDEN_ROWS: Final = 4
# A large network on a slow machine answers a few golden inputs, not all 64, before it serves.
GOLDEN_TIME_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A version whose network is on its device and answered its golden inputs.

    Attributes:
        network: as its class computes it, in fp32.
        execution: how it computes; may hold another form of the network.
        reference: golden inputs and answers.
        elsewhere: the same on the other devices, in their order; None on one that is lost.
        drift: what decoding on the device changes; None where it is not done, or not known.
    """

    version: Version
    manifest: Manifest
    network: nn.Module
    device: torch.device
    execution: Execution
    reference: Reference
    elsewhere: tuple["LoadedVersion | None", ...] = ()
    drift: DecodingDrift | None = None


class LostWhileLoading(DeviceLost):
    """A device can be used no more; which one it was is told to whoever owns it."""

    def __init__(self, version: Version, device: torch.device, place: int = 0) -> None:
        super().__init__(f"{device} failed while {version} was loaded")
        self.place = place


def load_everywhere(
    version: Version,
    devices: Sequence[torch.device],
    lost: Container[int],
    precision: Wanted = "fp32",
    known: KnownChoices | None = None,
) -> LoadedVersion:
    """`load_version` on every device that is not lost; raises as it does."""
    found: list[LoadedVersion | None] = []
    for place, device in enumerate(devices):
        try:
            alive = place not in lost
            found.append(load_version(version, device, precision, known) if alive else None)
        except LostWhileLoading as error:
            error.place = place
            raise
    first = next((one for one in found if one is not None), None)
    if first is None:
        raise DeviceLost("the device failed and answers no more")
    return replace(first, elsewhere=tuple(found[1:]))


def with_drift(loaded: LoadedVersion, decoder: Decoder) -> LoadedVersion:
    """The same, with what decoding on its device changes, where `decoder` does that.

    Raises:
        DeviceLost: the device failed, and can be used no more.
    """
    preprocessing, pixels = loaded.manifest.preprocessing, loaded.reference.sent_bytes
    reader = decoder.device_reader(preprocessing)
    if reader is None or loaded.device.type == "cpu":
        return loaded
    if pixels is None:
        log.info("%s has no golden pictures: how far decoding drifts is unknown", loaded.version)
        return loaded
    try:
        drift = measure_drift(reader, loaded.execution, pixels, preprocessing, loaded.device)
    except RuntimeError as error:
        if is_device_lost(error, loaded.device):
            raise LostWhileLoading(loaded.version, loaded.device) from error
        raise LoadFailed(f"{loaded.device} cannot decode for {loaded.version}: {error}") from error
    log.info("%s, decoded on %s: %s", loaded.version, loaded.device, drift)
    return replace(loaded, drift=drift)


def load_version(
    version: Version,
    device: torch.device,
    precision: Wanted = "fp32",
    known: KnownChoices | None = None,
) -> LoadedVersion:
    """Load and check `version`; takes from milliseconds to seconds.

    Args:
        precision: to compute in; `auto` takes the quickest that answers alike.
        known: choices that were made before, and where this one is kept.

    Raises:
        models.checkpoint.CheckpointError, models.networks.NetworkError: it cannot be loaded.
        LoadFailed: it does not answer as it did, or not one logit a label, or does not fit.
        DeviceLost: the device failed, and can be used no more.
    """
    try:
        return _loaded(version, device, precision, known)
    except (RuntimeError, MemoryError) as error:
        if is_device_lost(error, device):
            raise LostWhileLoading(version, device) from error
        if is_out_of_memory(error):
            raise LoadFailed(f"{version} does not fit into the memory of {device}") from None
        raise


def _loaded(
    version: Version, device: torch.device, precision: Wanted, known: KnownChoices | None
) -> LoadedVersion:
    if device.type == "cuda":
        # fp32 shall mean fp32: golden outputs come from a processor, and TF32 has 10 bits.
        torch.backends.cudnn.allow_tf32 = False
    loaded = checkpoint.load(version.folder)
    manifest = loaded.manifest
    network = loaded.network.to(device)
    with torch.inference_mode():
        if loaded.golden is not None:
            _check_golden(version, manifest, network, loaded.golden, device)
        else:
            _check_shape(version, manifest, network, device)
    agreement = manifest.metrics.get("agreement")
    reference = Reference.of(
        loaded.golden,
        manifest.preprocessing,
        device,
        agreement if isinstance(agreement, dict) else None,
    )
    execution = _execution(manifest.digest or "", network, reference, precision, known)
    if device.type == "cuda":
        # What was copied and cast here will be read on another stream, by another thread.
        # Not the whole device: another thread may be recording there.
        torch.cuda.current_stream(device).synchronize()
    for trial in execution.trials:
        log.info("%s in %s: %s", version, trial.form, trial.verdict)
    return LoadedVersion(version, manifest, network, device, execution, reference)


def _execution(
    digest: str,
    network: nn.Module,
    reference: Reference,
    precision: Wanted,
    known: KnownChoices | None,
) -> Execution:
    """As it was chosen before, or else by measuring now."""
    device = reference.inputs.device
    before = known.find(digest, device) if known is not None else None
    execution = chosen_before(network, reference, before) if before is not None else None
    if execution is None:
        execution = choose_form(network, reference, precision)
        if known is not None and execution.is_worthwhile:
            known.keep(digest, device, execution.choice)
    return execution


def check_change(version: Version, logits: Tensor, golden: Tensor, tolerance: float) -> None:
    """Compare answers with what they were when `version` was published.

    Args:
        logits, golden: float32 `[n, classes]` on the CPU.
        tolerance: largest change, relative to the largest logit.

    Raises:
        LoadFailed: they differ by more than rounding does.
    """
    if logits.shape != golden.shape:
        raise LoadFailed(
            f"{version} answers shape {list(logits.shape)} to its golden inputs; "
            f"when it was published it was {list(golden.shape)}"
        )
    largest = golden.abs().max().clamp_min(1e-6)
    change = float(((logits - golden).abs().max() / largest).item())
    if not change <= tolerance:  # NaN is no change that can be tolerated
        raise LoadFailed(
            f"{version} answers its golden inputs differently than when it was published: by "
            f"{change:.2g} of the largest output, and {tolerance} is allowed"
        )


def _check_shape(
    version: Version, manifest: Manifest, network: nn.Module, device: torch.device
) -> None:
    zeros = torch.zeros((1, *manifest.preprocessing.input_shape))
    logits = _forward(version, network, zeros, device)
    if logits.shape != (1, len(manifest.labels)):
        raise LoadFailed(
            f"{version} answers shape {list(logits.shape)} to one input; "
            f"its manifest has {len(manifest.labels)} labels"
        )


def _check_golden(
    version: Version, manifest: Manifest, network: nn.Module, golden: Golden, device: torch.device
) -> None:
    until = time.monotonic() + GOLDEN_TIME_S
    tolerance = TOLERANCE[plain_form(network).precision]
    for start in range(0, len(golden.inputs), GOLDEN_ROWS):
        rows = slice(start, start + GOLDEN_ROWS)
        batch = manifest.preprocessing.finish(golden.inputs[rows])
        logits = _forward(version, network, batch, device)
        check_change(version, logits, golden.outputs[rows], tolerance)
        if time.monotonic() > until:
            return


def _forward(version: Version, network: nn.Module, batch: Tensor, device: torch.device) -> Tensor:
    try:
        output: Tensor = network(batch.to(device)).float().cpu()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if is_device_error(error) or is_out_of_memory(error):
            raise  # no fault of the network's
        # A network that does not fit what its manifest says of its inputs, or an operator's fault.
        raise LoadFailed(f"{version} fails on an input: {' '.join(str(error).split())}") from error
    return output
