"""Drives a Decoder through the paged path: scattered blocks, chunks, mixed batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.kv_cache import TensorKVCache
from gqa_serve.engine.models.decoder import Decoder


class PagedRun:
    """Requests over one cache whose blocks are handed out in random order; keeps all logits.

    `block_size` is rounded up to what the backend serves.
    """

    def __init__(
        self, model: Decoder, prompts: Sequence[Sequence[int]], *, block_size: int, seed: int = 0
    ) -> None:
        self.model = model
        self.prompts = [list(prompt) for prompt in prompts]
        self.random = random.Random(seed)
        multiple = model.backend.block_multiple
        block_size = -(-block_size // multiple) * multiple
        needed = [-(-len(prompt) // block_size) for prompt in self.prompts]
        num_blocks = sum(needed) + 3
        self.cache = model.backend.allocate_cache(model.config, num_blocks, block_size)
        self.forward = model.backend.compile(model)
        # What an earlier owner left in a block is large but finite, and must never be seen.
        if isinstance(self.cache, TensorKVCache):
            for tensor in (*self.cache.k, *self.cache.v):
                tensor.fill_(1e4)
        free = list(range(num_blocks))
        self.random.shuffle(free)
        self.blocks = [[free.pop() for _ in range(count)] for count in needed]
        self.done = [0] * len(self.prompts)
        self.logits: list[list[torch.Tensor]] = [[] for _ in self.prompts]

    def step(self, shares: dict[int, int]) -> None:
        """Compute `shares[request]` more tokens of each request named, in the dict's order."""
        rows = []
        for index, count in shares.items():
            start = self.done[index]
            tokens = self.prompts[index][start : start + count]
            rows.append(PlanRow(tokens, start, self.blocks[index], len(tokens)))
            self.done[index] += len(tokens)
        with torch.inference_mode():
            logits = self.model.logits(self.forward(StepPlan(rows), self.cache)).clone()
        for index, part in zip(shares, logits.split([len(row.token_ids) for row in rows]), strict=True):
            self.logits[index].append(part)

    def finish_in_one_step(self) -> list[torch.Tensor]:
        """All prompts, whole, in one batch."""
        self.step({index: len(prompt) for index, prompt in enumerate(self.prompts)})
        return self.results()

    def finish_ragged(self, max_chunk: int) -> list[torch.Tensor]:
        """Random chunks; requests join and leave, in random order; the last third by single tokens."""
        while unfinished := [i for i, prompt in enumerate(self.prompts) if self.done[i] < len(prompt)]:
            self.random.shuffle(unfinished)
            shares = {}
            for index in unfinished[: self.random.randint(1, len(unfinished))]:
                length, done = len(self.prompts[index]), self.done[index]
                decoding = done * 3 >= length * 2
                chunk = 1 if decoding else self.random.randint(1, max_chunk)
                shares[index] = min(chunk, length - done)
            self.step(shares)
        return self.results()

    def results(self) -> list[torch.Tensor]:
        """Per request, the logits [length, V]."""
        return [torch.cat(parts) for parts in self.logits]
