"""Pictures become tensors off the event loop, within a budget of pixels in flight."""

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from app.engine.crew import Crew
from app.engine.device_decoding import Decode, DeviceReader
from app.engine.device_thread import compute_with
from app.engine.pictures import CrewReader, Pictures, Reader
from app.errors import Overloaded, QueueFull, QueueTooSlow
from models.device_picture import is_possible
from models.picture import (
    FORMATS,
    EncodedPicture,
    PictureError,
    PictureLimits,
    encoded_picture,
    open_picture,
)
from models.preprocessing import Preprocessing
from models.resizing import Threads

# Below both, decoding costs less than handing it to a thread and back.
INLINE_BYTES = 4096
INLINE_PIXELS = 4096
# Up to both, pictures wait for their turn as they came. Larger ones take so long that nobody's
# forward shall wait for them, and looking at the headers of more would hold the event loop.
IN_TURN_PICTURES = 32
IN_TURN_PIXELS = 1 << 21
# For a device that decodes, which is quick enough.
ON_DEVICE_PIXELS = 1 << 24

Read: TypeAlias = Callable[[EncodedPicture, Preprocessing, Threads | None], Tensor]


class PixelBudget:
    """Pixels that may be decoded at one moment; those who do not fit wait, up to a deadline.

    Args:
        max_pixels: the budget; a single picture larger than it is admitted alone.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.in_flight = 0
        self._changed = threading.Condition()

    def acquire(self, pixels: int, deadline: float) -> int:
        """Wait until `pixels` fit; returns what must be released.

        Raises:
            Overloaded: they did not fit before `deadline` (of `time.monotonic`).
        """
        pixels = min(pixels, self.max_pixels)
        with self._changed:
            fits = self._changed.wait_for(
                lambda: self.in_flight + pixels <= self.max_pixels, deadline - time.monotonic()
            )
            if not fits:
                raise Overloaded(
                    f"{self.in_flight} pixels are being decoded already; send this again later",
                    retry_after_s=1.0,
                )
            self.in_flight += pixels
        return pixels

    def release(self, pixels: int) -> None:
        """Give back what `acquire` returned."""
        with self._changed:
            self.in_flight -= pixels
            self._changed.notify_all()


class Decoder:
    """Threads that decode, shared by all models.

    Args:
        num_threads: how many pictures are decoded at once.
        limits: of one picture.
        max_pixels_in_flight: over all threads.
        max_waiting: pictures that may wait for a thread.
        on_device: how devices decode; None where they do not.
    """

    def __init__(
        self,
        *,
        num_threads: int,
        limits: PictureLimits,
        max_pixels_in_flight: int,
        max_waiting: int,
        on_device: Decode | None = None,
    ) -> None:
        self.limits = limits
        self._on_device = on_device
        self.max_waiting = max_waiting
        self.waiting = 0
        self._budget = PixelBudget(max_pixels_in_flight)
        # Each computes alone: with helpers of their own they would take the device thread's cores.
        self._threads = ThreadPoolExecutor(
            num_threads, "decode", initializer=compute_with, initargs=(1,)
        )
        # Whoever computes decodes too, and has helpers of its own: it must not wait behind others.
        self._crew = Crew(num_threads)

    def in_turn(self, pictures: Sequence[bytes], reader: Reader) -> Pictures | None:
        """The pictures as rows that `reader` decodes in their turn; None where that is no good.

        Raises:
            models.picture.PictureError: of the first picture whose header says enough.
        """
        if len(pictures) > IN_TURN_PICTURES:
            return None
        most_pixels = ON_DEVICE_PIXELS if isinstance(reader, DeviceReader) else IN_TURN_PIXELS
        encoded: list[EncodedPicture] = []
        for index, data in enumerate(pictures):
            with _naming(index, len(pictures)):
                encoded.append(encoded_picture(data, self.limits))
            if encoded[-1].num_pixels > most_pixels:
                return None
        return None if all(map(_is_small, encoded)) else Pictures(encoded, reader)

    def at_once(
        self, pictures: Sequence[bytes], preprocessing: Preprocessing, *, finished: bool = True
    ) -> Tensor | None:
        """As `decode`, here and now; None for many pictures, or where one is too large."""
        if len(pictures) > IN_TURN_PICTURES:
            return None
        read = self._finished if finished else self._pixels
        rows = []
        for index, data in enumerate(pictures):
            with _naming(index, len(pictures)):
                small = self._if_small(data)
                if small is None:
                    return None
                rows.append(read(small, preprocessing, None))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def host_reader(self, preprocessing: Preprocessing) -> CrewReader:
        """What decodes where the processor computes."""
        finish = preprocessing.finisher(torch.device("cpu"))

        def rows(picture: EncodedPicture, threads: Threads | None) -> Tensor:
            return finish(self._pixels(picture, preprocessing, threads))

        return CrewReader(rows, preprocessing.input_shape, self._crew)

    def device_reader(self, preprocessing: Preprocessing) -> DeviceReader | None:
        """What lets a device decode; None where it does not, or cannot do these steps."""
        if self._on_device is None or not is_possible(preprocessing):
            return None

        def pixels(picture: EncodedPicture, threads: Threads | None) -> Tensor:
            return self._pixels(picture, preprocessing, threads)

        host = CrewReader(pixels, preprocessing.raw_shape, self._crew, torch.uint8)
        return DeviceReader(self._on_device, host, preprocessing, self.limits)

    async def decode(
        self,
        pictures: Sequence[bytes],
        preprocessing: Preprocessing,
        deadline: float,
        *,
        finished: bool = True,
    ) -> Tensor:
        """Every picture through `preprocessing`.

        Args:
            pictures: encoded, at least one.
            deadline: of `time.monotonic`, in seconds.
            finished: whether its tensor steps are done here too.

        Returns:
            float32 `[n, *input_shape]`; uint8 `[n, *raw_shape]` where it is not finished.

        Raises:
            models.picture.PictureError: of the first picture that cannot be used; with several
                pictures the sentence says which.
            QueueFull, Overloaded, QueueTooSlow: too much at once.
        """
        if self.waiting + len(pictures) > self.max_waiting:
            raise QueueFull(f"{self.waiting} pictures wait to be decoded", retry_after_s=1.0)
        self.waiting += len(pictures)
        read = self._finished if finished else self._pixels
        started: list[Tensor | asyncio.Future[Tensor]] = []
        try:
            for data in pictures:
                with _naming(len(started), len(pictures)):
                    started.append(self._start(data, preprocessing, deadline, read))
            tensors = []
            for index, one in enumerate(started):
                with _naming(index, len(pictures)):
                    tensors.append(one if isinstance(one, Tensor) else await one)
        finally:
            self.waiting -= len(pictures)
            for one in started:
                if not isinstance(one, Tensor):
                    one.cancel()  # of no effect on those that are done
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def warm_up(self) -> None:
        """Let a thread load Pillow's codecs, so that no request waits for them."""
        self._threads.submit(_load_codecs)

    def close(self) -> None:
        """Finish what is being decoded and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._crew.close()

    def _start(
        self, data: bytes, preprocessing: Preprocessing, deadline: float, read: Read
    ) -> "Tensor | asyncio.Future[Tensor]":
        small = self._if_small(data)
        if small is not None:
            return read(small, preprocessing, None)
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(
            self._threads, self._within_budget, data, preprocessing, deadline, read
        )

    def _if_small(self, data: bytes) -> EncodedPicture | None:
        if len(data) > INLINE_BYTES:
            return None
        picture = encoded_picture(data, self.limits)
        return picture if _is_small(picture) else None

    def _within_budget(
        self, data: bytes, preprocessing: Preprocessing, deadline: float, read: Read
    ) -> Tensor:
        if time.monotonic() > deadline:
            raise QueueTooSlow(
                "the request's time was up before its picture was decoded", retry_after_s=1.0
            )
        picture = encoded_picture(data, self.limits)
        taken = self._budget.acquire(picture.num_pixels, deadline)
        try:
            # Who is alone here may have all the cores; several at once fill them as they are.
            return read(picture, preprocessing, self._crew if self.waiting == 1 else None)
        finally:
            self._budget.release(taken)

    def _pixels(
        self,
        picture: EncodedPicture,
        preprocessing: Preprocessing,
        threads: Threads | None,
    ) -> Tensor:
        return preprocessing.picture(picture, self.limits, threads).unsqueeze(0)

    def _finished(
        self,
        picture: EncodedPicture,
        preprocessing: Preprocessing,
        threads: Threads | None,
    ) -> Tensor:
        return preprocessing.finish(self._pixels(picture, preprocessing, threads))


def _is_small(picture: EncodedPicture) -> bool:
    return len(picture.data) <= INLINE_BYTES and picture.num_pixels <= INLINE_PIXELS


def _load_codecs() -> None:
    for name in FORMATS:
        file = io.BytesIO()
        Image.new("L", (1, 1)).save(file, name)
        open_picture(file.getvalue(), PictureLimits())


@contextlib.contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Say which picture it was, where there are several."""
    try:
        yield
    except PictureError as error:
        if count == 1:
            raise
        raise type(error)(f"picture {index + 1} of {count}: {error}") from None
