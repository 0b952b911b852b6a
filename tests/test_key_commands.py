"""`pytorchlib keys` as a person types it, and what `serve` says where there is no key."""

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.__main__ import commands
from app.auth.key import MADE_HERE
from app.auth.outside import keys_in
from app.auth.ring import KeyRing
from app.auth.scope import ALL_SCOPES
from app.auth.store import KeyStore
from app.flags import BadSetting, read_settings

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, **variables: str) -> Result:
    """The command in this process, `keys` before its arguments."""
    environment: dict[str, Any] = {"COLUMNS": "200", **variables}
    return CliRunner().invoke(commands, ["keys", *map(str, arguments)], env=environment)


def test_a_key_is_shown_once_alone_on_its_line(tmp_path: Path) -> None:
    done = run("create", "-n", "ci", "-s", "predict", "--scope", "evaluate", "--home", tmp_path)
    assert done.exit_code == 0
    assert MADE_HERE.fullmatch(done.stdout.encode().strip())
    assert "may predict, evaluate" in done.stderr
    assert done.stdout.strip() not in run("list", "--home", tmp_path).output
    [key] = KeyStore(tmp_path).read()
    assert (key.name, key.scopes, key.expires) == ("ci", ("predict", "evaluate"), None)


def test_list_shows_every_source_and_what_has_become_of_each(tmp_path: Path) -> None:
    for name in ("gone", "stays"):
        run("create", "-n", name, "-s", "all", "--expires-in", "2w", "--home", tmp_path)
    run("revoke", "gone", "--home", tmp_path)
    (tmp_path / "mounted").write_text(f"ci metrics {'0' * 64}\n")
    variables = {
        "PYTORCHLIB_API_KEY": "a-key-from-the-environment",
        "PYTORCHLIB_API_KEYS_FILE": str(tmp_path / "mounted"),
    }
    table = run("list", "--home", tmp_path, **variables).stdout
    assert re.search(r"gone +all .* keys\.json +revoked", table)
    assert re.search(r"stays +all .* keys\.json +valid", table)
    assert re.search(r"ci +metrics .* mounted +valid", table)
    assert re.search(r"environment +all .* PYTORCHLIB_API_KEY +valid", table)
    assert "a-key-from" not in table
    listed = json.loads(run("list", "--json", "--home", tmp_path, **variables).stdout)
    assert [one["name"] for one in listed] == ["gone", "stays", "ci", "environment"]


def test_create_for_machines(tmp_path: Path) -> None:
    options = ["-n", "ci", "-s", "all", "--expires-in", "90d", "--json", "--home", tmp_path]
    made = json.loads(run("create", *options).stdout)
    assert made["scopes"] == list(ALL_SCOPES)
    lifetime = datetime.fromisoformat(made["expires"]) - datetime.fromisoformat(made["created"])
    assert lifetime.days in (89, 90)
    assert KeyRing(KeyStore(tmp_path).read()).find(made["key"].encode(), 0.0) is not None
    assert json.loads(run("revoke", made["id"], "--json", "--home", tmp_path).stdout)["state"] == (
        "revoked"
    )


def test_a_line_for_a_mounted_secret_is_kept_nowhere(tmp_path: Path) -> None:
    done = run("create", "-n", "ci", "-s", "predict", "--line", "--home", tmp_path)
    token, line = done.stdout.split("\n", 1)
    (tmp_path / "mounted").write_text(line)
    assert KeyRing(keys_in(tmp_path / "mounted")).find(token.encode(), 0.0) is not None
    assert not (tmp_path / "keys.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["create", "-n", "ci", "-s", "root"], 1, "'root' is no scope; the scopes are predict"),
        (["create", "-n", "a b", "-s", "all"], 1, "cannot be the name of a key"),
        (["create", "-n", "ci", "-s", "all", "--expires-in", "soon"], 1, "like 12h, 90d or 52w"),
        (["create", "-n", "ci", "-s", "all", "--expires-in", "0d"], 1, "like 12h, 90d or 52w"),
        (["create", "-n", "c", "-s", "all", "--line", "--expires-in", "1d"], 1, "has no expiry"),
        (["revoke", "nobody"], 1, "`pytorchlib keys list` shows them all"),
        (["create", "-n", "ci"], 2, "--scope"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    done = run(*arguments, "--home", tmp_path)
    assert done.exit_code == code
    assert sentence in done.stderr
    assert "Traceback" not in done.output


def test_help_explains_each_scope() -> None:
    text = run("create", "--help").output
    assert all(scope in text for scope in ALL_SCOPES)
    assert "list" in run("--help").output


def test_a_secret_has_no_flag_and_no_sentence_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--api-key " not in CliRunner().invoke(commands, ["serve", "--help"]).output
    monkeypatch.setenv("PYTORCHLIB_API_KEY", "a-key-from-the-environment")
    assert "a-key" not in repr(read_settings({}))
    with pytest.raises(BadSetting, match="PYTORCHLIB_API_KEY: ") as refused:
        read_settings({"api_key": 123456789})
    assert "123456789" not in str(refused.value)


def test_optional_settings_from_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "API_KEYS_FILE", "METRICS_PORT"):
        monkeypatch.setenv(f"PYTORCHLIB_{name}", "")
    settings = read_settings({"no_auth": True})
    assert (settings.api_key, settings.api_keys_file, settings.metrics_port) == (None, None, None)
    assert settings.no_auth
    help_text = CliRunner().invoke(commands, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for flag in ("--no-auth", "--api-keys-file", "--metrics-port"):
        assert flag in help_text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "Others can reach 0.0.0.0, and there is no valid key"),
        (["--host", "0.0.0.0", "--api-keys-file", "absent"], "no valid key"),
        (["--host", "::"], "Others can reach ::"),
    ],
)
def test_serve_refuses_to_be_open_to_others(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--home", str(tmp_path)]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "--no-auth" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
