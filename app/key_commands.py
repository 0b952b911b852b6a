"""`pytorchlib keys`: make, list and revoke API keys. They need no server, and a server notices."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from app.auth.key import ALL_SCOPES, MEANINGS, BadKey, Key, new_key, scopes_from
from app.auth.outside import line_of
from app.auth.store import KeyStore
from app.auth.watch import KeySources
from app.flags import read_settings
from app.settings import Settings

LIFETIME = re.compile(r"([0-9]{1,5})([hdw])")
HOURS = {"h": 1, "d": 24, "w": 7 * 24}

Home = Annotated[
    Path | None,
    typer.Option("--home", help="The folder of the service. \\[PYTORCHLIB_HOME, default var]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines to read.")]
Name = Annotated[str, typer.Option("--name", "-n", help="Whose it is: histories and logs name it.")]
Scopes = Annotated[
    list[str],
    typer.Option("--scope", "-s", help="What it may do; repeat it for several, or say all."),
]
Lifetime = Annotated[
    str | None,
    typer.Option("--expires-in", help="12h, 90d or 52w; without it the key does not expire."),
]
Line = Annotated[
    bool,
    typer.Option(
        "--line", help="Keep nothing: print the key, and its line for PYTORCHLIB_API_KEYS_FILE."
    ),
]
Which = Annotated[str, typer.Argument(metavar="ID_OR_NAME", help="As `keys list` shows it.")]

SCOPE_HELP = "\n".join(f"- `{scope}`: {MEANINGS[scope]}" for scope in ALL_SCOPES)

commands = typer.Typer(
    name="keys",
    help="Make, list and revoke API keys.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def create(
    name: Name,
    scope: Scopes,
    expires_in: Lifetime = None,
    line: Line = False,
    as_json: Json = False,
    home: Home = None,
) -> None:
    scopes, expires = scopes_from(scope), _expiry(expires_in)
    if line:
        key, token = new_key(name, scopes, expires)
        if expires is not None:
            raise BadKey("a line of PYTORCHLIB_API_KEYS_FILE has no expiry; leave --expires-in out")
    else:
        key, token = KeyStore(_settings(home).home).create(name, scopes, expires)
    if as_json:
        own = {"key": token, "line": line_of(key)} if line else {"key": token}
        typer.echo(json.dumps({**_document("keys.json", key), **own}))
        return
    typer.echo(
        f"The key {key.name!r} may {', '.join(key.scopes)}. It is shown this once:", err=True
    )
    typer.echo(token)
    if line:
        typer.echo("Its line for PYTORCHLIB_API_KEYS_FILE:", err=True)
        typer.echo(line_of(key))
    typer.echo("Send it as the header  Authorization: Bearer KEY", err=True)


create.__doc__ = f"""Make a key and show it, once; a running service takes it within seconds.

Only its hash is kept. Scopes:

{SCOPE_HELP}
"""
commands.command("create")(create)


@commands.command("list")
def list_keys(as_json: Json = False, home: Home = None) -> None:
    """Show every key that a service would know, wherever it comes from."""
    settings = _settings(home)
    sources = KeySources(settings.home, settings.api_keys_file, settings.api_key)
    given = sources.given()
    if as_json:
        typer.echo(json.dumps([_document(source, key) for source, key in given]))
    elif not given:
        typer.echo("There are no keys. `pytorchlib keys create` makes one.")
    else:
        _print_table(given)


@commands.command("revoke")
def revoke(which: Which, as_json: Json = False, home: Home = None) -> None:
    """Let a key open nothing more; a running service refuses it within seconds."""
    key = KeyStore(_settings(home).home).revoke(which)
    if as_json:
        typer.echo(json.dumps(_document("keys.json", key)))
    else:
        typer.echo(f"The key {key.name!r} ({key.id}) is revoked.")


def _settings(home: Path | None) -> Settings:
    """As `serve` reads them, so that both look into the same folder."""
    return read_settings({} if home is None else {"home": home})


def _expiry(lifetime: str | None) -> datetime | None:
    if lifetime is None:
        return None
    parts = LIFETIME.fullmatch(lifetime)
    if parts is None or int(parts[1]) == 0:
        raise BadKey(f"--expires-in is {lifetime[:80]!r}; it must be like 12h, 90d or 52w")
    hours = int(parts[1]) * HOURS[parts[2]]
    return datetime.now(UTC).replace(microsecond=0) + timedelta(hours=hours)


def _document(source: str, key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "source": source,
        "state": key.state(datetime.now(UTC)),
        "created": key.created and key.created.isoformat(),
        "expires": key.expires and key.expires.isoformat(),
    }


def _print_table(given: list[tuple[str, Key]]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"valid": "green", "expired": "yellow", "revoked": "red"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("id", "name", "scopes", "created", "expires", "source", "state"):
        table.add_column(title, overflow="fold")
    for source, key in given:
        state = key.state(datetime.now(UTC))
        scopes = "all" if key.scopes == ALL_SCOPES else ", ".join(key.scopes)
        times = [f"{one:%Y-%m-%d}" if one else "-" for one in (key.created, key.expires)]
        shown = f"[{colours[state]}]{state}[/]"
        table.add_row(key.id, key.name, scopes, *times, source, shown)
    Console().print(table)
