"""What the batcher adds to a forward: `python -m benchmarks.batcher`.

Everything is measured in one process, in rounds, each round in another order; a figure is the
median over the rounds, and a ratio the median of the rounds' own ratios, so that what else the
machine does cancels out. Processor time is the sturdier figure on a busy machine.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from app.engine.batcher import Batcher, Lane, LaneOptions

Measure = Callable[[], Awaitable["Sample"]]
NUM_CALLERS = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one contestant, in microseconds a request."""

    wall_us: float
    cpu_us: float
    p50_us: float


def perceptron() -> nn.Module:
    """784-128-64-10."""
    layers = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers).eval()


def large() -> nn.Module:
    """Convolutions that take some ten milliseconds an image."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(2)]
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def forward_of(network: nn.Module) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda batch: {"logits": network(batch)}


async def of_bare(network: nn.Module, row: Tensor, num_rows: int, num_requests: int) -> Sample:
    """The network alone: as many rows a forward as there are callers."""
    rows = row.repeat(num_rows, *[1] * (row.ndim - 1))
    times: list[float] = []
    began, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for _ in range(num_requests // num_rows):
            at = time.perf_counter()
            network(rows)
            times.append(time.perf_counter() - at)
    return sample(began, cpu, num_requests // num_rows * num_rows, times)


async def of_lane(lane: Lane, row: Tensor, num_callers: int, num_requests: int) -> Sample:
    """Callers that ask again as soon as they are answered."""
    times: list[float] = []

    async def caller() -> None:
        for _ in range(num_requests // num_callers):
            at = time.perf_counter()
            await lane.submit(row, time.monotonic() + 30)
            times.append(time.perf_counter() - at)

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(num_callers)))
    return sample(began, cpu, len(times), times)


def sample(began: float, cpu: float, num_requests: int, times: list[float]) -> Sample:
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    per_request = 1e6 / num_requests
    return Sample(wall_s * per_request, cpu_s * per_request, statistics.median(times) * 1e6)


async def in_rounds(contestants: dict[str, Measure], num_rounds: int) -> dict[str, list[Sample]]:
    """Every contestant once a round, in a new order each time; the first round does not count."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    for number in range(num_rounds + 1):
        for name in random.sample(list(contestants), len(contestants)):
            result = await contestants[name]()
            if number:
                samples[name].append(result)
    return samples


def show(title: str, samples: dict[str, list[Sample]], field: str, base: str) -> None:
    """One line a contestant: median, what it adds to `base`, and the ratio to it."""
    print(f"\n{title}")
    of_base = [getattr(each, field) for each in samples[base]]
    for name, theirs in samples.items():
        values = [getattr(each, field) for each in theirs]
        added = statistics.median(a - b for a, b in zip(values, of_base, strict=True))
        ratio = statistics.median(a / b for a, b in zip(values, of_base, strict=True))
        print(f"  {name:34} {statistics.median(values):9.1f} us {added:+9.1f} us  {ratio:6.2f} x")


async def tiny(batcher: Batcher, num_rounds: int) -> None:
    """The perceptron: bare, on the event loop, and on the device thread."""
    network, row = perceptron(), torch.randn(1, 784)
    lanes = {}
    for name, below_ms in (("event loop", 5.0), ("device thread", 0.0)):
        options = LaneOptions(inline_below_ms=below_ms)
        lanes[name] = batcher.open_lane(name, forward_of(network), options, row_shape=(784,))
        await lanes[name].warm_up()
    for num_callers, num_requests in ((1, 300), (NUM_CALLERS, 1920)):
        contestants: dict[str, Measure] = {
            "bare forward": lambda n=num_callers, r=num_requests: of_bare(network, row, n, r)
        }
        for name, lane in lanes.items():
            contestants[name] = lambda lane=lane, n=num_callers, r=num_requests: of_lane(
                lane, row, n, r
            )
        samples = await in_rounds(contestants, num_rounds)
        title = f"784-128-64-10, {num_callers} caller{'s' * (num_callers > 1)}"
        if num_callers == 1:
            show(f"{title}: p50 of a request", samples, "p50_us", "bare forward")
        else:
            show(f"{title}: time a request", samples, "wall_us", "bare forward")
        show(f"{title}: processor time a request", samples, "cpu_us", "bare forward")
    for name, lane in lanes.items():
        print(f"  {name} was {'inline' if lane.is_inline else 'threaded'} at the end")


async def crowd(batcher: Batcher, num_rounds: int) -> None:
    """One lane that works, alone and beside a hundred that idle."""
    row = torch.randn(1, 784)
    alone = Batcher(torch.device("cpu"))
    alone.start()
    lanes = []
    for host, num_idle in ((alone, 0), (batcher, 100)):
        for number in range(num_idle):
            host_lane = host.open_lane(f"idle {number}", forward_of(perceptron()), row_shape=(784,))
            await host_lane.submit(row)
            lanes.append(host_lane)
        lanes.append(host.open_lane("busy", forward_of(perceptron()), row_shape=(784,)))
        await lanes[-1].warm_up()
    one, among = lanes[0], lanes[-1]
    samples = await in_rounds(
        {
            "one lane": lambda: of_lane(one, row, NUM_CALLERS, 1920),
            "and a hundred idle ones": lambda: of_lane(among, row, NUM_CALLERS, 1920),
        },
        num_rounds,
    )
    show("a hundred idle models: processor time a request", samples, "cpu_us", "one lane")
    await alone.stop(5)


async def slow(batcher: Batcher, num_rounds: int) -> None:
    """A large network: what the thread adds, and how long the event loop ever stands still."""
    network, row = large(), torch.randn(1, 3, 224, 224)
    options = LaneOptions(max_batch_items=8)
    lane = batcher.open_lane("large", forward_of(network), options, row_shape=(3, 224, 224))
    await lane.warm_up()
    samples = await in_rounds(
        {
            "bare forward": lambda: of_bare(network, row, 1, 10),
            "batcher": lambda: of_lane(lane, row, 1, 10),
        },
        num_rounds,
    )
    show("convolutions at 224 x 224, 1 caller: p50", samples, "p50_us", "bare forward")
    stalls: list[float] = []
    until = time.monotonic() + 2

    async def heartbeat() -> None:
        while (now := time.monotonic()) < until:
            await asyncio.sleep(0.001)
            stalls.append(time.monotonic() - now - 0.001)

    async def caller() -> None:
        while time.monotonic() < until:
            await lane.submit(row)

    await asyncio.gather(heartbeat(), *(caller() for _ in range(8)))
    stalls.sort()
    print(
        f"  event loop late beside 8 callers: p50 {stalls[len(stalls) // 2] * 1e3:.2f} ms, "
        f"p99 {stalls[int(len(stalls) * 0.99)] * 1e3:.2f} ms, longest {stalls[-1] * 1e3:.2f} ms"
    )


def joining(num_rounds: int) -> None:
    """Ways to lay single rows side by side: fresh rows each time, a forward after each.

    To be called on another thread than the first, as the batcher does: the allocator gives the
    memory of those back to the system sooner.
    """
    torch.set_num_threads(1)
    print("\njoining single rows: processor time a batch")
    between = nn.Sequential(nn.Conv2d(3, 32, 7, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    picture = torch.randn(8, 3, 224, 224)
    for shape, num_rows in (((784,), 32), ((3, 224, 224), 8)):
        scratch, times = torch.empty(num_rows, *shape), defaultdict(list)
        ways: dict[str, Callable[[list[Tensor]], Tensor]] = {
            "torch.cat": torch.cat,
            "torch.cat into kept memory": lambda rows, scratch=scratch: torch.cat(
                rows, out=scratch
            ),
            "numpy.concatenate": lambda rows: torch.from_numpy(
                np.concatenate([row.numpy() for row in rows])
            ),
        }
        for _ in range(3 * num_rounds):
            for name in random.sample(list(ways), len(ways)):
                rows = [torch.randn(1, *shape) for _ in range(num_rows)]
                began = time.thread_time()
                joined = ways[name](rows)
                times[name].append((time.thread_time() - began) * 1e6)
                with torch.inference_mode():
                    between(picture)
                del joined
        for name, values in times.items():
            print(f"  {num_rows} x {shape}: {name:30} {statistics.median(values):9.1f} us")


async def measure(num_rounds: int, num_threads: int) -> None:
    batcher = Batcher(torch.device("cpu"), num_threads=num_threads)
    batcher.start()
    await tiny(batcher, num_rounds)
    await crowd(batcher, num_rounds)
    await slow(batcher, max(3, num_rounds // 3))
    await batcher.stop(5)
    await asyncio.to_thread(joining, num_rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="threads of the device thread")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.loop}, {arguments.rounds} rounds")
    work = measure(arguments.rounds, arguments.threads)
    if arguments.loop == "uvloop":
        import uvloop  # the server's own choice; not there on every system

        uvloop.run(work)
    else:
        asyncio.run(work)


if __name__ == "__main__":
    main()
