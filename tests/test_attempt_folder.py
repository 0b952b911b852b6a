"""Attempts write into folders of their own, and begin with the snapshots before."""

from pathlib import Path

from app.jobs.attempt_folder import open_attempt, steps_saved


def save(attempt: Path, phase: str, step: int) -> Path:
    folder = attempt / phase / f"step-{step:010d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(str(step))
    return folder


def test_an_attempt_begins_with_the_snapshots_of_the_newest_before(tmp_path: Path) -> None:
    first = open_attempt(tmp_path / "run", 1)
    save(first, "head", 30)
    (first / "head" / ".writing-x").mkdir()
    second = open_attempt(tmp_path / "run", 2)
    assert (second / "head" / "step-0000000030" / "state.json").read_text() == "30"
    assert not (second / "head" / ".writing-x").exists()


def test_a_stale_attempt_does_not_disturb_the_next(tmp_path: Path) -> None:
    first = open_attempt(tmp_path / "run", 1)
    snapshot = save(first, "head", 30)
    second = open_attempt(tmp_path / "run", 2)
    (snapshot / "state.json").unlink()
    assert (second / "head" / "step-0000000030" / "state.json").is_file()


def test_opening_again_changes_nothing_and_old_attempts_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for token in (1, 2, 3):
        save(open_attempt(run, token), "head", token)
    assert open_attempt(run, 3) == run / "000003"
    assert sorted(path.name for path in run.iterdir()) == ["000002", "000003"]


def test_saved_steps_grow_over_all_phases(tmp_path: Path) -> None:
    attempt = open_attempt(tmp_path / "run", 1)
    assert steps_saved(attempt) == 0
    save(attempt, "head", 30)
    save(attempt, "head", 60)
    save(attempt, "all-layers", 5)
    assert steps_saved(attempt) == 65
