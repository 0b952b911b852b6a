"""What a stored dataset says of itself. Imports no torch."""

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from training.picture_check import PictureLook

Kind = Literal["pictures", "arrays", "table"]
Severity = Literal["error", "warning", "note"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SampleRecord(_Record):
    """One sample of a dataset."""

    name: str
    """What its maker calls it: the path in the archive, or its position."""
    part: str
    """`train`, `validation` or `test`."""
    label: str
    sha256: str
    """Hex, of its bytes; of an array's row, of the row's bytes."""
    file: str | None = None
    """Of a picture: its name below `samples/`, which is ours."""
    num_bytes: int = 0
    look: PictureLook | None = None


class Fault(_Record):
    """One thing that is wrong, with everything that it concerns.

    Attributes:
        kind: for programs, such as `exact_duplicates`.
        severity: an `error` makes training meaningless; a `warning` may; a `note` is to be known.
        files: names of samples or files, at most 1,000 of them.
        count: how many there are.
        sentence: for people.
    """

    kind: str
    severity: Severity
    files: tuple[str, ...]
    count: int
    sentence: str


class DatasetReport(_Record):
    """What was found in a dataset.

    Attributes:
        usable: whether there is no error.
        faults: everything, errors first.
        classes: class -> part -> samples.
        pictures: figures of the pictures: sizes, modes, means; None for numbers.
        suggestions: sentences on what would help.
    """

    usable: bool
    faults: tuple[Fault, ...]
    classes: dict[str, dict[str, int]]
    pictures: dict[str, object] | None = None


class DatasetManifest(_Record):
    """`manifest.json` of a dataset; its samples stand in `samples.json` beside it."""

    format: Literal[1] = 1
    id: str
    name: str
    kind: Kind
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    by: str = "local"
    parent: str | None = None
    """The dataset that it was derived from."""
    classes: tuple[str, ...]
    num_samples: int
    num_bytes: int
    fingerprint: str
    """Hex sha256 over the sorted samples (digest, part, label) and the kind."""
    report: DatasetReport


class Samples(_Record):
    """`samples.json`."""

    samples: tuple[SampleRecord, ...]
