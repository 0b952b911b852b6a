"""The limit of the computation: decode, preprocess and forward in a bare loop, with no server.

`python -m benchmarks.in_process STORE MODEL BODY PORT PRECISION` listens on PORT and takes
connections one after the other. PRECISION is that of a server's setting; `auto` compiles as well.
A line of JSON `{"seconds": 2.0, "batch": 1}` runs the loop that long on what is in the file BODY,
and is answered by a line with the figures.
"""

import io
import json
import socketserver
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import orjson
import torch

from app.engine.compiling import compiled
from app.engine.execution import Wanted
from app.engine.loading import LoadedVersion, load_version
from benchmarks.pace import spans_of, told
from benchmarks.record import tell
from benchmarks.system import HOST
from models.device import thread_count
from models.store import ModelStore

Step = Callable[[int], None]
SIZES = (1, 8)
NPY = b"\x93NUMPY"


def step_of(loaded: LoadedVersion, body: bytes) -> Step:
    """What is done for a batch of so many requests with this body: a JPEG, V2 JSON, or an array.

    An array (`.npy`, float32 `[1, *input_shape]`) needs nothing before the network.
    """
    preprocessing = loaded.manifest.preprocessing
    network = loaded.execution

    tensor = torch.from_numpy(np.load(io.BytesIO(body))) if body.startswith(NPY) else None

    def rows(batch: int) -> torch.Tensor:
        if tensor is not None:
            return torch.cat([tensor] * batch)
        if preprocessing.accepts_pictures:
            return torch.stack([preprocessing.picture(body) for _ in range(batch)])
        numbers = [orjson.loads(body)["inputs"][0]["data"] for _ in range(batch)]
        return torch.tensor(numbers, dtype=torch.float32)

    def step(batch: int) -> None:
        with torch.inference_mode():
            inputs = rows(batch)
            if tensor is None:
                inputs = preprocessing.finish(inputs)
            probabilities = network(inputs).softmax(1)
            probabilities.topk(5, dim=1)

    return step


def compile_for(loaded: LoadedVersion, sizes: Sequence[int]) -> None:
    """As a server's background thread does; its child process would starve on a busy machine."""
    form, row_shape = loaded.execution.form, loaded.manifest.preprocessing.input_shape
    for size in sizes:
        tell(f"compiling for {size} rows …")
        loaded.execution.compiled[size] = compiled(form, size, row_shape)


def run(step: Step, seconds: float, batch: int) -> dict[str, float]:
    """Repeat `step` for about `seconds`; latencies are of whole batches.

    Besides them there is the pace of the machine (`benchmarks.pace`).
    """
    latencies_ms: list[float] = []
    began = now = time.perf_counter()
    cpu_s = time.process_time()
    while now < began + seconds:
        step(batch)
        ended = time.perf_counter()
        latencies_ms.append((ended - now) * 1000)
        now = ended
    count = batch * len(latencies_ms)
    return {
        "rate_per_s": count / (now - began),
        "p50_ms": float(np.percentile(latencies_ms, 50)),
        "p99_ms": float(np.percentile(latencies_ms, 99)),
        "cpu_us": (time.process_time() - cpu_s) * 1e6 / count,
        "num_requests": float(count),
        **told(spans_of([latency_ms / 1000 for latency_ms in latencies_ms])),
    }


def main(store: str, model: str, body: str, port: str, precision: Wanted = "fp32") -> None:
    """Load the model, and answer until the process is ended."""
    torch.set_num_threads(thread_count())
    # In the same form as the server, which is told the same.
    loaded = load_version(ModelStore(Path(store)).resolve(model), torch.device("cpu"), precision)
    if precision == "auto":
        compile_for(loaded, SIZES)
    step = step_of(loaded, Path(body).read_bytes())
    step(1)

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline()
            if line:  # none where somebody only looks whether this is up
                self.wfile.write(json.dumps(run(step, **json.loads(line))).encode() + b"\n")

    with socketserver.TCPServer((HOST, int(port)), Answer) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
