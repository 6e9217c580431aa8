"""A model runner whose "KV cache" holds the token ids themselves.

The next token is a hash of the whole context, read back through the block table, so that any mistake in
block accounting, positions, chunking, prefix reuse or preemption changes what is generated. `expected`
computes the same from the tokens alone: the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gqa_serve.config import EngineConfig
from gqa_serve.engine.batch import ForwardBatch, StepPlan
from gqa_serve.engine.core import Engine
from gqa_serve.engine.request import EngineRequest, ModelInfo, SamplingParams, TokenOutput

VOCAB = 97
EOS = 3


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
    row_operations = None

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        on_execute: Callable[[StepPlan], None] | None = None,
    ) -> None:
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

    def execute(self, plan: StepPlan) -> torch.Tensor:
        if self.on_execute is not None:
            self.on_execute(plan)
        self.plans.append(plan)
        batch = ForwardBatch.from_plan(plan, self.block_size, torch.device("cpu"))
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens written to one slot"
        self.memory[batch.slots] = batch.token_ids
        hashes, row = [], 0
        for index, context_len in enumerate(batch.context_lens):
            blocks = batch.block_tables[index, :, None] * self.block_size + torch.arange(self.block_size)
            context = self.memory[blocks.flatten()[:context_len]].tolist()
            begin = context_len - batch.query_lens[index]
            hashes += [context_hash(context[: end + 1]) for end in range(begin, context_len)]
            row += batch.query_lens[index]
        return torch.tensor(hashes, dtype=torch.int64)[batch.logit_rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(hidden)


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 64,
    on_execute: Callable[[StepPlan], None] | None = None,
    **settings: object,
) -> Engine:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "seed": 0, **settings}
    config = EngineConfig(model="fake", block_size=block_size, **settings)
    runner = FakeRunner(num_blocks, block_size, min(max_model_len, num_blocks * block_size), on_execute)
    return Engine(runner, config)


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
    request_id: str, prompt: Sequence[int], group: str | None = None, priority: int = 0, **params: object
) -> EngineRequest:
    params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params}
    return EngineRequest(
        request_id=request_id,
        prompt=list(prompt),
        params=SamplingParams(**params),
        group=group,
        priority=priority,
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
