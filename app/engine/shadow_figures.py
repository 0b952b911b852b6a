"""What Prometheus reads of shadows: how their answers compare with those that were given."""

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.engine.live import LiveModels


class ShadowFigures(Collector):
    """Asked at each scrape; register it beside the application's own figures."""

    def __init__(self, live: LiveModels) -> None:
        self._live = live

    def describe(self) -> list[Metric]:
        """Nothing ahead of time."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        names = ["model", "alias", "version"]
        inputs = CounterMetricFamily(
            "pytorchlib_shadow_inputs",
            "Inputs of a shadow by what became of them.",
            labels=[*names, "outcome"],
        )
        difference = GaugeMetricFamily(
            "pytorchlib_shadow_largest_difference",
            "Largest difference between a shadow's probability and the one that was answered.",
            labels=names,
        )
        for (model, alias, version), mirror in self._live.mirrors().items():
            labels, counts = [model, alias, str(version)], mirror.counts
            for outcome in ("agreed", "differed", "dropped", "failed"):
                inputs.add_metric([*labels, outcome], getattr(counts, f"num_{outcome}"))
            difference.add_metric(labels, counts.largest_difference)
        yield from (inputs, difference)
