"""Webhooks: where they may go, what they say, and that each one comes, whoever dies meanwhile."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import ROOT
from standardwebhooks import Webhook as Standard

from app.errors import DatabaseUnavailable
from app.jobs.courier import Courier
from app.jobs.database import Database
from app.jobs.destination import DestinationRefused, Destinations
from app.jobs.job import Job, JobError, Kind, NewJob
from app.jobs.outbox import Outbox
from app.jobs.store import JobStore
from app.jobs.webhook import SecretUnfit, secret_bytes
from app.jobs.worker import open_courier
from app.settings import Settings
from benchmarks.system import free_port, is_ready
from tests.databases import Postgres, postgres_cluster

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwJfKQ9r8GKYqr"
KINDS = (Kind.FINE_TUNING,)


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for `name`, and its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    subprocess.run([*command, *files], check=True, capture_output=True, timeout=60)
    both = folder / f"{name}.pem"
    both.write_bytes((folder / "key").read_bytes() + (folder / "certificate").read_bytes())
    return both


class Receiver:
    """A small HTTP server that keeps what it was sent, and answers with one status after another.

    Args:
        statuses: of its answers, the last one for all that follow; 0 does not answer.
        pem: a certificate with its key; without it, plain HTTP.
    """

    def __init__(self, statuses: Sequence[int], port: int, pem: Path | None) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        left = list(statuses)
        receiver, self.closing = self, threading.Event()

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                status = left.pop(0) if len(left) > 1 else left[0]
                if not status:
                    receiver.closing.wait(30)
                    return
                self.send_response(status)
                self.send_header("Location", receiver.url + "/elsewhere")
                self.end_headers()

            do_GET = do_POST  # which is how a redirect would be followed

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        if pem is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(pem)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def events(self) -> list[dict[str, Any]]:
        """What came, each signature checked by the reference implementation."""
        return [Standard(SECRET).verify(body, headers) for headers, body in self.got]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def receiving(*statuses: int, port: int = 0, pem: Path | None = None) -> Iterator[Receiver]:
    receiver = Receiver(statuses or (200,), port, pem)
    with contextlib.closing(receiver):
        yield receiver


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_cluster() as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    if request.param != "sqlite":
        url = request.getfixturevalue("postgres").new_database()
    database = Database(url)
    yield JobStore(database)
    database.close()


def begun(store: JobStore, *urls: str) -> Job:
    options = {"webhooks": list(urls)}
    store.create(NewJob(Kind.FINE_TUNING, options))
    job = store.claim(KINDS, "somebody")
    assert job is not None
    return job


def deliver(store: JobStore, until: Any, *pauses_s: float, hosts: Sequence[str] = ()) -> None:
    """Run a courier until something holds."""

    async def run() -> None:
        destinations = Destinations(hosts or ("127.0.0.1",))
        outbox = Outbox(store.database)
        courier = Courier(outbox, destinations, secret_bytes(SECRET), pauses_s=pauses_s)
        courier.start()
        try:
            async with asyncio.timeout(20):
                while not await asyncio.to_thread(until):
                    await asyncio.sleep(0.02)
        finally:
            await courier.stop()

    asyncio.run(run())


def is_empty(store: JobStore) -> bool:
    with store.database.read() as connection:
        return connection.exec_driver_sql("SELECT count(*) FROM webhooks").scalar() == 0


def test_each_ending_is_told_once_and_signed(store: JobStore) -> None:
    with receiving() as receiver:
        done = begun(store, receiver.url)
        store.succeed(done, {"model": "m", "version": 1})
        failed = begun(store, receiver.url)
        store.fail(failed, JobError("loss_not_finite", "the loss is not finite"))
        store.cancel(begun(store, receiver.url).id)
        store.set_aside(begun(store, receiver.url), "the disk is full")
        store.succeed(begun(store), {"model": "m", "version": 2})
        deliver(store, lambda: is_empty(store))
        events = {one["type"]: one for one in receiver.events()}
    assert len(receiver.got) == 4
    assert events.keys() == {
        f"fine_tuning.job.{one}" for one in ("succeeded", "failed", "cancelled", "paused")
    }
    told = events["fine_tuning.job.failed"]
    assert (told["data"], told["object"]) == ({"id": failed.id}, "event")
    assert abs(told["created_at"] - time.time()) < 60
    assert {headers["webhook-id"] for headers, _ in receiver.got} == {
        one["id"] for one in events.values()
    }


def test_a_transition_that_is_undone_tells_nobody(store: JobStore) -> None:
    job = begun(store, "http://127.0.0.1:1")
    store.cancel(job.id)
    assert not is_empty(store)
    other = begun(store, "http://127.0.0.1:1")
    with contextlib.suppress(RuntimeError), store.database.write() as connection:
        store._move(connection, other, "cancelled", "never mind")  # type: ignore[arg-type]
        raise RuntimeError
    with store.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT job FROM webhooks").scalars().all()
    assert rows == [job.id]


@pytest.mark.slow
def test_it_is_sent_again_under_the_same_id_and_follows_no_redirect(store: JobStore) -> None:
    with receiving(500, 302, 204) as receiver:
        store.cancel(begun(store, f"{receiver.url}/hook?a=1").id)
        deliver(store, lambda: is_empty(store), 0.01, 0.01, 0.01)
        assert len(receiver.events()) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({body for _, body in receiver.got}) == 1


@pytest.mark.slow
def test_it_is_given_up_in_the_end_or_where_it_is_not_wanted(store: JobStore) -> None:
    with receiving(500) as broken, receiving(410) as gone:
        store.cancel(begun(store, broken.url, gone.url).id)
        deliver(store, lambda: is_empty(store), 0.01, 0.01)
        assert (len(broken.got), len(gone.got)) == (3, 1)


@pytest.mark.parametrize(("name", "num"), [("localhost", 1), ("somebody.else", 0)])
def test_the_certificate_must_be_that_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num: int
) -> None:
    pem = certificate(tmp_path, name)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    store = JobStore(database)
    with receiving(pem=pem) as receiver:
        store.cancel(begun(store, receiver.url).id)
        deliver(store, lambda: is_empty(store), hosts=["localhost"])
        assert len(receiver.events()) == num
    database.close()


def test_one_that_does_not_answer_holds_up_no_other(store: JobStore) -> None:
    with receiving(0) as silent, receiving() as receiver:
        store.cancel(begun(store, silent.url, receiver.url).id)
        began = time.monotonic()
        deliver(store, lambda: len(receiver.got) == 1 and len(silent.got) == 1)
        assert time.monotonic() - began < 8
        silent.closing.set()


def test_a_claimed_webhook_is_left_alone_until_its_time_is_over(store: JobStore) -> None:
    store.cancel(begun(store, "http://127.0.0.1:1").id)
    outbox = Outbox(store.database)
    first = outbox.claim(0.2)
    assert first is not None
    assert outbox.claim(0.2) is None
    assert not outbox.has_due()
    time.sleep(0.3)
    again = outbox.claim(0.2)
    assert again is not None
    assert (again.id, again.attempts) == (first.id, 2)


LISTED = ("hooks.example.com", "localhost", "10.1.0.0/16", "2001:db8::7")


@pytest.mark.parametrize(
    "url",
    [
        *("https://hooks.example.com/x?y=1", "https://HOOKS.example.com:8443/"),
        *("http://localhost:1/", "http://127.0.0.1:9/", "http://[::1]:9/"),
        *("https://10.1.2.3/", "https://[2001:db8::7]/"),
    ],
)
def test_a_listed_host_is_a_destination(url: str) -> None:
    assert Destinations(LISTED).check(url).host


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("https://example.com/", "do not go to example.com"),
        ("https://evil.hooks.example.com/", "do not go to"),
        ("https://hooks.example.com.evil.com/", "do not go to"),
        ("https://hooks.example.com@evil.com/", "without a password"),
        ("https://169.254.169.254/latest/meta-data/", "do not go to"),
        ("https://10.2.0.1/", "do not go to"),
        ("https://2130706433/", "do not go to"),
        ("https://127.1/", "do not go to"),
        ("http://hooks.example.com/", "needs https"),
        ("http://10.1.2.3/", "needs https"),
        ("file:///etc/passwd", "is no URL"),
        ("gopher://hooks.example.com/", "is no URL"),
        ("hooks.example.com", "is no URL"),
        ("https://", "is no URL"),
        ("https://hooks.example.com\r\nX: y/", "is no URL"),
    ],
)
def test_what_is_not_listed_is_none(url: str, sentence: str) -> None:
    with pytest.raises(DestinationRefused, match=sentence):
        Destinations(LISTED).check(url)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1"]
)
def test_a_listed_name_may_not_lead_inside(address: str) -> None:
    from ipaddress import ip_address

    inside = ip_address(address)
    assert not Destinations(("hooks.example.com",))._may_reach(inside)
    assert Destinations(("hooks.example.com", address))._may_reach(inside)
    for outside in ("93.184.216.34", "2606:4700::1111"):
        assert Destinations(())._may_reach(ip_address(outside))
    for translated in ("64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1"):
        assert not Destinations(())._may_reach(ip_address(translated))


def test_the_name_of_this_machine_leads_inside_and_is_refused() -> None:
    name = socket.gethostname().lower()
    destinations = Destinations((name,))
    try:
        url = destinations.check(f"https://{name}/")
        with pytest.raises(DestinationRefused, match="is no public address"):
            asyncio.run(destinations.addresses(url))
    except OSError:
        pytest.skip("this machine does not know its own name")


def test_settings_that_could_send_nothing_stop_the_start(tmp_path: Path) -> None:
    def opened(**settings: Any) -> Courier | None:
        store = JobStore(Database(f"sqlite:///{tmp_path}/jobs.db"))
        return open_courier(Settings(home=tmp_path, **settings), store)

    assert opened() is None
    assert opened(webhook_hosts="a.com", webhook_secret=SECRET) is not None
    with pytest.raises(SecretUnfit, match="set PYTORCHLIB_WEBHOOK_SECRET"):
        opened(webhook_hosts="a.com")
    for secret in ("whsec_short", SECRET.removeprefix("whsec_"), "whsec_" + "A" * 200):
        with pytest.raises(SecretUnfit, match="24 to 64 bytes"):
            opened(webhook_hosts="a.com", webhook_secret=secret)
    with pytest.raises(DestinationRefused, match="do not go to b.com"):
        opened(webhook_url="https://b.com/", webhook_hosts="a.com", webhook_secret=SECRET)


@pytest.mark.slow
def test_a_database_that_is_away_loses_nothing(tmp_path: Path) -> None:
    store = JobStore(Database(f"sqlite:///{tmp_path}/jobs.db"))
    with receiving() as receiver:
        store.cancel(begun(store, receiver.url).id)
        path, away = tmp_path / "jobs.db", tmp_path / "away.db"
        store.database.close()
        path.rename(away)
        path.mkdir()
        with pytest.raises(DatabaseUnavailable):
            store.list(Kind.FINE_TUNING)

        def back_after_a_while() -> bool:
            if path.is_dir():
                time.sleep(1.5)
                path.rmdir()
                away.rename(path)
            return len(receiver.got) == 1

        deliver(store, back_after_a_while)
        assert json.loads(receiver.got[0][1])["type"] == "fine_tuning.job.cancelled"


@contextlib.contextmanager
def serving(home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that works on no jobs, and sends webhooks to this machine."""
    command = [sys.executable, "-m", "app", "serve", "--home", str(home), "--port", str(port)]
    command += ["--no-jobs", "--device", "cpu", "--threads", "1", "--webhook-hosts", "127.0.0.1"]
    environment = {**os.environ, "PYTORCHLIB_WEBHOOK_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while not is_ready(port, "/readyz"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_a_server_killed_between_transition_and_delivery_tells_after_its_return(
    tmp_path: Path,
) -> None:
    listens, port = free_port(), free_port()
    store = JobStore(Database(f"sqlite:///{tmp_path}/jobs.db"))
    options = {"method": "train", "name": "m", "webhooks": [f"http://127.0.0.1:{listens}/"]}
    job = store.create(NewJob(Kind.FINE_TUNING, options))
    with (
        serving(tmp_path, port) as server,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        server.kill()  # nobody listens yet, so it cannot have been delivered
        server.wait()
    assert not is_empty(store)
    with (
        receiving(port=listens) as receiver,
        serving(tmp_path, port),
        openai.OpenAI(api_key="none", webhook_secret=SECRET) as client,
    ):
        deadline = time.monotonic() + 30
        while not is_empty(store):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ((headers, body),) = receiver.got
        event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", job.id)
    store.database.close()
