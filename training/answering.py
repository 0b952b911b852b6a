"""What a network answers to one part of a dataset, on the CPU."""

from collections.abc import Generator
from typing import Final

import torch
from torch import Tensor, nn

from training.datasets import Dataset
from training.feed import in_batches
from training.layout import laid_out, layout_of
from training.progress import Progress

ANSWERED_AT_ONCE: Final = 64


def answers_to(
    dataset: Dataset, name: str, network: nn.Module
) -> Generator[Progress, None, Tensor]:
    """The logits of the part `name` in its order, float32 `[N, classes]`; phase `evaluate`."""
    part, layout, rows, done = dataset.parts[name], layout_of(network), [], 0
    network.to("cpu").to(memory_format=layout).eval()
    finish, num_workers = dataset.preprocessing.finish, dataset.num_workers
    for x, _ in in_batches(part, finish, ANSWERED_AT_ONCE, num_workers):
        with torch.inference_mode():
            rows.append(network(laid_out(x, layout)).float())
        done += len(x)
        yield Progress("evaluate", done, len(part))
    return torch.cat(rows).clone()
