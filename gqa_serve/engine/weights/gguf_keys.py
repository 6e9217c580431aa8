"""Typed access to GGUF metadata, with errors that name the key.

Owns type checks, per-layer lists that must agree, and the way back from float32 to the decimal a
config.json held. Does not know what any key means. Invariant: a value is returned with the type asked
for, or a `ModelError` was raised; every key asked for is remembered in `used`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gqa_serve.errors import ModelError, UnsupportedModelError


class Keys:
    """Typed access to the metadata of one architecture; errors name the key."""

    def __init__(self, where: str, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.where = where
        self.architecture = architecture
        self.metadata = metadata
        self.used: set[str] = set()

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(
            f"{self.where}: metadata key {self.architecture}.{key} {problem}; convert the model again."
        )

    def get(self, key: str) -> Any:
        self.used.add(key)
        return self.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.get(key)
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise UnsupportedModelError(
                    f"{self.where}: {self.architecture}.{key} differs from layer to layer, which is not "
                    "supported; use a model whose layers are alike."
                )
            value = value[0]
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"is {value!r}, not an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(key, f"is {value!r}, not a finite number")
        return short_float(float(value))


def short_float(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 is 1e-05 in config.json.

    Metadata numbers are float32; the config they were written from held the short decimal.
    """
    for digits in range(6, 10):
        candidate = float(f"{value:.{digits}g}")
        if _float32(candidate) == _float32(value):
            return candidate
    return value


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))
