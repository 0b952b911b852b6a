"""Which samples are held out: seeded, and in every class alike."""

import torch
from torch import Tensor

from training.randomness import generator


def hold_out(targets: Tensor, fraction: float, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Split sample indices in two, class by class.

    Args:
        targets: int64 `[N]`.
        fraction: the share of each class that is held out, rounded; at least one sample of a
            class that has three, and never a class's last.
        seed: decides which.
        purpose: what they are held out for, so that two parts draw independently.

    Returns:
        Kept and held-out indices, int64, each in rising order.
    """
    held = [
        _held_of_class(torch.nonzero(targets == label).flatten(), fraction, seed, purpose, label)
        for label in sorted(set(targets.tolist()))
    ]
    is_held = torch.zeros(len(targets), dtype=torch.bool)
    if held:
        is_held[torch.cat(held)] = True
    return torch.nonzero(~is_held).flatten(), torch.nonzero(is_held).flatten()


def _held_of_class(members: Tensor, fraction: float, seed: int, purpose: str, label: int) -> Tensor:
    wanted = round(len(members) * fraction)
    if fraction > 0 and len(members) >= 3:
        wanted = max(1, wanted)
    count = min(wanted, len(members) - 1)
    shuffled = torch.randperm(
        len(members), generator=generator(seed, f"split {purpose}", sample=label)
    )
    return members[shuffled[:count]]


def fold_of_each(targets: Tensor, num_folds: int, seed: int) -> Tensor:
    """Which fold holds each sample out: int64 `[N]`, every class spread evenly over the folds.

    Args:
        targets: int64 `[N]`.
        num_folds: at least 2.
        seed: decides which.
    """
    folds, dealt = torch.empty_like(targets), 0
    for label in sorted(set(targets.tolist())):
        members = torch.nonzero(targets == label).flatten()
        draws = generator(seed, "folds", sample=label)
        shuffled = members[torch.randperm(len(members), generator=draws)]
        folds[shuffled] = (torch.arange(len(members)) + dealt) % num_folds
        dealt += len(members)  # so that what is left over does not always go to the first folds
    return folds
