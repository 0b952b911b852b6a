"""The command `pytorchlib`: `serve`, and every command that needs no server.

torch is imported inside the commands, so that `--help` answers at once.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from app import key_commands
from app.flags import read_settings, with_settings
from app.logs import configure_logging
from app.settings import Settings
from training.__main__ import commands

ServeImport = Annotated[
    Path | None,
    typer.Option("--import", help="A .pt or .safetensors file to publish first, if it is new."),
]
ServeNetwork = Annotated[
    str | None, typer.Option("--network", help="The network of --import: torchvision/resnet50, …")
]
ServeName = Annotated[str | None, typer.Option("--name", help="The model's name for --import.")]
ServeLabels = Annotated[
    Path | None, typer.Option("--labels", help="A file with one label a line for --import.")
]
Quickstart = Annotated[
    bool,
    typer.Option("--quickstart", help="Train the model digits if there is none, and show how."),
]


@commands.command("serve")
@with_settings
def serve(
    flags: dict[str, Any],
    quickstart: Quickstart = False,
    import_file: ServeImport = None,
    network: ServeNetwork = None,
    name: ServeName = None,
    labels: ServeLabels = None,
) -> None:
    """Answer HTTP requests until Ctrl-C or SIGTERM."""
    from app.engine.heap import keep_freed_memory
    from app.http.door import EarlyDoor
    from app.http.listener import listen

    if import_file is None and (network, name, labels) != (None, None, None):
        raise typer.BadParameter("--network, --name and --labels go with --import")
    settings = read_settings(flags)
    configure_logging(settings)
    _require_a_key(settings)
    keep_freed_memory()
    # A checkpoint of the operator's own may name a class that lies where the service is started.
    sys.path.append(str(Path.cwd()))
    # Bound before anything slow: a taken port is told at once, and early callers wait in line.
    listener = listen(settings.host, settings.port)
    door = EarlyDoor(listener)
    port = settings.metrics_port
    scraped = [] if port is None else [listen(settings.host, port)]
    if import_file is not None:
        imported = _import_once(settings, import_file, network, name, labels)
        if imported not in settings.preload:
            # Whoever names a file waits for its answers: ready means that it is loaded.
            settings = settings.model_copy(update={"preload": (*settings.preload, imported)})
    sample = _prepare(settings) if quickstart else None

    from app.api.metrics_port import MetricsPort
    from app.http.server import Breakdown
    from app.http.server import serve as serve_app
    from app.main import create_app

    stopping = threading.Event()
    breakdown = Breakdown()
    app = create_app(settings, draining=stopping.is_set, on_broken=breakdown.happened)
    _greet(f"http://{settings.host}:{listener.getsockname()[1]}", sample, app.state.gate.is_open)
    served: Any = app
    for second in scraped:
        served = MetricsPort(
            app, app.state.metrics, second.getsockname()[1], settings.allowed_hosts
        )
    code = serve_app(
        served,
        sockets=[listener, *scraped],
        drain_s=settings.drain_s,
        on_drain=stopping.set,
        on_refusal=app.state.metrics.count_refusal,
        breakdown=breakdown,
        door=door,
    )
    raise typer.Exit(code)


@commands.command("worker")
@with_settings
def worker(flags: dict[str, Any]) -> None:
    """Run jobs until Ctrl-C or SIGTERM, and answer no requests."""
    from app.jobs.worker import work

    settings = read_settings(flags)
    configure_logging(settings)
    sys.path.append(str(Path.cwd()))
    work(settings)


def _require_a_key(settings: Settings) -> None:
    """Refuse to be open to others, unless that is said aloud, and say so before anything slow."""
    from app.http.listener import is_loopback

    if settings.no_auth or is_loopback(settings.host):
        return
    from app.auth.watch import KeySources

    sources = KeySources(settings.home, settings.api_keys_file, settings.api_key)
    sources.require_one(settings.host)


def _import_once(
    settings: Settings,
    weights: Path,
    network: str | None,
    name: str | None,
    labels: Path | None,
) -> str:
    """Publish the file that `serve --import` names, and let it answer, unless it does already.

    Returns:
        The model's name.
    """
    if network is None or name is None:
        raise typer.BadParameter("--import needs --network and --name beside it")
    from models.store import PRODUCTION, ModelStore
    from training.importing import ImportRequest, find_import, publish, read_import

    request, store = (
        ImportRequest(str(weights), network, labels),
        ModelStore(settings.models_folder),
    )
    version = find_import(store, name, request)
    if version is not None:
        typer.echo(f"{weights.name} is {version}, imported before")
        return name
    version = publish(read_import(request), store, name)
    # Whoever starts with another file wants that one to answer.
    if store.aliases(name).get(PRODUCTION) != version.number:
        store.move_alias(name, PRODUCTION, version.number, why="imported at start")
    typer.echo(f"{weights.name} is {version} now")
    return name


def _prepare(settings: Settings) -> Path:
    from training.quickstart import prepare

    return prepare(settings.home)


def _greet(address: str, sample: Path | None, is_open: bool) -> None:
    typer.echo(f"Serving on {address}; its routes are described at {address}/docs")
    if sample is not None:
        key = "" if is_open else "-H 'Authorization: Bearer KEY' "
        typer.echo(f"Try:  curl {key}-F file=@{sample} {address}/v1/models/digits/predict")


commands.add_typer(key_commands.commands)


def main() -> None:
    """The console script."""
    _spin_briefly()
    commands()


def _spin_briefly() -> None:
    """Let threads of torch that wait for each other give their core up soon.

    Others need it: decoding, the event loop, whatever else runs there. Read when torch is loaded;
    the processes of jobs get fewer.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


if __name__ == "__main__":
    main()
