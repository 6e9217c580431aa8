"""What /metrics says, as numbers."""

from __future__ import annotations

import httpx2
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "gqa_serve_"


class Scraped:
    """One scrape: samples by name and labels; `model_name` is on each and left out here."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
                key = (sample.name, frozenset(labels.items()))
                assert key not in self.samples, key
                self.samples[key] = sample.value

    def get(self, name: str, **labels: str) -> float:
        """A sample; 0 for label values that have not occurred."""
        return self.samples.get((PREFIX + name, frozenset(labels.items())), 0.0)

    def all(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        """Every series of a name."""
        return {labels: value for (sample, labels), value in self.samples.items() if sample == PREFIX + name}


def scrape(url: str, path: str = "/metrics", **options: object) -> Scraped:
    response = httpx2.get(url + path, verify=False, **options)  # type: ignore[arg-type]
    assert response.status_code == 200, response.text
    return Scraped(response.text)
