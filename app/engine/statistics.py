"""What one live version has done, in the counts that the statistics extension of V2 reports."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Duration:
    """How often and how long."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count `count` occurrences that took `ns` together."""
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class Statistics:
    """Counts since the version became live."""

    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=dict)
