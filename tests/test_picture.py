"""Pictures from strangers: a right answer or a named error, within bounds of time and memory."""

import csv
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from models.picture import (
    PictureError,
    PictureLimits,
    PictureTooLarge,
    PictureUnreadable,
    PictureUnsupported,
    encoded_picture,
    open_picture,
    oriented,
    picture_format,
    to_mode,
)

LIMITS = PictureLimits()
FORMATS = ("JPEG", "PNG", "WEBP")
# Pillow refuses what these say beside their pixels; here it never sees it.
DAMAGED_METADATA = ("pil__png_decompression_dos.png", "pil__unknown_compression_method.png")
every_format = pytest.mark.parametrize("kind", FORMATS)


def noise(width: int = 16, height: int = 12, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(png: bytes, chunks: bytes) -> bytes:
    """The PNG with `chunks` before its pixels."""
    at = png.index(b"IDAT") - 4
    return png[:at] + chunks + png[at:]


def with_segments(jpeg: bytes, segments: bytes) -> bytes:
    """The JPEG with `segments` at its beginning."""
    return jpeg[:2] + segments + jpeg[2:]


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def refusal(data: bytes) -> PictureError:
    with pytest.raises(PictureError) as caught:
        open_picture(data, LIMITS)
    return caught.value


def manifest(real_data: Path) -> list[dict[str, str]]:
    with (real_data / "images" / "MANIFEST.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# Real pictures


@pytest.mark.filterwarnings("ignore::UserWarning")  # by Pillow, of the pictures read to compare
def test_every_real_picture_is_right_or_refused_by_name(real_data: Path) -> None:
    rows, folder = manifest(real_data), real_data / "images"
    answers = {row["file"]: answer((folder / row["file"]).read_bytes()) for row in rows}
    assert len(answers) == 94
    refused = {name: got for name, got in answers.items() if isinstance(got, PictureError)}
    for row in rows:
        name, got = row["file"], answers[row["file"]]
        if row["pil_format"] not in FORMATS and not name.endswith(".png"):
            assert isinstance(got, PictureUnsupported), name
        elif row["pillow13_load"] != "ok":
            assert name in refused or name in DAMAGED_METADATA, name
        elif name in refused:
            assert row["tag"].endswith("damaged") or "animated" in str(got), name
        else:
            with Image.open(folder / name, formats=FORMATS) as plain:
                assert np.array_equal(np.asarray(got), np.asarray(plain)), name
    assert len(answers) - len(refused) >= 55


def answer(data: bytes) -> Image.Image | PictureError:
    try:
        image = open_picture(data, LIMITS)
    except PictureError as error:
        return error
    header = encoded_picture(data, LIMITS).header
    assert (header.width, header.height) == image.size
    return image


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_leaving_metadata_out_changes_no_pixel_of_a_photograph(real_data: Path) -> None:
    for path in sorted((real_data / "hymenoptera" / "val").rglob("*.jpg"))[::4]:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as plain:
            turned = ImageOps.exif_transpose(plain)
        assert np.array_equal(oriented(open_picture(data, LIMITS)), turned), path.name


MEASURE = """
import json, resource, sys, time
from models.picture import PictureError
from models.preprocessing import Preprocessing

steps = [
    {"step": "decode"}, {"step": "orient"}, {"step": "color", "mode": "RGB"},
    {"step": "resize", "size": 256}, {"step": "crop", "size": [224, 224]},
]
ours = Preprocessing(steps=steps)

def resident_peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

for path in sys.argv[1:]:
    with open(path, "rb") as file:
        data = file.read()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, began = resident_peak(), time.process_time()
    try:
        answer = list(ours.picture(data).shape)
    except PictureError as error:
        answer = f"{type(error).__name__}: {error}"
    cost = {"file": path, "answer": answer, "seconds": time.process_time() - began}
    print(json.dumps(cost | {"mebibytes": resident_peak() - before}))
"""


def costs(files: list[Path]) -> list[dict[str, float | str]]:
    """Processor seconds and additional memory of each file, measured in a process of its own."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, *map(str, files)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Bombs


def progressive_with_scans(side: int, num_scans: int) -> bytes:
    """Each scan is 42 bytes and makes the decoder visit every pixel."""
    data = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * num_scans + data[-2:]


def webp_canvas(width: int, height: int) -> bytes:
    """A canvas of this size around a small picture; libwebp takes memory for the canvas."""
    small = encoded(noise(), "WEBP")[12:]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides + small
    return b"RIFF" + struct.pack("<I", len(body)) + body


def orientation_last(num_entries: int) -> bytes:
    """EXIF whose directory is as long as it can be."""
    tags = [tag for tag in range(num_entries + 1) if tag != 0x0112]
    entries = [struct.pack("<HHLL", tag, 7, 4, 8) for tag in tags[:num_entries]]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", num_entries) + b"".join(entries)


JPEG, PNG = encoded(noise(8, 8), "JPEG"), encoded(noise(8, 8), "PNG")
BOMBS: dict[str, Callable[[], bytes]] = {
    "9000x9000 of one bit": lambda: encoded(Image.new("1", (9000, 9000)), "PNG"),
    "13000x13000 of one bit": lambda: encoded(Image.new("1", (13000, 13000)), "PNG"),
    "14000x14000 of one bit": lambda: encoded(Image.new("1", (14000, 14000)), "PNG"),
    "two billion a side": lambda: PNG[:16] + b"\x7f\xff\xff\xff" * 2 + PNG[24:],
    "two headers": lambda: with_chunks(PNG, chunk(b"IHDR", PNG[16:29])),
    "compressed text": lambda: with_chunks(
        PNG, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))) * 20
    ),
    "compressed colour profile": lambda: with_chunks(
        PNG, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    ),
    "unknown chunks": lambda: with_chunks(PNG, chunk(b"abCd") * 850_000),
    "empty pixel chunks": lambda: with_chunks(PNG, chunk(b"IDAT") * 850_000),
    "pixels without end": lambda: with_chunks(
        PNG, chunk(b"IDAT", zlib.compress(bytes(100_000_000)))
    ),
    "a JPEG 65500 pixels wide": lambda: JPEG.replace(b"\0\x08\0\x08\x03", b"\xff\xdc\xff\xdc\x03"),
    "a thousand scans": lambda: progressive_with_scans(5000, 1000),
    "a hundred scans": lambda: progressive_with_scans(5000, 100),
    "empty segments": lambda: with_segments(JPEG, b"\xff\xe5\0\x02" * 2_500_000),
    "empty comments": lambda: with_segments(JPEG, b"\xff\xfe\0\x02" * 2_500_000),
    "fill bytes": lambda: with_segments(JPEG, b"\xff" * 10_000_000),
    "restarts": lambda: with_segments(JPEG, b"\xff\xd0" * 5_000_000),
    "a WebP canvas": lambda: webp_canvas(16384, 16384),
    "a WebP canvas within the sides": lambda: webp_canvas(8192, 3000),
    "EXIF of 65535 entries": lambda: with_chunks(PNG, chunk(b"eXIf", orientation_last(65535))),
    "EXIF of 65535 entries, WebP": lambda: encoded(noise(), "WEBP", exif=orientation_last(65535)),
    "EXIF in ten segments": lambda: with_segments(
        JPEG, (b"\xff\xe1\xff\xf0Exif\0\0" + orientation_last(5460)[: 0xFFF0 - 8]) * 10
    ),
}
LARGEST: dict[str, Callable[[], bytes]] = {
    "RGBA": lambda: encoded(Image.new("RGBA", (5000, 5000)), "PNG", exif=exif_of(6)),
    "palette": lambda: encoded(Image.new("P", (5000, 5000)), "PNG", transparency=b"\0" * 256),
    "16 bits": lambda: encoded(Image.new("I;16", (5000, 5000)), "PNG", exif=exif_of(6)),
    "CMYK": lambda: encoded(Image.new("CMYK", (5000, 5000)), "JPEG", exif=exif_of(6)),
    "progressive": lambda: encoded(
        Image.new("RGB", (5000, 5000)), "JPEG", progressive=True, subsampling=0, exif=exif_of(6)
    ),
    "progressive CMYK": lambda: encoded(
        Image.new("CMYK", (4500, 4500)), "JPEG", progressive=True, exif=exif_of(6)
    ),
    "WebP": lambda: encoded(Image.new("RGBA", (3900, 4000)), "WEBP", method=0, exif=exif_of(6)),
}


def assert_cheap(files: list[Path]) -> list[dict[str, float | str]]:
    measured = costs(files)
    for cost in measured:
        assert cost["seconds"] < 2, cost
        assert cost["mebibytes"] < 256, cost
    return measured


def written(folder: Path, pictures: dict[str, Callable[[], bytes]]) -> list[Path]:
    for name, make in pictures.items():
        (folder / name).write_bytes(make())
    return [folder / name for name in pictures]


@pytest.mark.slow
def test_no_real_picture_and_no_bomb_costs_more_than_two_seconds_and_256_mib(
    real_data: Path, tmp_path: Path
) -> None:
    real = [real_data / "images" / row["file"] for row in manifest(real_data)]
    assert_cheap([*real, *written(tmp_path, BOMBS)])


@pytest.mark.slow
def test_nor_does_the_largest_picture_of_each_kind(tmp_path: Path) -> None:
    for cost in assert_cheap(written(tmp_path, LARGEST)):
        assert cost["answer"] == [3, 224, 224], cost


@pytest.mark.parametrize(
    ("data", "error", "sentence"),
    [
        (b"", PictureUnreadable, "0 bytes"),
        (b"GIF89a" + bytes(50), PictureUnsupported, "not a JPEG, PNG or WebP"),
        (b"BM" + bytes(50), PictureUnsupported, "not a JPEG, PNG or WebP"),
        (b"\xff\xd8\xff", PictureUnreadable, "header of the JPEG"),
        (b"\x89PNG\r\n\x1a\n", PictureUnreadable, "header of the PNG"),
        (b"RIFF\0\0\0\0WEBP", PictureUnreadable, "header of the WEBP"),
        (PNG[:16] + bytes(8) + PNG[24:], PictureUnreadable, "0x0 pixels; it has no content"),
        (bytes(LIMITS.max_bytes + 1), PictureTooLarge, "the limit is 10485760 bytes"),
        (BOMBS["9000x9000 of one bit"](), PictureTooLarge, "8192 pixels a side"),
        (BOMBS["a hundred scans"](), PictureTooLarge, "scans of 5000x5000 pixels"),
        (BOMBS["a WebP canvas within the sides"](), PictureTooLarge, "bytes to decode"),
        (webp_canvas(64, 64), PictureUnreadable, "damaged"),
        (with_segments(JPEG, b"\xff\xe5\0\x02" * 10_000), PictureUnreadable, "10000 segments"),
        (with_chunks(PNG, chunk(b"abCd") * 10_000), PictureUnreadable, "10000 chunks"),
        (webp_canvas(8, 8) + b"abcd\0\0\0\0" * 10_000, PictureUnreadable, "10000 chunks"),
    ],
)
def test_a_refusal_names_the_limit_or_the_fault(
    data: bytes, error: type[PictureError], sentence: str
) -> None:
    refused = refusal(data)
    assert type(refused) is error
    assert sentence in str(refused)


def test_limits_are_where_they_say() -> None:
    data = encoded(noise(20, 10), "PNG")
    for limits in (
        PictureLimits(max_bytes=len(data), max_pixels=200, max_side=20),
        PictureLimits(max_memory_bytes=200 * 8, max_pixel_visits=200),
    ):
        assert open_picture(data, limits).size == (20, 10)
    for field, value in [
        ("max_bytes", len(data) - 1),
        ("max_pixels", 199),
        ("max_side", 19),
        ("max_memory_bytes", 200 * 8 - 1),
        ("max_pixel_visits", 199),
    ]:
        with pytest.raises(PictureTooLarge, match=str(value)):
            open_picture(data, PictureLimits(**{field: value}))


# Kinds of pictures


@every_format
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_exif_transpose_turns(kind: str, orientation: int) -> None:
    data = encoded(noise(), kind, exif=exif_of(orientation))
    with Image.open(io.BytesIO(data), formats=[kind]) as plain:
        wanted = ImageOps.exif_transpose(plain)
        assert np.array_equal(oriented(plain), wanted)
    assert np.array_equal(oriented(open_picture(data, LIMITS)), wanted)


@every_format
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",
        b"Exif\0\0XX*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",  # turned 9 is no way
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\x06\0\0\0",  # a text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x01\0\x01\0\0\0\x06\0\0\0",  # a byte
    ],
)
def test_damaged_exif_leaves_the_picture_as_it_is(kind: str, exif: bytes) -> None:
    data = encoded(noise(), kind, exif=exif)
    image = open_picture(data, LIMITS)
    assert oriented(image) is image
    if kind == "PNG":  # of which Pillow reads the EXIF when it is asked for, not before
        with Image.open(io.BytesIO(data), formats=[kind]) as plain:
            assert oriented(plain) is plain


@every_format
def test_only_exif_turns_a_picture(kind: str) -> None:
    """As in browsers; XMP, which repeats it in text, does not."""
    data = encoded(noise(), kind, xmp=b'<rdf:Description tiff:Orientation="6"/>')
    image = open_picture(data, LIMITS)
    assert oriented(image) is image


@pytest.mark.parametrize("value", [(3, 1, 6, 0), (4, 1, 0, 6)])
def test_exif_of_the_other_byte_order_in_short_and_long(value: tuple[int, ...]) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + struct.pack(">HLHH", *value)
    image = open_picture(encoded(noise(), "JPEG", exif=exif), LIMITS)
    assert oriented(image).size == (12, 16)


def test_sixteen_bits_keep_their_upper_byte() -> None:
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    data = encoded(Image.fromarray(grey), "PNG")
    assert open_picture(data, LIMITS).mode == "I;16"
    assert np.array_equal(to_mode(open_picture(data, LIMITS), "L"), grey >> 8)
    rgb = np.asarray(to_mode(open_picture(data, LIMITS), "RGB"))
    assert np.array_equal(rgb, np.repeat((grey >> 8)[..., None], 3, 2))
    assert np.array_equal(to_mode(Image.fromarray(grey.astype(np.int32)), "L"), grey >> 8)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I", "I;16", "F"]
)
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_every_mode_becomes_the_wanted_one(mode: str, wanted: str) -> None:
    image = noise(mode="L" if mode in ("PA", "I;16", "F") else "RGB").convert(
        {"PA": "LA"}.get(mode, mode)
    )
    assert to_mode(image, wanted).mode == wanted


def test_cmyk_and_palettes_with_transparency_show_their_colours() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    cmyk = to_mode(open_picture(encoded(red.convert("CMYK"), "JPEG"), LIMITS), "RGB")
    assert np.abs(np.asarray(cmyk).astype(int) - [255, 0, 0]).max() < 8
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    clear = encoded(palette, "PNG", transparency=bytes(256))
    for source in (open_picture(clear, LIMITS), Image.open(io.BytesIO(clear), formats=["PNG"])):
        assert to_mode(source, "RGB").getpixel((0, 0)) == (255, 0, 0)


def test_a_phones_two_jpegs_are_one_picture() -> None:
    first, second = noise(), Image.new("RGB", (16, 12))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert np.array_equal(open_picture(data, LIMITS), open_picture(encoded(first, "JPEG"), LIMITS))
    assert open_picture(data + b"\xff\xda" * 10_000, LIMITS).size == (16, 12)  # a film behind it


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused_and_a_single_frame_is_not(kind: str) -> None:
    frames = [noise(), Image.new("RGB", (16, 12))]
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "animated" in str(refusal(moving))
    still = encoded(frames[0], kind, save_all=True, lossless=True)
    assert np.array_equal(to_mode(open_picture(still, LIMITS), "RGB"), frames[0])


def test_bytes_decide_the_format_and_no_other_is_tried() -> None:
    assert [picture_format(encoded(noise(), kind)) for kind in FORMATS] == list(FORMATS)
    for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "TGA", "PCX", "SGI", "DDS"):
        assert isinstance(refusal(encoded(noise(), kind)), PictureUnsupported), kind


# Damage


SMALL = {
    "JPEG": encoded(noise(), "JPEG", exif=exif_of(6)),
    "JPEG, progressive": encoded(noise(), "JPEG", progressive=True, comment=b"hello"),
    "PNG": encoded(noise(mode="P"), "PNG", exif=exif_of(6), transparency=bytes(9)),
    "PNG, 16 bits": encoded(Image.fromarray(np.arange(99, dtype=np.uint16)[None] * 500), "PNG"),
    "WEBP": encoded(noise(), "WEBP", exif=exif_of(6)),
    "WEBP, lossless": encoded(noise(mode="RGBA"), "WEBP", lossless=True),
}


def outcome(data: bytes) -> Image.Image | None:
    """The picture, upright and in colour, or None where it is refused; no other error passes."""
    try:
        return to_mode(oriented(open_picture(data, LIMITS)), "RGB")
    except PictureError:
        return None


@pytest.mark.parametrize("name", SMALL)
def test_truncated_at_every_byte(name: str) -> None:
    data = SMALL[name]
    whole = np.asarray(outcome(data))
    for length in range(len(data)):
        image = outcome(data[:length])
        # Only what lies behind the last pixel may be missing.
        nearly = length > len(data) - 32
        assert image is None or (nearly and np.array_equal(image, whole)), length


@given(
    st.sampled_from(sorted(SMALL)),
    st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=6), st.booleans()), max_size=6),
)
@settings(max_examples=500, deadline=None)
def test_a_changed_file_raises_nothing_but_a_picture_error(
    name: str, changes: list[tuple[int, bytes, bool]]
) -> None:
    data = bytearray(SMALL[name])
    for place, patch, replaces in changes:
        at = place % len(data)
        data[at : at + (len(patch) if replaces else 0)] = patch
    outcome(bytes(data))


@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF????WEBP"]), st.binary())
@settings(max_examples=300, deadline=None)
def test_anything_behind_the_first_bytes_raises_nothing_but_a_picture_error(
    magic: bytes, rest: bytes
) -> None:
    outcome(magic + rest)


@given(st.integers(0, 65535), st.lists(st.binary(min_size=1, max_size=12), max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_exif_leaves_a_readable_picture(offset: int, parts: list[bytes]) -> None:
    exif = b"Exif\0\0II*\0" + struct.pack("<I", offset % 64) + b"".join(parts)
    for kind in FORMATS:
        assert outcome(encoded(noise(), kind, exif=exif)) is not None


def test_threads_decode_at_once() -> None:
    wanted = {name: np.asarray(outcome(data)) for name, data in SMALL.items()}
    jobs = [name for name in SMALL for _ in range(40)]
    with ThreadPoolExecutor(8) as threads:
        images = threads.map(lambda name: outcome(SMALL[name]), jobs)
        for name, image in zip(jobs, images, strict=True):
            assert np.array_equal(np.asarray(image), wanted[name])
