"""What is counted, and how Prometheus reads it.

Counting is a few additions to plain numbers, because it happens on every request; the exposition
format is prometheus-client's, made when somebody asks, and not on the event loop: of 256 models it
takes a tenth of a second. Labels are routes, models that are or were just live, and statuses, never
anything a client can invent, so the number of series is bounded.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
KEPT_VERSIONS: Final = 20
"""So many versions that are gone keep their series, so that the next scrape sees how they ended."""
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts in fixed buckets, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` in its bucket."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> "Histogram":
        """What it holds now."""
        copy = Histogram(self.bounds)
        copy.counts, copy.total = self.counts.copy(), self.total
        return copy

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus buckets: (upper bound, how many are at most that)."""
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        running, buckets = 0, []
        for name, count in zip(names, self.counts, strict=True):
            running += count
            buckets.append((name, float(running)))
        return buckets


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One live version's counts at the moment of a scrape; times are sums in seconds.

    Its histograms are its own: they are read later, on another thread.
    """

    model: str
    version: int
    queue_length: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    batch_sizes: Histogram | None = None
    queue_wait: Histogram | None = None
    memory_bytes: int = 0


class Metrics:
    """The counts of one application.

    Args:
        figures: asked at each scrape for every live version.
        device_memory_bytes: asked at each scrape; empty where the device does not tell.

    Attributes:
        registry: of what else is told; asked on the event loop, so it must be quick.
    """

    def __init__(
        self,
        figures: Callable[[], Iterable[ModelFigures]] = tuple,
        device_memory_bytes: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self._figures = figures
        self._device_memory_bytes = device_memory_bytes
        self._requests: dict[tuple[str, str, str, str], Histogram] = {}
        self._versions: list[tuple[str, str]] = []  # that these name, the oldest first
        self._refusals: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

    def count_request(
        self, route: str, model: str, version: str, status: int, seconds: float
    ) -> None:
        """Count one answered request."""
        key = (route, model, version, str(status))
        histogram = self._requests.get(key)
        if histogram is None:
            self._note_version(model, version)
            histogram = self._requests[key] = Histogram(LATENCY_BUCKETS_S)
        histogram.observe(seconds)

    def count_refusal(self, code: str) -> None:
        """Count a request that was refused before it was one: malformed, too slow, too large."""
        self._refusals[code] += 1

    def scrape(self) -> "Scrape":
        """What is true now; on the event loop."""
        return Scrape(
            {labels: histogram.copy() for labels, histogram in self._requests.items()},
            dict(self._refusals),
            list(self._figures()),
            self._device_memory_bytes(),
            list(self.registry.collect()),
        )

    def _note_version(self, model: str, version: str) -> None:
        """With each new version the series of those end that have been gone for the longest."""
        if (model, version) in self._versions:
            return
        self._versions.append((model, version))
        if len(self._versions) <= KEPT_VERSIONS:
            return
        live = {("", ""), *((one.model, str(one.version)) for one in self._figures())}
        ended = set([one for one in self._versions if one not in live][:-KEPT_VERSIONS])
        self._versions = [one for one in self._versions if one not in ended]
        kept = {key: one for key, one in self._requests.items() if key[1:3] not in ended}
        self._requests = kept


@dataclass(frozen=True, slots=True)
class Scrape(Collector):
    """Counts that change no more."""

    requests: Mapping[tuple[str, str, str, str], Histogram]
    refusals: Mapping[str, int]
    figures: Sequence[ModelFigures]
    device_memory_bytes: Mapping[str, int]
    others: Sequence[Metric]

    def text(self) -> bytes:
        """All series in Prometheus' text format; on any thread."""
        return generate_latest(cast(CollectorRegistry, self))

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client writes down."""
        yield from self.others
        yield self._request_family()
        refusals = CounterMetricFamily(
            "pytorchlib_http_refusals",
            "Requests refused below the framework, which no route has seen.",
            labels=["code"],
        )
        for code, count in self.refusals.items():
            refusals.add_metric([code], count)
        yield refusals
        yield from _model_families(self.figures)
        loaded = GaugeMetricFamily("pytorchlib_versions_loaded", "Versions that are live.")
        loaded.add_metric([], len(self.figures))
        yield loaded
        memory = GaugeMetricFamily(
            "pytorchlib_device_memory_bytes", "Device memory by kind.", labels=["kind"]
        )
        for kind, size_bytes in self.device_memory_bytes.items():
            memory.add_metric([kind], size_bytes)
        yield memory

    def _request_family(self) -> Metric:
        family = HistogramMetricFamily(
            "pytorchlib_request_seconds",
            "Requests and how long they took, from first byte of the request to the answer.",
            labels=["route", "model", "version", "status"],
        )
        for labels, histogram in self.requests.items():
            family.add_metric(labels, histogram.cumulative(), histogram.total)
        return family


def _model_families(figures: Sequence[ModelFigures]) -> Iterator[Metric]:
    names = ["model", "version"]
    queued = GaugeMetricFamily("pytorchlib_queue_length", "Inputs that wait.", labels=names)
    memory = GaugeMetricFamily("pytorchlib_model_memory_bytes", "Bytes of weights.", labels=names)
    seconds = CounterMetricFamily(
        "pytorchlib_stage_seconds", "Time spent in each stage.", labels=[*names, "stage"]
    )
    outcomes = CounterMetricFamily(
        "pytorchlib_inputs", "Inputs by what became of them.", labels=[*names, "outcome"]
    )
    for one in figures:
        labels = [one.model, str(one.version)]
        queued.add_metric(labels, one.queue_length)
        memory.add_metric(labels, one.memory_bytes)
        for stage, value in one.seconds.items():
            seconds.add_metric([*labels, stage], value)
        for outcome, count in one.outcomes.items():
            outcomes.add_metric([*labels, outcome], count)
    yield from (queued, memory, seconds, outcomes)
    yield _histogram_family(
        "pytorchlib_batch_size", "Inputs in one batch.", figures, lambda one: one.batch_sizes
    )
    yield _histogram_family(
        "pytorchlib_queue_wait_seconds", "Wait for a batch.", figures, lambda one: one.queue_wait
    )


def _histogram_family(
    name: str,
    text: str,
    figures: Sequence[ModelFigures],
    of: Callable[[ModelFigures], Histogram | None],
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["model", "version"])
    for one in figures:
        histogram = of(one)
        if histogram is not None:
            labels = [one.model, str(one.version)]
            family.add_metric(labels, histogram.cumulative(), histogram.total)
    return family
