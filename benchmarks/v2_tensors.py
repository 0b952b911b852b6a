"""What parsing a request and encoding its answer cost beside the least that could be done.

    python -m benchmarks.v2_tensors

The request of scenario P: 784 floats in, 10 out. The floor of JSON is `orjson.loads` and
`np.array(..., float32)`, which checks nothing; that of binary is `np.frombuffer`; that of the
answer is `orjson.dumps` of the same document, or joining its bytes. Every figure is the best of
many interleaved rounds, in microseconds.
"""

import platform
import time
from collections.abc import Callable

import numpy as np
import orjson
import torch

from app.api.v2_request import InferRequest, parse_request
from app.api.v2_response import encode_answer, select_outputs
from app.api.v2_tensors import Limits, NamedTensor
from app.engine.predictor import TensorSpec

NUM_ROUNDS = 200
CALLS_A_ROUND = 50
LIMITS = Limits()
SPEC = TensorSpec("input", "FP32", (784,))
LABELS = [str(digit) for digit in range(10)]
LOGITS = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
PRODUCED = {
    name: NamedTensor(name, "FP32", (1, 10), data)
    for name, data in (("logits", LOGITS), ("probabilities", LOGITS.softmax(1)))
}


def main() -> None:
    """Print one line per measured pair."""
    torch.set_num_threads(1)
    print("python", platform.python_version(), "torch", torch.__version__)
    pixels = np.random.default_rng(0).random(784, dtype=np.float32)
    for name, values in (
        ("JSON, 4 digits a number", np.round(pixels.astype(float), 4)),
        ("JSON, float32 as tritonclient sends it", pixels.astype(float)),
        ("JSON, zeros and ones", (pixels > 0.8).astype(int)),
    ):
        body = json_body(values.tolist())
        compare(f"parse {name} ({len(body)} bytes)", lambda body=body: floor_json(body), body, None)
    body, length = binary_body(pixels)
    compare(
        f"parse binary ({len(body)} bytes)",
        lambda: floor_binary(body, length),
        body,
        b"%d" % length,
    )
    for name, binary in (("JSON", False), ("binary", True)):
        floor = floor_joined if binary else floor_dumped
        report(f"encode {name}, 2 outputs of 10", floor, lambda binary=binary: encode(binary))


def json_body(values: list[float]) -> bytes:
    """As a client sends it: the tensor, flat, and the wish for one output."""
    tensor = {"name": "input", "shape": [1, 784], "datatype": "FP32", "data": values}
    return orjson.dumps({"inputs": [tensor], "outputs": [{"name": "probabilities"}]})


def binary_body(values: np.ndarray) -> tuple[bytes, int]:
    """The same, with raw bytes; and how many of it are JSON."""
    tensor = {
        "name": "input",
        "shape": [1, 784],
        "datatype": "FP32",
        "parameters": {"binary_data_size": values.nbytes},
    }
    text = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    return text + values.tobytes(), len(text)


def floor_json(body: bytes) -> torch.Tensor:
    """No check at all."""
    values = orjson.loads(body)["inputs"][0]["data"]
    return torch.from_numpy(np.array(values, dtype=np.float32))


def floor_binary(body: bytes, length: int) -> torch.Tensor:
    """No check at all, and a tensor that must not be written to."""
    orjson.loads(body[:length])
    return torch.from_numpy(np.frombuffer(bytearray(body[length:]), dtype=np.float32))


def floor_dumped() -> bytes:
    """The document as it is."""
    outputs = [
        {"name": one.name, "datatype": "FP32", "shape": [1, 10], "data": one.data.numpy()}
        for one in PRODUCED.values()
    ]
    document = {"model_name": "digits", "model_version": "1", "outputs": outputs}
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def floor_joined() -> bytes:
    """The document without data, and the bytes."""
    outputs = [
        {"name": one.name, "datatype": "FP32", "shape": [1, 10]} for one in PRODUCED.values()
    ]
    text = orjson.dumps({"model_name": "digits", "model_version": "1", "outputs": outputs})
    return b"".join([text, *(one.data.numpy() for one in PRODUCED.values())])


def encode(binary: bool) -> bytes:
    """What the route does after the prediction."""
    request = InferRequest(None, [], None, binary, 0, 0)
    return encode_answer("digits", "1", None, select_outputs(request, PRODUCED, LABELS)).body


def compare(name: str, floor: Callable[[], object], body: bytes, header: bytes | None) -> None:
    """Report parsing `body` beside its floor."""
    report(name, floor, lambda: parse_request(body, header, SPEC, LIMITS))


def report(name: str, floor: Callable[[], object], ours: Callable[[], object]) -> None:
    """Measure both by turns and print them."""
    best = {floor: float("inf"), ours: float("inf")}
    for _ in range(NUM_ROUNDS):
        for call in best:
            best[call] = min(best[call], microseconds(call))
    print(
        f"{name:58} floor {best[floor]:6.1f} us, ours {best[ours]:6.1f} us "
        f"(+{best[ours] - best[floor]:.1f})"
    )


def microseconds(call: Callable[[], object]) -> float:
    """One call's share of a round."""
    began = time.perf_counter()
    for _ in range(CALLS_A_ROUND):
        call()
    return (time.perf_counter() - began) / CALLS_A_ROUND * 1e6


if __name__ == "__main__":
    main()
