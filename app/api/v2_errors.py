"""What is wrong with a request of the Open Inference Protocol, by name.

Every class is a `BadRequest`; the one table in `app/errors.py` gives those that also descend from
`MediaTypeRefused` or `BodyTooLarge` their own status.
"""

from app.errors import BadRequest, BodyTooLarge, MediaTypeRefused

MAX_SHOWN_CHARACTERS = 80


class V2Error(BadRequest):
    """A request of the Open Inference Protocol that cannot be answered."""


class HeaderLengthInvalid(V2Error):
    """`Inference-Header-Content-Length` is no number, or more than the body holds."""


class JsonInvalid(V2Error):
    """The JSON part cannot be parsed."""


class FieldInvalid(V2Error):
    """A field is missing or has the wrong type."""


class ParameterInvalid(V2Error):
    """A parameter has the wrong type or range."""


class FeatureRefused(V2Error):
    """A part of the protocol that this server does not offer."""


class DatatypeUnknown(V2Error):
    """The protocol has no such datatype."""


class DatatypeRefused(V2Error):
    """A datatype that the model does not take, or that JSON cannot carry."""


class ShapeInvalid(V2Error):
    """A shape that is no list of sizes, or not the one that the model takes."""


class DataInvalid(V2Error):
    """The elements of a tensor do not fit its datatype or its shape."""


class BinarySizeInvalid(V2Error):
    """Byte counts that do not add up."""


class InputMissing(V2Error):
    """The model needs an input that the request does not have."""


class InputUnexpected(V2Error):
    """An input that the model does not have, or one given twice."""


class InputsConflict(V2Error):
    """Two inputs of which the model takes one or the other."""


class OutputUnknown(V2Error):
    """A requested output that the model does not have, or one asked for twice."""


class OutputNotJson(V2Error):
    """An output that JSON cannot carry and binary can."""


class EncodingRefused(V2Error, MediaTypeRefused):
    """A `Content-Encoding` that is not read here."""


class EncodingCorrupt(V2Error):
    """The compressed body is damaged or cut short."""


class TooManyBytes(V2Error, BodyTooLarge):
    """More bytes than the limit, as sent or after inflating."""


class TooManyElements(V2Error, BodyTooLarge):
    """More elements, items or nested lists than the limit."""


def shown(value: object) -> str:
    """`value` as an error sentence quotes it: short, whatever the client sent."""
    text = repr(value[:MAX_SHOWN_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"
