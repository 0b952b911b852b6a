"""The README's examples: every command is one there is, with options that it takes.

What the commands do is shown elsewhere (`test_journey`, `test_commands`, `test_transfer`); here
nothing is run, because some examples need Docker, a network, or a file that only a reader has.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from app.__main__ import commands

ROOT = Path(__file__).resolve().parent.parent


def examples() -> Iterator[list[str]]:
    """Each line of the README's shell blocks as words, comments left out."""
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def arguments_of(words: list[str]) -> list[str]:
    """What follows `pytorchlib`, or the image's name, whose entry point is the same command."""
    start = words.index("IMAGE" if words[0] == "docker" else "pytorchlib")
    return words[start + 1 :]


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
