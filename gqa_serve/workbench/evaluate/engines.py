"""A loaded candidate, and the three things that are asked of it: log-probabilities, greedy answers, steps.

Owns how evaluation drives the served path: plans of token ids over a paged KV cache, executed by the
`ModelRunner` that the engine drives too, with its backend, kernels, KV cache format and weights. What is left
out is the scheduler (each plan is ours) and the sampler (an answer is the largest logit). Knows no text.
Invariant: logits of at most `_MOST_LOGITS` numbers exist at a time, however long the text is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.errors import ConfigError

if TYPE_CHECKING:
    from gqa_serve.config import EngineConfig
    from gqa_serve.engine.model_runner import OnTensor
    from gqa_serve.workbench.evaluate.windows import Window

_MOST_LOGITS = 2**23  # numbers; 64 MiB in float64


class LoadedModel:
    """A model in one setting. `close` frees its memory."""

    def __init__(self, path: Path, config: EngineConfig, on_tensor: OnTensor | None = None) -> None:
        self.runner = ModelRunner(path, config, on_tensor)
        self.info = self.runner.info
        self.eos_token_ids = frozenset(self.runner.eos_token_ids)
        self.max_tokens = config.max_num_batched_tokens
        self.max_rows = config.max_num_seqs
        self.num_kv_tokens = self.info.num_blocks * self.info.block_size

    def close(self) -> None:
        """Let go of weights and cache."""
        del self.runner
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def blocks(self, index: int, num_tokens: int) -> list[int]:
        """The blocks of sequence `index`, where sequences of at most `num_tokens` lie side by side.

        Raises ConfigError if the cache does not hold them.
        """
        count = -(-num_tokens // self.info.block_size)
        if (index + 1) * count > self.info.num_blocks:
            raise ConfigError(
                f"The KV cache holds {self.num_kv_tokens} tokens, but {(index + 1) * num_tokens} are needed; "
                "use a shorter --window, --lengths or --context."
            )
        return list(range(index * count, (index + 1) * count))

    def batch_size(self, num_tokens: int) -> int:
        """How many sequences of `num_tokens` are computed at once."""
        count = -(-num_tokens // self.info.block_size)
        return max(1, min(self.max_rows, self.max_tokens // num_tokens, self.info.num_blocks // count))

    def hidden(
        self, sequences: Sequence[Sequence[int]], num_last: Sequence[int], room: int = 0
    ) -> list[torch.Tensor]:
        """Compute whole sequences side by side; hidden states [num_last, E] of the last tokens of each.

        Long ones are computed in chunks, as the scheduler does. `room`: tokens that each may grow to.
        """
        longest = max(map(len, sequences))
        room = max(room, longest)
        parts: list[list[torch.Tensor]] = [[] for _ in sequences]
        step = self.max_tokens if len(sequences) == 1 else longest
        for begin in range(0, longest, step):
            rows, owners = [], []
            for index, (ids, count) in enumerate(zip(sequences, num_last, strict=True)):
                chunk = list(ids[begin : begin + step])
                if chunk:
                    wanted = max(0, begin + len(chunk) - max(begin, len(ids) - count))
                    rows.append(PlanRow(chunk, begin, self.blocks(index, room), wanted))
                    owners.append((index, wanted))
            hidden = self.runner.execute(StepPlan(rows))
            at = 0
            for index, wanted in owners:
                if wanted:
                    parts[index].append(hidden[at : at + wanted].clone())  # a graph may write there again
                at += wanted
        return [torch.cat(part) for part in parts]

    def next_hidden(self, tokens: Sequence[Sequence[int]], starts: Sequence[int], room: int) -> torch.Tensor:
        """Append tokens to sequences that `hidden` has computed; hidden states [R, E] of all of them.

        `room`: the most tokens that one of these sequences will have.
        """
        rows = [
            PlanRow(list(ids), start, self.blocks(index, room), len(ids))
            for index, (ids, start) in enumerate(zip(tokens, starts, strict=True))
        ]
        return self.runner.execute(StepPlan(rows))

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] -> [R, V] float64 log-probabilities, on the CPU where the device lacks float64."""
        logits = self.runner.logits(hidden)
        wide = logits.cpu() if logits.device.type == "mps" else logits
        return torch.log_softmax(wide.double(), dim=-1)

    def likeliest(self, hidden: torch.Tensor) -> list[int]:
        """[R, E] -> the token with the largest logit of each row."""
        result: list[int] = self.runner.logits(hidden).argmax(dim=-1).tolist()
        return result

    def row_chunks(self, num_rows: int) -> Iterator[slice]:
        """Slices of `num_rows` rows, few enough at a time for their logits."""
        size = max(1, min(256, _MOST_LOGITS // self.info.vocab_size))
        for begin in range(0, num_rows, size):
            yield slice(begin, min(begin + size, num_rows))


def score_tokens(model: LoadedModel, hidden: torch.Tensor, targets: Sequence[int]) -> list[float]:
    """Log-probability of each target [R], in nats, given the hidden states [R, E] before them.

    Sums in float64: the engine's own logprobs are float32.
    """
    result: list[float] = []
    with torch.inference_mode():
        for rows in model.row_chunks(len(targets)):
            logprobs = model.logprobs(hidden[rows])
            wanted = torch.tensor(targets[rows], device=logprobs.device)
            result += logprobs.gather(-1, wanted[:, None])[:, 0].tolist()
    return result


def compare_tokens(
    reference: LoadedModel, other: LoadedModel, hidden: tuple[torch.Tensor, torch.Tensor]
) -> tuple[list[float], list[bool]]:
    """Of each position: KL(reference || other) in nats over the whole vocabulary, and whether both predict
    the same token.

    KL(P || Q) = sum over tokens of P (log P - log Q), which Kullback and Leibler (1951) call the mean
    information for discriminating P from Q: what other's predictions lose if reference's are the truth.
    """
    divergences: list[float] = []
    agree: list[bool] = []
    with torch.inference_mode():
        for rows in other.row_chunks(len(hidden[0])):
            wanted = reference.logprobs(hidden[0][rows])
            got = other.logprobs(hidden[1][rows]).to(wanted.device)
            mass = wanted.exp()
            # No mass costs nothing, also where a logit is -inf; rounding may leave -1e-17.
            terms = torch.where(mass > 0, mass * (wanted - got), 0.0)
            divergences += terms.sum(dim=-1).clamp(min=0).tolist()
            agree += (wanted.argmax(dim=-1) == got.argmax(dim=-1)).tolist()
    return divergences, agree


def window_batches(model: LoadedModel, windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
    """Windows in order, as many at once as a step takes."""
    longest = max(len(window.token_ids) for window in windows)
    size = model.batch_size(longest)
    for begin in range(0, len(windows), size):
        yield windows[begin : begin + size]


def hidden_before_scored(model: LoadedModel, windows: Sequence[Window]) -> list[torch.Tensor]:
    """[num_scored, E] of each window: the states from which its scored tokens are predicted."""
    ids = [window.token_ids[:-1] for window in windows]
    return model.hidden(ids, [window.num_scored for window in windows])


def answers(
    model: LoadedModel, prompts: Sequence[Sequence[int]], keys: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Of each prompt: the greedy continuation, and the log-probability of each token of its key.

    A prompt is computed once. Then its key is appended to learn the log-probabilities, and then, over it in
    the same blocks of the cache, the greedy tokens one by one.
    """
    room = max(map(len, prompts)) + max(max_tokens, max(map(len, keys)))
    size = model.batch_size(room)
    for begin in range(0, len(prompts), size):
        part, part_keys = prompts[begin : begin + size], keys[begin : begin + size]
        last = model.hidden(part, [1] * len(part), room)
        scores = _key_scores(model, part, part_keys, last, room)
        yield from zip(_greedy(model, part, torch.cat(last), max_tokens, room), scores, strict=True)


def _key_scores(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    last: Sequence[torch.Tensor],
    room: int,
) -> list[list[float]]:
    """Log-probabilities of the keys' tokens; `last` are the prompts' last hidden states, [1, E] each."""
    after = torch.split(model.next_hidden(keys, list(map(len, prompts)), room), list(map(len, keys)))
    return [
        score_tokens(model, torch.cat([before, following])[:-1], key)
        for before, following, key in zip(last, after, keys, strict=True)
    ]


def _greedy(
    model: LoadedModel, prompts: Sequence[Sequence[int]], last: torch.Tensor, max_tokens: int, room: int
) -> list[list[int]]:
    """Greedy tokens after each prompt, whose last hidden states are `last` [R, E]. An end comes last."""
    outputs: list[list[int]] = [[] for _ in prompts]
    hidden = last
    for count in range(1, max_tokens + 1):
        for output, token in zip(outputs, model.likeliest(hidden), strict=True):
            if not output or output[-1] not in model.eos_token_ids:
                output.append(token)
        if count == max_tokens or all(output[-1] in model.eos_token_ids for output in outputs):
            break
        # Where one has ended, its last token is computed again in its place.
        starts = [len(prompt) + len(output) - 1 for prompt, output in zip(prompts, outputs, strict=True)]
        hidden = model.next_hidden([output[-1:] for output in outputs], starts, room)
    return outputs
