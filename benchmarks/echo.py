"""The limit of the HTTP front: a Starlette route that reads the body and answers a constant.

`python -m benchmarks.echo PORT SIZE...`: POST `/echo/SIZE` answers SIZE bytes for each size given.
"""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.system import HOST


def application(sizes: list[int]) -> Starlette:
    """A route for each size in bytes, and `/` for the question whether it is up."""
    routes = [_echo(size) for size in sizes]
    return Starlette(routes=[*routes, Route("/", _up)])


def _echo(size: int) -> Route:
    constant = b"x" * size

    async def echo(request: Request) -> Response:
        await request.body()
        return Response(constant, media_type="application/json")

    return Route(f"/echo/{size}", echo, methods=["POST"])


async def _up(_: Request) -> Response:
    return Response(b"up")


def main(port: str, *sizes: str) -> None:
    """Serve with what uvicorn does fastest."""
    uvicorn.run(
        application([int(size) for size in sizes]),
        host=HOST,
        port=int(port),
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
