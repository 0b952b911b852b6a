"""Processes that torchrun has started, one a rank: rank 0 carries out the command, others follow.

They meet at MASTER_ADDR and MASTER_PORT, where rank 0 says in which folder it listens; everything
else goes through that folder and the loopback.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from training.follower import follow, watch
from training.ranks import Ranks

FOLDER_KEY: Final = "pytorchlib/folder"


class SeveralMachines(Exception):
    """The ranks are not all on this machine."""


class FolderNotOurs(Exception):
    """The folder in which ranks meet belongs to another user."""


@contextmanager
def joined(num_ranks: int, num_here: int) -> Iterator[Ranks]:
    """The other ranks, as rank 0 sees them.

    Args:
        num_ranks: with this process, which is rank 0.
        num_here: of these, on this machine.

    Raises:
        SeveralMachines: some of them are elsewhere.
    """
    if num_here != num_ranks:
        raise SeveralMachines(
            f"torchrun has started {num_ranks} processes and {num_here} of them here; "
            "training is shared among processes of one machine: --nnodes 1"
        )
    store = _store(0, num_ranks)
    with tempfile.TemporaryDirectory(prefix="pytorchlib-") as folder:
        ranks = Ranks(Path(folder), num_ranks)
        try:
            store.set(FOLDER_KEY, folder)
            yield ranks
        finally:
            ranks.close()


def follow_rank_0(rank: int, num_ranks: int) -> int:
    """Follow rank 0 to its end; gives the exit status.

    Raises:
        FolderNotOurs: somebody else says to be rank 0.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach rank 0 too, and it decides
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    folder = Path(_store(rank, num_ranks).get(FOLDER_KEY).decode())
    if folder.stat().st_uid != os.getuid():
        raise FolderNotOurs(f"{folder} belongs to another user")
    threading.Thread(
        target=watch, args=(parent, folder), name="watch torchrun", daemon=True
    ).start()
    return follow(folder, rank, num_ranks)


def _store(rank: int, num_ranks: int) -> Any:
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", rank, num_ranks))[0]
