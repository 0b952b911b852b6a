"""The caller: how their body is read, and what happens when they hang up."""

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from starlette.types import Message

from app.api import caller
from app.api.caller import CallerGone, WhileCallerWaits, read_body, timeout_s
from app.errors import BadRequest, BodyTooLarge

pytestmark = pytest.mark.anyio
HANG_UP: Message = {"type": "http.disconnect"}


class Line:
    """A connection that brings these messages, then nothing."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)
        self.asked = 0

    async def receive(self) -> Message:
        self.asked += 1
        if self.messages:
            return self.messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError


def pieces(*chunks: bytes) -> Line:
    last = len(chunks) - 1
    return Line(
        *(
            {"type": "http.request", "body": chunk, "more_body": number < last}
            for number, chunk in enumerate(chunks)
        )
    )


@pytest.mark.parametrize("chunks", [(b"",), (b"abc",), (b"a", b"", b"bc"), (b"", b"abc", b"")])
async def test_a_body_is_read_whole(chunks: tuple[bytes, ...]) -> None:
    assert await read_body(pieces(*chunks).receive, None, 3) == b"".join(chunks)
    assert await read_body(pieces(*chunks).receive, None, 3, 2) == b"\0\0" + b"".join(chunks)


async def test_a_body_that_announces_too_much_is_not_read() -> None:
    line = pieces(b"abcd")
    for length in (b"4", b"9" * 30, b"9" * 5000):
        with pytest.raises(BodyTooLarge, match="limit of 3 bytes"):
            await read_body(line.receive, length, 3)
    assert line.asked == 0


async def test_a_body_that_grows_too_large_is_read_no_further() -> None:
    for lead_bytes in (0, 2):
        line = pieces(b"ab", b"cd", b"ef")
        with pytest.raises(BodyTooLarge):
            await read_body(line.receive, None, 3, lead_bytes)
        assert line.asked == 2


async def test_a_body_that_is_never_finished_is_no_body() -> None:
    line = Line({"type": "http.request", "body": b"ab", "more_body": True}, HANG_UP)
    with pytest.raises(CallerGone):
        await read_body(line.receive, b"3", 3)


async def test_a_timeout_is_a_number_of_milliseconds() -> None:
    assert timeout_s(b"250") == 0.25
    for header in (b"", b"0", b"-1", b"soon", b"nan", b"inf", b"1e30", b"\xff"):
        with pytest.raises(BadRequest, match="milliseconds"):
            timeout_s(header)


async def work(line: Line, started: Callable[[], None] = lambda: None) -> str:
    with WhileCallerWaits(line.receive):
        started()
        await asyncio.sleep(2)
    return "done"


async def test_work_ends_when_the_caller_hangs_up() -> None:
    with pytest.raises(CallerGone):
        await work(Line(HANG_UP))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_connection_that_cannot_be_read_has_no_caller() -> None:
    async def receive() -> Message:
        raise OSError("broken")

    with pytest.raises(CallerGone), WhileCallerWaits(receive):
        await asyncio.sleep(2)


async def test_work_that_is_cancelled_otherwise_is_cancelled() -> None:
    started = asyncio.Event()
    task = asyncio.create_task(work(Line(), started.set))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_quick_work_is_never_watched() -> None:
    line = Line(HANG_UP)
    with WhileCallerWaits(line.receive):
        await asyncio.sleep(0)
    await asyncio.sleep(2 * caller.WATCH_AFTER_S)
    assert line.asked == 0


async def test_an_error_of_the_work_is_the_error() -> None:
    async def fail() -> None:
        await asyncio.sleep(2 * caller.WATCH_AFTER_S)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), WhileCallerWaits(Line().receive):
        await fail()


async def test_nothing_is_left_behind() -> None:
    before = asyncio.all_tasks()
    with WhileCallerWaits(Line().receive):
        await asyncio.sleep(2 * caller.WATCH_AFTER_S)
    with contextlib.suppress(CallerGone):
        await asyncio.wait_for(work(Line(HANG_UP)), 1)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
