"""A device that answers no more ends the process, and one that only stood still does not.

Real processes that serve a network of the operator's own, which does what its input asks for.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore

pytestmark = pytest.mark.slow

DEADLINE_S = 60.0
INFER = "/v2/models/wish/infer"
FINE, SLOW, LOST, NEVER = 0.0, 1.0, 2.0, 3.0
NETWORK = """
import time, torch
from torch import nn

class Wish(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x):
        wish = float(x.max())
        if wish == 2.0:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        until = time.thread_time() + (0.3 if wish == 1.0 else 0.0)
        while time.thread_time() < until or wish == 3.0:
            self.layer(x) if wish == 1.0 else time.sleep(1.0)
        return self.layer(x)
"""


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"wish_{folder.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(folder)
    manifest = Manifest(
        network=NetworkSpec(name=f"{name}:Wish", options={}),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [1]}]),
        labels=("no", "yes"),
    )
    network = networks.build(f"{name}:Wish", {})
    store = ModelStore(folder / "var" / "models")
    store.publish("wish", lambda at: checkpoint.save(at, network, manifest))


class Service:
    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.client = httpx.Client(base_url=address, timeout=DEADLINE_S)

    def ask(self, wish: float, timeout_ms: float = 30_000) -> httpx.Response:
        tensor = {"name": "input", "shape": [1, 1], "datatype": "FP32", "data": [wish]}
        headers = {"X-Request-Timeout-Ms": str(timeout_ms)}
        return self.client.post(INFER, json={"inputs": [tensor]}, headers=headers)

    def ask_many(self, wishes: list[float]) -> list[int]:
        """Their statuses; 0 where nobody answered."""
        statuses = [0] * len(wishes)

        def ask(index: int) -> None:
            statuses[index] = self.ask(wishes[index]).status_code

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(wishes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        return statuses


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Service]:
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--preload", "wish", *options]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = next(line for line in process.stdout if line.startswith("Serving on")).split()[2]
        service = Service(process, address.rstrip(";"))
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until and not is_ready(service):
            time.sleep(0.05)
        yield service
        service.client.close()
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        if process.stdout is not None:
            process.stdout.close()


def is_ready(service: Service) -> bool:
    try:
        return service.client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("wish", [LOST, NEVER])
def test_a_lost_device_answers_everybody_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: float
) -> None:
    publish(tmp_path, monkeypatch)
    with serving(tmp_path, "--stuck-after-s", "1", "--max-batch-items", "1") as service:
        assert service.ask(FINE).status_code == 200
        statuses = service.ask_many([wish, SLOW, SLOW, wish])
        assert set(statuses) <= {200, 503}
        assert 503 in statuses
        assert service.process.wait(DEADLINE_S) == 70


def test_a_network_that_took_long_lately_does_not_hold_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it was quick as well: nobody could end a forward there that never returns."""
    publish(tmp_path, monkeypatch)
    with serving(tmp_path, "--stuck-after-s", "1", "--max-batch-items", "1") as service:
        assert {service.ask(wish).status_code for wish in (FINE, SLOW, FINE)} == {200}
        assert service.ask(NEVER).status_code == 503
        assert service.process.wait(DEADLINE_S) == 70


def test_a_process_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, monkeypatch)
    with serving(tmp_path, "--stuck-after-s", "4") as service:
        for _ in range(4):
            assert service.ask(SLOW).status_code == 200
        asking = threading.Thread(target=service.ask, args=(SLOW,))
        asking.start()
        time.sleep(0.2)
        service.process.send_signal(signal.SIGSTOP)
        time.sleep(8.0)
        service.process.send_signal(signal.SIGCONT)
        asking.join(DEADLINE_S)
        # Time in which it stood still is no batch time: nobody is refused for it afterwards.
        answer = service.ask(SLOW, timeout_ms=2000)
        assert answer.status_code == 200, answer.text
        assert service.ask_many([SLOW] * 4) == [200] * 4
        assert service.client.get("/readyz").status_code == 200
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(DEADLINE_S) == 0
