"""The exception tree of the service, and one table: exception -> status.

    ServiceError
    ├── BadRequest              400  the body or a parameter cannot be understood
    │   ├── BadInput            422  understood, and wrong: shape, range, type
    │   ├── MediaTypeRefused    415  a content type or encoding that is not read here
    │   └── BodyTooLarge        413  more bytes or elements than the limit
    ├── KeyRefused              401  no key, or none that opens anything
    ├── ScopeMissing            403  the key may not do this
    ├── NotFound                404  no such thing
    │   ├── JobUnknown
    │   └── NoSuchEvaluation         it has no report
    ├── Conflict                409  not as things stand
    │   ├── JobConflict              the job's state does not allow it
    │   ├── IdempotencyKeyReused     the same key came with another request
    │   ├── NotPromoted              a rule does not hold, or there is nothing to move
    │   └── VersionUnusable          an alias cannot lead to what cannot be served
    ├── Overloaded              429  a bound is reached; `retry_after_s` says when to come back
    │   ├── QueueFull                too many inputs wait for this model
    │   └── TooManyBadKeys           this address sent bad keys, and must wait
    ├── DeadlineExceeded        504  the request's time was up before its answer
    │   └── DeadlineUnreachable      its time would be up before its turn
    │       └── QueueTooSlow    429  only because of what waits before it: later there may be time
    ├── Unavailable             503  not now: starting, draining, a version that cannot be loaded
    │   ├── Draining
    │   ├── LoadFailed
    │   ├── DeviceLost
    │   └── DatabaseUnavailable      the job database is locked, gone or full
    ├── DiskFull                507  there is no room on disk
    └── ForwardFailed           500  the network itself raised

Errors of `models` and `training` keep their own names; the table knows them. `/v1` answers
`{"error": {"type", "message", "param", "code"}}`, `/v2` answers `{"error": "sentence"}`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.archive_error import ArchiveError, ArchiveTooLarge
from models.checkpoint import CheckpointError
from models.intake_error import IntakeRefused, WeightsTooLarge
from models.networks import NetworkError
from models.picture import PictureError, PictureTooLarge, PictureUnsupported
from models.seen import SeenDamaged
from models.store_error import (
    AliasMoved,
    BadName,
    LocksUnsupported,
    NothingToRollBack,
    RunMismatch,
    StoreBusy,
    StoreDamaged,
    UnknownModel,
    UnknownVersion,
    VersionInUse,
)


class ServiceError(Exception):
    """What the service refuses or fails at; the text is one sentence for a person."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequest(ServiceError):
    """The body or a parameter cannot be understood."""


class BadInput(BadRequest):
    """Understood, and wrong."""


class MediaTypeRefused(BadRequest):
    """A content type or encoding that is not read here."""


class BodyTooLarge(BadRequest):
    """More bytes or elements than the limit."""


class KeyRefused(ServiceError):
    """No key, or one that is unknown, expired or revoked: one sentence for all, which tells none.

    It takes no message, so that nobody can make two of it.
    """

    def __init__(self) -> None:
        super().__init__(
            "this needs a key that has neither expired nor been revoked; send it as the header "
            "`Authorization: Bearer KEY`"
        )


class ScopeMissing(ServiceError):
    """The key may not do this."""


class NotFound(ServiceError):
    """No such thing."""


class JobUnknown(NotFound):
    """No job has this id."""


class Conflict(ServiceError):
    """Not as things stand."""


class VersionUnusable(Conflict):
    """An alias cannot lead to this version, because it cannot be served."""


class JobConflict(Conflict):
    """The job's state does not allow it."""


class IdempotencyKeyReused(Conflict):
    """The same `Idempotency-Key` came with another request."""


class DiskFull(ServiceError):
    """There is no room on disk."""


class NoSuchEvaluation(NotFound):
    """No such evaluation, or none that has a report."""


class NotPromoted(Conflict):
    """A rule does not hold, or the alias holds this version already."""


class Overloaded(ServiceError):
    """A bound is reached."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """Too many inputs wait for this model."""


class TooManyBadKeys(Overloaded):
    """This address sent bad keys, and must wait before it sends another."""


class DeadlineExceeded(ServiceError):
    """The request's time was up before its answer."""


class DeadlineUnreachable(DeadlineExceeded):
    """The request's time would be up before its turn; refused at once."""


class QueueTooSlow(DeadlineUnreachable):
    """Too much waits for the time that the caller gives; with less of it there would be enough."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ServiceError):
    """Not now."""


class Draining(Unavailable):
    """The process is stopping."""


class LoadFailed(Unavailable):
    """A version is in the store and cannot be loaded."""


class DeviceLost(Unavailable):
    """The device answers no more; the process ends so that its supervisor starts another."""


class DatabaseUnavailable(Unavailable):
    """The job database is locked, gone or full."""


class ForwardFailed(ServiceError):
    """The network itself raised."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """How an exception is told over HTTP."""

    status: int
    code: str
    type: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


# The first class along the exception's own line of ancestors decides.
STATUS: Mapping[type[Exception], int] = {
    BadRequest: 400,
    BadInput: 422,
    MediaTypeRefused: 415,
    BodyTooLarge: 413,
    KeyRefused: 401,
    ScopeMissing: 403,
    NotFound: 404,
    Conflict: 409,
    DiskFull: 507,
    Overloaded: 429,
    DeadlineExceeded: 504,
    QueueTooSlow: 429,
    Unavailable: 503,
    ForwardFailed: 500,
    PictureError: 422,
    PictureTooLarge: 413,
    PictureUnsupported: 415,
    ArchiveError: 422,
    ArchiveTooLarge: 413,
    BadName: 400,
    UnknownModel: 404,
    UnknownVersion: 404,
    AliasMoved: 409,
    NothingToRollBack: 409,
    VersionInUse: 409,
    RunMismatch: 409,
    StoreBusy: 503,
    StoreDamaged: 503,
    LocksUnsupported: 503,
    IntakeRefused: 422,
    WeightsTooLarge: 413,
    CheckpointError: 503,
    SeenDamaged: 503,
    NetworkError: 503,
}
RETRY_AFTER_S = 1.0


def refusal_of(error: BaseException) -> Refusal:
    """How `error` is told; what the table does not know is a 500 that says nothing of itself."""
    status = _status(error)
    if status is None:
        return Refusal(500, "internal_error", "server_error", "the service failed on this request")
    kind = "invalid_request_error" if status < 429 else "server_error"
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    if retry_after_s is None and status == 503:
        retry_after_s = RETRY_AFTER_S
    return Refusal(
        status,
        code_of(type(error)),
        "rate_limit_error" if status == 429 else kind,
        str(error),
        getattr(error, "param", None),
        retry_after_s,
    )


def v1_body(refusal: Refusal) -> dict[str, Any]:
    """The body of an error under `/v1`."""
    return {
        "error": {
            "type": refusal.type,
            "message": refusal.message,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def code_of(error_class: type[BaseException]) -> str:
    """`QueueFull` -> `queue_full`: stable, for programs."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", error_class.__name__).lower()


def _status(error: BaseException) -> int | None:
    return next((STATUS[one] for one in type(error).__mro__ if one in STATUS), None)
