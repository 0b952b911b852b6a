"""The other processes of a run, as the first one sees them: started or joined, led, and ended.

Rank 0 is the process that drives the loop. It alone validates, reports, writes snapshots and
publishes; the others (`training/follower.py`) take their share of each step when it says so, and
hold nothing that it has not. So a run may be stopped between any two steps, and ends at the same
step everywhere.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from models.device import DeviceUnavailable
from training.gradient_sum import GradientSum
from training.link import Link, LinkClosed
from training.stepper import Exchange
from training.task import Task

SOCKET: Final = "rank-0"
START_S: Final = 300.0
"""A rank may take so long to start, import its network's package and map its samples."""
SUM_S: Final = 300.0
"""A step may wait so long for its slowest rank."""
REASON_S: Final = 3.0
"""So long a death is looked into."""
LEAVE_S: Final = 3.0
FOLLOW: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from training.follower import main
main(*sys.argv[2:])
"""
"""What a rank's process runs; it finds modules where this one does."""


class RankFailed(Exception):
    """A rank met an error; the sentence names it and the rank."""


class RankLost(Exception):
    """A rank's process died or does not answer; the run can be gone on with from its snapshot."""


class Ranks:
    """Ranks 1 and up.

    Args:
        folder: private to this run.
        num_ranks: with rank 0.
    """

    def __init__(self, folder: Path, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.exchange = Exchange(0, num_ranks, self._sum)
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._links: dict[int, Link] = {}
        self._bereaved: set[int] = set()
        self._num_tasks = 0
        self._add: GradientSum | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / SOCKET))
        self._listener.listen(num_ranks)

    def start(self) -> None:
        """Start a process for each rank; they import torch while this one reads its data."""
        for rank in range(1, self.num_ranks):
            told = [json.dumps(sys.path), str(self._folder), str(rank), str(self.num_ranks)]
            self._processes[rank] = subprocess.Popen(
                [sys.executable, "-c", FOLLOW, *told, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is rank 0's matter
            )

    def begin(self, task: Task, device: torch.device) -> None:
        """Give every rank its task and wait until all are ready for the first step.

        Raises:
            RankFailed, RankLost: as their sentences say.
            training.task.Unshareable: the samples cannot be given to other processes.
            models.device.DeviceUnavailable: there are fewer GPUs than ranks.
        """
        _check_gpus(device, self.num_ranks)
        self._num_tasks += 1
        folder = self._folder / f"task-{self._num_tasks}"
        task.write(folder)
        self._gather()
        self._tell("task", folder=str(folder), device=device.type)
        for rank in self._links:
            self._hear(rank, "ready")
        if self._add is None:
            file = self._folder / f"sum-{secrets.token_hex(8)}"
            self._tell("join", file=str(file))
            self._add = GradientSum(file, 0, self.num_ranks, device, SUM_S, self._look)
        for path in folder.iterdir():
            path.unlink()  # what is mapped stays until nobody has it mapped

    def step(self) -> None:
        """Let every rank compute its share of the next step."""
        self._tell("step")

    def end(self) -> None:
        """There is no further step in this task; who is gone by now is not missed."""
        with suppress(RankFailed, RankLost):
            self._tell("end")

    def close(self) -> None:
        """Let every rank go; what has not gone by itself in a moment is killed."""
        for link in self._links.values():
            with suppress(LinkClosed):
                link.say("leave")
        self._add = None
        deadline = time.monotonic() + (LEAVE_S if self._links else 0.0)
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        for link in self._links.values():
            link.close()
        self._listener.close()

    def _gather(self) -> None:
        """Wait until every rank has connected; one that ended before is noticed."""
        deadline = time.monotonic() + START_S
        self._listener.settimeout(0.1)
        while len(self._links) < self.num_ranks - 1:
            with suppress(TimeoutError):
                link = Link(self._listener.accept()[0])
                self._links[int(link.hear(START_S)["rank"])] = link
                continue
            for rank, process in self._processes.items():
                if process.poll() is not None:
                    raise RankLost(f"rank {rank} {_how(process.returncode)} before it began")
            if time.monotonic() > deadline:
                raise RankLost(f"not all ranks were there after {START_S:.0f} s")

    def _tell(self, word: str, **fields: Any) -> None:
        for link in self._links.values():
            try:
                link.say(word, **fields)
            except LinkClosed as closed:
                raise self._why(closed) from None

    def _hear(self, rank: int, word: str) -> None:
        try:
            said = self._links[rank].hear(START_S)
        except (LinkClosed, TimeoutError) as error:
            raise self._why(error) from None
        if said["word"] != word:
            raise RankFailed(f"rank {rank} failed: {said.get('reason')}")

    def _sum(self, tensor: Tensor) -> None:
        if self._add is None:
            raise RuntimeError("ranks add up once they have begun")
        try:
            self._add(tensor)
        except RuntimeError as error:
            raise self._why(error) from None

    def _look(self) -> None:
        """Notice a death whose connections a process of the dead one still holds open."""
        if any(process.poll() is not None for process in self._processes.values()):
            raise self._why(LinkClosed("a process has ended"))

    def _why(self, cause: Exception) -> Exception:
        """Which rank is at fault, and why."""
        deadline = time.monotonic() + REASON_S
        while (suspects := self._links.keys() - self._bereaved) and time.monotonic() < deadline:
            for rank in suspects:
                fault = self._fault_of(rank)
                if fault is not None:
                    return fault
        return RankLost(f"a rank does not answer: {cause}")

    def _fault_of(self, rank: int) -> Exception | None:
        """What it said last, or how its process ended; None where it only misses another."""
        process = self._processes.get(rank)
        try:
            said = self._links[rank].hear(0.05)
        except TimeoutError:
            # A process that the dead one has started may still hold its end of the connection.
            is_dead = process is not None and process.poll() is not None
            return RankLost(f"rank {rank} {_end_of(process)}") if is_dead else None
        except LinkClosed:
            return RankLost(f"rank {rank} {_end_of(process)}")
        if said["word"] == "failed":
            return RankFailed(f"rank {rank} failed: {said['reason']}")
        if said["word"] == "lost":
            self._bereaved.add(rank)
        return None


@contextmanager
def started(num_ranks: int) -> Iterator[Ranks]:
    """Ranks in processes of their own, which end with the block; spawned, never forked.

    Args:
        num_ranks: with this process, which is rank 0.
    """
    with tempfile.TemporaryDirectory(prefix="pytorchlib-") as folder:
        ranks = Ranks(Path(folder), num_ranks)
        try:
            ranks.start()
            yield ranks
        finally:
            ranks.close()


def ranks_for(num_ranks: int, ranks: Ranks | None = None) -> Any:
    """A block with `ranks` where there are some, else with as many as are wanted; None for one."""
    if ranks is not None or num_ranks < 2:
        return nullcontext(ranks)
    return started(num_ranks)


def threads_each(num_ranks: int) -> int:
    """Of the threads that this process would compute with, what each rank takes."""
    return max(1, torch.get_num_threads() // num_ranks)


def _check_gpus(device: torch.device, num_ranks: int) -> None:
    if device.type != "cuda":
        return
    count = torch.cuda.device_count()
    if num_ranks > count:
        raise DeviceUnavailable(
            f"{num_ranks} processes need a GPU each, and torch sees {count}; on a processor any "
            "number may share: --device cpu"
        )
    if device.index:
        raise DeviceUnavailable(
            f"{device} is one GPU, and {num_ranks} processes take the first {num_ranks}: "
            "say cuda, and choose them by CUDA_VISIBLE_DEVICES"
        )


def _end_of(process: "subprocess.Popen[bytes] | None") -> str:
    if process is None:
        return "is gone"  # torchrun started it, and knows more
    with suppress(subprocess.TimeoutExpired):
        return _how(process.wait(REASON_S))
    return "closed its connection"


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"
