"""The model store: a version is absent or complete, an alias moves once, a number is used once."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from models import checkpoint, networks
from models.aliases import Split
from models.checkpoint import MANIFEST, CheckpointDamaged, CheckpointError, WeightsMismatch
from models.file_lock import locked
from models.manifest import WEIGHTS, Lineage, Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import (
    PRODUCTION,
    AliasMoved,
    BadName,
    LocksUnsupported,
    ModelStore,
    NothingToRollBack,
    RunMismatch,
    StoreBusy,
    StoreDamaged,
    Traffic,
    UnknownModel,
    UnknownVersion,
    VersionInUse,
)

OPTIONS = {"inputs": 2, "num_classes": 2, "hidden": [2]}


def writing(seed: int, run: str | None = None) -> Callable[[Path], Manifest]:
    """A function that writes a tiny real checkpoint; another seed is another digest."""
    torch.manual_seed(seed)
    network = networks.build("mlp", OPTIONS)
    manifest = Manifest(
        network=NetworkSpec(name="mlp", options=OPTIONS),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [2]}]),
        labels=("no", "yes"),
        lineage=Lineage(run=run),
    )
    return lambda folder: checkpoint.save(folder, network, manifest)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """An empty store."""
    return ModelStore(tmp_path / "models", lock_timeout_s=5.0)


@pytest.fixture
def three(store: ModelStore) -> ModelStore:
    """A store with three versions of `digits`, the first of them `production`."""
    for seed in (1, 2, 3):
        store.publish("digits", writing(seed))
    return store


def staged(store: ModelStore) -> list[Path]:
    return list(store.folder.glob("*/.staging-*"))


# Publishing


def test_a_published_version_is_a_checkpoint_that_loads(store: ModelStore) -> None:
    version = store.publish("digits", writing(1), by="anna", why="a first try")
    assert (version.name, version.number, str(version)) == ("digits", 1, "digits:1")
    assert version.folder == store.folder / "digits" / "1"
    assert checkpoint.load(version.folder).manifest == version.manifest()
    assert (store.names(), store.versions("digits")) == (["digits"], [1])
    assert not staged(store)


def test_the_first_version_becomes_production_and_later_ones_do_not(three: ModelStore) -> None:
    assert three.versions("digits") == [1, 2, 3]
    assert three.aliases("digits") == {PRODUCTION: 1}
    (move,) = three.history("digits")
    assert (move.alias, move.to, move.previous, move.by) == (PRODUCTION, 1, None, "local")


def test_the_same_digest_is_the_version_that_is_there(three: ModelStore) -> None:
    assert three.publish("digits", writing(2)) == three.version("digits", 2)
    assert three.versions("digits") == [1, 2, 3]
    assert three.publish("letters", writing(2)).number == 1  # of another model it is new


def test_one_run_publishes_once(store: ModelStore) -> None:
    run = 'job "7", zweiter Läuf'
    first = store.publish("digits", writing(1, run=run), run=run)
    assert store.publish("digits", writing(2, run=run), run=run) == first
    assert store.publish("digits", writing(2, run="job 8"), run="job 8").number == 2


def test_a_manifest_that_only_mentions_the_run_is_not_of_it(store: ModelStore) -> None:
    store.publish("digits", writing(1))  # whose labels are no and yes
    assert store.publish("digits", writing(2, run="yes"), run="yes").number == 2


def test_a_run_that_the_lineage_does_not_name_is_refused(store: ModelStore) -> None:
    with pytest.raises(RunMismatch, match="run 'job 7' publishes the work of None"):
        store.publish("digits", writing(1), run="job 7")
    assert store.names() == []
    assert not staged(store)


def test_files_are_read_only(three: ModelStore) -> None:
    for path in three.version("digits", 2).folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o444, path.name


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), CheckpointDamaged),
        (lambda folder: (folder / MANIFEST).unlink(), CheckpointError),
        (lambda folder: shutil.rmtree(folder), CheckpointError),
        (lambda folder: folder.rmdir(), OSError),
    ],
)
def test_what_does_not_load_is_not_published(
    three: ModelStore, spoil: Callable[[Path], object], error: type[Exception]
) -> None:
    def write(folder: Path) -> None:
        writing(4)(folder)
        spoil(folder)

    with pytest.raises(error):
        three.publish("digits", write)
    assert three.versions("digits") == [1, 2, 3]
    assert not staged(three)


def test_weights_that_do_not_fit_are_not_published(store: ModelStore) -> None:
    def write(folder: Path) -> None:
        manifest = writing(1)(folder)
        (folder / MANIFEST).unlink()
        spec = NetworkSpec(name="mlp", options={**OPTIONS, "hidden": [3]})
        checkpoint.seal(folder, manifest.model_copy(update={"network": spec}))

    with pytest.raises(WeightsMismatch):
        store.publish("digits", write)
    assert store.names() == []


def test_damaged_versions_do_not_stop_others_from_being_published(three: ModelStore) -> None:
    (three.folder / "digits" / "2" / MANIFEST).unlink()
    (three.folder / "digits" / "2" / MANIFEST).write_bytes(b"\xff" * 100)
    assert three.publish("digits", writing(4)).number == 4


def test_the_digest_of_a_damaged_version_is_published_anew(three: ModelStore) -> None:
    weights = three.version("digits", 2).folder / WEIGHTS
    weights.unlink()
    weights.write_bytes(b"lost")
    assert three.publish("digits", writing(2)).number == 4


def test_threads_publish_at_once(store: ModelStore) -> None:
    writers = [writing(seed) for seed in range(6)] * 2
    with ThreadPoolExecutor(4) as threads:
        versions = list(threads.map(lambda write: store.publish("digits", write), writers))
    numbers = [version.number for version in versions]
    assert store.versions("digits") == [1, 2, 3, 4, 5, 6]
    assert numbers[:6] == numbers[6:]
    digests = {store.version("digits", number).manifest().digest for number in numbers}
    assert len(digests) == 6
    assert len(store.history("digits")) == 1


# Staging


def test_what_dead_writers_left_is_swept_and_what_living_ones_write_is_not(
    store: ModelStore,
) -> None:
    def write(folder: Path) -> None:
        writing(1)(folder)
        dead = folder.parent / ".staging-dead"
        dead.mkdir()
        (dead / "half").write_bytes(b"half")
        store.publish("digits", writing(2))  # sweeps
        store.sweep()
        assert not dead.exists()

    assert store.publish("digits", write).number == 2
    assert not staged(store)


def test_a_version_that_is_being_written_is_not_to_be_seen(store: ModelStore) -> None:
    def write(folder: Path) -> None:
        writing(1)(folder)
        assert store.names() == []
        assert store.versions("digits") == []
        with pytest.raises(UnknownModel):
            store.resolve("digits")

    store.publish("digits", write)


def test_before_a_gate_has_decided_nothing_is_in_production(store: ModelStore) -> None:
    version = store.publish("digits", writing(1), is_gated=True)
    assert store.publish("digits", writing(2)).number == 2
    assert store.aliases("digits") == {}
    assert store.history("digits")[0].why == "a gate decides"
    store.move_alias("digits", PRODUCTION, version.number, expected=None, by="the gate")
    assert store.aliases("digits") == {PRODUCTION: 1}


def test_a_publisher_that_died_before_the_alias_is_made_up_for(three: ModelStore) -> None:
    (three.folder / "digits" / "aliases.jsonl").unlink()
    three.publish("digits", writing(3))
    assert three.aliases("digits") == {PRODUCTION: 1}


def test_an_alias_taken_away_is_not_given_back_by_publishing(three: ModelStore) -> None:
    three.move_alias("digits", PRODUCTION, None)
    three.publish("digits", writing(4))
    assert three.aliases("digits") == {}


# Names and references


def test_a_reference_leads_to_a_version(three: ModelStore) -> None:
    three.move_alias("digits", "canary", 3)
    assert three.resolve("digits").number == 1
    assert three.resolve("digits@production").number == 1
    assert three.resolve("digits@canary").number == 3
    assert three.resolve("digits:2").number == 2


@pytest.mark.parametrize(
    ("reference", "error", "sentence"),
    [
        ("digit", UnknownModel, "no model is called 'digit'; the nearest are digits"),
        ("digits:4", UnknownVersion, "digits has no version 4; there are 1, 2, 3"),
        ("digits@canary", UnknownVersion, "digits has no alias 'canary'; there are: production"),
        ("digit:1", UnknownModel, "'digit'"),
        ("digit@production", UnknownModel, "'digit'"),
        ("digits:", BadName, "a version is a number from 1"),
        ("digits:0", BadName, "a version is a number from 1"),
        ("digits:01", BadName, "a version is a number from 1"),
        ("digits:-1", BadName, "a version is a number from 1"),
        ("digits:٣", BadName, "a version is a number from 1"),
        ("digits:9999999999", BadName, "a version is a number from 1"),
        ("digits@", BadName, "'' is no name here"),
        ("digits@Production", BadName, "lower-case letters"),
        ("", BadName, "lower-case letters"),
        ("../digits", BadName, "lower-case letters"),
        ("digits/../digits", BadName, "lower-case letters"),
        ("digits\n", BadName, "lower-case letters"),
        ("digits\0", BadName, "lower-case letters"),
        ("x" * 1_000_000, BadName, "at most 64"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_there_is(
    three: ModelStore, reference: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as refusal:
        three.resolve(reference)
    assert type(refusal.value) is error
    assert sentence in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["a", "0", "resnet-18_v1.5", "x" * 64, "console", "com10"])
def test_names_that_are_names(store: ModelStore, name: str) -> None:
    assert store.publish(name, writing(1)).name == name


@pytest.mark.parametrize(
    "name",
    ["CON", "con", "nul.txt", "com1", "Digits", ".hidden", "-x", "a.", "a b", "é", "a/b", "x" * 65],
)
def test_names_that_are_none(store: ModelStore, name: str) -> None:
    with pytest.raises(BadName):
        store.publish(name, writing(1))
    assert not store.folder.exists()


def test_an_empty_store_says_so(store: ModelStore) -> None:
    assert store.names() == []
    assert store.versions("digits") == []
    assert store.history("digits") == []
    for ask in (store.aliases, store.resolve):
        with pytest.raises(UnknownModel, match="the store is empty"):
            ask("digits")


def test_other_things_in_the_folder_are_no_versions(three: ModelStore) -> None:
    for name in ("0", "007", "x", "4.bak", "٤"):
        (three.folder / "digits" / name).mkdir()
    (three.folder / "README").write_text("models rest here")
    assert three.versions("digits") == [1, 2, 3]
    assert three.names() == ["digits"]


# Aliases


def test_an_alias_moves_and_its_history_tells_why(three: ModelStore) -> None:
    three.move_alias("digits", PRODUCTION, 2, by="anna", why="better", evidence={"accuracy": 0.98})
    move = three.move_alias("digits", PRODUCTION, 3, expected=2)
    assert (move.previous, move.to) == (2, 3)
    assert [move.to for move in three.history("digits", PRODUCTION)] == [1, 2, 3]
    second = three.history("digits", PRODUCTION)[1]
    assert (second.by, second.why, second.evidence) == ("anna", "better", {"accuracy": 0.98})
    assert three.history("digits", "canary") == []


def test_compare_and_set(three: ModelStore) -> None:
    with pytest.raises(AliasMoved, match="digits@production holds 1, not 2"):
        three.move_alias("digits", PRODUCTION, 3, expected=2)
    with pytest.raises(AliasMoved, match="digits@production holds 1, not nothing"):
        three.move_alias("digits", PRODUCTION, 3, expected=None)
    with pytest.raises(AliasMoved, match="digits@canary holds nothing, not 1"):
        three.move_alias("digits", "canary", 3, expected=1)
    three.move_alias("digits", "canary", 3, expected=None)
    three.move_alias("digits", "canary", None, expected=3)
    assert three.aliases("digits") == {PRODUCTION: 1}


def test_an_alias_splits_its_traffic_until_it_moves_again(three: ModelStore) -> None:
    split = Split(canary=2, share=0.1, shadow=3)
    three.move_alias("digits", PRODUCTION, 1, expected=1, why="try two", split=split)
    traffic = three.traffic("digits")
    assert (traffic.holder.number, traffic.share, traffic.alias) == (1, 0.1, PRODUCTION)
    assert traffic.canary == three.version("digits", 2)
    assert traffic.shadow == three.version("digits", 3)
    assert three.states("digits")[PRODUCTION].split == split
    three.move_alias("digits", PRODUCTION, 2)
    assert three.traffic("digits") == Traffic(three.version("digits", 2), PRODUCTION)
    assert three.traffic("digits:3") == Traffic(three.version("digits", 3))


@pytest.mark.parametrize("split", [Split(2, 0.5), Split(shadow=2)])
def test_a_version_that_an_alias_sends_to_is_kept(three: ModelStore, split: Split) -> None:
    three.move_alias("digits", PRODUCTION, 1, split=split)
    with pytest.raises(VersionInUse, match="digits:2 is held by production"):
        three.delete("digits", 2)
    three.move_alias("digits", PRODUCTION, 1)
    three.delete("digits", 2)


def test_a_split_that_makes_no_sense(three: ModelStore) -> None:
    for canary, share in [(2, 0.0), (2, 1.0), (2, -0.1), (2, float("nan")), (None, 0.5)]:
        with pytest.raises(ValueError, match="share"):
            Split(canary, share)
    with pytest.raises(ValueError, match="another version"):
        three.move_alias("digits", PRODUCTION, 2, split=Split(2, 0.5))
    with pytest.raises(ValueError, match="another version"):
        three.move_alias("digits", PRODUCTION, None, split=Split(shadow=2))
    with pytest.raises(UnknownVersion, match="no version 9"):
        three.move_alias("digits", PRODUCTION, 1, split=Split(shadow=9))
    assert len(three.history("digits")) == 1


def test_a_history_from_before_there_were_splits_is_read(three: ModelStore) -> None:
    path = three.folder / "digits" / "aliases.jsonl"
    old = {"alias": "production", "to": 2, "previous": 1, "at": "2026-01-01T00:00:00.000+00:00"}
    lines = [{**old, "by": "local", "why": "better", "evidence": {}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert three.traffic("digits") == Traffic(three.version("digits", 2), PRODUCTION)
    three.move_alias("digits", PRODUCTION, 3, split=Split(shadow=1))
    newest = json.loads(path.read_text().splitlines()[-1])
    assert old.keys() <= newest.keys()  # a program from before reads it as well
    assert [move.shadow for move in three.history("digits")] == [None, 1]


def test_rolling_back_goes_to_what_was_held_before(three: ModelStore) -> None:
    for number in (2, 3):
        three.move_alias("digits", PRODUCTION, number)
    first = three.roll_back("digits", PRODUCTION, by="anna", why="three is slow", expected=3)
    assert (first.to, first.previous, first.by, first.rollback) == (2, 3, "anna", True)
    assert three.roll_back("digits", PRODUCTION).to == 1  # not to three, which was left as bad
    with pytest.raises(NothingToRollBack, match="digits@production"):
        three.roll_back("digits", PRODUCTION)
    with pytest.raises(AliasMoved):
        three.roll_back("digits", PRODUCTION, expected=3)
    three.move_alias("digits", PRODUCTION, 3)
    assert three.rolls_back_to("digits", PRODUCTION) == three.version("digits", 1)
    with pytest.raises(AliasMoved, match="goes back to digits:1"):
        three.roll_back("digits", PRODUCTION, to=2)
    assert three.roll_back("digits", PRODUCTION, to=1).to == 1


def test_rolling_back_ends_a_canary_and_passes_over_what_was_deleted(three: ModelStore) -> None:
    three.move_alias("digits", PRODUCTION, 2)
    three.move_alias("digits", PRODUCTION, 3)
    three.delete("digits", 2)
    three.move_alias("digits", PRODUCTION, 3, split=Split(1, 0.5, shadow=None))
    move = three.roll_back("digits", PRODUCTION)
    assert (move.to, move.canary) == (3, None)
    assert three.roll_back("digits", PRODUCTION).to == 1
    with pytest.raises(NothingToRollBack):
        three.roll_back("digits", "nobody")


def test_a_stamp_changes_with_versions_and_aliases(store: ModelStore) -> None:
    stamps = [store.stamp("digits")]
    for change in (
        lambda: store.publish("digits", writing(1)),
        lambda: store.publish("digits", writing(2)),
        lambda: store.move_alias("digits", PRODUCTION, 2),
        lambda: store.delete("digits", 1),
    ):
        change()
        stamps.append(store.stamp("digits"))
    assert len(set(stamps)) == 5
    assert store.stamp("digits") == stamps[-1]


def test_of_two_who_expect_the_same_one_wins(three: ModelStore) -> None:
    def move(to: int) -> bool:
        try:
            three.move_alias("digits", PRODUCTION, to, expected=1)
        except AliasMoved:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(move, [2, 3] * 8)) == 1


def test_an_alias_cannot_hold_what_is_not_there(three: ModelStore) -> None:
    with pytest.raises(UnknownVersion):
        three.move_alias("digits", "canary", 4)
    with pytest.raises(UnknownModel):
        three.move_alias("letters", "canary", 1)
    with pytest.raises(BadName):
        three.move_alias("digits", "a b", 1)
    assert not (three.folder / "letters").exists()


@pytest.mark.parametrize("evidence", [{"loss": float("nan")}, {"network": object()}])
def test_evidence_that_is_no_json_changes_nothing(
    three: ModelStore, evidence: dict[str, Any]
) -> None:
    before = (three.folder / "digits" / "aliases.jsonl").read_bytes()
    with pytest.raises((ValueError, TypeError)):
        three.move_alias("digits", PRODUCTION, 2, evidence=evidence)
    assert (three.folder / "digits" / "aliases.jsonl").read_bytes() == before


def test_a_line_cut_off_at_any_byte_never_was(three: ModelStore) -> None:
    path = three.folder / "digits" / "aliases.jsonl"
    first = path.read_bytes()
    three.move_alias("digits", PRODUCTION, 2)
    second = path.read_bytes()[len(first) :]
    for length in range(len(second)):
        path.write_bytes(first + second[:length])
        assert three.resolve("digits").number == 1
        three.move_alias("digits", PRODUCTION, 3, expected=1)
        assert three.resolve("digits").number == 3
        assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", [b"{}", b"[]", b"\xff", b'{"alias":"production","to":2}', b""])
def test_a_damaged_line_is_named_and_numbers_still_serve(three: ModelStore, line: bytes) -> None:
    path = three.folder / "digits" / "aliases.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(StoreDamaged, match="digits/aliases.jsonl has a line"):
        three.resolve("digits")
    with pytest.raises(StoreDamaged):
        three.move_alias("digits", PRODUCTION, 2)
    assert three.resolve("digits:2").number == 2


def test_a_damaged_line_below_the_last_does_not_hide_the_last(three: ModelStore) -> None:
    path = three.folder / "digits" / "aliases.jsonl"
    path.write_bytes(b"damaged\n" + path.read_bytes())
    assert three.resolve("digits").number == 1
    with pytest.raises(StoreDamaged):
        three.history("digits")


# Deleting


def test_a_number_is_never_used_again(three: ModelStore) -> None:
    three.delete("digits", 3, by="anna")
    with pytest.raises(UnknownVersion, match="there are 1, 2"):
        three.resolve("digits:3")
    assert three.publish("digits", writing(3)).number == 4
    (grave,) = (three.folder / "digits" / "tombstones.jsonl").read_text().splitlines()
    assert json.loads(grave)["version"] == 3
    assert not staged(three)


def test_what_an_alias_holds_cannot_be_deleted(three: ModelStore) -> None:
    three.move_alias("digits", "canary", 1)
    with pytest.raises(VersionInUse, match="digits:1 is held by production, canary"):
        three.delete("digits", 1)
    with pytest.raises(UnknownVersion):
        three.delete("digits", 4)
    with pytest.raises(UnknownModel):
        three.delete("letters", 1)
    assert three.versions("digits") == [1, 2, 3]


def test_a_damaged_version_can_be_deleted(three: ModelStore) -> None:
    manifest = three.version("digits", 3).folder / MANIFEST
    manifest.unlink()
    manifest.write_text("{")
    three.delete("digits", 3)
    assert three.versions("digits") == [1, 2]


def test_a_damaged_tombstone_stops_numbers_from_being_given(three: ModelStore) -> None:
    for line in ("{}", "what", '{"version": "3"}'):
        (three.folder / "digits" / "tombstones.jsonl").write_text(line + "\n")
        with pytest.raises(StoreDamaged, match="digits/tombstones.jsonl"):
            three.publish("digits", writing(4))
    assert three.versions("digits") == [1, 2, 3]


# Locks


def test_a_lock_that_is_held_for_too_long_is_an_error(three: ModelStore) -> None:
    hasty = ModelStore(three.folder, lock_timeout_s=0.1)
    with locked(three.folder / "digits" / ".lock", 1.0):
        for change in (
            lambda: hasty.publish("digits", writing(4)),
            lambda: hasty.move_alias("digits", PRODUCTION, 2),
            lambda: hasty.delete("digits", 3),
        ):
            with pytest.raises(StoreBusy, match="has been changing digits for 0.1 s"):
                change()
        assert hasty.resolve("digits").number == 1  # reading waits for nobody
    assert hasty.publish("digits", writing(4)).number == 4


def test_a_lock_that_comes_free_is_taken(three: ModelStore) -> None:
    def hold() -> None:
        with locked(three.folder / "digits" / ".lock", 1.0):
            time.sleep(0.3)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(hold)
        time.sleep(0.1)
        assert three.publish("digits", writing(4)).number == 4


def refusing(code: int, *, folders_only: bool = False) -> Callable[[int, int], None]:
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if folders_only and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            return real(descriptor, operation)
        raise OSError(code, os.strerror(code))

    return flock


def test_a_disk_without_locks_is_read_and_not_changed(
    three: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    with pytest.raises(LocksUnsupported, match="cannot lock files .*; put the store on"):
        three.publish("digits", writing(4))
    with pytest.raises(LocksUnsupported):
        three.move_alias("digits", PRODUCTION, 2)
    assert three.resolve("digits").number == 1
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        three.move_alias("digits", PRODUCTION, 2)


def test_where_folders_cannot_be_locked_age_tells_the_dead(
    three: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EBADF, folders_only=True))
    old, young = (three.folder / "digits" / f".staging-{age}" for age in ("old", "young"))
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    assert three.publish("digits", writing(4)).number == 4
    assert staged(three) == [young]


# Disks


@contextlib.contextmanager
def full_disk(max_file_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: the system takes what fits and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_publishes_nothing(three: ModelStore) -> None:
    largest = max(path.stat().st_size for path in three.version("digits", 1).folder.iterdir())
    for max_file_bytes in (0, 10, 100, 300, largest - 1):
        with full_disk(max_file_bytes), pytest.raises((OSError, CheckpointError)):
            three.publish("digits", writing(4))
        assert three.versions("digits") == [1, 2, 3]
        assert not staged(three)
    assert three.publish("digits", writing(4)).number == 4


def test_a_full_disk_moves_no_alias(three: ModelStore) -> None:
    path = three.folder / "digits" / "aliases.jsonl"
    before = path.read_bytes()
    for free in (0, 1, 30):
        with full_disk(len(before) + free), pytest.raises(OSError, match="File too large"):
            three.move_alias("digits", PRODUCTION, 2)
        assert path.read_bytes() == before
    three.move_alias("digits", PRODUCTION, 2)
    assert three.resolve("digits").number == 2


def syncs(monkeypatch: pytest.MonkeyPatch, failing: int = -1) -> list[str]:
    """The paths that are synced or renamed from now on; the sync `failing` is an I/O error."""
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        if len(seen) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    def watched_rename(source: Path, target: Path) -> None:
        rename(source, target)
        seen.append(f"rename to {Path(target).name}")

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    return seen


def test_everything_is_on_disk_before_the_rename_and_the_rename_after_it(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = syncs(monkeypatch)
    store.publish("digits", writing(1))
    seen = ["sync staging" if ".staging-" in entry else entry for entry in seen]
    (renamed,) = (at for at, entry in enumerate(seen) if entry == "rename to 1")
    assert seen[renamed - 3 :] == [
        *(f"sync {WEIGHTS}", f"sync {MANIFEST}", "sync staging"),
        *("rename to 1", "sync digits"),
        *("sync aliases.jsonl", "sync digits"),
    ]


def test_a_sync_that_fails_is_an_error_and_leaves_all_or_nothing(
    three: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failing in range(1, 8):
        with monkeypatch.context() as patch:
            syncs(patch, failing)
            try:
                three.publish("digits", writing(4))
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017
        for number in three.versions("digits"):
            checkpoint.load(three.version("digits", number).folder)
        assert not staged(three)
    with monkeypatch.context() as patch:
        syncs(patch, 1)
        with pytest.raises(OSError, match="Input/output"):
            three.move_alias("digits", PRODUCTION, 2)
    assert three.resolve("digits").number == 1


# A model of the whole


class Store(RuleBasedStateMachine):
    """Versions and aliases against a dictionary; a writer may die in the middle of any line."""

    aliases = st.sampled_from(["production", "canary"])
    numbers = st.integers(1, 6)

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.store = ModelStore(self.folder)
        self.there: set[int] = set()
        self.used = 0
        self.moves: list[tuple[str, int | None]] = []

    def held(self) -> dict[str, int]:
        return {alias: to for alias, to in dict(self.moves).items() if to is not None}

    @rule()
    def publish(self) -> None:
        staging = self.folder / "staging"
        staging.mkdir()
        (staging / MANIFEST).touch()
        (self.folder / "m").mkdir(exist_ok=True)
        self.used += 1
        assert self.store._rename("m", staging).number == self.used
        self.there.add(self.used)

    @precondition(lambda self: self.there)
    @rule(alias=aliases, to=st.none() | numbers, expected=st.none() | numbers)
    def move(self, alias: str, to: int | None, expected: int | None) -> None:
        try:
            self.store.move_alias("m", alias, to, expected=expected)
        except UnknownVersion:
            assert to not in self.there
        except AliasMoved:
            assert self.held().get(alias) != expected
        else:
            assert self.held().get(alias) == expected
            assert to is None or to in self.there
            self.moves.append((alias, to))

    @precondition(lambda self: self.there)
    @rule(number=numbers)
    def delete(self, number: int) -> None:
        try:
            self.store.delete("m", number)
        except UnknownVersion:
            assert number not in self.there
        except VersionInUse:
            assert number in self.held().values()
        else:
            self.there.remove(number)

    @precondition(lambda self: self.there)
    @rule(tail=st.sampled_from([b"{", b'{"alias":"canary","to":1', b"\0\0", b'{"version":99']))
    def die_while_writing(self, tail: bytes) -> None:
        for name in ("aliases.jsonl", "tombstones.jsonl"):
            with (self.folder / "m" / name).open("ab") as file:
                file.write(tail)

    @invariant()
    def agrees(self) -> None:
        assert self.store.versions("m") == sorted(self.there)
        assert [(move.alias, move.to) for move in self.store.history("m")] == self.moves
        if self.there:
            assert self.store.aliases("m") == self.held()
        for alias, number in self.held().items():
            assert self.store.resolve(f"m@{alias}").number == number

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
