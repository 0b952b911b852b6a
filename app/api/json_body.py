"""A JSON body that a route reads by itself, bounded before it is parsed."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from app.api.caller import read_body
from app.api.complaint import complaint
from app.errors import BadInput

MAX_BYTES = 64 * 1024

W = TypeVar("W", bound=BaseModel)


async def read_json(request: Request, kind: type[W], *, empty: bytes = b"") -> W:
    """The body as `kind`; `empty` stands for none.

    Raises:
        BodyTooLarge, CallerGone: as `read_body`.
        BadInput: in a sentence that names the field.
    """
    length = request.headers.get("content-length")
    body = await read_body(request.receive, length.encode() if length else None, MAX_BYTES)
    try:
        return kind.model_validate_json(bytes(body) or empty)
    except ValidationError as error:
        raise bad_input(error) from None


def bad_input(error: ValidationError) -> BadInput:
    """What is wrong with the values of a request, in a sentence."""
    sentence, field = complaint(error.errors())
    return BadInput(sentence, param=field)
