"""The README's examples: every command, option and target is one that there is."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from app.__main__ import commands

ROOT = Path(__file__).resolve().parent.parent


def lines() -> Iterator[str]:
    """Each command of the README's shell blocks, on one line."""
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        yield from re.sub(r"\\\n\s*|(?<=\|)\n\s*", "", block).splitlines()


def examples() -> Iterator[list[str]]:
    """The same as words, comments left out."""
    yield from filter(None, (shlex.split(line, comments=True) for line in lines()))


def arguments_of(words: list[str]) -> list[str]:
    """What follows `pytorchlib`: the command, or the image, whose entry point is the command."""
    return words[words.index("pytorchlib") + 1 :]


OURS = [
    arguments_of(words)
    for words in examples()
    if words[0] == "pytorchlib" or words[:2] == ["docker", "run"]
]


@pytest.mark.parametrize("arguments", OURS, ids=" ".join)
def test_an_example_is_a_command_with_options_that_it_takes(arguments: list[str]) -> None:
    command = typer.main.get_command(commands)
    context = command.make_context("pytorchlib", list(arguments))
    name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    assert found is not None
    if isinstance(found, click.Group):
        return
    found.make_context(name, rest, parent=context)  # raises for an option it does not take


def test_every_target_of_make_is_there() -> None:
    targets = {words[1] for words in examples() if words[0] == "make"}
    assert {"serve", "test", "test-slow", "check", "bench"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
