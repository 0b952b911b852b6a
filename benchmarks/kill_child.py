"""The child of a job that kills itself at its n-th file operation: `-m benchmarks.kill_child N`.

Only operations on snapshots count. Without a kill it says on standard error how many there were.
"""

import itertools
import os
import signal
import sys
from typing import Any, Final

from app.jobs import work

# Python announces these before it asks the system; writes and syncs lie between them.
STEPS: Final = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"),
    *("os.link", "shutil.rmtree", "shutil.copytree"),
}


def main() -> None:
    """Carry out the order, and die on the way."""
    wanted, counter = int(sys.argv[1]), itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STEPS and any(_is_of_snapshots(one) for one in arguments):
            if next(counter) == wanted:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    work.main()
    sys.stderr.write(f"operations {next(counter) - 1}\n")
    sys.stderr.flush()
    os._exit(0)


def _is_of_snapshots(argument: object) -> bool:
    return isinstance(argument, str | os.PathLike) and "snapshots" in os.fspath(argument)


if __name__ == "__main__":
    main()
