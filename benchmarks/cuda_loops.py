"""What a device can do without a server: forwards in each form, decoding, training steps.

`python -m benchmarks.cuda_loops DEVICE SIDE SECONDS` is the job beside the server: it says
`ready`, trains for so long, and prints steps a second.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from app.engine.decoding import Decoder
from app.engine.device_decoding import nvjpeg
from app.engine.execution import interleaved_best
from app.engine.pipeline import accelerator_of
from benchmarks.cuda_networks import build, steps
from models.forms import Form, other_forms, plain_form
from models.picture import PictureLimits, encoded_picture
from models.preprocessing import Preprocessing

REPETITIONS = 3
COMPILED_SIZES = (1, 32)
TRAINED_ROWS = 64
NUM_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Curve:
    """One network in one form.

    Attributes:
        seconds: rows in the batch -> the shortest time of a few.
        start_s, row_s: of the straight line through them, `start + row * n`.
        fault: why there is nothing to see, in words.
    """

    network: str
    form: str
    seconds: Mapping[int, float]
    fault: str = ""

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of a batch and of a row more, by least squares of relative errors."""
        sizes, times = np.array(list(self.seconds)), np.array(list(self.seconds.values()))
        if len(sizes) < 2:
            return float(times.sum()), 0.0
        row_s, start_s = np.polyfit(sizes, times, 1, w=1 / times)
        return float(start_s), float(row_s)

    @property
    def best_per_s(self) -> float:
        """Rows a second at the best size."""
        return max((size / seconds for size, seconds in self.seconds.items()), default=0.0)


def curves(
    name: str, device: torch.device, sizes: Sequence[int], side: int, *, compile_too: bool
) -> list[Curve]:
    """`name` in every form at every size; what fails says why and stops nothing else."""
    network = build(name).to(device).requires_grad_(False)
    forms = [plain_form(network), *other_forms(network, "auto")]
    found = [
        _curve(name, form.name, lambda _, form=form: form, device, sizes, side) for form in forms
    ]
    chosen = forms[-1]
    if device.type == "cuda":
        found.append(
            _curve(name, f"{chosen.name}, recorded", _recorded(chosen), device, sizes, side)
        )
    if compile_too:
        few = [size for size in COMPILED_SIZES if size in sizes]
        found.append(_curve(name, f"{chosen.name}, compiled", _compiled(chosen), device, few, side))
    return found


def _curve(
    name: str,
    form: str,
    make: Callable[[Tensor], Callable[[Tensor], Tensor]],
    device: torch.device,
    sizes: Sequence[int],
    side: int,
) -> Curve:
    seconds: dict[int, float] = {}
    for size in sizes:
        rows = torch.rand(size, 3, side, side, device=device)
        try:
            with torch.inference_mode():
                seconds[size] = interleaved_best([make(rows)], rows, REPETITIONS)[0]
        except Exception as error:  # the edge of a measurement: others go on
            return Curve(name, form, seconds, " ".join(str(error).split())[:200])
    return Curve(name, form, seconds)


def _recorded(form: Form) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """Makes, for one batch size, the graph that the server would replay."""

    def make(rows: Tensor) -> Callable[[Tensor], Tensor]:
        accelerator = accelerator_of(rows.device)
        if accelerator is None or accelerator.recorder is None:
            raise RuntimeError("this device cannot record")
        recording = accelerator.recorder()(lambda batch: {"logits": form(batch)}, rows)

        def replay(batch: Tensor) -> Tensor:
            recording.inputs.copy_(batch)
            recording.replay()
            return recording.outputs["logits"]

        return replay

    return make


def _compiled(form: Form) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """Makes, for one batch size, what torch's compiler makes of it."""

    def make(_: Tensor) -> Callable[[Tensor], Tensor]:
        function = torch.compile(form.network, dynamic=False)
        return lambda batch: form.finish(function(form.begin(batch)))

    return make


def decoded_on_device_per_s(
    picture: bytes, side: int, device: torch.device, num_rows: int, seconds: float
) -> float:
    """Pictures a second that the device decodes, resizes and crops, so many at once.

    Raises:
        models.device.DeviceUnavailable: it cannot.
    """
    preprocessing, limits = Preprocessing(steps=steps(side)), PictureLimits()
    decoder = Decoder(
        num_threads=1,
        limits=limits,
        max_pixels_in_flight=1,
        max_waiting=1,
        on_device=nvjpeg(),
    )
    reader = decoder.device_reader(preprocessing)
    assert reader is not None
    many = [picture] * num_rows
    for _ in range(NUM_WARM_UPS):
        reader.read_on(device, [encoded_picture(data, limits) for data in many])
    torch.cuda.synchronize(device)
    began = time.monotonic()
    done = 0
    while time.monotonic() < began + seconds:
        reader.read_on(device, [encoded_picture(data, limits) for data in many])
        done += num_rows
    torch.cuda.synchronize(device)
    decoder.close()
    return done / (time.monotonic() - began)


def decoded_per_s(picture: bytes, side: int, num_threads: int, seconds: float) -> float:
    """Pictures a second that so many threads decode, resize and crop."""
    preprocessing = Preprocessing(steps=steps(side))

    def work(until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            preprocessing.picture(picture)
            count += 1
        return count

    began = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as threads:
        counts = list(threads.map(work, [began + seconds] * num_threads))
    return sum(counts) / (time.perf_counter() - began)


def trained_steps_per_s(device: torch.device, side: int, seconds: float, rows: int) -> float:
    """Steps a second of ResNet-18 on random pictures that lie on the device."""
    network = build("resnet18").to(device).to(memory_format=torch.channels_last).train()
    x = torch.rand(rows, 3, side, side, device=device).to(memory_format=torch.channels_last)
    targets = torch.randint(0, 1000, (rows,), device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=True)
    count, began = -NUM_WARM_UPS, time.perf_counter()
    while count <= 0 or time.perf_counter() < began + seconds:
        if count == 0:
            print("ready", flush=True)
            began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(x)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        count += 1
        if device.type == "cuda" and count % 10 == 0:
            torch.cuda.synchronize(device)  # or it would enqueue far ahead of the clock
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    where, job_side, length = sys.argv[1:4]
    num_rows = TRAINED_ROWS if where.startswith("cuda") else 2
    print(trained_steps_per_s(torch.device(where), int(job_side), float(length), num_rows))
