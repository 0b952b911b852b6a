"""One real error of each status, as `/v1` tells it: what `/docs` shows."""

import json
from collections.abc import Mapping
from typing import Any, Final

from app.errors import (
    BadInput,
    BodyTooLarge,
    DeadlineExceeded,
    DiskFull,
    Draining,
    ForwardFailed,
    KeyRefused,
    QueueFull,
    ScopeMissing,
    refusal_of,
    v1_body,
)
from app.http.connection import BODY_TOO_SLOW
from models.picture import PictureUnsupported
from models.store_error import AliasMoved, BadName, UnknownModel

_ERRORS: Final[tuple[Exception, ...]] = (
    BadName("'Digits' is no name here; a name is at most 64 of lower-case letters, digits, ..."),
    KeyRefused(),
    ScopeMissing("the key 'ci' lacks the scope 'predict'; `pytorchlib keys create` makes one"),
    UnknownModel("no model is called 'digit'; the nearest are digits"),
    AliasMoved("digits@production holds 2, not 1"),
    BodyTooLarge("the body is larger than the limit of 67108864 bytes"),
    PictureUnsupported("the picture is not a JPEG, PNG or WebP; these three are read"),
    BadInput("`top_k` must be at most 100, not 1000.", param="top_k"),
    QueueFull("1024 inputs wait for digits; ask again in 0.4 s", retry_after_s=0.4),
    ForwardFailed("digits:1 failed on this input: the sizes of tensors must match"),
    Draining("the service is stopping and takes no more work"),
    DeadlineExceeded("the request's time was up before its answer"),
    DiskFull("there is no room for the dataset on disk"),
)


ERROR_EXAMPLES: Final[Mapping[int, dict[str, Any]]] = {
    BODY_TOO_SLOW.status: json.loads(BODY_TOO_SLOW.body(b"/v1")),
    **{refusal.status: v1_body(refusal) for refusal in map(refusal_of, _ERRORS)},
}
"""By status: a body with its type, message, param and code."""
