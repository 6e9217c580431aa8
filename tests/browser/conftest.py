"""A real Chromium, and pages in it that complain: of errors on the console, requests that leave the origin,
anything that the page's own policy blocked.

The browser is the system's. Without one these tests are skipped, or fail where TESTS_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine, Server, fake_info, serving, wait_until

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
NETWORK = re.compile(r"Failed to load resource")  # what a browser logs of any status from 400 on

OpenPage = Callable[..., Any]


def _missing(what: str) -> None:
    if os.environ.get("TESTS_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{what}, and TESTS_REQUIRE_BROWSER=1")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for each file of tests, not for the session: while Playwright is open, its event loop counts as
    running in this thread, and other tests could start none."""
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        _missing(f"none of {', '.join(CHROMIUM)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed (pip install 'gqa-serve[dev]')")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def page_server() -> Iterator[Server]:
    with serving(FakeEngine()) as running:
        yield running


@pytest.fixture
def server(page_server: Server) -> Iterator[Server]:
    """The app over a scripted engine, as new; the context is long enough for a conversation in bytes."""
    page_server.engine.reset()
    page_server.engine.model_info = fake_info(max_model_len=8192, num_blocks=512)
    yield page_server
    page_server.engine.release.set()
    wait_until(lambda: page_server.engine.num_running == 0)


@pytest.fixture(scope="module")
def plain_context(browser: Any) -> Any:
    """For pages without options: what they store is the tab's own, and they share a cache of the files."""
    return _context(browser)


def _context(browser: Any, **options: Any) -> Any:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(20_000)
    context.add_init_script(
        "addEventListener('securitypolicyviolation', (event) => console.error('blocked: '"
        " + event.violatedDirective + ' ' + event.blockedURI + ' ' + event.sample));"
    )
    return context


@pytest.fixture
def open_page(browser: Any, plain_context: Any) -> Iterator[OpenPage]:
    """`open_page(url, ready=True, refused=False, **options)`: a page in a tab of its own.

    `options` are those of a context; with any, it has one of its own.

    `refused`: the test makes the server answer with errors, which the browser then logs.
    """
    opened: list[Any] = []
    complaints: list[str] = []

    def open_one(url: str, *, ready: bool = True, refused: bool = False, **options: Any) -> Any:
        origin = "/".join(url.split("/")[:3])
        context = _context(browser, **options) if options else plain_context
        page = context.new_page()
        opened.append(context if options else page)

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning") and not (refused and NETWORK.match(message.text)):
                complaints.append(f"console: {message.text}")

        def on_request(request: Any) -> None:
            if not request.url.startswith((origin + "/", "data:")):
                complaints.append(f"left the origin: {request.url}")

        page.on("console", on_console)
        page.on("pageerror", lambda error: complaints.append(f"threw: {error}"))
        page.on("request", on_request)
        page.goto(url)
        if ready:
            page.wait_for_selector("#connection[data-kind=ready]")
        return page

    yield open_one
    for one in opened:
        one.close()
    assert complaints == []
