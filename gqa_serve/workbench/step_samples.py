"""How long steps took: what `bench engine --steps FILE` writes and a cost model is fitted to.

Owns the format, one JSON object a line. Knows neither engine nor model, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gqa_serve.workbench.json_lines import read_json_lines, write_json_lines


@dataclass(frozen=True, kw_only=True)
class StepSample:
    """One step of the engine.

    `num_decode` requests computed one token, over `decode_context_tokens` tokens in all, the new ones
    included. `chunks`: (query_len, context_len) of every request that computed more, new tokens included.
    `num_sampled` rows got a token. It took `seconds`, of which `forward_s` in the model.
    """

    num_decode: int
    decode_context_tokens: int
    chunks: tuple[tuple[int, int], ...]
    num_sampled: int
    seconds: float
    forward_s: float

    def __post_init__(self) -> None:
        numbers = (
            self.num_decode,
            self.decode_context_tokens,
            self.num_sampled,
            self.seconds,
            self.forward_s,
        )
        if min(*numbers, *(number for chunk in self.chunks for number in chunk)) < 0:
            raise ValueError("numbers must not be negative")


def read_samples(path: Path) -> list[StepSample]:
    """The samples of a file. Raises ConfigError that names the line."""
    return read_json_lines(path, StepSample, "sample of a step")


def write_samples(path: Path, samples: Iterable[StepSample]) -> None:
    """Write what `read_samples` reads. Raises ConfigError if the file can't be written."""
    write_json_lines(path, samples)
