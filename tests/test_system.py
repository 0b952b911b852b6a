"""Systems under test: all their processes are counted, frozen, thawed and ended."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.machine import cores
from benchmarks.process_tree import ProcessTree
from benchmarks.system import Launch, System, SystemFailed, free_port, is_ready

# A server whose grandchild, in a session of its own, burns what its parent does not.
BURNING = """
import http.server, subprocess, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
burn = [sys.executable, "-c", "while True: pass"]
child = subprocess.Popen(burn, start_new_session=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def burning(port: int) -> Launch:
    return Launch("burning", [sys.executable, "-c", BURNING, str(port)], port, "/")


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with System(burning(free_port()), cores(), tmp_path / "log") as system:
        yield system


def test_the_time_of_every_descendant_is_counted(system: System) -> None:
    before = system.cpu_us()
    deadline = time.monotonic() + 20
    while system.cpu_us() < before + 100_000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert system.memory_bytes() > 1_000_000


# A server that goes on for half a second with what it answered.
LINGERING = """
import http.server, sys, time
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        end = time.process_time() + 0.5
        while self.path == "/long" and time.process_time() < end:
            pass
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def test_a_system_has_settled_once_it_did_what_it_was_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LINGERING, str(port := free_port())]
    with System(Launch("lingering", command, port, "/"), cores(), tmp_path / "log") as system:
        before_us = system.cpu_us()
        assert is_ready(port, "/long")
        system.settle()
        assert system.cpu_us() >= before_us + 450_000


def test_nobody_waits_for_ever_for_a_system_to_settle(system: System) -> None:
    began = time.monotonic()
    system.settle()
    assert time.monotonic() - began >= 2.0


def test_a_frozen_system_uses_nothing_and_a_thawed_one_answers(system: System) -> None:
    system.freeze()
    time.sleep(0.2)
    before = system.cpu_us()
    time.sleep(0.3)
    assert system.cpu_us() == before
    system.thaw()
    assert is_ready(system.port, "/")


def test_nothing_outlives_a_stopped_system(tmp_path: Path) -> None:
    with System(burning(free_port()), cores(), tmp_path / "log") as system:
        tree = system.tree
        assert len(tree.pids()) == 2
        system.freeze()
    deadline = time.monotonic() + 10
    while tree.pids():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_system_that_ends_says_its_last_words(tmp_path: Path) -> None:
    launch = Launch("broken", [sys.executable, "-c", "raise SystemExit('no model')"], 1, "/")
    with pytest.raises(SystemFailed, match="broken ended with 1: no model"):
        System(launch, cores(), tmp_path / "log")


def test_a_system_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    launch = Launch("asleep", command, free_port(), "/", ready_within_s=0.5)
    with pytest.raises(SystemFailed, match="asleep was not ready in 0 s|in 1 s"):
        System(launch, cores(), tmp_path / "log")


def test_others_do_not_belong_to_a_tree() -> None:
    assert ProcessTree("a token that nobody has").pids() == []
    assert ProcessTree("").cpu_us() == 0
    assert os.getpid() not in ProcessTree("another").pids()
