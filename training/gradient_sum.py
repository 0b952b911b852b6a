"""Numbers summed over all ranks: gloo on processors, NCCL on GPUs, on this machine alone.

The groups are objects of their own instead of torch's global one, so that whoever has set that up
keeps it. Addresses are met in a file of the run's private folder: there is no port to race for.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOOPBACK = "127.0.0.1"
LOOK_UP = timedelta(seconds=1)
dist: Any = torch.distributed  # whose stubs know half of it


class GradientSum:
    """One rank's end of the group; built by all ranks at once, and waits until all are there.

    Args:
        file: where the ranks find each other; not there before.
        rank: counted from 0.
        num_ranks: in all.
        device: where the tensors lie.
        deadline_s: how long one sum may wait for the slowest rank.
        watch: asked once a second while others are waited for; raises where that is in vain.
    """

    def __init__(
        self,
        file: Path,
        rank: int,
        num_ranks: int,
        device: torch.device,
        deadline_s: float,
        watch: Callable[[], None],
    ) -> None:
        self._store = dist.FileStore(str(file), num_ranks)
        self._deadline_s, self._watch = deadline_s, watch
        within = timedelta(seconds=deadline_s)
        build = _nccl if device.type == "cuda" else _gloo
        self._group = build(self._store, rank, num_ranks, within)

    def __call__(self, tensor: Tensor) -> None:
        """Replace `tensor` by the sum over all ranks.

        Raises:
            RuntimeError: a rank is gone, or too slow.
            KeyboardInterrupt: a second Ctrl-C; signals are looked at once a second.
        """
        work = self._group.allreduce([tensor])
        if tensor.is_cuda:
            work.wait()  # the device waits, not this thread
            return
        deadline = time.monotonic() + self._deadline_s
        while True:
            try:
                work.wait(LOOK_UP)
                return
            except RuntimeError:
                if work.is_completed() or time.monotonic() > deadline:
                    raise
            self._watch()


def _gloo(store: Any, rank: int, num_ranks: int, within: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # the only road to a device of our choice
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = within
    return dist.ProcessGroupGloo(store, rank, num_ranks, options)


def _nccl(store: Any, rank: int, num_ranks: int, within: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = within
    return dist.ProcessGroupNCCL(store, rank, num_ranks, options)
