"""JPEGs that the device decodes, many at once; only where that is asked for.

Another decoder rounds otherwise, and resizing in floats does too, so answers drift. How far is
measured for each version when it is loaded, on its own golden inputs as JPEGs.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app.engine.device_error import is_device_error, is_out_of_memory
from app.engine.execution import Execution
from app.engine.pictures import CrewReader
from app.engine.pipeline import Accelerator
from models.device import DeviceUnavailable
from models.device_picture import picture_on_device
from models.picture import EncodedPicture, PictureError, PictureLimits, encoded_picture
from models.preprocessing import Color, Preprocessing

log = logging.getLogger(__name__)

Mode: TypeAlias = Literal["L", "RGB"]
# JPEGs as uint8 `[n]` in host memory to uint8 `[C, H, W]` on the device; all of them or an error.
Decode: TypeAlias = Callable[[Sequence[Tensor], Mode, torch.device], Sequence[Tensor]]

# Pixels that are decoded at one moment: 100 MB as bytes.
MOST_PIXELS: Final = 1 << 25
QUALITY: Final = 90
# torchvision's `ImageReadMode`.
_READ_MODES: Final[dict[Mode, int]] = {"L": 1, "RGB": 3}


def nvjpeg() -> Decode:
    """nvJPEG by torchvision's operator, which takes several at once and waits for the device.

    Its Python function says that it will move to another package; the operator is the same.

    Raises:
        DeviceUnavailable: this torchvision has none.
    """
    import torchvision  # noqa: F401  (registers the operator)

    operator = getattr(torch.ops.image, "decode_jpegs_cuda", None)
    if operator is None:
        raise DeviceUnavailable("this build of torchvision cannot decode on a GPU")

    def decode(encoded: Sequence[Tensor], mode: Mode, device: torch.device) -> Sequence[Tensor]:
        decoded: list[Tensor] = operator(list(encoded), _READ_MODES[mode], device)
        return decoded

    return decode


class DeviceReader:
    """Decodes plain JPEGs on the device, and everything else on threads of the processor.

    Args:
        host: what decodes there, to bytes.
    """

    def __init__(
        self, decode: Decode, host: CrewReader, preprocessing: Preprocessing, limits: PictureLimits
    ) -> None:
        self.row_shape = preprocessing.raw_shape
        self.dtype = torch.uint8
        self._decode = decode
        self._host = host
        self._preprocessing = preprocessing
        self._limits = limits
        color = preprocessing.find(Color)
        self._mode: Mode = "RGB" if color is None else color.mode

    def read(
        self, pictures: Sequence[EncodedPicture], accelerator: Accelerator | None
    ) -> list[Tensor | Exception]:
        """On the device where there is one; on its compute stream, as the caller sees to."""
        if accelerator is None:
            return self._host.read(pictures, None)
        return self.read_on(accelerator.device, pictures)

    def read_on(
        self, device: torch.device, pictures: Sequence[EncodedPicture]
    ) -> list[Tensor | Exception]:
        """The same on the current stream of `device`."""
        others = [one for one in pictures if not one.header.is_plain]
        elsewhere = iter(self._host.read(others, None) if others else [])
        here = self._decoded([one for one in pictures if one.header.is_plain], device)
        return [next(here if one.header.is_plain else elsewhere) for one in pictures]

    def _decoded(
        self, pictures: Sequence[EncodedPicture], device: torch.device
    ) -> Iterator[Tensor | Exception]:
        for some in _in_pieces(pictures):
            encoded = [
                torch.frombuffer(bytearray(one.header.essence(one.data)), dtype=torch.uint8)
                for one in some
            ]
            try:
                decoded = self._decode(encoded, self._mode, device)
            except RuntimeError as error:
                if is_device_error(error) or is_out_of_memory(error):
                    raise
                # One of them is damaged, and the decoder does not say which: Pillow does.
                yield from self._host.read(some, None)
                continue
            for picture, one in zip(decoded, some, strict=True):
                yield self._prepared(picture, one.header.orientation)

    def _prepared(self, picture: Tensor, orientation: int) -> Tensor | Exception:
        try:
            row = picture_on_device(picture, orientation, self._preprocessing, self._limits)
        except PictureError as error:
            return error
        return row.unsqueeze(0)


def _in_pieces(pictures: Sequence[EncodedPicture]) -> Iterator[list[EncodedPicture]]:
    """As many at once as fit into `MOST_PIXELS`; a larger one alone."""
    some: list[EncodedPicture] = []
    num_pixels = 0
    for one in pictures:
        if some and num_pixels + one.num_pixels > MOST_PIXELS:
            yield some
            some, num_pixels = [], 0
        some.append(one)
        num_pixels += one.num_pixels
    if some:
        yield some


@dataclass(frozen=True, slots=True)
class DecodingDrift:
    """What decoding on the device changes for one version.

    Attributes:
        num_pictures: golden inputs, twice as large and as JPEGs, that were decoded both ways.
        mean_levels, most_levels: difference of a pixel, of 255, after cropping.
        change: of a logit, relative to the largest.
        num_same: pictures whose best label is the same.
    """

    num_pictures: int
    mean_levels: float
    most_levels: int
    change: float
    num_same: int

    def __str__(self) -> str:
        return (
            f"pixels differ by {self.mean_levels:.2g} of 255 on average and {self.most_levels} at "
            f"most, logits by {self.change:.2g} of the largest, and {self.num_same} of "
            f"{self.num_pictures} pictures have the same best label"
        )


def measure_drift(
    reader: DeviceReader,
    execution: Execution,
    pixels: Tensor,
    preprocessing: Preprocessing,
    device: torch.device,
) -> DecodingDrift:
    """Decode the same pictures both ways and let the network answer both.

    Args:
        pixels: uint8 `[n, C, H, W]` in host memory.

    Raises:
        RuntimeError: a picture could not be decoded.
    """
    pictures = [encoded_picture(as_jpeg(picture), PictureLimits()) for picture in pixels]
    here = _all_of(reader.read_on(device, pictures)).to(device)
    there = _all_of(reader.read(pictures, None)).to(device)
    finish = preprocessing.finisher(device)
    with torch.inference_mode():
        found, expected = execution(finish(here)), execution(finish(there))
    levels = (here.int() - there.int()).abs()
    largest = expected.abs().max().clamp_min(1e-6)
    return DecodingDrift(
        num_pictures=len(pictures),
        mean_levels=float(levels.float().mean()),
        most_levels=int(levels.max()),
        change=float((found - expected).abs().max() / largest),
        num_same=int((found.argmax(1) == expected.argmax(1)).sum()),
    )


def as_jpeg(picture: Tensor) -> bytes:
    """uint8 `[C, H, W]` twice as large, so that it has to be resized again, and encoded."""
    pixels = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    larger = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
    larger.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _all_of(rows: Sequence[Tensor | Exception]) -> Tensor:
    for row in rows:
        if isinstance(row, Exception):
            raise RuntimeError("a golden input could not be decoded") from row
    return torch.cat([row for row in rows if isinstance(row, Tensor)])
