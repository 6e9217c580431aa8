"""What people do on the page, and what a test may ask of it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx2

PROBES = Path(__file__).with_name("probes.js").read_text()


def ask(page: Any, text: str, *, wait: bool = True) -> None:
    """Type a question and send it; `wait` for the whole answer."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        answered(page)


def answered(page: Any) -> None:
    """Wait until no answer grows."""
    page.wait_for_selector("#send:not([hidden])")


def until(page: Any, condition: str) -> None:
    """Wait until a JavaScript expression holds.

    Playwright's own way evaluates text inside the page, which the page's policy forbids.
    """
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"never came true: {condition}"
        page.wait_for_timeout(20)


def answers(page: Any) -> list[str]:
    texts: list[str] = page.locator(".answer > .text").all_inner_texts()
    return texts


def metrics(url: str, **headers: str) -> dict[str, float]:
    """/metrics as a dict: the sample without the label of the model -> value."""
    text = httpx2.get(f"{url}/metrics", headers=headers).text
    samples = re.findall(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE)
    found: dict[str, float] = {}
    for name, labels, value in samples:
        kept = re.sub(r',?model_name="[^"]*",?', "", labels)
        found[f"{name}{{{kept}}}" if kept else name] = float(value)
    return found


def number(text: str) -> float:
    """What a tile or a legend shows, as a number."""
    return float(text.replace(",", "").removesuffix(" %"))


def probe(page: Any, name: str, *arguments: Any) -> Any:
    """The result of a function of probes.js in the page."""
    return page.evaluate(f"(args) => {{ {PROBES}; return {name}(...args); }}", list(arguments))


def nameless(page: Any) -> list[str]:
    """What Chromium's accessibility tree shows of roles that need a name and have none."""
    needs = {
        "button", "link", "textbox", "combobox", "checkbox", "spinbutton", "image", "region", "listbox",
        "option", "table", "dialog", "navigation", "complementary", "log", "heading", "article",
    }  # fmt: skip
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    found = []
    for node in nodes:
        role = node.get("role", {}).get("value", "")
        if not node.get("ignored") and role in needs and not node.get("name", {}).get("value", "").strip():
            found.append(f"{role} {node.get('backendDOMNodeId')}")
    session.detach()
    return found
