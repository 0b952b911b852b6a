"""What pydantic finds wrong is told in a person's words: the field, the bound, the value."""

import pytest
from starlette.testclient import TestClient

pytestmark = pytest.mark.changes_nothing

GOOD = {"model": "digits", "dataset": "digits"}
PROMOTE = "/v1/models/digits/aliases/production/promote"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "`model` is missing. `dataset` is missing."),
        ({**GOOD, "wait_s": 1000}, "`wait_s` must be at most 300, not 1000."),
        (
            {**GOOD, "wait_s": -1, "x": 1},
            "`wait_s` must be at least 0, not -1. `x` is no field here.",
        ),
        ({**GOOD, "wait_s": "x"}, '`wait_s` must be a number, not "x".'),
        ({**GOOD, "top_k": [3, 0]}, "`top_k[1]` must be at least 1, not 0."),
        ({**GOOD, "top_k": [1.5]}, "`top_k[0]` must be a whole number, not 1.5."),
        ({**GOOD, "top_k": 5}, "`top_k` must be a list, not 5."),
        ({**GOOD, "part": "all"}, "`part` must be 'train', 'validation' or 'test', not \"all\"."),
        ({**GOOD, "leave_out_seen": 7}, "`leave_out_seen` must be true or false, not 7."),
        ({**GOOD, "model": "d" * 300}, "`model` must have at most 200 characters, not 300."),
        ({**GOOD, "model": None}, "`model` must be a text, not null."),
        ([], "The body must be a JSON object, sent with `Content-Type: application/json`."),
    ],
)
def test_a_complaint_names_the_field_the_bound_and_the_value(
    client: TestClient, given: object, sentence: str
) -> None:
    answer = client.post("/v1/evaluations", json=given)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == sentence


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b'{"model":', 422, "The body is no JSON: Expecting value, at character 9."),
        (b"\xff", 400, "The body cannot be read: it is no JSON in UTF-8, or nested too deeply."),
        (
            b"[" * 100_000,
            400,
            "The body cannot be read: it is no JSON in UTF-8, or nested too deeply.",
        ),
    ],
    ids=["cut", "binary", "deep"],
)
def test_a_body_that_is_no_json(
    client: TestClient, body: bytes, status: int, sentence: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post(PROMOTE, content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["param"]) == (status, sentence, None)


def test_a_field_within_another_is_named_by_its_path(client: TestClient) -> None:
    wish = {"version": 1, "dataset": "digits", "rule": {"min_absolute_change": "much"}}
    error = client.post(PROMOTE, json=wish).json()["error"]
    assert error["param"] == "rule.min_absolute_change"
    assert error["message"] == '`rule.min_absolute_change` must be a number, not "much".'


def test_what_a_rule_itself_complains_of_is_told_as_it_is(client: TestClient) -> None:
    wish = {"version": 1, "dataset": "digits", "rule": {}}
    message = client.post(PROMOTE, json=wish).json()["error"]["message"]
    assert message.startswith("`rule`: a rule must ask for something")


def test_a_query_and_a_body_that_is_read_by_hand(client: TestClient) -> None:
    message = client.get("/v1/evaluations?limit=1000").json()["error"]["message"]
    assert message == '`limit` must be at most 100, not "1000".'
    wish = client.put("/v1/models/digits/aliases/production", json={"version": "x"})
    assert wish.json()["error"]["message"] == '`version` must be a whole number, not "x".'
