"""Databases for the tests of jobs: SQLite in a file, and a PostgreSQL cluster of their own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BINARIES = Path("/usr/lib/postgresql")


class Postgres:
    """A cluster that lives as long as the tests, reached through a socket in its folder."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs = folder, programs
        self._num_databases = 0

    def new_database(self) -> str:
        """The URL of a database that nobody has used."""
        self._num_databases += 1
        name = f"jobs{self._num_databases}"
        self._run("createdb", "-h", str(self.folder), "-U", "tester", name)
        return f"postgresql+psycopg://tester@/{name}?host={self.folder}"

    def create(self) -> None:
        data = str(self.folder / "data")
        self._run("initdb", "--auth=trust", "--username=tester", "--no-sync", data)

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off -c max_connections=40"
        self._control("start", "-o", options, "-l", str(self.folder / "log"))

    def stop(self) -> None:
        self._control("stop", "-m", "immediate")

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-w", "-D", str(self.folder / "data"), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        # PostgreSQL refuses to run as root, which is who runs the tests in a container.
        user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        command = [*user, str(self._programs / program), *arguments]
        with (self.folder / "output").open("ab") as output:
            done = subprocess.run(
                command, cwd=self.folder, stdout=output, stderr=output, timeout=60, check=False
            )
        assert done.returncode == 0, (self.folder / "output").read_text()


@contextmanager
def postgres_cluster() -> Iterator[Postgres]:
    """A running cluster; skips the test where PostgreSQL is not installed."""
    programs = sorted(BINARIES.glob("*/bin"))
    if not programs or (os.getuid() == 0 and not shutil.which("runuser")):
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    cluster = Postgres(folder, programs[-1])
    try:
        cluster.create()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
