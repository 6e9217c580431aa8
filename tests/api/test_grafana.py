"""The dashboard and the rules ask for metrics that there are, and the dashboard for nearly all there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_engine import FakeEngine, serving, wait_until
from scraped import PREFIX, Scraped, scrape
from test_api_raw import chat

FOLDER = Path(__file__).parents[2] / "docs" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "gqa-serve.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
SELECTOR = re.compile(rf"({PREFIX}\w+)(?:\{{([^}}]*)\}})?")
NOT_SHOWN: set[str] = set()
GIVEN_ELSEWHERE = {"instance", "replica"}  # by Prometheus; and by servers of several engines


@pytest.fixture(scope="module")
def served() -> Iterator[Scraped]:
    """What a server says that has answered and refused."""
    with serving(FakeEngine()) as server:
        chat(server)
        chat(server, stream=True)
        chat(server, max_tokens=0.5)
        wait_until(lambda: scrape(server.url).get("request_success_total", finished_reason="stop") == 2)
        yield scrape(server.url)


def expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    variables = [one["definition"] for one in DASHBOARD["templating"]["list"] if "definition" in one]
    return [*panels, *variables, *(rule["expr"] for rule in RULES)]


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_what_is_asked_for_exists(served: Scraped, expression: str) -> None:
    found = SELECTOR.findall(expression)
    assert found
    samples = {sample.name: sample.labels for family in served.families.values() for sample in family.samples}
    families = {f"{name}_total" for name, family in served.families.items() if family.type == "counter"}
    for name, matchers in found:
        assert name in samples or name in families, name
        known = set(samples.get(name, {"reason": ""})) | {"model_name"}
        asked = set(re.findall(r"(\w+)\s*(?:=|!=)", matchers))
        assert asked <= known, (name, asked - known)
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression)
                   for label in group.split(",")}  # fmt: skip
        assert grouped <= known | GIVEN_ELSEWHERE, (name, grouped - known)
    assert expression.count("(") == expression.count(")")


def test_nearly_everything_is_shown(served: Scraped) -> None:
    shown = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", []))
    missing = {name for name in served.families if not re.search(rf"{name}(_|\b)", shown)}
    assert missing == NOT_SHOWN


def test_it_is_portable() -> None:
    assert "id" not in DASHBOARD
    assert {one["name"] for one in DASHBOARD["templating"]["list"]} == {"datasource", "model_name"}
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "KV cache", "Engine steps", "Errors and processes"]
    for panel in DASHBOARD["panels"]:
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_each_rule_says_what_it_means() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    assert all(rule["annotations"]["summary"] for rule in RULES)
