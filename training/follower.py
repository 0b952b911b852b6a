"""The process of a rank other than 0: takes its share of each step, when rank 0 says so.

It holds nothing that rank 0 has not, writes nothing and reports nothing but its own failure; where
rank 0 is gone, so is it.
"""

import os
import shutil
import sys
import threading
import time
import traceback
from contextlib import closing
from pathlib import Path
from typing import Final

import torch

from training.commands import sentence_of
from training.gradient_sum import GradientSum
from training.link import Link, LinkClosed
from training.ranks import REASON_S, SOCKET, START_S, SUM_S
from training.stepper import Exchange, Stepper, repeatable
from training.task import Task

WATCH_S: Final = 0.5
WORD_S: Final = 24 * 3600.0
"""Rank 0 may be silent for so long; its death is noticed at once."""
LOST, FAILED, ORPHANED = 4, 1, 3
"""Exit statuses: another rank is gone, this one failed, rank 0 is gone."""


def main(folder: str, rank: str, num_ranks: str, parent: str) -> None:
    """Follow the process `parent`, which started this one."""
    watching = threading.Thread(
        target=watch, args=(int(parent), Path(folder)), name="watch rank 0", daemon=True
    )
    watching.start()
    status = follow(Path(folder), int(rank), int(num_ranks))
    os._exit(status)  # threads of torch and of readers have nothing left to say


def follow(folder: Path, rank: int, num_ranks: int) -> int:
    """Carry out one task after the other until rank 0 says to leave; gives the exit status."""
    try:
        link = Link.to(folder / SOCKET, START_S)
        link.say("here", rank=rank)
        _Follower(link, rank, num_ranks).run()
    except (LinkClosed, TimeoutError):
        shutil.rmtree(folder, ignore_errors=True)  # rank 0 had no time to
        return ORPHANED
    return 0


class _Lost(Exception):
    """A sum over all ranks did not come about."""


class _Follower:
    def __init__(self, link: Link, rank: int, num_ranks: int) -> None:
        self._link, self._rank, self._num_ranks = link, rank, num_ranks
        self._add: GradientSum | None = None

    def run(self) -> None:
        """Until rank 0 says to leave; a failure is told before the process ends of it."""
        try:
            while (said := self._link.hear(WORD_S))["word"] != "leave":
                if said["word"] == "task":
                    self._carry_out(Path(said["folder"]), said["device"])
        except _Lost:
            self._link.say("lost")
            self._link.hear(REASON_S)  # rank 0 looks for whose fault it is
            os._exit(LOST)
        except (LinkClosed, TimeoutError):
            raise
        except Exception as error:  # the edge of a rank: everything becomes a sentence
            sentence = sentence_of(error)
            if sentence is None:
                traceback.print_exc()
            self._link.say("failed", reason=sentence or f"{type(error).__name__}: {error}")
            sys.stderr.flush()
            os._exit(FAILED)

    def _carry_out(self, folder: Path, device_type: str) -> None:
        task = Task.read(folder)
        name = f"cuda:{self._rank}" if device_type == "cuda" else "cpu"
        config = task.config.model_copy(update={"device": name})
        exchange = Exchange(self._rank, self._num_ranks, self._sum)
        stepper = task.stepper(config, exchange)
        with repeatable(stepper.device, config.threads, config.determinism):
            self._link.say("ready")
            stepper.train()
            self._follow_steps(stepper)

    def _follow_steps(self, stepper: Stepper) -> None:
        with closing(stepper.batches()) as batches:
            while (said := self._link.hear(WORD_S))["word"] != "end":
                if said["word"] == "join":
                    self._join(Path(said["file"]), stepper.device)
                elif said["word"] == "leave":
                    raise LinkClosed("rank 0 said to leave in the middle of a task")
                else:
                    stepper.step(*next(batches))

    def _join(self, file: Path, device: torch.device) -> None:
        rank, num_ranks = self._rank, self._num_ranks
        self._add = GradientSum(file, rank, num_ranks, device, SUM_S, lambda: None)

    def _sum(self, tensor: torch.Tensor) -> None:
        if self._add is None:
            raise RuntimeError("ranks add up once they have joined")
        try:
            self._add(tensor)
        except RuntimeError as error:
            raise _Lost(str(error)) from None


def watch(parent: int, folder: Path) -> None:
    """End this process once `parent` has: whatever it computes, nobody waits for it."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(ORPHANED)
