"""Metrics of several servers in one text that Prometheus's own parser reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gqa_serve.deploy.merged_metrics import merged_metrics


def text(count: float) -> str:
    registry = CollectorRegistry()
    Gauge("plain", "No labels.", registry=registry).set(count)
    labels = Counter("labelled", 'Labels that hold "} and , and \\.', ["word"], registry=registry)
    labels.labels('a"},{b\\c\nd').inc(count)
    Histogram("times_seconds", "Buckets.", registry=registry, buckets=(1, 2)).observe(count)
    return generate_latest(registry).decode()


def test_samples_are_told_apart_and_families_are_whole() -> None:
    families = list(text_string_to_metric_families(merged_metrics({"x": text(1), "y": text(2)})))
    alone = list(text_string_to_metric_families(text(1)))
    assert [(family.name, family.type) for family in families] == [
        (family.name, family.type) for family in alone
    ]
    for family, single in zip(families, alone, strict=True):
        assert family.documentation == single.documentation
        for replica in ("x", "y"):
            own = [sample for sample in family.samples if sample.labels["replica"] == replica]
            assert [sample.name for sample in own] == [sample.name for sample in single.samples]
        assert {tuple(sample.labels.items())[1:] for sample in family.samples} >= {
            tuple(sample.labels.items()) for sample in single.samples
        }
    (plain,) = [family for family in families if family.name == "plain"]
    assert {sample.labels["replica"]: sample.value for sample in plain.samples} == {"x": 1, "y": 2}


def test_nobody_says_nothing() -> None:
    assert list(text_string_to_metric_families(merged_metrics({}))) == []
    assert merged_metrics({"x": "odd{} 1\n"}) == 'odd{replica="x"} 1\n'
