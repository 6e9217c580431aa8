"""EngineReplicas: several engines of one model behind one API process (`--data-parallel-size`).

Owns one `AsyncEngine` for each replica, their common start and stop, and the router that says which of them
gets a request. Offers the API what `AsyncEngine` does. Knows no processes: each engine supervises its own,
and one that dies takes nothing from the others. Invariants: requests submitted together go to one engine;
only one that is ready gets any; what a request added to the router's account leaves it with its stream's end.

            submit_all
                |
             Router ---- order of the ready ones; the first that is not full
            /   |   \\
    AsyncEngine ...  each with its process, its KV cache, its admission, its watchdog
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gqa_serve.config import EngineConfig
from gqa_serve.engine.client import AsyncEngine, State
from gqa_serve.engine.metrics import EngineSnapshot, RequestSnapshot
from gqa_serve.engine.placement import Placement
from gqa_serve.engine.request import EngineRequest, ModelInfo
from gqa_serve.engine.routing import Prompt, Router, chunk_tokens, chunks_of
from gqa_serve.engine.token_stream import TokenStream
from gqa_serve.errors import EngineUnavailableError, QueueFullError


class EngineReplicas:
    """`num_replicas` engines, seen from an event loop."""

    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        num_replicas: int,
        *,
        log_level: str = "info",
        log_format: str = "text",
        on_load: Callable[[int, int], None] | None = None,
    ) -> None:
        self._config = config
        self._loaded = LoadedTensors(num_replicas, on_load)
        self.replicas: Sequence[AsyncEngine] = tuple(
            AsyncEngine(
                path,
                dataclasses.replace(config, seed=replica_seed(config.seed, replica)),
                log_level=log_level,
                log_format=log_format,
                on_load=self._loaded.of(replica),
                placement=Placement(replica=replica, num_replicas=num_replicas),
            )
            for replica in range(num_replicas)
        )
        self._router = Router(num_replicas, chunk_tokens(config.block_size))
        self._renewed_at = [-1] * num_replicas  # restarts of each when the router was last told of its cache
        self._phase: State = "loading"  # of them together: then ready or failed, at last stopping

    # --- what they are -------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Ready while one of them is, once all have been."""
        if self._phase != "ready":
            return self._phase
        states: list[State] = [engine.state for engine in self.replicas]
        if "ready" in states:
            return "ready"
        return "restarting" if "restarting" in states else "failed"

    @property
    def model_info(self) -> ModelInfo | None:
        """The loaded model, as each of them has it; the context is that of the one with the shortest.

        `num_blocks` and `max_num_seqs`, too, are those of one engine: the most that one request may have.
        """
        infos = [engine.model_info for engine in self.replicas]
        known = [info for info in infos if info is not None]
        if len(known) < len(infos):
            return None
        return min(known, key=lambda info: (info.max_model_len, info.num_blocks))

    @property
    def num_requests(self) -> int:
        """Requests under way, on all of them."""
        return sum(engine.num_requests for engine in self.replicas)

    # --- start and stop ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every process and load the model into all of them at the same time: they read the same files.

        Raises ModelError with the words of the first that can't, after the others were ended.
        """
        loading = [asyncio.create_task(engine.start()) for engine in self.replicas]
        try:
            await asyncio.gather(*loading)
        except BaseException:
            for task in loading:
                task.cancel()
            await asyncio.gather(*loading, return_exceptions=True)
            await asyncio.gather(*(engine.stop() for engine in self.replicas))
            self._leave_loading("failed")
            raise
        self._leave_loading("ready")

    def _leave_loading(self, phase: State) -> None:
        if self._phase == "loading":
            self._phase = phase

    def refuse_new(self) -> None:
        """Take no more requests; those under way go on."""
        self._phase = "stopping"
        for engine in self.replicas:
            engine.refuse_new()

    async def stop(self) -> None:
        """End the requests under way with "abort", then the processes."""
        self.refuse_new()
        await asyncio.gather(*(engine.stop() for engine in self.replicas))

    # --- requests ------------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Raises QueueFullError if none of those that are ready could take a request now."""
        refusals = []
        for engine in self.replicas:
            if engine.state == "ready":
                try:
                    return engine.check_room()
                except QueueFullError as error:
                    refusals.append(error)
        if refusals:
            raise _soonest(refusals)
        return None

    def submit_all(self, requests: Sequence[EngineRequest]) -> list[TokenStream]:
        """Send requests to one engine, all or none; see `AsyncEngine.submit_all`.

        Raises EngineUnavailableError if none is ready, QueueFullError if all that are ready are full.
        """
        if self.state != "ready":
            raise EngineUnavailableError(f"The engine is {self.state}; try again in a moment.")
        ready = [number for number, engine in enumerate(self.replicas) if engine.state == "ready"]
        self._renew(ready)
        prompts = self._prompts_of(requests)
        refusals = []
        for number in self._router.order(prompts, ready):
            try:
                streams = self.replicas[number].submit_all(requests)
            except QueueFullError as error:
                refusals.append(error)
                continue
            for stream, ticket in zip(streams, self._router.enter(number, prompts), strict=True):
                stream.ticket = ticket
            return streams
        raise _soonest(refusals)

    def _renew(self, ready: Iterable[int]) -> None:
        """Tell the router of processes that are new: their caches are empty."""
        for number in ready:
            engine = self.replicas[number]
            if self._renewed_at[number] != engine.num_restarts and (info := engine.model_info) is not None:
                self._renewed_at[number] = engine.num_restarts
                self._router.renew(number, info.num_blocks * info.block_size)

    def _prompts_of(self, requests: Iterable[EngineRequest]) -> list[Prompt]:
        """What the router needs of them: a prompt and its choices, which are a group, as one."""
        prompts = []
        for _, group in itertools.groupby(requests, lambda request: request.group or request.request_id):
            choices = list(group)
            first = choices[0]
            chunks = self._chunks_of(first) if self._config.prefix_caching else ()
            max_tokens = [choice.params.max_tokens or 0 for choice in choices]
            prompts.append(Prompt(len(first.prompt), chunks, max_tokens))
        return prompts

    def _chunks_of(self, request: EngineRequest) -> Sequence[int]:
        if request.params.prompt_logprobs is not None or request.pooling == "mean":
            return ()  # every token of it is computed, whatever the cache holds
        return chunks_of(request.prompt, self._router.chunk_tokens, request.cache_salt)

    # --- looking at them -----------------------------------------------------------------------------------

    async def snapshot(self) -> EngineSnapshot:
        """All of them as one: blocks one engine after the other, requests by their states, the oldest first.

        Blocks of an engine that cannot answer are shown as free. Raises EngineUnavailableError if none can,
        and before all have loaded: until then nobody knows the model, or how many blocks the others have.
        """
        found: list[EngineSnapshot | None] = []
        if self._phase in ("ready", "stopping"):
            found = await asyncio.gather(*map(_snapshot_of, self.replicas))
        if not any(found):
            raise EngineUnavailableError(f"The engine is {self.state}; try again in a moment.")
        blocks, requests = bytearray(), []
        for number, (engine, snapshot) in enumerate(zip(self.replicas, found, strict=True)):
            if snapshot is None:
                blocks += bytes(0 if engine.model_info is None else engine.model_info.num_blocks)
                continue
            blocks += snapshot.blocks
            for request in snapshot.requests:
                request.replica = number
            requests += snapshot.requests
        return EngineSnapshot(bytes(blocks), sorted(requests, key=_place))


class LoadedTensors:
    """Sums up what several engines say of loading the same model: each has as many tensors."""

    def __init__(self, num_replicas: int, on_load: Callable[[int, int], None] | None) -> None:
        self._done = [0] * num_replicas
        self._on_load = on_load

    def of(self, replica: int) -> Callable[[int, int], None]:
        """What to tell one engine's progress to."""

        def update(done: int, total: int) -> None:
            self._done[replica] = done
            if self._on_load is not None:
                self._on_load(sum(self._done), total * len(self._done))

        return update


def replica_seed(seed: int | None, replica: int) -> int | None:
    """The seed of an engine: the first has the one that was given, each other one of its own made from it."""
    if seed is None or replica == 0:
        return seed
    return random.Random(f"{seed}/{replica}").getrandbits(63)


async def _snapshot_of(engine: AsyncEngine) -> EngineSnapshot | None:
    """None if it is not there, or goes away."""
    try:
        return await engine.snapshot()
    except EngineUnavailableError:
        return None


_STATES = ("running", "waiting", "preparing")


def _place(request: RequestSnapshot) -> tuple[int, int, float]:
    return _STATES.index(request.state), request.priority, -request.age_s


def _soonest(refusals: Iterable[QueueFullError]) -> QueueFullError:
    """Of several engines' refusals, the one that says to come back first."""
    return min(refusals, key=lambda error: error.retry_after_s)
