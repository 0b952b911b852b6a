"""What is sent: one POST request, as the bytes that go over the wire and as a script for `wrk`."""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from benchmarks.system import HOST

NUM_PIXELS = 784
PICTURE_SIZE = (500, 375)
BOUNDARY = "pytorchlib-benchmark-boundary"


@dataclass(frozen=True, slots=True)
class Payload:
    """A POST request without its host.

    Attributes:
        name: for file names and tables.
        path: begins with `/`.
        headers: besides Host and Content-Length.
    """

    name: str
    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def message(self, port: int) -> bytes:
        """The whole request as HTTP/1.1 bytes."""
        fields = {"Host": f"{HOST}:{port}", **self.headers, "Content-Length": str(len(self.body))}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{key}: {text}" for key, text in fields.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body

    def with_headers(self, **headers: str) -> "Payload":
        """The same with further headers; `_` in a name stands for `-`."""
        added = {name.replace("_", "-"): text for name, text in headers.items()}
        return Payload(self.name, self.path, self.body, {**self.headers, **added})

    def write_lua(self, folder: Path) -> Path:
        """A script for `wrk` that sends this and prints its figures as one line of JSON."""
        body, script = folder / f"{self.name}.body", folder / f"{self.name}.lua"
        body.write_bytes(self.body)
        headers = "\n".join(
            f"wrk.headers[{json.dumps(name)}] = {json.dumps(text)}"
            for name, text in self.headers.items()
        )
        script.write_text(_LUA.format(body=json.dumps(os.fspath(body)), headers=headers))
        return script


_LUA = """wrk.method = "POST"
local file = assert(io.open({body}, "rb"))
wrk.body = file:read("*a")
file:close()
{headers}
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'FIGURES {{"num_requests":%d,"duration_us":%d,"p50_us":%.1f,"p90_us":%.1f,"p99_us":%.1f,' ..
    '"max_us":%.1f,"status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(90),
    latency:percentile(99), latency.max, errors.status, errors.connect, errors.read,
    errors.write, errors.timeout))
end
"""


def row(seed: int = 0) -> list[float]:
    """784 numbers from 0 to 1 with five decimals: about 6 KB as JSON."""
    return np.random.default_rng(seed).random(NUM_PIXELS).round(5).tolist()


def v2_json(model: str, numbers: ArrayLike) -> Payload:
    """One row, or rows `[n, ...]`, as JSON of the Open Inference Protocol."""
    rows = np.atleast_2d(numbers)
    data = rows.ravel().tolist()
    tensor = {"name": "input", "shape": list(rows.shape), "datatype": "FP32", "data": data}
    body = json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()
    path = f"/v2/models/{model}/infer"
    return Payload("v2-json", path, body, {"Content-Type": "application/json"})


def v2_binary(model: str, numbers: ArrayLike) -> Payload:
    """The same as a binary tensor, the answer wanted as one: what `tritonclient` sends."""
    rows = np.atleast_2d(numbers)
    data = rows.astype("<f4").tobytes()
    tensor = {
        "name": "input",
        "shape": list(rows.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(data)},
    }
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    text = json.dumps(document, separators=(",", ":")).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(text)),
    }
    return Payload("v2-binary", f"/v2/models/{model}/infer", text + data, headers)


def v2_pixels(model: str, pixels: np.ndarray) -> Payload:
    """Pictures as bytes, uint8 `[n, channels, height, width]`, and probabilities of the best."""
    data = pixels.tobytes()
    tensor = {
        "name": "pixels",
        "shape": list(pixels.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(data)},
    }
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    text = json.dumps({"inputs": [tensor], "outputs": [wanted]}, separators=(",", ":")).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(text)),
    }
    return Payload("v2-pixels", f"/v2/models/{model}/infer", text + data, headers)


def multipart(path: str, *pictures: bytes, field_name: str = "file") -> Payload:
    """Pictures as a browser's form sends them."""
    head = (
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
        f'name="{field_name}"; filename="picture.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    )
    parts = b"".join(head.encode() + picture + b"\r\n" for picture in pictures)
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    body = parts + f"--{BOUNDARY}--\r\n".encode()
    return Payload("multipart", path, body, {"Content-Type": content_type})


def raw_picture(path: str, picture: bytes) -> Payload:
    """A picture as the whole body."""
    return Payload("raw", path, picture, {"Content-Type": "image/jpeg"})


def photograph(seed: int = 0, size: tuple[int, int] = PICTURE_SIZE) -> bytes:
    """A JPEG whose spectrum falls with frequency, as a photograph's does.

    Args:
        size: width and height in pixels.
    """
    width, height = size
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = [_plane(random, frequency) for _ in range(3)]
    shared = planes[0]  # colours of a photograph go together
    pixels = np.stack([0.7 * shared + 0.3 * plane for plane in planes], axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=87)
    return file.getvalue()


def _plane(random: np.random.Generator, frequency: np.ndarray) -> np.ndarray:
    noise = np.fft.fft2(random.standard_normal(frequency.shape)) / frequency**1.1
    plane = np.fft.ifft2(noise).real
    return 128 + 45 * (plane - plane.mean()) / plane.std()
