"""`python -m benchmarks`: what can be measured here; runs all that needs nothing else installed.

Each is a program of its own with options of its own (`python -m benchmarks.serve --help`). The runs
started here are short; the figures that count come from the full ones, on a quiet machine.
"""

import argparse
import ast
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Program:
    """One benchmark.

    Attributes:
        name: of its module.
        short: arguments of a run of a minute or a few; None where it is only run by itself.
    """

    name: str
    short: tuple[str, ...] | None

    @property
    def sentence(self) -> str:
        """What it measures, as its own file says."""
        path = FOLDER / f"{self.name}.py"
        if not path.is_file():
            path = FOLDER / self.name / "__main__.py"
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        return text.split("\n\n")[0].replace("\n", " ")


PROGRAMS = (
    Program("train", ("--rounds", "3", "--seeds", "1")),
    Program("start", ("--rounds", "3")),
    Program("execution", ("--rounds", "3")),
    Program("v2_tensors", ()),
    Program("batcher", ("--rounds", "5")),
    Program("serve", ("--rounds", "3", "--seconds", "2")),
    Program("poisson", ("--rounds", "3", "--seconds", "2")),
    Program("evaluate", ("--rounds", "3", "--seconds", "5")),
    Program("jobs", ("--rounds", "5")),
    Program("beside", ("--rounds", "3", "--seconds", "2")),
    Program("growth", ("--rounds", "2")),
    Program("swap", ("--swaps", "50", "--steady", "10")),
    Program("peers", None),
    Program("cuda", ()),
)


def main(arguments: Sequence[str]) -> int:
    """List the programs, and run what was asked for; the number of those that failed."""
    options = argparse.ArgumentParser(description=__doc__)
    names = [program.name for program in PROGRAMS]
    options.add_argument("names", nargs="*", choices=[[], *names], help="which; all but peers")
    options.add_argument("--list", action="store_true", help="run nothing")
    chosen = options.parse_args(arguments)
    for program in PROGRAMS:
        print(f"{program.name:10}  {program.sentence}")
    if chosen.list:
        return 0
    asked = chosen.names or [program.name for program in PROGRAMS if program.short is not None]
    failed = [program.name for program in PROGRAMS if program.name in asked and not run(program)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def run(program: Program) -> bool:
    """Whether its short run ended well."""
    command = ["-m", f"benchmarks.{program.name}", *(program.short or ())]
    print(f"\n$ python {' '.join(command)}\n", flush=True)
    return not subprocess.run([sys.executable, *command], cwd=FOLDER.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
