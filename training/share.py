"""Which samples of a batch one of several ranks learns from.

The batch and its order are those of a single process: ranks take consecutive pieces of it.
"""

from dataclasses import replace

import torch

from training.order import Batch

FEWEST = 2
"""A batch norm cannot learn from a single sample."""


def share_of(batch: Batch, rank: int, num_ranks: int, *, with_neighbour: bool = False) -> Batch:
    """The piece of `batch` that `rank` takes; the last ranks get nothing of a very small one.

    Args:
        batch: of all ranks.
        rank: counted from 0.
        num_ranks: in all.
        with_neighbour: put the sample before the piece in front of it, because mixup and cutmix
            mix each sample with the one before; the first one's is the last of the batch.
    """
    num = len(batch.indices)
    num_active = max(1, min(num_ranks, num // FEWEST))
    if rank >= num_active:
        return replace(batch, indices=batch.indices[:0], first=num, num_whole=num)
    first, end = num * rank // num_active, num * (rank + 1) // num_active
    indices = batch.indices[first:end]
    if with_neighbour:
        indices = torch.cat((batch.indices[(first - 1) % num].view(1), indices))
    return replace(batch, indices=indices, first=first, num_whole=num, has_neighbour=with_neighbour)
