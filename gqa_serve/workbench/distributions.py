"""Numbers drawn from a distribution that a user writes in one word: `512`, `uniform:100-800`, ...

Owns the notation and the drawing of lengths (tokens, turns) and times (seconds). Knows no request.
Invariant: what is drawn depends on the generator alone, so that a seed gives the same traffic everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gqa_serve.errors import ConfigError

NOTATION = """\
  512                     always 512 (also constant:512)
  uniform:100-800         any from 100 to 800, equally likely
  normal:512,100          mean 512, standard deviation 100
  lognormal:512,0.8       mean 512; 0.8 is the standard deviation of the logarithm
                          (real traffic: 0.5 is narrow, 1 is wide)
  exponential:512         mean 512
  lognormal:512,0.8:16-4096   the same with values below 16 and above 4096 set to these bounds
"""
_PARAMETERS = {"constant": 1, "uniform": 2, "normal": 2, "lognormal": 2, "exponential": 1}


@dataclass(frozen=True)
class Distribution:
    """`kind` with its `parameters` as in NOTATION; `low` and `high` are bounds that values are clipped to."""

    kind: str
    parameters: tuple[float, ...]
    low: float = -math.inf
    high: float = math.inf

    def draw(self, count: int, random: np.random.Generator) -> NDArray[np.float64]:
        """So many values, float64 [count]."""
        first, *rest = self.parameters
        if self.kind == "constant":
            values = np.full(count, first)
        elif self.kind == "uniform":
            values = random.uniform(first, rest[0], count)
        elif self.kind == "normal":
            values = random.normal(first, rest[0], count)
        elif self.kind == "lognormal":  # its mean is exp(mu + sigma^2 / 2)
            values = random.lognormal(math.log(first) - rest[0] ** 2 / 2, rest[0], count)
        else:
            values = random.exponential(first, count)
        return values.clip(self.low, self.high)

    def draw_counts(self, count: int, random: np.random.Generator) -> list[int]:
        """So many whole numbers of 1 or more, the nearest to what is drawn; a range holds both its ends."""
        if self.kind == "uniform":
            low, high = (round(bound) for bound in self.parameters)
            whole = random.integers(low, high, count, endpoint=True).astype(np.float64)
            values = whole.clip(self.low, self.high)
        else:
            values = self.draw(count, random)
        return [max(1, round(float(value))) for value in values]

    @property
    def is_constant(self) -> bool:
        return self.kind == "constant"

    def __str__(self) -> str:
        if self.is_constant:
            return f"{self.parameters[0]:g}"
        separator = "-" if self.kind == "uniform" else ","
        bounds = "" if self.low == -math.inf else f":{self.low:g}-{self.high:g}"
        return f"{self.kind}:{separator.join(f'{value:g}' for value in self.parameters)}{bounds}"


def parse_distribution(text: str, flag: str, *, low: float = 0.0) -> Distribution:
    """What the notation says. Raises ConfigError that names `flag`, also where means are below `low`."""
    kind, _, rest = text.strip().partition(":") if ":" in text else ("constant", "", text)
    if kind not in _PARAMETERS:
        raise ConfigError(f"{flag}: there is no distribution {kind!r}; write one of\n{NOTATION}")
    body, _, bounds = rest.partition(":")
    try:
        parameters = _pair(body) if kind == "uniform" else tuple(float(part) for part in body.split(","))
        limits = _pair(bounds) if bounds else (-math.inf, math.inf)
    except ValueError as error:
        raise ConfigError(f"{flag}: can't read {text!r}; write one of\n{NOTATION}") from error
    wrong = len(parameters) != _PARAMETERS[kind] or not all(map(math.isfinite, parameters))
    if wrong or limits[0] > limits[1] or (bounds and not all(map(math.isfinite, limits))):
        raise ConfigError(f"{flag}: can't read {text!r}; write one of\n{NOTATION}")
    if parameters[0] < low or (kind in ("lognormal", "exponential") and parameters[0] <= 0):
        raise ConfigError(f"{flag}: {text!r} asks for values below {low:g}.")
    if kind == "uniform" and parameters[1] < parameters[0]:
        raise ConfigError(f"{flag}: the range of {text!r} is empty; write the smaller number first.")
    if kind in ("normal", "lognormal") and parameters[1] < 0:
        raise ConfigError(f"{flag}: the spread in {text!r} is negative.")
    return Distribution(kind, parameters, *limits)


def _pair(text: str) -> tuple[float, float]:
    low, dash, high = text.partition("-")
    if not dash:
        raise ValueError(text)
    return float(low), float(high)
