"""What a checkpoint says of itself: network, preprocessing, labels, lineage, and its files' hashes.

Every field is described for readers in `models/FORMAT.md`; a test keeps the two together.
"""

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.preprocessing import Preprocessing

FORMAT: Literal[1] = 1
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, Field(min_length=1, max_length=256)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkSpec(_Record):
    """Which class computes, and the keyword arguments that build it."""

    name: str = Field(min_length=1, max_length=256)
    options: dict[str, Any] = Field(default_factory=dict)


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
    options: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    run: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)


class Manifest(_Record):
    """The manifest of one checkpoint.

    `digest` and `files` are filled in when the checkpoint is saved.
    """

    format: Literal[1] = FORMAT
    network: NetworkSpec
    preprocessing: Preprocessing
    labels: tuple[Label, ...] = Field(min_length=1, max_length=100_000)
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    lineage: Lineage = Lineage()
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    digest: Sha256 | None = None
    files: dict[str, FileRecord] = Field(default_factory=dict)

    def identity(self, weights_sha256: str) -> str:
        """The digest of what computes: two checkpoints that share it give the same answers."""
        computing = {
            "network": self.network.model_dump(mode="json"),
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "labels": self.labels,
            "temperature": self.temperature,
            "weights": weights_sha256,
        }
        canonical = json.dumps(computing, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
