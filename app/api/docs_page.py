"""The page at /docs: Swagger UI from files on this machine, because a server may have no network.

Swagger UI itself comes from the package `fastapi-offline`, which carries its files; the page around
it lies in `app/static`.
"""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parent.parent / "static"

PAGE_HEADERS = {
    # `data:` and `blob:` are the icons in Swagger UI's style sheet and the pictures in answers.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def mount_docs(app: FastAPI) -> None:
    """Answer /docs, its files under /docs/assets, and /favicon.ico.

    The application must have been made with `docs_url=None` and leaves its description at
    /openapi.json. Addresses in the page are relative, so it also works behind a path prefix.
    """

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html", headers=PAGE_HEADERS)

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> FileResponse:
        return FileResponse(STATIC / "favicon.svg", media_type="image/svg+xml")

    assets = StaticFiles(directory=STATIC, packages=[("fastapi_offline", "static")])
    app.mount("/docs/assets", assets, name="docs-assets")
