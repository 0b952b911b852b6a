"""What a request costs the server as it grows: payloads, forms, pictures, answers, connections."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks import ours, payload
from benchmarks.growth.asking import Asked, asking
from benchmarks.growth.row import Curve, Measure, Row
from benchmarks.networks import PERCEPTRON, publish_network, publish_perceptrons
from benchmarks.payload import NUM_PIXELS, Payload
from benchmarks.record import tell
from benchmarks.resnet_scenario import EAGER
from benchmarks.rounds import Round, Sample
from benchmarks.session import front_layout
from benchmarks.stage import Stage, Timing
from benchmarks.verdict import Verdict, at_least, at_most
from models.store import ModelStore

VECTOR: Final = [{"step": "tensor", "shape": [NUM_PIXELS]}]
PICTURE: Final = [
    {"step": "decode"},
    {"step": "orient"},
    {"step": "color", "mode": "L"},
    {"step": "resize", "size": [28, 28]},
    {"step": "scale"},
]
CPU: Final = "server's CPU us a request"
ROWS: Final = (1, 4, 16, 64, 256, 1024)
FILLS: Final = {
    "plain": bytes(range(256)),
    "crlf": b"\r\n",
    "boundary": b"\r\n--" + payload.BOUNDARY[:-1].encode(),
}
NUM_CLASSES: Final = (10, 50, 250, 1000, 5000, 21_000)
ECHOED_BYTES: Final = 300
CONNECTIONS: Final = (1, 4, 16, 64, 128, 256)


def rows() -> list[Row]:
    """All of this file."""
    return [*_payload_rows(), *_form_rows(), *_answer_rows(), *_connection_rows()]


def _payload_rows() -> list[Row]:
    return [
        Row(
            "json",
            "numbers in a JSON body",
            [count * NUM_PIXELS for count in ROWS],
            [Curve("cpu_us", CPU, 1.0)],
            partial(_vectors, payload.v2_json, 1),
        ),
        Row(
            "binary",
            "bytes in a binary body",
            [count * NUM_PIXELS * 4 for count in (*ROWS, 4096, 16_384)],
            [Curve("cpu_us", CPU, 1.0)],
            partial(_vectors, payload.v2_binary, 4),
        ),
    ]


@contextmanager
def _vectors(
    encode: Callable[[str, np.ndarray], Payload], bytes_a_number: int, folder: Path
) -> Iterator[Measure]:
    publish_network(
        ModelStore(folder / "home" / "models"),
        "vectors",
        "mlp",
        {"inputs": NUM_PIXELS, "hidden": [8], "num_classes": 10},
        VECTOR,
    )

    def sent(size: int) -> Payload:
        count = size // bytes_a_number // NUM_PIXELS
        return encode("vectors", np.random.default_rng(0).random((count, NUM_PIXELS)).round(5))

    with asking(folder, folder / "home", ["vectors"]) as asked:
        yield _kept(asked, sent)


def _form_rows() -> list[Row]:
    return [
        Row(
            "multipart",
            "bytes of one file in a form",
            [1 << power for power in (16, 18, 20, 21, 22, 23)],  # pictures end at ten mebibytes
            [Curve(f"{name}_us", f"{CPU}, {name} bytes", 1.0) for name in FILLS],
            _forms,
            further=_worst_form,
        ),
        Row(
            "parts",
            "pictures in a form",
            [1, 4, 16, 64, 256, 1000],
            [Curve("cpu_us", CPU, 1.0)],
            partial(_pictures, lambda size: payload.multipart(PATH, *[png()] * size)),
        ),
        Row(
            "headers",
            "bytes of header fields",
            [512, 1024, 4096, 8192, 16384, 28672],
            [Curve("cpu_us", CPU, 1.0)],
            partial(
                _pictures,
                lambda size: payload.multipart(PATH, png()).with_headers(X_Filler="x" * size),
            ),
        ),
        Row(
            "pixels",
            "pixels of a JPEG",
            [300 * 224, 500 * 376, 800 * 600, 1280 * 960, 2048 * 1536, 3072 * 2304, 4096 * 3072],
            [Curve("cpu_us", CPU, 1.0)],
            partial(_pictures, lambda size: payload.raw_picture(PATH, photograph(size))),
        ),
    ]


PATH: Final = "/v1/models/pictures/predict"


@contextmanager
def _pictures(sent: Callable[[int], Payload], folder: Path) -> Iterator[Measure]:
    with _picture_server(folder) as asked:
        yield _kept(asked, sent)


@contextmanager
def _forms(folder: Path) -> Iterator[Measure]:
    """One picture, followed by bytes that its decoder does not read."""

    def measure(size: int) -> Sample:
        sample = {}
        for name, fill in FILLS.items():
            body = png() + (fill * (size // len(fill) + 1))[:size]
            sample[f"{name}_us"] = asked.cost(payload.multipart(PATH, body))["cpu_us"]
        return sample

    with _picture_server(folder) as asked:
        yield measure


def _worst_form(rounds: Sequence[Round]) -> list[Verdict]:
    def worst(samples: Mapping[str, Sample]) -> float:
        largest = samples[max(samples, key=int)]
        return max(largest[f"{name}_us"] for name in FILLS) / largest["plain_us"]

    return [at_most("bytes of one file in a form: worst bytes over plain ones", rounds, worst, 3.0)]


def _picture_server(folder: Path) -> AbstractContextManager[Asked]:
    options = {"channels": 1, "size": 28, "num_classes": 10, "width": 4}
    publish_network(ModelStore(folder / "home" / "models"), "pictures", "cnn", options, PICTURE)
    return asking(folder, folder / "home", ["pictures"])


def _answer_rows() -> list[Row]:
    return [
        Row(
            "classes",
            "classes of a model, the best told",
            NUM_CLASSES,
            [Curve("cpu_us", CPU, 0.0)],
            _classes,
        ),
        Row(
            "top-k",
            "classes told, of a thousand",
            [1, 4, 16, 64, 256, 1000],
            [Curve("cpu_us", CPU, 1.0)],
            _told,
        ),
    ]


@contextmanager
def _classes(folder: Path) -> Iterator[Measure]:
    for size in NUM_CLASSES:
        _publish_classes(folder, size)
    with asking(folder, folder / "home", [f"classes-{size}" for size in NUM_CLASSES]) as asked:
        yield _kept(asked, lambda size: _question(size, 1))


@contextmanager
def _told(folder: Path) -> Iterator[Measure]:
    _publish_classes(folder, 1000)
    with asking(folder, folder / "home", ["classes-1000"]) as asked:
        yield _kept(asked, lambda size: _question(1000, size))


def _publish_classes(folder: Path, count: int) -> None:
    publish_network(
        ModelStore(folder / "home" / "models"),
        f"classes-{count}",
        "mlp",
        {"inputs": NUM_PIXELS, "hidden": [8], "num_classes": count},
        VECTOR,
    )


def _question(num_classes: int, top_k: int) -> Payload:
    body = f'{{"inputs":[{payload.row()}],"top_k":{top_k}}}'.encode()
    path = f"/v1/models/classes-{num_classes}/predict"
    return Payload("question", path, body, {"Content-Type": "application/json"})


def _connection_rows() -> list[Row]:
    return [
        Row(
            "concurrency",
            "busy connections",
            CONNECTIONS,
            [
                Curve("p50_ms", "p50 in ms", 1.0, "wall"),
                Curve("cpu_us", "server's CPU us a request", 0.0),
            ],
            _connections,
            num_rounds=5,
            further=_throughput,
        )
    ]


@contextmanager
def _connections(folder: Path) -> Iterator[Measure]:
    publish_perceptrons(ModelStore(folder / "home" / "models"), [PERCEPTRON])
    # Long enough that opening the connections, some 0.4 ms each, is little of it.
    timing = Timing(warm_up_s=0.0, closed_s=3.0, open_s=0.0)
    with Stage(front_layout(), timing, folder, tell) as stage:
        server = stage.start(ours.server("ours", folder / "home", [PERCEPTRON], EAGER))
        sent = payload.v2_binary(PERCEPTRON, payload.row())
        echo = stage.start(ours.echo("echo", [ECHOED_BYTES]))
        echoed = Payload("echo", f"/echo/{ECHOED_BYTES}", sent.body, sent.headers)

        def measure(size: int) -> Sample:
            limit = stage.closed("echo", echo, echoed, size).measure()
            sample = stage.closed("ours", server, sent, size).measure()
            return {**sample, "echo_per_s": limit["rate_per_s"]}

        yield measure


def _throughput(rounds: Sequence[Round]) -> list[Verdict]:
    def held(samples: Mapping[str, Sample], figure: str) -> float:
        most = samples[max(samples, key=int)][figure]
        return most / max(sample[figure] for sample in samples.values())

    def over_echo(samples: Mapping[str, Sample]) -> float:
        return held(samples, "rate_per_s") / held(samples, "echo_per_s")

    # An echo loses as well: what many connections hold leaves the caches between their turns.
    what = "busy connections: share of the best requests/s kept at the most, over the echo's share"
    return [
        at_least(what, rounds, over_echo, 0.95),
        at_most("busy connections: coherency of the scalability law", rounds, coherency, 1e-4),
    ]


def coherency(samples: Mapping[str, Sample]) -> float:
    """Gunther's kappa: what every pair of connections costs each other, of one request's time.

    From `c / X(c) = (1 + sigma (c - 1) + kappa c (c - 1)) / lambda`, fitted in relative errors.
    """
    count = np.array([float(size) for size in samples])
    times = count / np.array([sample["rate_per_s"] for sample in samples.values()])
    terms = np.stack([np.ones_like(count), count - 1, count * (count - 1)], axis=1)
    found, *_ = np.linalg.lstsq(terms / times[:, None], np.ones_like(count), rcond=None)
    return float(found[2] / found[0])


def png() -> bytes:
    """A small picture, 28 pixels a side."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def photograph(num_pixels: int) -> bytes:
    """A JPEG of about so many pixels, four to three."""
    width = round((num_pixels * 4 / 3) ** 0.5)
    return payload.photograph(size=(width, num_pixels // width))


def _kept(asked: Asked, make: Callable[[int], Payload]) -> Measure:
    """Measures requests that are made once for each size."""
    made: dict[int, Any] = {}

    def measure(size: int) -> Sample:
        if size not in made:
            made[size] = make(size)
        return asked.cost(made[size])

    return measure
