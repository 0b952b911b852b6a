"""What a checkpoint says of itself: network, preprocessing, labels, lineage, and its files' hashes.

Every field is described for readers in `models/FORMAT.md`; a test keeps the two together.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from models.preprocessing import Preprocessing

FORMAT: Final = 1
WEIGHTS: Final = "weights.safetensors"
_COMPUTING = ("network", "preprocessing", "labels", "temperature")
_CONTROL: Final = re.compile("[\x00-\x1f\x7f]")


def _as_json(value: object) -> object:
    """What JSON gives back as it was; anything else would change by being written down."""
    try:
        same: object = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be written as JSON: {error}") from None
    return same


def _without_nan(value: object) -> object:
    """Null for a number that is not finite: a figure that could not be measured loses no run."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return value


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, Field(min_length=1, max_length=256)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Exact = Annotated[dict[str, Any], BeforeValidator(_as_json)]
Noted = Annotated[Exact, BeforeValidator(_without_nan)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkSpec(_Record):
    """Which class computes, and the keyword arguments that build it."""

    name: str = Field(min_length=1, max_length=256)
    options: Exact = Field(default_factory=dict)


class FileRecord(_Record):
    """A file of the folder, as it was when it was published."""

    size_bytes: int = Field(ge=0)
    sha256: Sha256


class Lineage(_Record):
    """Where the weights come from; everything is optional, because imported weights know little."""

    parent: str | None = None
    dataset: str | None = None
    dataset_fingerprint: str | None = None
    method: str | None = None
    options: Noted = Field(default_factory=dict)
    seed: int | None = None
    run: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)


class Manifest(_Record):
    """The manifest of one checkpoint.

    `digest`, `files` and `checksum` are filled in when the checkpoint is saved.
    """

    format: Literal[1] = FORMAT
    network: NetworkSpec
    preprocessing: Preprocessing
    labels: tuple[Label, ...] = Field(min_length=1, max_length=100_000)
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    metrics: Noted = Field(default_factory=dict)
    lineage: Lineage = Lineage()
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    digest: Sha256 | None = None
    files: dict[FileName, FileRecord] = Field(default_factory=dict)
    checksum: Sha256 | None = None

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        broken = next((label for label in self.labels if _CONTROL.search(label)), None)
        if broken is not None:
            raise ValueError(f"the label {broken!r} has a control character in it")
        num_classes = self.network.options.get("num_classes", len(self.labels))
        if num_classes != len(self.labels):
            raise ValueError(f"there are {len(self.labels)} labels for {num_classes} classes")
        return self

    def sealed(self, files: Mapping[str, FileRecord]) -> Self:
        """The same manifest with `files`, the digest of what computes, and its own checksum."""
        bare = self.model_copy(update={"files": dict(files), "digest": None, "checksum": None})
        digest = digest_of(bare.model_dump(mode="json"))
        named = bare.model_copy(update={"digest": digest})
        return named.model_copy(update={"checksum": checksum_of(named.model_dump(mode="json"))})


def digest_of(document: Mapping[str, Any]) -> str:
    """Identity of what computes: two checkpoints that share it give the same answers.

    Taken from the document as it stands in the file, so that a later version of this program,
    whose steps may have more fields, still finds the same.
    """
    computing = {name: document.get(name) for name in _COMPUTING}
    return _hash({**computing, "weights": document["files"][WEIGHTS]["sha256"]})


def checksum_of(document: Mapping[str, Any]) -> str:
    """Of everything in the document but the checksum itself."""
    return _hash({name: value for name, value in document.items() if name != "checksum"})


def sentence_of(error: ValidationError) -> str:
    """The first fault, with the place where it is."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if where == "format":
        return f"format is {first['input']!r}, and this program reads format {FORMAT}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _hash(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
