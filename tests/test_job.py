"""The table of transitions."""

import pytest

from app.jobs.job import FINAL, TRANSITIONS, State, TransitionRefused, check_transition, sources_of


def test_every_state_has_its_line() -> None:
    assert set(TRANSITIONS) == set(State)


def test_nothing_follows_an_end() -> None:
    for state in FINAL:
        assert TRANSITIONS[state] == frozenset()
        for target in State:
            with pytest.raises(TransitionRefused, match=f"no job goes from {state} to {target}"):
                check_transition(state, target)


def test_every_other_state_leads_to_an_end_and_is_reached() -> None:
    for state in set(State) - FINAL:
        assert State.CANCELLED in TRANSITIONS[state]
        assert sources_of(state)


def test_only_a_running_job_succeeds_and_only_a_queued_one_runs() -> None:
    assert sources_of(State.SUCCEEDED) == {State.RUNNING}
    assert sources_of(State.RUNNING) == {State.QUEUED}
