"""A model runner whose "KV cache" holds the token ids themselves.

The next token is a hash of the whole context, read back through the block table, so that any mistake in
block accounting, positions, chunking, prefix reuse or preemption changes what is generated. `expected`
computes the same from the tokens alone: the oracle.

With `lookahead` it stands for a GPU: hidden states, logits and tokens are `OnDevice`, and reading a value of
those anywhere but in the `result` of what the sampler launched fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gqa_serve.config import EngineConfig
from gqa_serve.engine.batch import ForwardBatch, StepPlan
from gqa_serve.engine.constraints import ConstraintService
from gqa_serve.engine.core import Engine
from gqa_serve.engine.request import EngineRequest, ModelInfo, Pooling, SamplingParams, TokenOutput
from gqa_serve.engine.sampler import Sampler, TorchRows

VOCAB = 97
EOS = 3

_READS = {
    getattr(torch.Tensor, name)
    for name in (
        *("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__iter__"),
        *("__contains__", "__repr__", "equal", "allclose", "nonzero", "masked_select", "unique"),
    )
}


class OnDevice(torch.Tensor):
    """A tensor whose values the host may see only inside `done`; what is computed from one is another."""

    _done = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func in _READS or (func is torch.Tensor.to and "cpu" in args[1:])) and not cls._done:
            raise AssertionError(f"{func.__name__} waits for the device")
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    @contextmanager
    def done(cls) -> Iterator[None]:
        """While the host has waited for the device."""
        cls._done = True
        try:
            yield
        finally:
            cls._done = False


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnDevice)


class DeviceRows(TorchRows):
    """Row operations inside the device, which may look at its own tensors."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return on_device(super().argmax(logits.as_subclass(torch.Tensor)))

    def mask(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return on_device(super().mask(logits.as_subclass(torch.Tensor), *args))

    def draw(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return on_device(super().draw(logits.as_subclass(torch.Tensor), *args))


class Watched:
    """Something pending, which may be collected once; `on_collect` may raise then."""

    def __init__(self, pending: Any, on_collect: Callable[[], None] | None) -> None:
        self.pending = pending
        self.on_collect = on_collect
        self.collected = False
        self.num_collected = 0

    @property
    def tokens(self) -> torch.Tensor:
        return self.pending.tokens

    def result(self) -> Any:
        assert not self.collected, "collected twice"
        self.collected = True
        if self.on_collect is not None:
            self.on_collect()
        with OnDevice.done():
            result: Any = self.pending.result()
        self.num_collected = len(result)
        return result


class WatchedSampler(Sampler):
    """`launched` holds what was launched, in order; `on_collect` as in `Watched`."""

    on_collect: Callable[[], None] | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.launched: list[Watched] = []

    def launch(self, *args: Any) -> Any:
        self.launched.append(Watched(super().launch(*args), self.on_collect))
        return self.launched[-1]

    def nothing(self, *args: Any) -> Any:
        return Watched(super().nothing(*args), self.on_collect)

    def score(self, *args: Any) -> Any:
        return Watched(super().score(*args), self.on_collect)

    def states(self, *args: Any) -> Any:
        return Watched(super().states(*args), self.on_collect)


def context_hash(tokens: Sequence[int]) -> int:
    value = 17
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % 2_147_483_647
    return value


def logits_of(values: torch.Tensor) -> torch.Tensor:
    """[R] int64 hashes -> [R, VOCAB] float32."""
    tokens = torch.arange(1, VOCAB + 1, dtype=torch.int64)
    mixed = (values[:, None] * tokens * 2_654_435_761 + tokens * 40_503) % 1_000_003
    return (mixed.double() / 1_000_003 * 8 - 4).float()


class FakeRunner:
    """`on_execute(plan)`, if given, runs before each step and may raise."""

    eos_token_ids = (EOS,)

    def __init__(
        self,
        lookahead: bool,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        on_execute: Callable[[StepPlan], None] | None = None,
    ) -> None:
        self.lookahead = lookahead
        self.row_operations = DeviceRows() if lookahead else None
        self.memory = torch.full((num_blocks * block_size,), -1, dtype=torch.int64)
        self.block_size = block_size
        self.on_execute = on_execute
        self.plans: list[StepPlan] = []
        self.info = ModelInfo(
            model="fake",
            architecture="fake",
            vocab_size=VOCAB,
            max_model_len=max_model_len,
            num_heads=4,
            num_kv_heads=2,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_bytes_per_token=8,
            kv_dtype="float32",
            weight_bytes=0,
            dtype="float32",
            quantization="none",
            device="cpu",
            backend="fake",
            max_num_seqs=8,
        )

    def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
        if self.on_execute is not None:
            self.on_execute(plan)
        assert previous is None or self.lookahead, "no token is unknown then"
        self.plans.append(plan)
        assert all(type(token) is int for row in plan.rows for token in row.token_ids)
        batch = ForwardBatch.from_plan(plan, self.block_size, torch.device("cpu"), previous)
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens written to one slot"
        self.memory[batch.slots] = batch.token_ids
        hashes, row = [], 0
        for index, context_len in enumerate(batch.context_lens):
            blocks = batch.block_tables[index, :, None] * self.block_size + torch.arange(self.block_size)
            context = self.memory[blocks.flatten()[:context_len]].tolist()
            begin = context_len - batch.query_lens[index]
            hashes += [context_hash(context[: end + 1]) for end in range(begin, context_len)]
            row += batch.query_lens[index]
        hidden = torch.tensor(hashes, dtype=torch.int64)[batch.logit_rows]
        return on_device(hidden) if self.lookahead else hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = logits_of(hidden)
        assert isinstance(logits, OnDevice) == self.lookahead
        return logits


def make_engine(
    lookahead: bool,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 64,
    on_execute: Callable[[StepPlan], None] | None = None,
    on_collect: Callable[[], None] | None = None,
    constraints: ConstraintService | None = None,
    **settings: object,
) -> Engine:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "seed": 0, **settings}
    config = EngineConfig(model="fake", block_size=block_size, **settings)
    context = min(max_model_len, num_blocks * block_size)
    runner = FakeRunner(lookahead, num_blocks, block_size, context, on_execute)
    engine = Engine(runner, config, constraints)
    engine.sampler = WatchedSampler(runner.eos_token_ids, runner.row_operations)
    engine.sampler.on_collect = on_collect
    return engine


def expected(prompt: Sequence[int], params: SamplingParams, max_model_len: int = 64) -> list[int]:
    """What greedy decoding of the fake model generates, stop token included."""
    tokens = list(prompt)
    while len(tokens) < max_model_len and len(tokens) - len(prompt) != params.max_tokens:
        logits = logits_of(torch.tensor([context_hash(tokens)]))[0]
        token = int(logits.argmax())
        tokens.append(token)
        if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            break
    return tokens[len(prompt) :]


def request(
    request_id: str,
    prompt: Sequence[int],
    group: str | None = None,
    priority: int = 0,
    pooling: Pooling | None = None,
    **params: object,
) -> EngineRequest:
    params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params}
    return EngineRequest(
        request_id=request_id,
        prompt=list(prompt),
        params=SamplingParams(**params),
        group=group,
        priority=priority,
        pooling=pooling,
    )


def run(engine: Engine, max_steps: int = 5000) -> dict[str, list[TokenOutput]]:
    """Step until idle; outputs by request."""
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine does not come to rest")


def tokens_of(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def assert_conserved(engine: Engine) -> None:
    """Every block is free or referenced, and referenced exactly as often as running requests hold it."""
    kv, pool = engine.scheduler.kv, engine.scheduler.kv.pool
    held: dict[int, int] = {}
    for req in engine.scheduler.running:
        for block in kv.block_ids(req.request_id):
            held[block] = held.get(block, 0) + 1
    assert set(kv._held) == {r.request_id for r in engine.scheduler.running}
    for block in range(pool.num_blocks):
        assert pool._ref_counts[block] == held.get(block, 0)
        assert (block in pool._free) == (block not in held)
    assert pool.num_free + len(held) == pool.num_blocks
    for key, entry in pool._entries.items():
        assert pool._key_of_block[entry.block_id] == key
        if not isinstance(engine.runner, FakeRunner):
            continue  # only the fake's memory holds token ids
        begin = entry.block_id * pool.block_size
        assert tuple(engine.runner.memory[begin : begin + pool.block_size].tolist()) == key[1]
    assert len(pool._entries) == len(pool._key_of_block)
