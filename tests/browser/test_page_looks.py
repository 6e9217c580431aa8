"""The page in Chromium, whatever the screen and whoever answers: contrast, width, names, and hostile text."""

from __future__ import annotations

from typing import Any

import pytest
from actions import answers, ask, nameless, probe, until
from fake_engine import Script, Server
from test_dashboard_page import busy, dashboard

RICH = (
    "# Title\n\nSome **bold** and *thin* text with `code`, [a link](https://example.org/x) and a list:\n\n"
    "- one\n  1. inner\n- two\n\n> quoted\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n---\n\n"
    "```python\nprint('a very long line that a phone cannot show without scrolling in its box')\n```\nEnd."
)
HOSTILE = (
    "<script>document.title='taken'</script>\n\n<img src=x onerror=\"document.title='taken'\">\n\n"
    "[click](javascript:document.title='taken') ![p](https://evil.example/pixel.png) "
    "[d](data:text/html,<script>1</script>)\n\n```html\n</code><script>1</script>\n```\n<style>*{display:none}</style>"
)


def chat_with_everything(page: Any, server: Server) -> None:
    """An answer of every kind of block, one shown as tokens, one that failed."""
    server.engine.script = lambda request: Script([RICH])
    ask(page, "Everything")
    server.engine.script = lambda request: Script(["Plain"])
    ask(page, "Tokens")
    page.locator("button:text-is('Tokens'):visible").last.click()
    page.locator(".token-list").focus()
    server.engine.script = lambda request: Script(["x"], finish="error", error="It failed.")
    ask(page, "Fail")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(server: Server, open_page: Any, scheme: str) -> None:
    busy(server.engine)
    page = open_page(server.url, color_scheme=scheme, reduced_motion="reduce")
    empty = probe(page, "contrast")
    chat_with_everything(page, server)
    chat = probe(page, "contrast")
    dashboard(page)
    page.wait_for_selector(".compare")
    numbers = probe(page, "contrast")
    assert empty["low"] + chat["low"] + numbers["low"] == []
    assert min(empty["seen"], chat["seen"], numbers["seen"]) > 20
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "light dark"
    # The toggle wins over the system, and is remembered.
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.select_option("#theme", "light" if scheme == "dark" else "dark")
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert after != before
    assert probe(page, "contrast")["low"] == []
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone(server: Server, open_page: Any, width: int) -> None:
    busy(server.engine)
    page = open_page(server.url, viewport={"width": width, "height": 640}, has_touch=True, is_mobile=True)
    fits = {"page": 0, "found": []}
    assert probe(page, "overflowing") == fits
    page.click("#settings-box summary")
    assert probe(page, "overflowing") == fits
    page.fill("#max_tokens", "3000")
    page.click("#settings-box summary")
    chat_with_everything(page, server)
    assert probe(page, "overflowing") == fits
    assert page.locator("#send").is_visible()
    dashboard(page)
    page.wait_for_selector(".compare")
    assert probe(page, "overflowing") == fits


def test_names_roles_and_structure(server: Server, open_page: Any) -> None:
    page = open_page(server.url)
    assert nameless(page) == []
    chat_with_everything(page, server)
    assert nameless(page) == []
    for view in ("chat", "dashboard"):
        page.click(f"#to-{view}")
        page.wait_for_selector(f"#{view}:not([hidden])")
        assert page.locator("h1:visible, h1.hidden:not([hidden] *)").count() == 1
        assert page.locator("[aria-current=page]").inner_text().lower() == view
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-labelledby", "aria-describedby"):
        values = page.evaluate(
            f"[...document.querySelectorAll('[{name}]')].map((one) => one.getAttribute('{name}'))"
        )
        assert {id for value in values for id in value.split()} <= set(ids)
    assert page.get_attribute("html", "lang") == "en"
    page.click("#to-dashboard")
    assert page.locator("#blocks").get_attribute("role") == "img"
    assert page.get_by_role("img", name="KV blocks").count() == 1


def test_no_motion_where_none_is_wanted(server: Server, open_page: Any) -> None:
    page = open_page(server.url, reduced_motion="reduce")
    server.engine.script = lambda request: Script(["On", "e"], hold_at=1)
    ask(page, "Hold", wait=False)
    until(page, "document.querySelector('.answer > .text').textContent === 'On'")
    assert page.evaluate("document.getAnimations().length") == 0
    server.engine.release.set()


# --- hostile text ------------------------------------------------------------------------------------------


def test_hostile_answers_stay_text(server: Server, open_page: Any) -> None:
    server.engine.script = lambda request: Script([HOSTILE])
    page = open_page(server.url)
    ask(page, "<b>Question</b>")
    shown = answers(page)[0]
    assert "<script>document.title='taken'</script>" in shown
    assert "<style>" in shown
    assert page.locator(".user .text").inner_text() == "<b>Question</b>"
    page.click("button:text-is('Tokens')")
    assert "<script>" in page.locator(".token-list").inner_text()
    inside = "one => [...one.querySelectorAll('script, img, style, iframe, b')].length"
    assert page.locator("#messages").evaluate(inside) == 0
    assert page.title() == "Chat – gqa-serve"
    links = page.locator("#messages a").evaluate_all("all => all.map((one) => one.href)")
    assert links == ["https://evil.example/pixel.png"]  # a link to follow, nothing that loads by itself


MARKDOWN: list[tuple[str, list[str]]] = [
    ("a\nb\n\nc", ["p", "br", "p"]),
    ("**a** _b_ ~~c~~ `d` 2*3*4 snake_case_name", ["p", "strong", "em", "del", "code", "em"]),
    ("- a\n- b\n  - c\n\n1. d", ["ul", "li", "li", "ul", "li", "ol", "li"]),
    ("### t\n***\n> q\n> r", ["h5", "hr", "blockquote", "p", "br"]),
    ("~~~js\n<b>\n~~~", ["div", "div", "span", "button", "pre", "code"]),
    ("```\nopen", ["div", "div", "span", "button", "pre", "code"]),
    ("see https://a.example/b(c) or <https://d.example>.", ["p", "a", "a"]),
    ("[x](java\nscript:alert(1)) [y](//evil.example) [z](mailto:a@b.example)", ["p", "br", "a"]),
    ("\\*no\\* ** lone * marks __", ["p"]),
    ("<div onclick=alert(1)>&lt;</div>", ["p"]),
]


def test_markdown(server: Server, open_page: Any) -> None:
    page = open_page(server.url, ready=False)
    for text, names in MARKDOWN:
        made = probe(page, "markdown", text)
        assert made["names"] == names, text
        for href, rel, target in made["links"]:
            assert href.startswith(("https:", "mailto:"))
            assert (rel, target) == ("noopener noreferrer nofollow", "_blank")
        assert not [name for name in made["attributes"] if name.startswith("on")], text


def test_no_text_stalls_the_page(server: Server, open_page: Any) -> None:
    page = open_page(server.url, ready=False)
    pieces = (
        "*a ", "**a _b ", "[", "![", "`", "``a", "> ", "- ", "|-", "1. ", "\n", "h", "https://", "~", "_",
        "\\", "#", "* * ", "- a\n", "|a",
    )  # fmt: skip
    texts = [piece * (40_000 // len(piece)) for piece in pieces]
    texts.append("".join("  " * depth + "- a\n" for depth in range(200)))
    texts.append(">" * 5000 + "a")
    # It comes to an end, before the test's own time is up, and loses no letters.
    assert probe(page, "letters", texts) == [text.count("a") for text in texts]
