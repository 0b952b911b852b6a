"""What a benchmark tells: tables for people, one line of JSON for programs, a file to keep."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from benchmarks.machine import Machine

RESULTS = Path(__file__).resolve().parent / "results"
OPENING, CLOSING = "```json\n", "\n```\n"


@dataclass(frozen=True, slots=True)
class Table:
    """A heading and rows; the first row names the columns."""

    heading: str
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return f"## {self.heading}\n\n{aligned(self.rows)}"


@dataclass(frozen=True, slots=True)
class Record:
    """One run of a benchmark.

    Attributes:
        name: begins the file's name.
        command: as it was typed, without paths.
        method: sentences on how it was measured.
        tables: for people.
        figures: the same and more, for programs.
    """

    name: str
    command: str
    machine: Machine
    method: Sequence[str]
    tables: Sequence[Table]
    figures: Mapping[str, Any]
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __str__(self) -> str:
        date = f"{self.began:%Y-%m-%d %H:%M} UTC"
        facts = [
            f"Command: `{self.command}`",
            f"Machine: {self.machine.sentence()}",
            f"Date: {date}; commit {commit()}",
            *self.method,
        ]
        listed = "\n".join(f"- {fact}" for fact in facts)
        tables = "\n\n".join(str(table) for table in self.tables)
        return f"# {self.name}\n\n{listed}\n\n{tables}\n"

    def line(self) -> str:
        """Everything as one line of JSON; what is not a finite number is null."""
        document = {
            "benchmark": self.name,
            "command": self.command,
            "machine": self.machine.as_dict(),
            "date": self.began.isoformat(timespec="seconds"),
            "commit": commit(),
            **self.figures,
        }
        return orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS).decode()

    def show(self, *, write: bool) -> None:
        """Print the tables and the line of JSON, and keep them where that is wanted."""
        print(self)
        print(self.line())
        if write:
            tell(f"written to benchmarks/results/{self.write().name}")

    def write(self, folder: Path = RESULTS) -> Path:
        """Keep it as a file of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.began:%Y-%m-%d-%H%M}-{self.name}.md"
        path.write_text(f"{self}\n{OPENING}{self.line()}{CLOSING}")
        return path


def document_in(result: str) -> dict[str, Any]:
    """The JSON document of a kept result, from its text.

    Raises:
        ValueError: there is none.
    """
    _, opening, rest = result.partition(OPENING)
    if not opening:
        raise ValueError("there is no JSON document in this result")
    document: dict[str, Any] = orjson.loads(rest.partition(CLOSING)[0])
    return document


def command_of(program: str, arguments: Sequence[str]) -> str:
    """What was typed, without paths: they say nothing to others."""
    shown = (word for word in arguments if "/" not in word and word != "--data")
    return " ".join([f"python -m benchmarks.{program}", *shown])


def tell(line: str) -> None:
    """To whoever watches."""
    print(line, file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table that reads well as text and as Markdown."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def commit() -> str:
    """The short name of the commit, with `+` where files were changed since; empty without git."""
    folder = Path(__file__).resolve().parent
    try:
        name = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return name + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
