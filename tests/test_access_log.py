"""One line a request at most; and of a crowd that is refused, a few lines."""

import logging

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.http import access
from app.http.access import AccessLog, Crowd
from app.metrics import Metrics

pytestmark = pytest.mark.anyio


async def answer(request: Request) -> Response:
    return Response(status_code=int(request.path_params["status"]))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == access.__name__]


async def ask(logged: str, statuses: list[int], caplog: pytest.LogCaptureFixture) -> list[str]:
    routes = [Route("/{status}", answer)]
    app = AccessLog(Starlette(routes=routes), Metrics(), logged)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    with caplog.at_level(logging.INFO, access.__name__):
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            for status in statuses:
                assert (await client.get(f"/{status}")).status_code == status
    return lines(caplog)


async def test_a_crowd_of_refusals_gets_ten_lines_and_their_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "WINDOW_S", 3600.0)
    told = await ask("errors", [429] * 30 + [404, 200, 429], caplog)
    assert [line.split()[2] for line in told] == ["429"] * 10 + ["404"]


async def test_all_means_all(caplog: pytest.LogCaptureFixture) -> None:
    assert len(await ask("all", [429] * 30 + [200], caplog)) == 31


def test_who_got_no_line_is_told_of_when_the_second_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crowd = Crowd()
    with caplog.at_level(logging.INFO, access.__name__):
        assert [crowd.is_told(100.0 + number / 100) for number in range(15)] == [True] * 10 + [
            False
        ] * 5
        crowd.tell_the_rest(100.5)
        assert not lines(caplog)
        crowd.tell_the_rest(101.0)
        assert lines(caplog) == ["5 more requests were answered with 429"]
        assert crowd.num_untold == 0
        assert crowd.is_told(101.1)
