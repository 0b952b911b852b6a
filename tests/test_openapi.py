"""What /docs says: every route with one sentence, a worked example, and all its error answers."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.error_examples import ERROR_EXAMPLES
from app.api.schema import ERRORS, UNSAID

METHODS = {"get", "post", "put", "delete", "patch"}


@pytest.fixture
def operations(client: TestClient) -> dict[str, dict[str, Any]]:
    paths = client.get("/openapi.json").json()["paths"]
    return {
        f"{method.upper()} {path}": operation
        for path, item in paths.items()
        for method, operation in item.items()
        if method in METHODS
    }


@pytest.mark.changes_nothing
def test_every_route_is_described(client: TestClient, operations: dict[str, Any]) -> None:
    routes = {
        f"{method} {route.path}"
        for route in _routes(client.app)  # type: ignore[arg-type]
        for method in route.methods - {"HEAD"}
    }
    hidden = {"GET /docs", "GET /favicon.ico", "GET /openapi.json"}
    assert routes - hidden == operations.keys()


def test_every_route_has_one_sentence(operations: dict[str, Any]) -> None:
    for name, operation in operations.items():
        summary = operation["summary"]
        assert summary.endswith("."), name
        assert summary.count(". ") == 0, name
        assert operation["tags"], name


def test_every_route_has_a_worked_example(operations: dict[str, Any]) -> None:
    for name, operation in operations.items():
        answer = operation["responses"]["200"]
        for content_type, content in answer.get("content", {}).items():
            if content_type == "application/octet-stream":
                continue
            assert _has_example(content), f"{name} shows no example of its answer"


def test_every_route_lists_its_errors(operations: dict[str, Any]) -> None:
    for name, operation in operations.items():
        statuses = {int(status) for status in operation["responses"]}
        assert {400, 500, 503} <= statuses or name.split()[1] in SIMPLE, name
        if "{model}" in name:
            assert 404 in statuses, name
        if "requestBody" in operation:
            assert {403, 408, 413} <= statuses, name


def test_examples_of_the_errors_have_their_shape(operations: dict[str, Any]) -> None:
    for name, operation in operations.items():
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and name.split()[1] not in SIMPLE:
                assert "application/json" in answer["content"], (name, status)
                assert answer["description"].endswith("."), (name, status)
                example = answer["content"]["application/json"]["example"]["error"]
                message = example if name.split()[1].startswith("/v2") else example["message"]
                assert " " in message, (name, status)


def test_an_example_of_an_error_is_one_of_its_status() -> None:
    assert ERROR_EXAMPLES.keys() == ERRORS.keys()
    assert {body["error"]["code"] for body in ERROR_EXAMPLES.values()} >= {"unknown_model"}


def test_every_answer_has_a_description(operations: dict[str, Any]) -> None:
    for name, operation in operations.items():
        for status, answer in operation["responses"].items():
            assert answer["description"].endswith("."), (name, status)
            assert answer["description"] != UNSAID, name


def test_try_it_out_is_filled_with_what_there_is(operations: dict[str, Any]) -> None:
    """Names that a first start has; ids, which nobody can know, are left empty."""
    known = {"model": "digits", "alias": "production", "number": 1, "version": "production"}
    for name, operation in operations.items():
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "path" and parameter["name"] in known:
                assert parameter["example"] == known[parameter["name"]], name
            elif parameter["in"] == "path" and parameter["schema"]["type"] == "string":
                assert "example" not in parameter, name


def is_free_text(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "string" and "enum" not in schema


@pytest.mark.changes_nothing
def test_try_it_out_makes_nothing_up(client: TestClient, operations: dict[str, Any]) -> None:
    """Where a body has no example, the page fills in the word `string`."""
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name, operation in operations.items():
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            schema = content["schema"]
            schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
            if kind == "application/json":
                assert content.keys() & {"example", "examples"} or "example" in schema, name
            for field, about in schema.get("properties", {}).items():
                texts = [one for one in (about, *about.get("anyOf", ())) if is_free_text(one)]
                if kind == "multipart/form-data" and texts:
                    assert about.keys() & {"example", "enum", "format"}, (
                        name,
                        field,
                    )


@pytest.mark.changes_nothing
def test_no_example_says_string(client: TestClient) -> None:
    assert '"example":"string"' not in client.get("/openapi.json").text
    assert '"message":"string"' not in client.get("/openapi.json").text


SIMPLE = {"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2"}


def _routes(router: Any) -> list[Any]:
    """Every route, also of included routers."""
    found = []
    for route in router.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        found += _routes(inner) if inner is not None else []
        found += [route] if getattr(route, "methods", None) else []
    return found


def _has_example(content: dict[str, Any]) -> bool:
    return bool(content.keys() & {"example", "examples"}) or not content.get("schema")
