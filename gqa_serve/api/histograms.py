"""`Histogram`: a Prometheus histogram for one thread, cheap enough to observe every token.

Owns bucket counts and their exposition. Knows nothing of what is measured. prometheus_client's own takes two
locks and walks its buckets for each value; here everything is observed on the event loop, so an observation
is a bisection and two additions, and many equal values cost as much as one. Invariant: counts only grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


def steps_1_2_5(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 times powers of ten from `low` (one of these) up to the first that is not below `high`."""
    bounds: list[float] = []
    mantissas, index = (1.0, 2.0, 5.0), 0
    scale = low
    while not bounds or bounds[-1] < high:
        bounds.append(float(f"{scale * mantissas[index]:.6g}"))
        index += 1
        if index == len(mantissas):
            scale, index = scale * 10, 0
    return tuple(bounds)


class Series:
    """The counts of one combination of label values."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times


class Histogram(Collector):
    """A name with its buckets, and a `Series` for each combination of label values.

    All of them are there from the start, so that a rate has its zero to begin with.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        bounds: Sequence[float],
        *,
        labels: Sequence[str] = (),
        values: Iterable[tuple[str, ...]] = ((),),
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._bounds = tuple(bounds)
        self._shown = [floatToGoString(bound) for bound in (*bounds, float("inf"))]  # type: ignore[no-untyped-call]
        self._series = {value: Series(self._bounds) for value in values}

    def series(self, *values: str) -> Series:
        """The series of these label values. Raises KeyError for values that were not announced."""
        return self._series[values]

    def collect(self) -> Iterator[Metric]:
        """One family with every series."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, series in self._series.items():
            counts, total = list(series.counts), series.total
            reached, buckets = 0, []
            for shown, count in zip(self._shown, counts, strict=True):
                reached += count
                buckets.append((shown, float(reached)))
            family.add_metric(values, buckets, total)
        yield family
