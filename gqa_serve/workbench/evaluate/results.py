"""What was measured of a candidate, as plain data that a JSON file holds and a later run takes up again.

Owns the shapes. Knows no statistics and no model. Invariant: sums are kept per block of text and answers per
sample, so that every interval and every paired comparison can be computed again from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from gqa_serve.errors import ConfigError

SCHEMA = 1


class TextScores(msgspec.Struct, kw_only=True):
    """Sums per block of text [B]: negative log-likelihood in nats, tokens and bytes scored.

    Against the reference, where that was computed: sums of KL(reference || candidate) in nats, and of
    positions where both predict the same token.
    """

    nll: list[float]
    num_tokens: list[int]
    num_bytes: list[float]
    divergence: list[float] | None = None
    same_top: list[int] | None = None
    no_agreement: str = ""
    """Why there is no comparison with the reference."""


class Trial(msgspec.Struct, kw_only=True):
    """One hidden fact asked for. `depth`: 0 at the beginning of the haystack, 1 at its end; `logprobs` of the
    key's tokens, in nats."""

    task: str
    length: int
    depth: float
    sample: int
    key: str
    answer: str
    correct: bool
    logprobs: list[float]


class Speed(msgspec.Struct, kw_only=True):
    """Seconds of repeated steps: `decode_s` one token for each of `requests` at `context` tokens, `prefill_s`
    a chunk of `prefill_tokens`. `reference_*`: the reference's steps in the same rounds, one after each."""

    context: int
    requests: int
    prefill_tokens: int
    decode_s: list[float]
    prefill_s: list[float]
    reference_decode_s: list[float] | None = None
    reference_prefill_s: list[float] | None = None


class Held(msgspec.Struct, kw_only=True):
    """What was loaded: heads, and how weights and KV cache are held."""

    num_heads: int
    num_kv_heads: int
    weight_bytes: int
    kv_bytes_per_token: int
    block_size: int
    weights: str
    kv_dtype: str
    backend: str
    device: str

    def memory_bytes(self, context: int, requests: int) -> int:
        """Weights, and the KV blocks of `requests` of `context` tokens."""
        tokens = -(-context // self.block_size) * self.block_size
        return self.weight_bytes + requests * tokens * self.kv_bytes_per_token


class CandidateResult(msgspec.Struct, kw_only=True):
    """All that was measured of one candidate. `key` changes with whatever the numbers depend on."""

    name: str
    key: str
    settings: dict[str, Any]
    held: Held
    text: TextScores | None = None
    trials: list[Trial] = []
    speed: Speed | None = None
    seconds: float = 0.0


def load_results(path: Path) -> dict[str, CandidateResult]:
    """By key, those of a file written earlier; none without a file. Raises ConfigError for another file."""
    if not path.exists():
        return {}
    try:
        data = msgspec.json.decode(path.read_bytes())
        if data["tool"] != "eval" or data["schema"] != SCHEMA:
            raise ConfigError(
                f"--resume: {path} was not written by this version of gqa-serve eval; remove it."
            )
        listed = msgspec.convert(data["candidates"], list[CandidateResult])
    except (OSError, msgspec.MsgspecError, KeyError, TypeError) as error:
        raise ConfigError(f"--resume: {path} holds no results of gqa-serve eval ({error}).") from error
    return {result.key: result for result in listed}
