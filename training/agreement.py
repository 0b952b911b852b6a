"""How often a network gives samples the same class in another precision as in fp32.

A server cannot ask this when it loads a version: it has no samples but the few golden ones. So it
is asked once, when a version is published, of samples that were held out.
"""

import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from models.device import supports_bf16
from models.forms import other_forms
from training.feed import in_batches
from training.source import Part

ENOUGH_SAMPLES: Final = 200
"""Fewer say too little, and nothing is asked."""
MAX_SAMPLES: Final = 400
MAX_S: Final = 10.0
"""Publishing waits no longer."""
WORTHWHILE_S: Final = 0.001
"""Quicker than this for one row, a network is served in fp32 anyway."""
BATCH: Final = 16


def agreement(network: nn.Module, part: Part, finish: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Precision -> `share` of samples with the same class, and `num_samples`.

    Args:
        network: in `eval()`, on any device; it is not changed.
        part: held-out samples.
        finish: the model's preprocessing of them.

    Returns:
        Nothing, where there are too few samples or too little time, where the device has no bf16,
        or where the network is too small to gain by it.
    """
    device = next(network.parameters()).device
    if len(part) < ENOUGH_SAMPLES or not supports_bf16(device) or _is_small(network, part, finish):
        return {}
    other = other_forms(network, "bf16")[0]
    chosen = part.select(torch.arange(0, len(part), max(1, len(part) // MAX_SAMPLES))[:MAX_SAMPLES])
    until = time.monotonic() + MAX_S
    num_same = num_samples = 0
    for inputs, _ in in_batches(chosen, finish, BATCH):
        with torch.inference_mode():
            inputs = inputs.to(device)
            same = other(inputs).argmax(1) == network(inputs).argmax(1)
        num_same, num_samples = num_same + int(same.sum()), num_samples + len(same)
        if time.monotonic() > until:
            break
    if num_samples < ENOUGH_SAMPLES:
        return {}
    return {"bf16": {"share": num_same / num_samples, "num_samples": num_samples}}


def _is_small(network: nn.Module, part: Part, finish: Callable[[Tensor], Tensor]) -> bool:
    row = finish(part.samples.read(0)[0][None]).to(next(network.parameters()).device)
    with torch.inference_mode():
        network(row)
        began = time.perf_counter()
        network(row)
    return time.perf_counter() - began < WORTHWHILE_S
