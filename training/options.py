"""Settings as options of the command line: one option a field, with its sentence as help."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_PLAIN: Final = (bool, int, float, Path)


def with_fields(
    command: Callable[..., None],
    model: type[BaseModel],
    *,
    flag_of: Callable[[str], str],
    variable_of: Callable[[str], str] | None = None,
    without: Iterable[str] = (),
) -> Callable[..., None]:
    """Let typer call `command(given, **own)`, `given` being the fields that the caller set.

    Args:
        command: its first parameter is `given`, a dictionary; the others are its own options.
        model: each of its fields becomes an option whose default is None, "not given".
        flag_of: what the option of a field is called.
        variable_of: what the variable in the environment is called, where there is one.
        without: fields that are no options.
    """
    names = [name for name in model.model_fields if name not in set(without)]
    own = list(inspect.signature(command).parameters.values())[1:]

    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        command({name: value for name, value in given.items() if value is not None}, **values)

    variables = {name: f"{variable_of(name)}, " if variable_of else "" for name in names}
    fields = [
        _option(name, model.model_fields[name], flag_of(name), variables[name]) for name in names
    ]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        sorted([*own, *fields], key=lambda one: one.kind)
    )
    run.__annotations__ = {one.name: one.annotation for one in [*own, *fields]}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _option(name: str, field: FieldInfo, flag: str, variable: str) -> inspect.Parameter:
    default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "none" if default in ("", None) else default
    choices = f" One of {', '.join(get_args(field.annotation))}." if _is_choice(field) else ""
    text = f"{field.description}{choices} \\[{variable}default {shown}]"
    if field.default is True:
        flag = f"{flag}/--no-{flag[2:]}"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            _kind(field) | None, typer.Option(flag, help=text, show_default=False)
        ],
    )


def _kind(field: FieldInfo) -> Any:
    """What the command line parses; pydantic checks ranges and choices afterwards."""
    annotations = set(_annotations(field.annotation))
    return next((kind for kind in _PLAIN if kind in annotations), str)


def _annotations(annotation: Any) -> Iterator[Any]:
    """The annotation and all that it is made of: `Annotated[int, ...] | None` holds an `int`."""
    yield annotation
    for part in get_args(annotation):
        if isinstance(part, Hashable):
            yield from _annotations(part)


def _is_choice(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal
