"""Step times that are linear in what a step does, with factors that `fit.py` finds in measurements.

    seconds = step_s + decode_s * requests that compute one token + context_s * tokens that these read
            + prefill_s * tokens of prompts + pair_s * pairs of tokens that prompts' attention computes

Owns the formula and its file, the `cost model` of --save-cost-model. Knows no measurement and no torch.
Invariant: no factor is negative, so that more work never takes less time.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.report import write_text
from gqa_serve.workbench.simulate.cost_model import Chunk, visible_pairs

RANGES = {
    "most_requests": "requests at once",
    "longest_context": "contexts of answers",
    "longest_prompt": "prompts",
}
"""What `about` tells of the extent of the measurements, and its words."""
_SLACK = 1.2  # so much farther is no other regime
TERMS = ("step_s", "decode_s", "context_s", "prefill_s", "pair_s")


@dataclass(frozen=True, kw_only=True)
class FittedCost:
    """See the module; `request_s` is what a request takes on its way to the engine. `about` says where the
    numbers are from."""

    step_s: float
    decode_s: float
    context_s: float
    prefill_s: float
    pair_s: float
    request_s: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    def step_seconds(self, contexts: Sequence[int], chunks: Sequence[Chunk], num_sampled: int) -> float:
        """See CostModel; sampling is in `decode_s` and `prefill_s`."""
        seconds = self.step_s + self.decode_s * len(contexts) + self.context_s * sum(contexts)
        for query_len, context_len in chunks:
            seconds += self.prefill_s * query_len + self.pair_s * visible_pairs(query_len, context_len)
        return seconds

    def decode_seconds(self, contexts: Sequence[int], num_steps: int) -> list[float]:
        """See CostModel."""
        count, total = len(contexts), sum(contexts)
        fixed_s = self.step_s + self.decode_s * count
        return [fixed_s + self.context_s * (total + step * count) for step in range(num_steps)]

    def beyond(self, **asked: int) -> list[str]:
        """What is asked of the model that was not measured, by the names of RANGES; [] if that is unknown."""
        found = []
        for name, most in asked.items():
            measured = self.about.get(name)
            if isinstance(measured, int | float) and most > _SLACK * measured:
                found.append(f"{RANGES[name]} up to {most:,} (measured: {measured:,.0f})")
        return found

    def to_json(self) -> dict[str, Any]:
        """See CostModel; what `read_cost_model` reads."""
        return {"kind": "fitted", **dataclasses.asdict(self)}


def write_cost_model(path: Path, cost: FittedCost) -> None:
    """Write what `read_cost_model` reads. Raises ConfigError if the file can't be written."""
    write_text(path, json.dumps(cost.to_json(), indent=1) + "\n")


def read_cost_model(path: Path) -> FittedCost:
    """A cost model that --save-cost-model wrote. Raises ConfigError that names the field."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Could not read the cost model {path}: {error}.") from error
    if not isinstance(raw, dict) or raw.get("kind") != "fitted":
        raise ConfigError(
            f"{path} is no cost model. Fit one to measurements: gqa-serve simulate --fit FILE "
            "--save-cost-model COST.json"
        )
    about = raw.get("about")
    numbers: dict[str, Any] = {name: raw.get(name) for name in (*TERMS, "request_s")}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"{path}: {name} must be seconds, 0 or more; got {value!r}.")
    return FittedCost(**numbers, about=about if isinstance(about, dict) else {})
