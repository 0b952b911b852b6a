"""The body of an `infer` request of the Open Inference Protocol becomes tensors and wishes.

Three forms: JSON alone; JSON followed by raw tensors, its length in the header
`Inference-Header-Content-Length`; and raw tensor bytes alone, which that header announces with 0.
"""

from typing import Any, NamedTuple

from app.api.v2_document import parse_json
from app.api.v2_errors import (
    BinarySizeInvalid,
    FeatureRefused,
    FieldInvalid,
    HeaderLengthInvalid,
    InputMissing,
    InputUnexpected,
    OutputUnknown,
    ParameterInvalid,
    TooManyElements,
    shown,
)
from app.api.v2_tensors import (
    Data,
    Datatype,
    Limits,
    NamedTensor,
    checked_shape,
    data_from_bytes,
    data_from_json,
    datatype_named,
)
from app.engine.predictor import TensorSpec

MAX_TEXT_CHARACTERS = 1024
MAX_INTEGER = 2**63 - 1
MAX_HEADER_DIGITS = 18
WIDEST_ELEMENT_BYTES = 8
SCALARS = {str, int, float, bool}


class RequestedOutput(NamedTuple):
    """One entry of `outputs`; `num_classes` above 0 asks for labels instead of numbers."""

    name: str
    binary: bool
    num_classes: int


class InferRequest(NamedTuple):
    """What a client asks.

    Attributes:
        id: echoed in the answer; None where none was given.
        outputs: None asks for all.
        binary_output: whether outputs that say nothing themselves travel as binary data.
        priority: 0 where none was given, 1 is the highest.
        timeout_us: microseconds; 0 where none was given.
    """

    id: str | None
    inputs: list[NamedTensor]
    outputs: list[RequestedOutput] | None
    binary_output: bool
    priority: int
    timeout_us: int


class Message(NamedTuple):
    """A body taken apart: the JSON text, and where the raw tensors after it begin."""

    text: bytes | bytearray
    body: bytes | bytearray
    start: int


def lead_bytes(header: bytes | None) -> int:
    """How many bytes before a body bring its first raw tensor to an address fit for any datatype.

    Args:
        header: `Inference-Header-Content-Length` as sent; None where it was not.
    """
    return -int(header) % WIDEST_ELEMENT_BYTES if header and _is_number(header) else 0


def parse_request(
    body: bytes | bytearray,
    header: bytes | None,
    raw_input: TensorSpec,
    limits: Limits,
    begin: int = 0,
) -> InferRequest:
    """Everything in one `infer` request but what only the model can judge.

    Args:
        body: after inflating.
        header: `Inference-Header-Content-Length` as sent; None where it was not.
        raw_input: which tensor a body without JSON holds, one item of it.
        begin: where in `body` it begins; only with a header may that not be 0.

    Raises:
        V2Error: by name; see `app/api/v2_errors.py`.
    """
    if header is None:
        message = Message(body, body, len(body))
    else:
        length = _header_length(header, len(body) - begin)
        if length == 0:
            return _raw_request(body, begin, raw_input, limits)
        start = begin + length
        message = Message(bytes(memoryview(body)[begin:start]), body, start)
    document = parse_json(message.text, limits)
    parameters = parameters_of(document)
    _refuse_sequences(parameters)
    binary_output = flag(parameters, "binary_data_output", False)
    return InferRequest(
        _text(document, "id"),
        _inputs(document, message, limits),
        _outputs(document, binary_output, limits),
        binary_output,
        whole_number(parameters, "priority"),
        whole_number(parameters, "timeout"),
    )


def parameters_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The `parameters` of a request, an input or an output; empty where there are none.

    Raises:
        FieldInvalid: not an object of texts, numbers and truth values.
    """
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict or not set(map(type, parameters.values())) <= SCALARS:
        owner = shown(entry["name"]) if "name" in entry else "the request"
        raise FieldInvalid(
            f"parameters of {owner} must be an object of texts, numbers, true and false"
        )
    return parameters


def flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    """A parameter that is true or false.

    Raises:
        ParameterInvalid: it is neither.
    """
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise ParameterInvalid(f"parameter {name} must be true or false, not {shown(value)}")
    return value


def whole_number(parameters: dict[str, Any], name: str) -> int:
    """A parameter that is a whole number from 0; 0 where it is not given.

    Raises:
        ParameterInvalid: it is something else.
    """
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise ParameterInvalid(
            f"parameter {name} must be a whole number from 0, not {shown(value)}"
        )
    return value


def _header_length(header: bytes, body_length: int) -> int:
    length = int(header) if _is_number(header) else -1
    if not 0 <= length <= body_length:
        raise HeaderLengthInvalid(
            f"inference header size should be in range (0, {body_length}), "
            f"got: {header[:MAX_HEADER_DIGITS].decode('latin-1')}"
        )
    return length


def _is_number(header: bytes) -> bool:
    return header.isdigit() and len(header) <= MAX_HEADER_DIGITS


def _raw_request(
    body: bytes | bytearray, begin: int, spec: TensorSpec, limits: Limits
) -> InferRequest:
    """The body is one item of the model's first input, and every output comes back binary."""
    datatype = datatype_named(spec.datatype)
    shape = checked_shape(spec.name, datatype, [1, *spec.shape], limits)
    num_bytes = len(body) - begin
    data = data_from_bytes(spec.name, datatype, shape, _writable(body), begin, num_bytes)
    tensor = NamedTensor(spec.name, spec.datatype, shape, data)
    return InferRequest(None, [tensor], None, True, 0, 0)


def _writable(body: bytes | bytearray) -> bytearray:
    """torch takes memory that it may write only; a body that came in one piece is copied once."""
    return body if isinstance(body, bytearray) else bytearray(body)


def _inputs(document: dict[str, Any], message: Message, limits: Limits) -> list[NamedTensor]:
    entries = _entries(document, "inputs", limits)
    if not entries:
        raise InputMissing("the request has no inputs")
    reader = _InputReader(message, limits)
    tensors = [reader.read(entry) for entry in entries]
    reader.check_end()
    twice = _twice([tensor.name for tensor in tensors])
    if twice is not None:
        raise InputUnexpected(f"input {shown(twice)} is given twice")
    return tensors


class _InputReader:
    """Reads inputs in their order, and knows where the next raw tensor begins."""

    def __init__(self, message: Message, limits: Limits) -> None:
        self._message, self._limits = message, limits
        self._at, self._end = message.start, len(message.body)
        self._body = _writable(message.body) if self._at < self._end else bytearray()

    def read(self, entry: dict[str, Any]) -> NamedTensor:
        """The tensor that one entry of `inputs` describes."""
        name = _name(entry, "an input")
        parameters = parameters_of(entry)
        datatype = datatype_named(entry.get("datatype"))
        shape = checked_shape(name, datatype, entry.get("shape"), self._limits)
        if _is_binary(name, entry, parameters):
            size = whole_number(parameters, "binary_data_size")
            data = self._cut(name, datatype, shape, size)
        else:
            data = data_from_json(name, datatype, shape, entry["data"], self._message.text)
        return NamedTensor(name, datatype.name, shape, data)

    def check_end(self) -> None:
        """Raises BinarySizeInvalid where bytes are left over."""
        if self._at != self._end:
            raise BinarySizeInvalid(
                f"{self._end - self._message.start} bytes follow the JSON part, the inputs "
                f"account for {self._at - self._message.start}"
            )

    def _cut(self, name: str, datatype: Datatype, shape: tuple[int, ...], size: int) -> Data:
        start, self._at = self._at, self._at + size
        if self._at > self._end:
            raise BinarySizeInvalid(
                f"input {shown(name)} claims {size} bytes of binary data, "
                f"{self._end - start} are left in the body"
            )
        return data_from_bytes(name, datatype, shape, self._body, start, size)


def _is_binary(name: str, entry: dict[str, Any], parameters: dict[str, Any]) -> bool:
    """Whether the elements follow the JSON part.

    Raises:
        FeatureRefused: they are said to lie in shared memory.
        FieldInvalid: they are given in both ways, or in none.
    """
    if "shared_memory_region" in parameters:
        raise FeatureRefused("shared memory is not offered here; send the tensor in the request")
    binary = "binary_data_size" in parameters
    if binary == ("data" in entry):
        how = "both" if binary else "neither"
        raise FieldInvalid(f"input {shown(name)} has {how} data and binary_data_size; give one")
    return binary


def _outputs(
    document: dict[str, Any], binary_output: bool, limits: Limits
) -> list[RequestedOutput] | None:
    entries = _entries(document, "outputs", limits)
    if not entries:
        return None
    outputs = [_output(entry, binary_output) for entry in entries]
    twice = _twice([output.name for output in outputs])
    if twice is not None:
        raise OutputUnknown(f"output {shown(twice)} is asked for twice")
    return outputs


def _output(entry: dict[str, Any], binary_output: bool) -> RequestedOutput:
    name = _name(entry, "an output")
    parameters = parameters_of(entry)
    if "shared_memory_region" in parameters:
        raise FeatureRefused("shared memory is not offered here; outputs come in the answer")
    return RequestedOutput(
        name,
        flag(parameters, "binary_data", binary_output),
        whole_number(parameters, "classification"),
    )


def _entries(document: dict[str, Any], field: str, limits: Limits) -> list[dict[str, Any]]:
    entries = document.get(field)
    if entries is None:
        return []
    if type(entries) is not list or not set(map(type, entries)) <= {dict}:
        raise FieldInvalid(f"{field} must be a list of objects")
    if len(entries) > limits.max_tensors:
        raise TooManyElements(f"{field} has {len(entries)} entries; {limits.max_tensors} may be")
    return entries


def _name(entry: dict[str, Any], owner: str) -> str:
    name = _text(entry, "name")
    if not name:
        raise FieldInvalid(f"{owner} has no name")
    return name


def _text(entry: dict[str, Any], field: str) -> str | None:
    value = entry.get(field)
    if value is not None and (type(value) is not str or len(value) > MAX_TEXT_CHARACTERS):
        raise FieldInvalid(f"{field} must be text of at most {MAX_TEXT_CHARACTERS} characters")
    return value


def _twice(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _refuse_sequences(parameters: dict[str, Any]) -> None:
    if parameters.get("sequence_id") or parameters.get("sequence_start"):
        raise FeatureRefused("sequences are not offered here; requests do not depend on each other")
