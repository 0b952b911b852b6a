"""The job store, on SQLite and on PostgreSQL alike."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from app.errors import DatabaseUnavailable, IdempotencyKeyReused, JobConflict, JobUnknown
from app.jobs.database import Database
from app.jobs.job import (
    EventType,
    Job,
    JobError,
    Kind,
    Level,
    NewEvent,
    NewJob,
    Request,
    StaleWorker,
)
from app.jobs.outbox import Outbox
from app.jobs.store import MAX_FRUITLESS, JobStore
from app.jobs.tables import JOBS
from tests.databases import Postgres, postgres_cluster

ROOT = Path(__file__).resolve().parent.parent
TUNE = Kind.FINE_TUNING


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_cluster() as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.new_database()


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    database = Database(url)
    yield JobStore(database, lease_s=0.2)
    database.close()


def new(**changes: Any) -> NewJob:
    return NewJob(**{"kind": TUNE, "options": {"epochs": 3}, **changes})


def claimed(store: JobStore, worker: str = "w") -> Job:
    job = store.claim([TUNE], worker)
    assert job is not None
    return job


def messages(store: JobStore, job: Job) -> list[str]:
    return [event.message for event in store.events(job.id)[0]]


def test_a_job_is_read_as_it_was_created(store: JobStore) -> None:
    made = store.create(new(by="ann", model="digits", dataset="ds-1"))
    assert store.get(made.id) == made
    assert (made.state, made.by, made.model, made.dataset) == ("queued", "ann", "digits", "ds-1")
    assert made.options == {"epochs": 3}
    assert abs(made.created - time.time()) < 2
    (event,) = store.events(made.id)[0]
    assert (event.sequence, event.data) == (1, {"state": "queued"})


def test_an_unknown_job_is_an_error(store: JobStore) -> None:
    for ask in (store.get, store.cancel, store.pause, store.resume, store.stop, store.events):
        with pytest.raises(JobUnknown, match="there is no job 'ftjob-0'"):
            ask("ftjob-0")


def test_the_same_key_gives_the_same_job(store: JobStore) -> None:
    first = store.create(new(idempotency_key="k"))
    assert store.create(new(idempotency_key="k")).id == first.id
    assert store.find("local", "k") == first
    assert store.create(new(idempotency_key="k", by="bob")).id != first.id
    assert store.create(new()).id != store.create(new()).id
    assert len(store.list(TUNE)[0]) == 4


def test_the_same_key_with_another_request_is_refused(store: JobStore) -> None:
    store.create(new(idempotency_key="k"))
    with pytest.raises(IdempotencyKeyReused, match="from another request"):
        store.create(new(idempotency_key="k", options={"epochs": 4}))


def test_the_same_key_from_many_threads_makes_one_job(store: JobStore) -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(store.create(new(idempotency_key="k")).id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(ids) == 8
    assert len(set(ids)) == 1


def test_the_oldest_of_the_wanted_kinds_is_claimed_first(store: JobStore) -> None:
    store.create(new(kind=Kind.EVALUATION))
    first, second = store.create(new()), store.create(new())
    assert [store.place(first), store.place(second)] == [0, 1]
    assert store.has_queued([TUNE])
    assert not store.has_queued([Kind.PROMOTION])
    running = claimed(store)
    assert (running.id, running.state, running.attempt, running.worker) == (
        first.id,
        "running",
        1,
        "w",
    )
    assert claimed(store).id == second.id
    assert store.claim([TUNE], "w") is None
    assert [job.id for job in store.running(TUNE)] == [first.id, second.id]


def test_a_job_runs_to_its_end(store: JobStore) -> None:
    made = store.create(new())
    job = claimed(store)
    assert store.heartbeat(job, {"step": 7}) is None
    store.record(job, [NewEvent("step 7", Level.INFO, EventType.METRICS, {"loss": 0.5})])
    store.seal(job)
    done = store.succeed(job, {"version": 3})
    assert (done.state, done.result, done.progress) == ("succeeded", {"version": 3}, {"step": 7})
    assert done.finished is not None
    assert done.started is not None
    assert done.created <= done.started <= done.finished
    assert done.worker is None
    assert messages(store, made) == ["created", "running", "step 7", "publishing", "succeeded"]
    assert [event.sequence for event in store.events(made.id)[0]] == [1, 2, 3, 4, 5]


def test_a_job_fails_with_its_reason(store: JobStore) -> None:
    store.create(new())
    done = store.fail(claimed(store), JobError("diverged", "the loss is nan", "learning_rate"))
    assert store.get(done.id).error == JobError("diverged", "the loss is nan", "learning_rate")
    assert store.events(done.id)[0][-1].level == "error"


def test_cancel_is_final_at_once(store: JobStore) -> None:
    store.create(new())
    job = claimed(store)
    assert store.cancel(job.id, by="ann").state == "cancelled"
    assert store.cancel(job.id).state == "cancelled"
    assert messages(store, job)[-1] == "cancelled by ann"
    for write in (store.heartbeat, store.seal):
        with pytest.raises(StaleWorker):
            write(job)
    for ask in (store.pause, store.resume, store.stop):
        with pytest.raises(JobConflict, match="was cancelled already"):
            ask(job.id)


def test_what_is_being_published_is_not_cancelled_any_more(store: JobStore) -> None:
    store.create(new())
    job = claimed(store)
    store.seal(job)
    for ask in (store.cancel, store.pause):
        with pytest.raises(JobConflict, match="is being published"):
            ask(job.id)
    store.release(job, "the worker died")
    with pytest.raises(JobConflict, match="is being published"):
        store.cancel(job.id)
    store.succeed(claimed(store), {})
    with pytest.raises(JobConflict, match="has succeeded already and cannot be cancelled"):
        store.cancel(job.id)


def test_a_queued_job_is_paused_at_once_and_resumed_at_its_place(store: JobStore) -> None:
    first, _ = store.create(new()), store.create(new())
    assert store.pause(first.id).state == "paused"
    with pytest.raises(JobConflict, match="learned nothing yet"):
        store.stop(first.id)
    assert store.resume(first.id).state == "queued"
    assert store.resume(first.id).state == "queued"
    assert claimed(store).id == first.id


def test_a_running_job_is_paused_when_its_worker_has_let_go(store: JobStore) -> None:
    store.create(new())
    job = claimed(store)
    assert store.pause(job.id).state == "running"
    assert store.pause(job.id).request == Request.PAUSE
    assert store.heartbeat(job) == Request.PAUSE
    with pytest.raises(JobConflict, match="still being paused"):
        store.resume(job.id)
    assert store.release(job, "paused", is_blamed=False).state == "paused"
    assert store.get(job.id).request is None


def test_a_stop_outlives_the_worker_that_it_was_asked_of(store: JobStore) -> None:
    store.create(new())
    job = claimed(store)
    store.snapshot_written(job, 5)
    store.stop(job.id)
    assert store.stop(job.id).request == Request.STOP
    assert store.release(job, "the worker died").request == Request.STOP
    assert store.heartbeat(claimed(store)) == Request.STOP


def test_a_paused_job_with_a_snapshot_can_be_stopped(store: JobStore) -> None:
    store.create(new())
    job = claimed(store)
    store.snapshot_written(job, 5)
    store.pause(job.id)
    store.release(job, "paused")
    stopped = store.stop(job.id)
    assert (stopped.state, stopped.request) == ("queued", "stop")


def test_a_worker_whose_lease_is_over_changes_nothing(store: JobStore) -> None:
    store.create(new())
    stale = claimed(store, "first")
    assert store.expire() == []
    time.sleep(0.25)
    (expired,) = store.expire()
    assert (expired.state, expired.reason) == ("queued", "its worker first died")
    again = claimed(store, "second")
    assert again.attempt == 2
    before = store.get(stale.id), messages(store, stale)
    for write in (
        lambda: store.heartbeat(stale, {"step": 1}),
        lambda: store.record(stale, [NewEvent("late")]),
        lambda: store.snapshot_written(stale, 9),
        lambda: store.seal(stale),
        lambda: store.succeed(stale, {}),
        lambda: store.fail(stale, JobError("late", "late")),
        lambda: store.release(stale, "late"),
    ):
        with pytest.raises(StaleWorker, match="no longer held under token 1"):
            write()
    assert (store.get(stale.id), messages(store, stale)) == before


def test_heartbeats_keep_a_lease(store: JobStore) -> None:
    store.create(new())
    job = claimed(store)
    for _ in range(4):
        time.sleep(0.1)
        store.heartbeat(job)
        assert store.expire() == []


def test_a_worker_known_to_be_dead_loses_its_jobs_at_once(store: JobStore) -> None:
    store.create(new())
    job = claimed(store, "dead")
    assert store.expire(["other"]) == []
    assert [expired.id for expired in store.expire(["dead"])] == [job.id]


def test_five_attempts_that_bring_no_newer_snapshot_end_a_job(store: JobStore) -> None:
    store.create(new())
    for number in range(1, 3 + MAX_FRUITLESS):
        job = claimed(store)
        if number <= 2:
            store.snapshot_written(job, number)  # newer than the one before
        elif number == 3:
            store.snapshot_written(job, 2)  # the same again
        released = store.release(job, "killed by signal 9")
    assert released.state == "failed"
    assert released.error is not None
    assert released.error.code == "attempts_exhausted"
    assert "killed by signal 9" in released.error.message


def test_a_server_that_stops_is_not_held_against_a_job(store: JobStore) -> None:
    made = store.create(new())
    for _ in range(MAX_FRUITLESS + 2):
        store.release(claimed(store), "the server stopped", is_blamed=False)
    assert store.get(made.id).state == "queued"


def test_lists_are_pages_from_the_newest(store: JobStore) -> None:
    made = [store.create(new()).id for _ in range(5)]
    store.create(new(kind=Kind.EVALUATION))
    page, has_more = store.list(TUNE, limit=3)
    assert ([job.id for job in page], has_more) == (made[:1:-1], True)
    page, has_more = store.list(TUNE, after=page[-1].id, limit=3)
    assert ([job.id for job in page], has_more) == (made[1::-1], False)


def test_events_are_pages_in_either_order(store: JobStore) -> None:
    store.create(new())
    job = claimed(store)
    store.record(job, [NewEvent(f"event {number}") for number in range(3, 8)])
    page, has_more = store.events(job.id, after=2, limit=3)
    assert ([event.sequence for event in page], has_more) == ([3, 4, 5], True)
    page, has_more = store.newest_events(job.id, limit=3)
    assert ([event.sequence for event in page], has_more) == ([7, 6, 5], True)
    page, has_more = store.newest_events(job.id, before=3, limit=3)
    assert ([event.sequence for event in page], has_more) == ([2, 1], False)


CLAIMER = """
import sys
from app.jobs.database import Database
from app.jobs.job import Kind
from app.jobs.store import JobStore

store = JobStore(Database(sys.argv[1]), lease_s=60)
sys.stdin.readline()
while (job := store.claim([Kind.FINE_TUNING], sys.argv[2])) is not None:
    sys.stdout.write(job.id + "\\n")
"""


@pytest.mark.slow
def test_two_processes_that_claim_at_once_get_each_job_once(store: JobStore, url: str) -> None:
    made = [store.create(new()).id for _ in range(40)]
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, url, name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    claimed_by = [claimer.communicate("go\n", timeout=60)[0].split() for claimer in claimers]
    assert sorted(claimed_by[0] + claimed_by[1]) == sorted(made)


def test_what_raises_within_a_transaction_leaves_nothing(store: JobStore) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.create(new(options={"path": Path()}))
    assert store.list(TUNE) == ([], False)


@pytest.mark.slow
def test_looking_costs_the_same_among_ten_thousand_jobs(store: JobStore) -> None:
    def seconds() -> float:
        began = time.process_time()
        for _ in range(20):
            job = store.create(new())
            store.get(job.id)
            store.list(TUNE)
            store.cancel(job.id)
        return time.process_time() - began

    for _ in range(5):
        store.create(new())
    before = min(seconds() for _ in range(3))
    with store.database.write() as connection:
        row = dict(connection.execute(sql.select(JOBS).limit(1)).mappings().one())
        rows = [{**row, "number": 100_000 + n, "id": f"ftjob-{n}"} for n in range(10_000)]
        connection.execute(sql.insert(JOBS), rows)
    assert min(seconds() for _ in range(3)) < 1.5 * before


def test_no_query_walks_the_table(tmp_path: Path) -> None:
    store = JobStore(Database(f"sqlite:///{tmp_path / 'jobs.db'}"))
    seen: list[str] = []
    engine = store.database._engine
    sql.event.listen(
        engine,
        "before_cursor_execute",
        lambda _c, cursor, statement, parameters, *_: (
            seen.extend(
                str(row[3]) for row in cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            )
            if statement.startswith(("SELECT jobs", "SELECT events", "UPDATE", "SELECT count"))
            else None
        ),
    )
    job = store.create(new(idempotency_key="k"))
    store.place(job)
    store.list(TUNE, after=job.id)
    store.newest_events(job.id)
    store.events(job.id)
    store.find("local", "k")
    store.expire()
    store.succeed(claimed(store), {})
    assert len(seen) > 8
    assert [step for step in seen if "SCAN jobs" in step or "SCAN events" in step] == []


def test_a_locked_database_is_told_and_comes_back(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("app.jobs.database.BUSY_TIMEOUT_MS", 50)
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    store, other = JobStore(Database(url)), JobStore(Database(url))
    store.create(new())
    with other.database.write(), pytest.raises(DatabaseUnavailable, match="database is locked"):
        store.create(new())
    assert len(store.list(TUNE)[0]) == 1
    store.create(new())


def test_a_database_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    database = Database(url)
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE schema SET version = 99")
    with pytest.raises(DatabaseUnavailable, match="version 99"):
        JobStore(Database(url)).list(TUNE)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nonsense", "cannot be used"),
        ("sqlite:////proc/nowhere/jobs.db", "unable to open database file"),
        ("postgresql://nobody@127.0.0.1:1/none", "does not answer"),
    ],
)
def test_a_database_that_is_not_there_is_told(url: str, sentence: str) -> None:
    with pytest.raises(DatabaseUnavailable, match=sentence):
        JobStore(Database(url)).list(TUNE)


def test_no_question_reads_more_of_a_table_the_more_it_holds(tmp_path: Path) -> None:
    """Every statement finds its rows by an index; on SQLite, which says how it will."""
    database, asked = Database(f"sqlite:///{tmp_path / 'jobs.db'}"), {}
    store, outbox = JobStore(database), Outbox(database)
    store.has_queued([TUNE])

    @sql.event.listens_for(database._engine, "before_cursor_execute")
    def hear(_: Any, __: Any, statement: str, values: Any, *___: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            asked[statement] = values

    a_life(store)
    webhook = outbox.claim(1) if outbox.has_due() else None
    assert webhook is not None
    outbox.postpone(webhook, 1)
    outbox.remove(webhook)
    sql.event.remove(database._engine, "before_cursor_execute", hear)
    assert len(asked) > 20
    with database.read() as connection:
        for statement, values in asked.items():
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
            plan = [row.detail for row in rows]
            # Of a kind there may be many jobs; only lists, which end with their page, go by it.
            is_page = "ORDER BY jobs.number DESC" in statement
            for step in plan:
                assert not re.match(r"SCAN (jobs|events|webhooks)", step), (plan, statement)
                assert "B-TREE" not in step, (plan, statement)
                assert is_page or "jobs_by_kind" not in step, (plan, statement)
    database.close()


def a_life(store: JobStore) -> None:
    """Everything that is ever asked of the store."""
    options = {"webhooks": ["http://127.0.0.1/"], "metadata": {"team": "vision"}}
    job = store.create(new(options=options, idempotency_key="once"))
    other = store.create(new())
    store.find(job.by, "once")
    for after in (None, other.id):
        store.list(TUNE, after=after)
    store.list(TUNE, metadata={"team": "vision"})
    store.pause(job.id)
    store.resume(job.id)
    assert store.place(job) == 0
    held = claimed(store)
    assert store.running(TUNE) == [held]
    store.heartbeat(held, {"step": 1})
    store.record(held, [NewEvent("epoch 1", type=EventType.METRICS)])
    store.snapshot_written(held, 1)
    store.amend(held, {"resolved": {}}, "settings resolved")
    store.events(job.id, after=1)
    store.newest_events(job.id, before=3)
    store.metrics(job.id, most=10)
    store.stop(job.id)
    store.expire(["somebody"])
    store.seal(held)
    store.succeed(held, {})
    store.ended_before([job.id], 1.0)
    store.cancel(other.id)
    store.delete(other.id)


def test_jobs_are_chosen_by_metadata(store: JobStore) -> None:
    odd = {"team": "vision", "a\".b'": "$[0]"}
    chosen = store.create(new(options={"metadata": odd}))
    store.create(new(options={"metadata": {"team": "sound"}}))
    store.create(new(options={"metadata": None}))
    store.create(new())
    for metadata, expected in (({"team": "vision"}, [chosen]), (odd, [chosen]), ({"x": ""}, [])):
        assert store.list(TUNE, metadata=metadata) == (expected, False)
