"""From a version on disk to a network on the device, checked; everything that belongs in a thread.

Verify the hashes, build, move to the device, and answer the golden inputs as they were answered
when the version was published.
"""

import time
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from app.errors import LoadFailed
from models import checkpoint
from models.checkpoint import Golden
from models.manifest import Manifest
from models.store import Version

# Largest change of a golden output, relative to the largest logit, in fp32 on any device.
GOLDEN_TOLERANCE: Final = 1e-3
GOLDEN_ROWS: Final = 4
# A large network on a slow machine answers a few golden inputs, not all 64, before it serves.
GOLDEN_TIME_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A version whose network is on its device and answered its golden inputs."""

    version: Version
    manifest: Manifest
    network: nn.Module
    device: torch.device


def load_version(version: Version, device: torch.device) -> LoadedVersion:
    """Load and check `version`; takes from milliseconds to seconds.

    Raises:
        models.checkpoint.CheckpointError, models.networks.NetworkError: it cannot be loaded.
        LoadFailed: it does not answer as it did, or not one logit a label.
    """
    loaded = checkpoint.load(version.folder)
    manifest = loaded.manifest
    network = loaded.network.to(device)
    with torch.inference_mode():
        if loaded.golden is not None:
            _check_golden(version, manifest, network, loaded.golden, device)
        else:
            _check_shape(version, manifest, network, device)
    return LoadedVersion(version, manifest, network, device)


def _check_shape(
    version: Version, manifest: Manifest, network: nn.Module, device: torch.device
) -> None:
    logits = _forward(network, torch.zeros((1, *manifest.preprocessing.input_shape)), device)
    if logits.shape != (1, len(manifest.labels)):
        raise LoadFailed(
            f"{version} answers shape {list(logits.shape)} to one input; "
            f"its manifest has {len(manifest.labels)} labels"
        )


def _check_golden(
    version: Version, manifest: Manifest, network: nn.Module, golden: Golden, device: torch.device
) -> None:
    largest = golden.outputs.abs().max().clamp_min(1e-6)
    until = time.monotonic() + GOLDEN_TIME_S
    for start in range(0, len(golden.inputs), GOLDEN_ROWS):
        rows = slice(start, start + GOLDEN_ROWS)
        logits = _forward(network, manifest.preprocessing.finish(golden.inputs[rows]), device)
        change = float(((logits - golden.outputs[rows]).abs().max() / largest).item())
        if not change <= GOLDEN_TOLERANCE:  # NaN is no change that can be tolerated
            raise LoadFailed(
                f"{version} answers its golden inputs differently than when it was published: by "
                f"{change:.2g} of the largest output, and {GOLDEN_TOLERANCE} is allowed"
            )
        if time.monotonic() > until:
            return


def _forward(network: nn.Module, batch: Tensor, device: torch.device) -> Tensor:
    output: Tensor = network(batch.to(device)).float().cpu()
    return output
