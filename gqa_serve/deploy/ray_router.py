"""`PrefixRouter`: Ray Serve's choice of a replica, by prefix cache and load.

Owns how Ray's interface for request routers (`ray.serve.request_router.RequestRouter`) meets `Affinity`. Runs
in each process that calls the engines, with a memory of its own. Ray's own PrefixCacheAffinityRouter cannot
serve here: it needs vLLM to be imported, and fails requests that have no prompt. Invariant: an engine that is
not ready, or has just said so, is chosen only if there is no other, since it answers quickly, with an error.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from gqa_serve.deploy.affinity import Affinity
from gqa_serve.deploy.http_request import HttpRequest
from gqa_serve.deploy.ray_autoscaling import READY, REQUESTS

_NO_PROMPT = HttpRequest({}, b"")


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # it is Any to mypy
    """Ranks the replicas for one request; Ray takes the first that has room."""

    def initialize_state(self, imbalance: int) -> None:
        """Ray calls it with `request_router_kwargs`, once, before anything else."""
        self._affinity = Affinity(imbalance)
        self._under_way: Counter[ReplicaID] = Counter()  # sent from here; never late, unlike what is reported

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks, the most preferred first."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = (
                True  # when all are full, wait before the next look
            )
        request = _request(pending_request)
        every = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # What is reported is some seconds old; what declined this request was so a moment ago.
        others = {name: each for name, each in every.items() if name not in request.declined_by} or every
        ready = {name: each for name, each in others.items() if each.routing_stats.get(READY, True)}
        replicas = ready or others
        loads = {name: self._load(replica) for name, replica in replicas.items()}
        ranks = self._affinity.ranked(request.prefix_keys, loads)
        return [[replicas[name] for name in rank] for rank in ranks]

    def _load(self, replica: RunningReplica) -> int:
        """Requests under way there: those of all routers as of the last report, or at least our own."""
        reported: int = replica.routing_stats.get(REQUESTS, 0)
        return max(self._under_way[replica.replica_id], reported)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """A request is on its way; whatever becomes of it, `on_request_completed` follows."""
        super().on_send_request(replica_id)
        self._under_way[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It ended there, however."""
        super().on_request_completed(replica_id, internal_request_id)
        self._under_way[replica_id] -= 1
        if self._under_way[replica_id] <= 0:
            del self._under_way[replica_id]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica took it, and will have its prompt in the cache."""
        super().on_request_routed(pending_request, replica_id, result)
        self._affinity.sent(_request(pending_request).prefix_keys, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """These are all there are now."""
        before = set(self.curr_replicas)
        super().update_replicas(replicas)
        if before - set(self.curr_replicas):
            self._affinity.keep_only({replica.replica_id.unique_id for replica in replicas})


def _request(pending_request: PendingRequest | None) -> HttpRequest:
    """What is to be routed; one without a prompt where it is none of the ingress's."""
    args = () if pending_request is None else pending_request.args
    return next((arg for arg in args if isinstance(arg, HttpRequest)), _NO_PROMPT)
