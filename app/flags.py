"""The settings as options of the command line: one flag a field, with its sentence as help."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from app.settings import Settings

_FLAG_TYPES: Final = (Path, int, float, bool)


class BadSetting(Exception):
    """A flag, a variable or a line of `.env` has a value that the setting does not take."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Let `command(settings, **own)` be called by typer with one flag for each setting as well."""
    own = [one for one in inspect.signature(command).parameters.values() if one.name != "settings"]

    def run(**values: Any) -> None:
        flags = {name: values.pop(name, None) for name in Settings.model_fields}
        command(read_settings(flags), **values)

    fields = [
        _option(name, field)
        for name, field in Settings.model_fields.items()
        if not is_secret(field)
    ]
    run.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in [*own, *fields]}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def read_settings(flags: dict[str, Any]) -> Settings:
    """Settings from `flags` (None where not given), then the environment, then `.env`.

    Raises:
        BadSetting: a value is out of range or of another type; the sentence names the setting.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        if is_secret(Settings.model_fields.get(name)):
            raise BadSetting(f"{variable_of(name)}: {first['msg']}") from None
        raise BadSetting(
            f"{flag_of(name)} or {variable_of(name)} is {first['input']!r}: {first['msg']}"
        ) from None


def is_secret(field: FieldInfo | None) -> bool:
    """Whether the setting has no flag: other users of the machine read those in its processes."""
    return field is not None and SecretStr in (field.annotation, *get_args(field.annotation))


def flag_of(name: str) -> str:
    """`max_body_bytes` -> `--max-body-bytes`."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """`max_body_bytes` -> `PYTORCHLIB_MAX_BODY_BYTES`."""
    return f"{Settings.model_config['env_prefix']}{name.upper()}"


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kinds = (field.annotation, *get_args(field.annotation))
    kind: Any = next((one for one in kinds if one in _FLAG_TYPES), str)
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "none" if default in ("", None) else default
    help_text = f"{field.description} \\[{variable_of(name)}, default {shown}]"
    option = typer.Option(flag_of(name), help=help_text, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
