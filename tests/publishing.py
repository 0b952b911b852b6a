"""Kills a writer of the model store at each of its steps; run by `tests/test_store_kills.py`.

`python tests/publishing.py kill|stop|race FOLDER` prints one JSON object a trial. It forks, which
is cheap and safe here because nothing in this process ever starts a thread.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from models import checkpoint, networks
from models.manifest import Lineage, Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import PRODUCTION, ModelStore, StoreBusy

OPTIONS = {"inputs": 2, "num_classes": 2, "hidden": [2]}
# Python announces these before it asks the system; writes and syncs lie between them.
STEPS = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir"),
    *("os.scandir", "fcntl.flock", "shutil.rmtree", "glob.glob"),
}
Operation = Callable[[ModelStore], object]


def writing(seed: int, run: str | None = None) -> Callable[[Path], Manifest]:
    torch.manual_seed(seed)
    network = networks.build("mlp", OPTIONS)
    manifest = Manifest(
        network=NetworkSpec(name="mlp", options=OPTIONS),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [2]}]),
        labels=("no", "yes"),
        lineage=Lineage(run=run),
    )
    return lambda folder: checkpoint.save(folder, network, manifest)


def publish_run(store: ModelStore) -> object:
    return store.publish("digits", writing(7, run="r"), run="r")


OPERATIONS: dict[str, Operation] = {
    "publish": publish_run,
    "delete": lambda store: store.delete("digits", 2),
    "move": lambda store: store.move_alias("digits", PRODUCTION, 2),
}


def forked(operation: Operation, folder: Path, step: int = -1, signal_number: int = 0) -> int:
    """Start `operation` in a child that sends itself the signal at its `step`th step."""
    child = os.fork()
    if child:
        return child
    counter = itertools.count(1)

    def watch(event: str, _: tuple[Any, ...]) -> None:
        if event in STEPS and next(counter) == step:
            os.kill(os.getpid(), signal_number)

    sys.addaudithook(watch)
    try:
        operation(ModelStore(folder, lock_timeout_s=30))
    except BaseException as error:  # what the parent is told is the exit status
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def new_store(folder: Path, number: int, num_versions: int) -> ModelStore:
    store = ModelStore(folder / str(number), lock_timeout_s=0.2)
    for seed in range(num_versions):
        store.publish("digits", writing(seed))
    return store


def faults_of(store: ModelStore) -> list[str]:
    """What no reader may ever see."""
    faults = []
    for number in store.versions("digits"):
        try:
            checkpoint.load(store.version("digits", number).folder)
        except Exception as error:  # a fault of any kind is a finding
            faults.append(f"version {number} does not load: {type(error).__name__}: {error}")
    if store.versions("digits"):
        held = store.aliases("digits")
        faults += [f"{a} holds {n}" for a, n in held.items() if n not in store.versions("digits")]
    return faults


def faults_after(store: ModelStore, name: str) -> list[str]:
    """What must hold once the same thing was done again by somebody who lived."""
    faults = faults_of(store)
    if list((store.folder / "digits").glob(".staging-*")):
        faults.append("something is left of the dead writer")
    if PRODUCTION not in store.aliases("digits"):
        faults.append("no production")
    numbers = store.versions("digits")
    runs = [store.version("digits", number).manifest().lineage.run for number in numbers]
    if name == "publish" and runs.count("r") != 1:
        faults.append(f"{runs.count('r')} versions of the run")
    if name == "delete" and numbers != [1]:
        faults.append(f"versions {numbers}")
    if name == "delete" and store.publish("digits", writing(9)).number != 3:
        faults.append("a number was used again")
    return faults


def kill(folder: Path) -> Iterator[dict[str, Any]]:
    """Kill each operation at every step, look, do it again, and look again."""
    for name, versions in [("publish", 0), ("publish", 2), ("delete", 2), ("move", 2)]:
        for step in itertools.count(1):
            store = new_store(folder / f"{name}-{versions}", step, versions)
            _, status = os.waitpid(forked(OPERATIONS[name], store.folder, step, signal.SIGKILL), 0)
            faults = faults_of(store)
            if os.WIFSIGNALED(status):
                again(store, name)
            faults += faults_after(store, name)
            yield {"operation": name, "versions": versions, "step": step, "faults": faults}
            if not os.WIFSIGNALED(status):
                break


def again(store: ModelStore, name: str) -> None:
    if name != "delete" or 2 in store.versions("digits"):
        OPERATIONS[name](store)
    store.sweep()


def stop(folder: Path) -> Iterator[dict[str, Any]]:
    """Stop a publisher at every step, let another publish the same run, let the first go on."""
    for step in itertools.count(1):
        store = new_store(folder, step, 1)
        child = forked(publish_run, store.folder, step, signal.SIGSTOP)
        _, status = os.waitpid(child, os.WUNTRACED)
        stopped, faults = os.WIFSTOPPED(status), faults_of(store)
        busy = False
        if stopped:
            try:
                publish_run(store)
            except StoreBusy:
                busy = True
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
        if status:
            faults.append(f"the stopped writer ended with {status}")
        faults += faults_after(store, "publish")
        yield {"operation": "stop", "step": step, "busy": busy, "faults": faults}
        if not stopped:
            break


def race(folder: Path) -> Iterator[dict[str, Any]]:
    """Two processes publish twenty versions each; five are the same in both."""

    def publish_twenty(start: int) -> Operation:
        return lambda store: [
            store.publish("digits", writing(seed)) for seed in range(start, start + 20)
        ]

    children = [forked(publish_twenty(start), folder) for start in (0, 15)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    store = ModelStore(folder)
    faults = faults_of(store) + [f"ended with {status}" for status in statuses if status]
    numbers = store.versions("digits")
    if numbers != list(range(1, 36)):
        faults.append(f"versions {numbers}")
    if len(store.history("digits")) != 1:
        faults.append("production moved more than once")
    yield {"operation": "race", "step": 0, "faults": faults}


if __name__ == "__main__":
    torch.set_num_threads(1)
    trials = {"kill": kill, "stop": stop, "race": race}[sys.argv[1]]
    for trial in trials(Path(sys.argv[2])):
        sys.stdout.write(json.dumps(trial) + "\n")
