"""What pydantic finds wrong with a request, as a person would say it: field, bound, value."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

MAX_SHOWN: Final = 60
_KINDS: Final[Mapping[str, str]] = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
}
"""By the first word of pydantic's name of an error: what should have come."""
_BOUNDS: Final[Mapping[str, str]] = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "literal_error": "{expected}",
    "enum": "{expected}",
}
_LENGTHS: Final[Mapping[str, str]] = {
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
}


def complaint(details: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """One sentence for every field at fault, and the name of the first of them.

    Args:
        details: as `errors()` of pydantic's `ValidationError` gives them.
    """
    firsts: dict[Any, Mapping[str, Any]] = {}
    for detail in details:
        # A field that may be one of several things complains about each.
        firsts.setdefault(detail["loc"][:1], detail)
    first = details[0]
    field = None if first["type"] == "json_invalid" else _path(first["loc"]) or None
    return " ".join(map(_sentence, firsts.values())), field


def _sentence(detail: Mapping[str, Any]) -> str:
    kind, where, context = detail["type"], detail["loc"], detail.get("ctx", {})
    if kind == "json_invalid":
        at = f", at character {where[0]}" if where else ""
        return f"The body is no JSON: {context['error']}{at}."
    if not where:
        return "The body must be a JSON object, sent with `Content-Type: application/json`."
    name, value = f"`{_path(where)}`", detail.get("input")
    if kind == "missing":
        return f"{name} is missing."
    if kind == "extra_forbidden":
        return f"{name} is no field here."
    if kind in _LENGTHS and isinstance(value, str | list):
        return f"{name} must have {_LENGTHS[kind].format(**context)}, not {len(value)}."
    if wanted := _wanted(kind, context):
        return f"{name} must be {wanted}, not {_shown(value)}."
    if kind == "value_error":
        return f"{name}: {context['error']}."
    return f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}, and it is {_shown(value)}."


def _wanted(kind: str, context: Mapping[str, Any]) -> str | None:
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    first, _, rest = kind.partition("_")
    is_type = rest in ("type", "parsing", "from_float", "number", "attributes_type", "unicode")
    return _KINDS.get(first) if is_type else None


def _path(where: Sequence[Any]) -> str:
    """`rule`, `min_change` -> `rule.min_change`; `top_k`, 0 -> `top_k[0]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in where]
    return "".join(parts).removeprefix(".")


def _shown(value: Any) -> str:
    """The value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
