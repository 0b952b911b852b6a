"""What a newcomer types first: locks that are whole, make's sentences, the image, the wheel."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-build.lock")
PACKAGES = ("app", "models", "training")


def locked(lock: str) -> dict[str, list[Requirement]]:
    """Name -> the lines that pin it; a name has several where platforms or Pythons differ."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / lock).read_text().splitlines():
        if re.match(r"[a-z0-9]", line):
            requirement = Requirement(line.rstrip(" \\"))
            found.setdefault(requirement.name, []).append(requirement)
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_line_is_pinned_and_hashed(lock: str) -> None:
    entries = re.split(r"^(?=[a-z0-9])", (ROOT / lock).read_text(), flags=re.MULTILINE)
    for entry in filter(None, entries):
        assert re.match(r"[a-z0-9-]+==[^ ]+ ", entry), entry
        assert "--hash=sha256:" in entry, entry


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_host(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|--index-url|--extra-index-url|--find-links| @ ", text)


def with_extras(wanted: list[str]) -> Iterator[Requirement]:
    """Every requirement; where the project names itself with extras, those of the extras."""
    for requirement in map(Requirement, wanted):
        if requirement.name != PROJECT["project"]["name"]:
            yield requirement
        for extra in requirement.extras if requirement.name == PROJECT["project"]["name"] else ():
            yield from with_extras(PROJECT["project"]["optional-dependencies"][extra])


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        ("requirements.lock", PROJECT["project"]["dependencies"]),
        ("requirements.lock", ["pytorchlib[postgresql,tracing]"]),
        ("requirements-dev.lock", PROJECT["project"]["dependencies"]),
        ("requirements-dev.lock", PROJECT["project"]["optional-dependencies"]["dev"]),
        ("requirements-build.lock", PROJECT["dependency-groups"]["build"]),
    ],
)
def test_a_lock_follows_the_project_file(lock: str, wanted: list[str]) -> None:
    pins = locked(lock)
    for requirement in with_extras(wanted):
        assert requirement.name in pins, f"{requirement.name} is not in {lock}: run `make lock`"
        for pin in pins[requirement.name]:
            version = str(pin.specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{pin} does not meet {requirement}"


def test_what_is_served_is_what_is_tested() -> None:
    tested = locked("requirements-dev.lock")
    for name, pins in locked("requirements.lock").items():
        assert pins == tested[name], f"{name} differs between the locks: run `make lock`"


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, though these tests may run under make themselves."""
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    command = ["make", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)


def make_fails(folder: Path, target: str, python: str) -> str:
    """Run a target with `python` as the interpreter's source; return what make says."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", *LOCKS):
        (folder / name).touch()
    fake = folder / "fake-python"
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{python}; exec(sys.argv[2])" "$@"\n')
    fake.chmod(0o755)
    done = run_make("-C", str(folder), target, "PYTHON=./fake-python")
    assert done.returncode != 0
    assert not (folder / ".venv").exists()
    return done.stderr + done.stdout


def test_an_old_python_is_told_what_to_do(tmp_path: Path) -> None:
    said = make_fails(
        tmp_path, "serve", "import sys; sys.version_info = (3, 9); sys.version = '3.9.2'"
    )
    assert "needs Python 3.11 or newer, and ./fake-python is 3.9.2" in said
    assert "make serve PYTHON=python3.12" in said


def test_a_python_without_venv_is_told_what_to_do(tmp_path: Path) -> None:
    said = make_fails(tmp_path, "setup", "import sys; sys.modules['ensurepip'] = None")
    assert "apt-get install python3-venv" in said


def test_make_knows_every_target_once_and_says_what_it_does() -> None:
    listed = run_make("-C", str(ROOT))
    targets = re.findall(r"^  ([a-z-]+) +\w", listed.stdout, re.MULTILINE)
    [phony] = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed.stderr == ""
    assert targets == phony.split()
    called = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert called == ["check", "test", "test-slow"]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile: (name, the rest of the line)."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    parts = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]
    return [re.findall(r"^([A-Z]+) (.*)", part, re.MULTILINE) for part in parts]


def test_the_image_copies_only_what_is_there_and_let_in() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = {
        source
        for name, rest in itertools.chain(*stages())
        for source in rest.split()[:-1]
        if name == "COPY" and not rest.startswith("--from")
    }
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)
    assert copied > set(PACKAGES)


def test_the_image_runs_as_nobody_in_exec_form() -> None:
    final = dict(stages()[-1])
    assert final["USER"] == "10001:10001"
    assert json.loads(final["ENTRYPOINT"]) == ["pytorchlib"]
    assert json.loads(final["CMD"]) == ["serve"]
    assert json.loads(final["HEALTHCHECK"].split("CMD ")[1])[0] == "python"
    assert {"/var/lib/pytorchlib", "/var/cache/pytorchlib"} == set(json.loads(final["VOLUME"]))
    assert "PYTORCHLIB_HOST=0.0.0.0" in final["ENV"]
    assert "PYTORCHLIB_HOME=/var/lib/pytorchlib" in final["ENV"]


def test_the_compose_file_publishes_on_loopback_only() -> None:
    text = (ROOT / "compose.yaml").read_text()
    assert re.findall(r"ports: (.*)", text) == ['["127.0.0.1:8000:8000"]']
    assert "read_only: true" in text
    assert "cap_drop: [ALL]" in text


@pytest.mark.parametrize("name", ["Dockerfile", "SECURITY.md"])
def test_every_variable_named_is_a_setting(name: str) -> None:
    named = set(re.findall(r"PYTORCHLIB_([A-Z_]+)", (ROOT / name).read_text()))
    assert {variable.lower() for variable in named} <= Settings.model_fields.keys()


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel, "--wheel-dir", tmp_path, source], check=True, timeout=120)

    [path] = tmp_path.glob("pytorchlib-*.whl")
    held = set(zipfile.ZipFile(path).namelist())
    files = {
        path for package in PACKAGES for path in (source / package).rglob("*") if path.is_file()
    }
    wanted = {path.relative_to(source).as_posix() for path in files if path.suffix != ".pyc"}
    assert wanted <= held, wanted - held
    [entry_points] = [name for name in held if name.endswith("entry_points.txt")]
    commands = zipfile.ZipFile(path).read(entry_points).decode()
    assert "pytorchlib = app.__main__:main" in commands
