"""The docs page: complete without a network, and usable in a real browser."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, Route, expect, sync_playwright
from raw_http import running
from starlette.testclient import TestClient

from app.auth.store import KeyStore
from app.main import create_app
from app.settings import Settings
from models.store import ModelStore

PATIENCE_MS = 60_000
CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def addresses_in(html: str) -> list[str]:
    return re.findall(r'(?:src|href)="([^"]+)"', html)


def test_every_address_in_the_page_is_its_own(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    addresses = addresses_in(page.text)
    assert len(addresses) == 6
    for address in addresses:
        assert client.get("/" + address).status_code == 200, address


def test_the_page_allows_itself_nothing_but_its_own_files(client: TestClient) -> None:
    page = client.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"<script>|<style| style=| on\w+=", page.text)


def test_no_other_file_comes_out_of_the_assets(client: TestClient) -> None:
    for path in ("../docs_page.py", "%2e%2e/main.py", "..%2f..%2fpyproject.toml", ""):
        assert client.get(f"/docs/assets/{path}").status_code == 404, path


def test_the_browser_gets_its_icon(client: TestClient) -> None:
    assert client.get("/favicon.ico").headers["content-type"] == "image/svg+xml"


@pytest.fixture
def address(store: ModelStore) -> Iterator[str]:
    """A real server over the small store."""
    settings = Settings(home=store.folder.parent, port=0, device="cpu", threads=1)
    with running(create_app(settings)) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of Debian's Chromium, for which no other host exists."""
    if CHROMIUM is None:
        pytest.fail("this test needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        page.set_default_timeout(PATIENCE_MS)
        yield page
        browser.close()


@pytest.mark.slow
def test_try_it_out_predicts_a_chosen_file(
    page: Page, address: str, digit_png: bytes, tmp_path: Path
) -> None:
    picture = tmp_path / "digit.png"
    picture.write_bytes(digit_png)
    foreign, complaints = watch(page)

    page.goto(f"{address}/docs")
    predict = page.locator(".opblock", has_text="/v1/models/{model}/predict")
    predict.locator(".opblock-summary-control").click()
    predict.get_by_role("button", name="Try it out").click()
    predict.get_by_placeholder("model").fill("digits")
    predict.locator("input[type=file]").set_input_files(picture)
    predict.get_by_role("button", name="Execute").click()

    answer = predict.locator(".live-responses-table .response").first
    expect(answer.locator(".response-col_status")).to_contain_text("200", timeout=PATIENCE_MS)
    expect(answer).to_contain_text(re.compile(r'"label": "\d"'))
    assert foreign == []
    assert complaints == []


@pytest.mark.slow
def test_authorize_takes_a_key_and_sends_it(page: Page, address: str, store: ModelStore) -> None:
    _, token = KeyStore(store.folder.parent).create("reader", ("predict",))
    foreign, complaints = watch(page)
    page.goto(f"{address}/docs")
    models = page.locator(".opblock", has_text="List all models").first
    models.locator(".opblock-summary-control").click()
    models.get_by_role("button", name="Try it out").click()
    status = models.locator(".live-responses-table .response .response-col_status").first
    execute = models.get_by_role("button", name="Execute")
    for _ in range(100):  # until the server has noticed that there is a key now
        execute.click()
        page.wait_for_timeout(200)
        if status.text_content() == "401":
            break

    page.get_by_role("button", name="Authorize").first.click()
    dialog = page.locator(".dialog-ux")
    expect(dialog).to_contain_text("bearer", ignore_case=True)
    dialog.locator("input").fill(token)
    dialog.get_by_role("button", name="Apply credentials").click()
    dialog.get_by_role("button", name="Close", exact=True).click()
    execute.click()

    expect(status).to_contain_text("200", timeout=PATIENCE_MS)
    assert foreign == []
    assert all("401" in line for line in complaints), complaints


def watch(page: Page) -> tuple[list[str], list[str]]:
    """What the page asks of other hosts, and what the browser complains of, as both happen."""
    foreign: list[str] = []
    complaints: list[str] = []

    def pass_or_note(route: Route) -> None:
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    page.route("**/*", pass_or_note)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    return foreign, complaints
