"""JPEGs that a device decodes: the same pictures within a few levels, in the right order.

What decodes here is torchvision's decoder on a processor, in the place of nVidia's; the device is
`LateStreams` of `tests/test_pipeline.py`. On a real GPU both are real.
"""

import io
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import LateStreams, recorder
from torch import Tensor

from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher
from app.engine.decoding import Decoder
from app.engine.device_decoding import (
    MOST_PIXELS,
    Decode,
    DeviceReader,
    Mode,
    as_jpeg,
    measure_drift,
    nvjpeg,
)
from app.engine.loading import load_version, with_drift
from app.engine.pictures import Pictures
from app.engine.pipeline import Accelerator
from app.engine.predictor import Predictor
from app.main import build_engine
from app.settings import Settings
from models import checkpoint, networks
from models.device import DeviceUnavailable
from models.device_picture import is_possible, picture_on_device
from models.manifest import Manifest, NetworkSpec
from models.picture import EncodedPicture, PictureError, PictureLimits, encoded_picture
from models.preprocessing import Preprocessing
from models.store import ModelStore

pytestmark = pytest.mark.anyio

CPU = torch.device("cpu")
LIMITS = PictureLimits()
STEPS = [
    {"step": "decode"},
    {"step": "orient"},
    {"step": "color", "mode": "RGB"},
    {"step": "resize", "size": 40},
    {"step": "crop", "size": [32, 32]},
    {"step": "scale"},
]
PREPROCESSING = Preprocessing(steps=STEPS)


def photograph(seed: int, size: tuple[int, int] = (120, 90), **options: object) -> bytes:
    """Something smooth, as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(photograph(seed))).save(file, "PNG")
    return file.getvalue()


class OnProcessor:
    """As nvJPEG: all of them or an error; counts how many it was given at once."""

    def __init__(self) -> None:
        import torchvision  # noqa: F401

        self.given: list[int] = []

    def __call__(
        self, encoded: Sequence[Tensor], mode: Mode, device: torch.device
    ) -> Sequence[Tensor]:
        self.given.append(len(encoded))
        number = {"L": 1, "RGB": 3}[mode]
        decode = torch.ops.image.decode_jpeg
        return [decode(one, number, False).to(device) for one in encoded]


def decoder(decode: Decode | None) -> Decoder:
    return Decoder(
        num_threads=2, limits=LIMITS, max_pixels_in_flight=1 << 22, max_waiting=64, on_device=decode
    )


def encoded(*pictures: bytes) -> list[EncodedPicture]:
    return [encoded_picture(data, LIMITS) for data in pictures]


def reader(decode: Decode, preprocessing: Preprocessing = PREPROCESSING) -> DeviceReader:
    found = decoder(decode).device_reader(preprocessing)
    assert found is not None
    return found


def differences(one: Tensor, other: Tensor) -> Tensor:
    return (one.int() - other.int()).abs()


# The steps


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (90, 160), (33, 33), (20, 400)])
def test_the_steps_do_what_pillow_does(interpolation: str, size: tuple[int, int]) -> None:
    steps = [dict(step) for step in STEPS]
    steps[3]["interpolation"] = interpolation
    preprocessing = Preprocessing(steps=steps)
    image = Image.open(io.BytesIO(photograph(1, size)))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = picture_on_device(pixels, 1, preprocessing, LIMITS)
    expected = preprocessing.picture(image)
    assert found.shape == expected.shape == preprocessing.raw_shape
    assert differences(found, expected).max() <= 2


def test_real_photographs_come_out_alike(real_data: Path) -> None:
    steps = [{**step, "size": 232} if step["step"] == "resize" else step for step in STEPS]
    steps[4] = {"step": "crop", "size": [224, 224]}
    preprocessing = Preprocessing(steps=steps)
    for path in sorted((real_data / "hymenoptera" / "val" / "ants").iterdir())[:8]:
        image = Image.open(path).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        found = picture_on_device(pixels, 1, preprocessing, LIMITS)
        apart = differences(found, preprocessing.picture(image)).float()
        assert apart.mean() < 0.5
        assert apart.max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photograph(2, (90, 60), exif=exif)
    (found,) = reader(OnProcessor()).read_on(CPU, encoded(data))
    assert isinstance(found, Tensor)
    assert differences(found[0], PREPROCESSING.picture(data)).max() <= 4
    upright = PREPROCESSING.picture(photograph(2, (90, 60)))
    assert (differences(found[0], upright).float().mean() > 10) == (orientation != 1)


def test_a_crop_beyond_the_picture_is_black_there() -> None:
    steps = [{"step": "decode"}, {"step": "color", "mode": "L"}, {"step": "crop", "size": [50, 41]}]
    preprocessing = Preprocessing(steps=steps)
    image = Image.fromarray(np.full((30, 60), 200, dtype=np.uint8))
    pixels = torch.from_numpy(np.array(image)).unsqueeze(0)
    found = picture_on_device(pixels, 1, preprocessing, LIMITS)
    assert torch.equal(found, preprocessing.picture(image))


def test_what_pillow_alone_can_do_stays_with_it() -> None:
    boxes = [
        {**step, "interpolation": "box"} if step["step"] == "resize" else step for step in STEPS
    ]
    assert not is_possible(Preprocessing(steps=boxes))
    assert not is_possible(Preprocessing(steps=[{"step": "tensor", "shape": [3]}]))
    assert decoder(OnProcessor()).device_reader(Preprocessing(steps=boxes)) is None
    assert decoder(None).device_reader(PREPROCESSING) is None


# Which pictures


def test_only_jpegs_that_every_decoder_reads_are_plain() -> None:
    grey = io.BytesIO()
    Image.new("L", (9, 9)).save(grey, "JPEG")
    inks = io.BytesIO()
    Image.new("CMYK", (9, 9)).save(inks, "JPEG")
    plain = photograph(0)
    adobe = plain[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + plain[2:]
    kinds = {
        "plain": plain,
        "grey": grey.getvalue(),
        "inks": inks.getvalue(),
        "progressive": photograph(0, progressive=True),
        "without its end": plain[:-2],
        "with something behind it": plain + b"more",
        "of named colours": adobe,
        "png": png(0),
    }
    found = {name for name, data in kinds.items() if encoded(data)[0].header.is_plain}
    assert found == {"plain", "grey"}


def test_every_picture_has_its_own_row() -> None:
    decode = OnProcessor()
    pictures = [
        photograph(0),
        png(1),
        photograph(2, (64, 200)),
        photograph(3, progressive=True),
        photograph(4)[:-500],
        photograph(5),
    ]
    rows = reader(decode).read(encoded(*pictures), Accelerator(CPU, LateStreams()))
    assert decode.given == [3], "the plain ones together, the others on the processor"
    for place in (0, 1, 2, 3, 5):
        row = rows[place]
        assert isinstance(row, Tensor)
        assert row.dtype is torch.uint8
        assert differences(row[0], PREPROCESSING.picture(pictures[place])).max() <= 4, place
    assert isinstance(rows[4], PictureError)
    for unreadable in (b"no picture", photograph(4)[:500]):
        with pytest.raises(PictureError):
            encoded(unreadable)


def test_where_the_decoder_fails_pillow_says_which_it_was() -> None:
    def fails(*_: object) -> Sequence[Tensor]:
        raise RuntimeError("Error in nvJPEG: 3")

    pictures = [photograph(0), photograph(1)]
    for row, data in zip(reader(fails).read_on(CPU, encoded(*pictures)), pictures, strict=True):
        assert isinstance(row, Tensor)
        assert torch.equal(row[0], PREPROCESSING.picture(data))


def test_memory_that_runs_out_is_for_who_asked() -> None:
    def fails(*_: object) -> Sequence[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        reader(fails).read_on(CPU, encoded(photograph(0)))


def test_large_ones_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.device_decoding.MOST_PIXELS", 25_000)
    assert MOST_PIXELS > 25_000
    decode = OnProcessor()
    reader(decode).read_on(CPU, encoded(*(photograph(seed) for seed in range(5))))
    assert decode.given == [2, 2, 1]


def test_a_picture_that_would_become_too_large_is_told_as_such() -> None:
    limits = PictureLimits(max_pixels=20_000)
    thin = Decoder(
        num_threads=1, limits=limits, max_pixels_in_flight=1, max_waiting=1, on_device=OnProcessor()
    ).device_reader(PREPROCESSING)
    assert thin is not None
    (row,) = thin.read_on(CPU, encoded(photograph(0, (2, 2000))))
    assert isinstance(row, PictureError)
    assert "would become" in str(row)


# Through the engine


@pytest.fixture
def colours(tmp_path: Path) -> ModelStore:
    """A store with one small network for photographs."""
    store = ModelStore(tmp_path / "models")
    options = {"channels": 3, "size": 32, "num_classes": 10, "width": 4}
    torch.manual_seed(0)
    network = networks.build("cnn", options).eval()
    manifest = Manifest(
        network=NetworkSpec(name="cnn", options=options),
        preprocessing=PREPROCESSING,
        labels=tuple("0123456789"),
    )
    golden = torch.stack([PREPROCESSING.picture(photograph(seed)) for seed in range(8)])
    store.publish("colours", lambda folder: checkpoint.save(folder, network, manifest, golden))
    return store


@pytest.fixture(params=[0, 1, 2])
async def batcher(request: pytest.FixtureRequest) -> AsyncIterator[Batcher]:
    batcher = Batcher(Accelerator(CPU, LateStreams(request.param), recorder))
    batcher.start()
    yield batcher
    await batcher.stop(5)


async def test_answers_are_those_of_the_processor_within_the_drift(
    colours: ModelStore, batcher: Batcher
) -> None:
    decode = OnProcessor()
    loaded = load_version(colours.resolve("colours"), CPU)
    predictor = Predictor(loaded, batcher, decoder(decode), LaneOptions(max_batch_items=4))
    pictures = [photograph(seed) for seed in range(7)]
    deadline = time.monotonic() + 60
    rows = await predictor.rows_of(pictures, deadline)
    assert isinstance(rows, Pictures)
    answer = await predictor.predict(rows, deadline)
    exact = await predictor.predict(await predictor.decode(pictures, deadline), deadline)
    torch.testing.assert_close(answer.probabilities, exact.probabilities, rtol=0, atol=0.02)
    assert not torch.equal(answer.logits, exact.logits), "nobody decoded otherwise"
    assert decode.given == [4, 3]


async def test_of_one_that_cannot_be_used_its_request_hears_alone(
    colours: ModelStore, batcher: Batcher
) -> None:
    loaded = load_version(colours.resolve("colours"), CPU)
    predictor = Predictor(loaded, batcher, decoder(OnProcessor()), LaneOptions())
    deadline = time.monotonic() + 60
    torn = photograph(1)[:900]
    alone = await predictor.rows_of([torn], deadline)
    with pytest.raises(PictureError):
        await predictor.predict(alone, deadline)
    second = await predictor.rows_of([photograph(0), torn], deadline)
    with pytest.raises(PictureError, match="picture 2 of 2"):
        await predictor.predict(second, deadline)
    assert predictor.is_idle


# The drift


def test_the_drift_is_that_of_the_decoder(colours: ModelStore) -> None:
    loaded = load_version(colours.resolve("colours"), CPU)
    pixels = loaded.reference.sent_bytes
    assert pixels is not None

    def drift(decode: Decode) -> tuple[int, float, str]:
        found = measure_drift(reader(decode), loaded.execution, pixels, PREPROCESSING, CPU)
        assert found.num_pictures == len(pixels)
        return found.most_levels, found.change, str(found)

    levels, change, words = drift(OnProcessor())
    assert 0 < levels <= 4
    assert 0 < change < 0.1
    assert f"{len(pixels)} of {len(pixels)} pictures have the same best label" in words

    def brighter(*arguments: object) -> Sequence[Tensor]:
        decoded = OnProcessor()(*arguments)  # type: ignore[arg-type]
        return [(one.int() + 60).clamp(0, 255).to(torch.uint8) for one in decoded]

    levels, much, _ = drift(brighter)
    assert levels >= 50
    assert much > change


def test_a_processor_that_is_asked_to_decode_like_a_device_says_what_to_do(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, device="cpu", decode_on="device")
    with pytest.raises(DeviceUnavailable, match="--decode-on host"):
        build_engine(settings)


def test_a_processor_has_no_drift(colours: ModelStore) -> None:
    loaded = load_version(colours.resolve("colours"), CPU)
    assert with_drift(loaded, decoder(OnProcessor())).drift is None


# On a GPU


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return torch.device("cuda", 0)


@pytest.mark.gpu
def test_a_gpu_decodes_what_pillow_decodes(device: torch.device, real_data: Path) -> None:
    paths = sorted((real_data / "hymenoptera" / "val" / "bees").iterdir())[:16]
    pictures = [path.read_bytes() for path in paths]
    rows = reader(nvjpeg()).read_on(device, encoded(*pictures))
    for row, data in zip(rows, pictures, strict=True):
        assert isinstance(row, Tensor)
        apart = differences(row[0].cpu(), PREPROCESSING.picture(data)).float()
        assert apart.mean() < 3


@pytest.mark.gpu
async def test_a_gpu_answers_encoded_pictures(device: torch.device, colours: ModelStore) -> None:
    batcher = Batcher(device)
    batcher.start()
    decodes = decoder(nvjpeg())
    loaded = with_drift(load_version(colours.resolve("colours"), device), decodes)
    assert loaded.drift is not None
    assert loaded.drift.num_same == loaded.drift.num_pictures
    predictor = Predictor(loaded, batcher, decodes, LaneOptions(max_batch_items=8))
    pictures = [photograph(seed) for seed in range(6)] + [png(7)]
    deadline = time.monotonic() + 60
    answer = await predictor.predict(await predictor.rows_of(pictures, deadline), deadline)
    exact = await predictor.predict(await predictor.decode(pictures, deadline), deadline)
    torch.testing.assert_close(answer.probabilities, exact.probabilities, rtol=0, atol=0.05)
    await batcher.stop(5)


def test_a_golden_picture_becomes_a_larger_jpeg() -> None:
    for channels in (1, 3):
        data = as_jpeg(torch.zeros((channels, 5, 7), dtype=torch.uint8))
        header = encoded_picture(data, LIMITS).header
        assert (header.width, header.height, header.is_plain) == (14, 10, True)
