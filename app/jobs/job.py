"""A job is a row about long work: what it is, how it stands, and what happened to it.

`TRANSITIONS` is the only place that says which state may follow which; the store refuses any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class Kind(StrEnum):
    """What a job does. Fine-tuning has a process of its own; the others run in the server."""

    FINE_TUNING = "fine_tuning"
    EVALUATION = "evaluation"
    PROMOTION = "promotion"


class State(StrEnum):
    """How a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL: Final = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.QUEUED: frozenset({State.RUNNING, State.PAUSED, State.FAILED, State.CANCELLED}),
    # Back to queued when its worker dies, or ends before the job does.
    State.RUNNING: FINAL | {State.QUEUED, State.PAUSED},
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


class Request(StrEnum):
    """What a person wants of a job that its worker has to see to."""

    PAUSE = "pause"
    STOP = "stop"


class Level(StrEnum):
    """How much an event matters."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class EventType(StrEnum):
    """A sentence for a person, or numbers."""

    MESSAGE = "message"
    METRICS = "metrics"


class StaleWorker(Exception):
    """The job is no longer this worker's: cancelled, or given to another; nothing was changed."""


class TransitionRefused(Exception):
    """The table of transitions does not know this step; a fault of the program."""


ID_PREFIXES: Final[Mapping[Kind, str]] = {
    Kind.FINE_TUNING: "ftjob",
    Kind.EVALUATION: "eval",
    Kind.PROMOTION: "promotion",
}


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: a stable code, one sentence, and the option that is to blame, if one is."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class NewJob:
    """What is needed to create a job.

    Attributes:
        kind: of the job.
        options: everything that its work reads; must be JSON.
        by: the name of the key that asked.
        idempotency_key: creating with the same key and `by` again gives the same job.
        model: the model that it is about, as a person names it.
        dataset: the id of the dataset that it reads.
    """

    kind: Kind
    options: Mapping[str, Any]
    by: str = "local"
    idempotency_key: str | None = None
    model: str | None = None
    dataset: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One row; times are Unix seconds by the database's clock.

    Attributes:
        number: rises with every job created; the queue's order.
        attempt: how many workers have begun it.
        progress: the worker's last sign of life, as JSON; empty before the first.
        result: what came of it, once it succeeded.
        error: why it failed.
        reason: why it waits, or was paused, in a sentence.
        request: what its worker has been asked and has not done yet.
        is_sealed: its result is being published; it can no longer be cancelled, paused or stopped.
        snapshot_step: the step of its newest snapshot, 0 before the first.
        num_fruitless: attempts in a row, the running one included, without a newer snapshot.
        worker: who runs it.
        token: changes with every claim; a worker's writes count only with the current one.
        lease_until: when its worker is believed dead.
    """

    id: str
    number: int
    kind: Kind
    state: State
    options: Mapping[str, Any]
    by: str
    idempotency_key: str | None
    model: str | None
    dataset: str | None
    created: float
    started: float | None
    finished: float | None
    attempt: int
    progress: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: JobError | None
    reason: str | None
    request: Request | None
    is_sealed: bool
    snapshot_step: int
    num_fruitless: int
    worker: str | None
    token: int
    lease_until: float | None

    @property
    def is_final(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state in FINAL


@dataclass(frozen=True, slots=True)
class NewEvent:
    """Something that happened, as it is written."""

    message: str
    level: Level = Level.INFO
    type: EventType = EventType.MESSAGE
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job.

    Attributes:
        sequence: 1, 2, 3, … within the job, without gaps.
        time: Unix seconds by the database's clock.
    """

    job_id: str
    sequence: int
    time: float
    level: Level
    type: EventType
    message: str
    data: Mapping[str, Any]


def sources_of(target: State) -> frozenset[State]:
    """The states from which a job may come to `target`."""
    return frozenset(source for source, targets in TRANSITIONS.items() if target in targets)


def check_transition(source: State, target: State) -> None:
    """Refuse a step that the table does not know.

    Raises:
        TransitionRefused: it does not.
    """
    if target not in TRANSITIONS[source]:
        raise TransitionRefused(f"no job goes from {source} to {target}")
