"""What the commands share: errors of ours become one sentence, and the options that recur.

Imports typer and nothing heavy: the server's own commands are merged with these, so what is
imported here is part of the server's start-up time.
"""

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

OUR_PACKAGES = frozenset({"models", "training", "app"})
"""An exception class defined in one of these carries, by house rule, one sentence for a person."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What a disk says of a file that it has no room for; such errors carry no name."""

HOME = Path("var")
Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar="PYTORCHLIB_HOME",
        help="The folder that holds models, datasets and runs.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="Where to compute: auto, cpu, cuda or cuda:N.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines to read.")]

Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Of the network's class; may be repeated."),
]


class Commands(typer.core.TyperGroup):
    """A group of commands that answers a named error with its sentence and exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the chosen command; an error that is not one of ours keeps its traceback."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            typer.echo(sentence, err=True)
            raise typer.Exit(1) from error


def sentence_of(error: BaseException) -> str | None:
    """The one sentence a person should read for `error`; None if it is a fault of the program."""
    if type(error).__module__.partition(".")[0] in OUR_PACKAGES:
        return str(error)
    if isinstance(error, FileExistsError):
        return f"{error.filename} is a file, and a folder is needed there"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.strerror}: make room, or name another folder with --home"
    return None


def named_values(options: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is JSON where it can be read as such, else text."""
    found: dict[str, Any] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--option takes NAME=VALUE, not {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
