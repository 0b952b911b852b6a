"""The settings as options of the command line, and how a bad one is told."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, get_args

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from app.settings import Settings
from training.options import with_fields

Own = ParamSpec("Own")


class BadSetting(Exception):
    """A flag, a variable or a line of `.env` has a value that the setting does not take."""


def with_settings(
    command: Callable[Concatenate[dict[str, Any], Own], None],
) -> Callable[..., None]:
    """Let typer call `command(flags, **own)`; each setting is a flag, and `flags` those given."""
    secrets = [name for name, field in Settings.model_fields.items() if is_secret(field)]
    return with_fields(command, Settings, flag_of=flag_of, variable_of=variable_of, without=secrets)


def read_settings(flags: dict[str, Any]) -> Settings:
    """Settings from `flags`, then the environment, then `.env`.

    Raises:
        BadSetting: a value is out of range or of another type; the sentence names the setting.
    """
    try:
        return Settings(**flags)
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
