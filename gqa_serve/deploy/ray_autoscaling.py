"""How many replicas the load of the engines asks for.

Owns the figures that a replica reports and the decision that Ray's controller makes of them (an autoscaling
policy of Ray Serve's). Ray itself averages the figures over the look-back period, and applies the delays and
the smallest and largest number of replicas. The controller loads this module by value: it imports nothing of
this package. Invariant: each figure alone asks for enough replicas that a replica's share is its target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REQUESTS = "requests"  # under way in the engine: computed or queued, each choice of each prompt
WAITING_TOKENS = "waiting_tokens"  # prompt tokens of those queued
KV_USE = "kv_use"  # share of the KV blocks that requests hold, 0 to 1
READY = "ready"  # whether the engine takes requests; for routing, not for scaling


class EngineLoadPolicy:
    """Called by Ray's controller every control period with what all replicas reported.

    `targets` says for each figure what one replica should have; what waits for a free replica outside of the
    engines counts as requests.
    """

    def __init__(self, targets: Mapping[str, float]) -> None:
        self._targets = dict(targets)

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """The wanted number of replicas, not yet rounded or bounded, and no state."""
        figures: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}
        loads = {name: sum(figures.get(name, {}).values()) for name in self._targets}
        loads[REQUESTS] += ctx.total_queued_requests or 0.0
        return max(loads[name] / target for name, target in self._targets.items()), {}
