"""One live model's way to the device: checks and admits requests, and waits for their answers."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from app.engine.admission import Admission
from app.engine.batch import Run
from app.engine.batch_policy import LaneOptions
from app.engine.call import Calls
from app.engine.dispatch import Dispatch
from app.engine.item_queue import Answer, Item
from app.engine.lane_statistics import LaneStatistics
from app.engine.pictures import Rows
from app.engine.schedule import LOWEST, NORMAL
from app.engine.turns import Turns
from app.engine.waiter import Waiter
from app.errors import BadInput, DeadlineExceeded, ServiceError, Unavailable

T = TypeVar("T")


class LaneClosed(Unavailable):
    """This version is being unloaded; whoever asks again gets the one that took its place."""


class Lane:
    """The queue of one live model; every method belongs to the event loop.

    Args:
        runs: forward over rows in host memory, `[size, *row_shape]` to named tensors of `size`
            rows, one for each device; each called in inference mode by one thread at a time.
        row_shape: the shape of one row of input.
    """

    def __init__(
        self,
        name: str,
        runs: Sequence[Run],
        row_shape: tuple[int, ...],
        options: LaneOptions,
        dispatch: Dispatch,
    ) -> None:
        self.name = name
        self.options = options
        self._row_shape = torch.Size(row_shape)
        self._dispatch = dispatch
        self._turns = Turns(name, runs, options, dispatch)
        self._admission = Admission(self._turns, options)
        self._calls = Calls(dispatch)
        self._unanswered: set[Item] = set()
        self._refusal: Callable[[], ServiceError] | None = None
        self._drained: asyncio.Event | None = None

    @property
    def statistics(self) -> LaneStatistics:
        """What it has done so far."""
        return self._turns.statistics

    @property
    def runs(self) -> Sequence[Run]:
        """Its forward on each device; none once it is closed."""
        return self._turns.runs or ()

    @property
    def num_waiting_rows(self) -> int:
        """Rows that wait for their turn."""
        return self._turns.items.num_rows

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not (self._unanswered or self._calls)

    @property
    def is_behind(self) -> bool:
        """Whether anything waits for the thread that its batches run on."""
        return self._turns.home.has_waiting()

    @property
    def largest_batch(self) -> int:
        """The most rows that share a forward; lower than asked for once memory ran out."""
        return self._turns.policy.sizes.largest

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes that the device sees, ascending."""
        return self._turns.policy.sizes.sizes

    @property
    def is_inline(self) -> bool:
        """Whether its batches run on the event loop."""
        return self._turns.is_inline

    def expected_ms(self, num_rows: int) -> float:
        """How long `num_rows` rows compute; 0 while nothing is known."""
        return self._turns.policy.seconds(num_rows) * 1000

    def foresee(self, num_rows: int, deadline: float) -> None:
        """Refuse rows now that `submit` would refuse, before work is spent on making them.

        Raises:
            QueueFull, DeadlineUnreachable: as `submit`.
        """
        key = (NORMAL, deadline, next(self._dispatch.numbers))
        with self._dispatch.lock:
            self._admission.admit(num_rows, key, deadline, time.monotonic())

    async def submit(
        self, inputs: Rows, deadline: float | None = None, priority: int = NORMAL
    ) -> Answer:
        """The network's outputs for `inputs` `[n, *row_shape]`, row for row.

        Args:
            inputs: rows in host memory, not to be changed until the answer is there; or pictures
                that become rows when their turn comes.
            deadline: in seconds of `time.monotonic()`; None waits as long as it takes.
            priority: smaller is sooner; within one, the earliest deadline is first.

        Raises:
            BadInput: rows of another shape or type, none, or more than the queue ever holds.
            QueueFull: too much waits already.
            DeadlineUnreachable: refused at once, because it would not be ready in time.
            DeadlineExceeded: it was not ready in time.
            models.picture.PictureError: one of its pictures cannot be used.
            ForwardFailed: the network raised on its batch.
            OutOfDeviceMemory: even half of its batch did not fit.
            DeviceLost, LaneClosed, Draining: nothing is computed here any more.
        """
        future: asyncio.Future[Answer] = self._dispatch.loop.create_future()
        item = self.begin(future, inputs, deadline, priority)
        try:
            return await future
        finally:
            self.end(item)
            # A future that failed knows the error, which knows this frame: no ring, no garbage.
            del item, future

    def begin(
        self,
        waiter: Waiter[Answer],
        inputs: Rows,
        deadline: float | None = None,
        priority: int = NORMAL,
    ) -> Item:
        """Let rows wait; `end` is called when `waiter` is done, and he may cancel before.

        Args and errors as `submit`.
        """
        self._check(inputs)
        dispatch, turns = self._dispatch, self._turns
        now = time.monotonic()
        item = Item(inputs, waiter, now, deadline, priority, next(dispatch.numbers))
        with dispatch.lock:
            self._admission.admit(item.num_rows, item.key, item.deadline, now)
            turns.push(item, now)
        self._unanswered.add(item)
        return item

    def end(self, item: Item) -> None:
        """Nobody waits for `item` any more: it was answered, or cancelled."""
        if item.waiter.cancelled():
            self._turns.statistics.num_abandoned += 1
            with self._dispatch.lock:
                self._turns.discard(item)
        self._unanswered.discard(item)
        self._notice_drained()

    async def call(
        self,
        function: Callable[[], T],
        deadline: float | None = None,
        priority: int = LOWEST,
        place: int = 0,
    ) -> T:
        """What `function` returns or raises, called on a device's thread when its turn comes.

        Args:
            place: number of the device.

        Raises:
            QueueFull: too many calls of this lane wait already.
            DeadlineExceeded: it was not ready in time.
            DeviceLost, LaneClosed, Draining: nothing is computed here any more.
        """
        self._check_open()
        try:
            return await self._calls.call(function, deadline, priority, place)
        finally:
            self._notice_drained()

    async def warm_up(self, within_s: float | None = None) -> None:
        """Run every batch size twice, so that what is set up once is, and the times are known.

        For a lane that nobody uses yet: its statistics start anew afterwards. Whatever serves goes
        first; after `within_s` seconds the larger sizes stay cold.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        with contextlib.suppress(DeadlineExceeded):
            for size in self._turns.policy.sizes.sizes:
                rows = torch.zeros(size, *self._row_shape, dtype=self.options.dtype)
                for _ in range(2):
                    if size <= self.largest_batch:
                        await self.submit(rows, deadline, LOWEST)
        self.forget_statistics()

    def count_with(self, other: "Lane") -> None:
        """From now on, count into what `other` counts into."""
        self._turns.statistics = other.statistics

    def forget_statistics(self) -> None:
        """Count anew."""
        self._turns.statistics = LaneStatistics()

    async def close(self, drain_s: float) -> None:
        """Admit nobody, answer who waits, then let go of the network.

        Who is not answered within `drain_s` seconds gets `LaneClosed`.
        """
        self.refuse(self._closed)
        await self.drain(drain_s)
        self._turns.runs = None

    def let_go(self) -> None:
        """Let go of the network at once; for an owner that dies, on whatever thread it does.

        It takes no lock, because the garbage collector may call it while this thread holds it.
        """
        self.refuse(self._closed)
        self._turns.runs = None
        if self._unanswered or self._calls:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._dispatch.loop.call_soon_threadsafe(self.fail, self._closed)

    def refuse(self, refusal: Callable[[], ServiceError]) -> None:
        """Admit nobody any more, and say `refusal()` to whoever comes."""
        self._refusal = refusal

    async def drain(self, drain_s: float) -> None:
        """Wait until nothing waits or runs; after `drain_s` seconds the rest are refused."""
        if self._drained is None:
            self._drained = asyncio.Event()
        self._turns.on_over = self._notice_drained
        self._notice_drained()
        try:
            async with asyncio.timeout(drain_s):
                await self._drained.wait()
        except TimeoutError:
            self.fail(self._refusal or self._closed)

    def fail(self, refusal: Callable[[], ServiceError]) -> None:
        """Answer all who wait, and those whose batch runs, with `refusal()`."""
        self.refuse(refusal)
        for item in list(self._unanswered):
            self._turns.fail_item(item, refusal())
        self._calls.fail(refusal())

    def _closed(self) -> ServiceError:
        return LaneClosed(f"{self.name} is being unloaded; ask again")

    def _check(self, inputs: Rows) -> None:
        self._check_open()
        shape = inputs.shape
        if len(shape) == 0 or shape[1:] != self._row_shape:
            raise BadInput(
                f"{self.name} takes rows of shape {tuple(self._row_shape)}, "
                f"not a tensor of shape {tuple(shape)}"
            )
        if inputs.dtype is not self.options.dtype or not inputs.is_cpu:
            raise BadInput(
                f"{self.name} takes {self.options.dtype} in host memory, "
                f"not {inputs.dtype} on {inputs.device}"
            )
        if not 0 < shape[0] <= self.options.max_queue_items:
            raise BadInput(
                f"{self.name} takes 1 to {self.options.max_queue_items} rows a request, "
                f"not {shape[0]}"
            )

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal()

    def _notice_drained(self) -> None:
        if self._drained is None:
            return
        if not (self._unanswered or self._calls or self._turns.num_out):
            self._drained.set()
