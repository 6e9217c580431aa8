"""The sampler against float64 oracles and transformers' own logits processors."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from fake_runner import OnDevice, on_device
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gqa_serve.engine.request import EngineRequest, Request, SamplingParams
from gqa_serve.engine.row_kernels import KernelRows
from gqa_serve.engine.sampler import Sampler, TorchRows, _filter_floor, random_unit

VOCAB = 1000


def make(tokens: list[int], output: list[int] = [], seed: int = 0, **params: object) -> Request:  # noqa: B006
    spec = EngineRequest(request_id=f"r{seed}", prompt=tokens, params=SamplingParams(**params))
    request = Request(spec, 0, seed, 4096)
    request.tokens += output
    request.num_tokens += len(output)
    return request


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_is_the_argmax_and_rows_do_not_mix() -> None:
    logits = random_logits(4)
    requests = [make([1], temperature=t, seed=i) for i, t in enumerate([0.0, 1.0, 0.0, 0.7])]
    together = Sampler([]).launch(logits, requests).result()
    assert [together[i].token_id for i in (0, 2)] == logits.argmax(-1)[[0, 2]].tolist()
    for row, request in enumerate(requests):
        assert Sampler([]).launch(logits[row : row + 1], [request]).result() == [together[row]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen_and_neighbours_choose_from_all(temperature: float) -> None:
    logits = random_logits(3) / 10
    allowed = [5, 900, 17]
    best = max(allowed, key=lambda token: float(logits[1, token]))
    chosen = Counter()
    for seed in range(60):
        requests = [
            make([1], seed=seed, temperature=temperature, logprobs=0),
            make([1], seed=seed, temperature=temperature, logprobs=0, allowed_token_ids=allowed),
            make([1], seed=seed, temperature=temperature),
        ]
        samples = Sampler([5]).launch(logits, requests).result()
        free = Sampler([5]).launch(logits, [requests[0], requests[0], requests[2]]).result()
        assert (samples[0], samples[2]) == (free[0], free[2])
        token, logprobs = samples[1]
        assert logprobs is not None
        # the log-probability is that of the unmodified logits
        assert logprobs.logprob == pytest.approx(float(logits[1].log_softmax(-1)[token]), abs=1e-5)
        chosen[token] += 1
    assert set(chosen) == ({best} if temperature == 0 else set(allowed))


def test_bias_decides_among_the_allowed_and_brings_nobody_in() -> None:
    request = make([1], temperature=0.0, allowed_token_ids=[3, 4], logit_bias={4: 100.0, 9: 100.0})
    (sample,) = Sampler([]).launch(random_logits(1), [request]).result()
    assert sample.token_id == 4


@settings(max_examples=60, deadline=None)
@given(
    top_k=st.sampled_from([0, 1, 5, 300, VOCAB, 5 * VOCAB]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
    seed=st.integers(0, 50),
)
def test_filters_keep_what_transformers_keeps(
    top_k: int, top_p: float, min_p: float, scale: float, seed: int
) -> None:
    logits = random_logits(3, seed) * scale
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    ours = logits >= _filter_floor(logits, [params] * 3)[:, None]
    wanted = logits.double()
    ids = torch.zeros(3, 1, dtype=torch.int64)
    if top_k:
        wanted = TopKLogitsWarper(min(top_k, VOCAB))(ids, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(ids, wanted)
    if min_p > 0:
        wanted = MinPLogitsWarper(min_p)(ids, wanted)
    assert torch.equal(ours, torch.isfinite(wanted))


def test_a_row_keeps_the_same_tokens_whatever_filters_its_neighbours_have() -> None:
    logits = random_logits(3)
    mine = SamplingParams(top_p=0.97)
    alone = _filter_floor(logits[:1], [mine])
    beside = _filter_floor(logits, [mine, SamplingParams(top_k=900), SamplingParams(min_p=0.3)])
    assert alone[0] == beside[0]


def test_draws_follow_the_distribution() -> None:
    vocab, draws = 12, 20_000
    logits = random_logits(1, 3, vocab)
    params = SamplingParams(temperature=0.8, top_k=8)
    units = [random_unit(seed, 1) for seed in range(draws)]
    tokens = TorchRows().draw(logits.expand(draws, vocab), range(draws), [params] * draws, units).tolist()
    warped = TopKLogitsWarper(8)(None, TemperatureLogitsWarper(0.8)(None, logits.double()))
    probs = torch.softmax(warped[0], -1)
    counts = Counter(tokens)
    chi_square = sum(
        (counts[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(probs.tolist()) if p > 0
    )
    assert sum(counts[t] for t, p in enumerate(probs.tolist()) if p == 0) == 0
    assert chi_square < 30  # 7 degrees of freedom: p < 0.0001 beyond this


def test_the_stream_depends_on_seed_and_position_only() -> None:
    assert random_unit(1, 5) == random_unit(1, 5)
    values = [random_unit(seed, position) for seed in range(40) for position in range(50)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.03
    random_unit(-(2**63), 0), random_unit(2**63 - 1, 0)


def test_repetition_penalty_as_in_transformers() -> None:
    logits = random_logits(2)
    requests = [
        make([5, 6, 7], [8, 8], repetition_penalty=1.3, temperature=0),
        make([1], temperature=0, seed=1),
    ]
    ours = Sampler([])._adjust(logits.clone(), requests, range(len(requests)))
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[5, 6, 7, 8, 8]]), logits[:1].clone())
    assert torch.allclose(ours[:1], wanted)
    assert torch.equal(ours[1], logits[1])


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    logits = random_logits(1)
    request = make([5, 6], [7, 7, 7, 9], presence_penalty=0.5, frequency_penalty=0.25)
    delta = (logits - Sampler([])._adjust(logits.clone(), [request], [0]))[0]
    wanted = torch.zeros(VOCAB)
    wanted[7], wanted[9] = 0.5 + 3 * 0.25, 0.5 + 0.25
    assert torch.allclose(delta, wanted, atol=1e-5)


def test_penalties_follow_the_output_as_it_grows() -> None:
    sampler = Sampler([])
    logits = torch.zeros(1, VOCAB)
    request = make([1], temperature=0, frequency_penalty=1.0)
    seen = []
    for _ in range(20):
        (sample,) = sampler.launch(logits, [request]).result()
        request.tokens.append(sample.token_id)
        request.num_tokens += 1
        seen.append(sample.token_id)
    assert len(set(seen)) == 20  # each choice makes itself less likely than all others
    sampler.forget(request.request_id)
    assert not sampler._counts


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    biased = make([1], temperature=0, logit_bias={77: 5.0, 78: 6.0})
    assert Sampler([]).launch(logits.clone(), [biased]).result()[0].token_id == 78
    logits[0, 3] = 9.0
    held = make([1], temperature=0, min_tokens=2, stop_token_ids=[4])
    assert Sampler([3]).launch(logits.clone(), [held]).result()[0].token_id not in (3, 4)
    held.tokens += [50, 51]
    held.num_tokens += 2
    assert Sampler([3]).launch(logits, [held]).result()[0].token_id == 3


class Allowing:
    """A constraint that allows some tokens."""

    error = None

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def mask(self) -> bytes:
        return sum(1 << token for token in self.tokens).to_bytes(
            max(self.tokens, default=0) // 8 + 1, "little"
        )


def constrained(tokens: list[int], **params: object) -> Request:
    request = make([1], **params)
    request.constraint = Allowing(tokens)  # type: ignore[assignment]
    return request


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_masked_row_gives_an_allowed_token_and_no_other_row_is_touched(temperature: float) -> None:
    logits = random_logits(3)
    rows = [
        make([1], temperature=temperature),
        constrained([5, 900], temperature=temperature, seed=1),
        make([1], temperature=temperature, seed=2),
    ]
    free = [Sampler([]).launch(logits[[row]], [rows[row]]).result()[0] for row in (0, 2)]
    chosen = Sampler([]).launch(logits.clone(), rows).result()
    assert chosen[1].token_id in (5, 900)
    assert [chosen[0], chosen[2]] == free
    if temperature == 0:
        assert chosen[1].token_id == max((5, 900), key=lambda token: logits[1, token])


def test_a_mask_without_tokens_leaves_none() -> None:
    (sample,) = Sampler([]).launch(random_logits(1), [constrained([])]).result()
    assert sample.token_id is None


def test_logprobs_of_a_masked_row_are_of_the_unmodified_logits() -> None:
    logits = random_logits(1)
    (sample,) = Sampler([]).launch(logits.clone(), [constrained([7], logprobs=2)]).result()
    wanted = torch.log_softmax(logits[0].double(), -1)
    assert sample.token_id == 7
    assert sample.logprobs is not None
    assert sample.logprobs.logprob == pytest.approx(float(wanted[7]), abs=1e-5)
    assert [t for t, _ in sample.logprobs.top] == wanted.topk(2).indices.tolist()


@pytest.mark.parametrize("vocab", [1, 8, 97, 1000])
@pytest.mark.parametrize("num_bytes", [0, 1, 13, 200])
def test_masks_bit_by_bit(vocab: int, num_bytes: int) -> None:
    logits = random_logits(3, vocab=vocab)
    masks = [bytes(random.Random(row).randbytes(num_bytes)) for row in (0, 1)]
    masked = logits.clone()
    best = TorchRows().mask(masked, [0, 2], masks).tolist()
    assert torch.equal(masked[1], logits[1])
    for row, mask in zip((0, 2), masks, strict=True):
        for token in range(vocab):
            stays = token < 8 * num_bytes and mask[token // 8] >> token % 8 & 1
            assert masked[row, token] == (logits[row, token] if stays else -torch.inf)
    for row, token in zip((0, 2), best, strict=True):
        assert token == (int(masked[row].argmax()) if masked[row].max() > -torch.inf else -1)


def test_logprobs_are_of_the_unmodified_logits() -> None:
    logits = random_logits(2)
    request = make([1], temperature=0, logprobs=3, logit_bias={5: 100.0})
    sample = Sampler([]).launch(logits, [request, make([1], seed=1)]).result()[0]
    wanted = torch.log_softmax(logits[0].double(), -1)
    assert sample.token_id == 5
    assert sample.logprobs is not None
    assert sample.logprobs.logprob == pytest.approx(float(wanted[5]), abs=1e-5)
    assert sample.logprobs.rank == int((wanted > wanted[5]).sum()) + 1
    assert [t for t, _ in sample.logprobs.top] == wanted.topk(3).indices.tolist()


def test_logprobs_zero_gives_the_chosen_token_alone() -> None:
    sample = Sampler([]).launch(random_logits(1), [make([1], temperature=0, logprobs=0)]).result()[0]
    assert sample.logprobs is not None
    assert sample.logprobs.top == []
    assert sample.logprobs.rank == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_have_no_token(bad: float) -> None:
    logits = random_logits(2)
    logits[0, 10] = bad
    first, second = Sampler([]).launch(logits, [make([1]), make([1], seed=1)]).result()
    assert first.token_id is None
    assert second.token_id is not None


def test_a_very_low_temperature_is_the_argmax() -> None:
    logits = random_logits(1)
    (sample,) = Sampler([]).launch(logits, [make([1], temperature=1e-4)]).result()
    assert sample.token_id == int(logits.argmax())


def test_a_nucleus_of_1_keeps_the_tail_that_rounding_would_cut() -> None:
    # The first token has all the mass that float64 can tell from 1; top_k asks for the rest all the same.
    logits = torch.full((1, VOCAB), -60.0)
    logits[0, 0] = 0.0
    logits[0, -1] = -70.0
    floor = _filter_floor(logits, [SamplingParams(top_k=VOCAB - 1, top_p=1.0)])
    assert int((logits >= floor[:, None]).sum()) == VOCAB - 1


def test_rows_that_parameters_leave_nothing_have_no_token() -> None:
    logits = random_logits(2)
    ban = make([1], min_tokens=1, stop_token_ids=list(range(VOCAB)), logprobs=1)
    first, second = Sampler([]).launch(logits, [ban, make([1], seed=1)]).result()
    assert first == (None, None)
    assert second.token_id is not None


def test_launching_looks_at_nothing_on_the_device() -> None:
    """Greedy and drawn rows, bans and biases, penalties, log-probabilities, a row without a token."""
    logits = random_logits(6)
    logits[4, 10] = math.nan
    requests = [
        make([1], temperature=0),
        make([1], seed=1, temperature=0.7, logprobs=2),
        make([1], seed=2, temperature=0, logit_bias={7: 3.0}, min_tokens=2, logprobs=0),
        make([1, 2], [3], seed=3, frequency_penalty=1.0, repetition_penalty=1.2),
        make([1], seed=4, logprobs=2),
        make([1], seed=5, logprobs=2, temperature=0),
    ]
    pending = Sampler([3]).launch(on_device(logits), requests)
    with pytest.raises(AssertionError, match="waits for the device"):
        pending.tokens.tolist()
    with OnDevice.done():
        samples = pending.result()
        assert pending.tokens.tolist() == [-1 if s.token_id is None else s.token_id for s in samples]
    assert samples == Sampler([3]).launch(logits, requests).result()
    assert [sample.token_id is None for sample in samples] == [False] * 4 + [True, False]
    assert [sample.logprobs is None for sample in samples] == [True, False, False, True, True, False]
    for row, request in enumerate(requests):  # and no row depends on its neighbours
        assert Sampler([3]).launch(logits[row : row + 1], [request]).result() == [samples[row]]


def test_scores_of_given_tokens() -> None:
    logits = random_logits(3)
    entries = Sampler([]).score(logits, [5, 6, 7], 2).result()
    wanted = torch.log_softmax(logits.double(), -1)
    assert [entry.token_id for entry in entries] == [5, 6, 7]
    for row, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(wanted[row, entry.token_id]), abs=1e-5)
        assert entry.rank == int((wanted[row] > wanted[row, entry.token_id]).sum()) + 1
        assert [token for token, _ in entry.top] == wanted[row].topk(2).indices.tolist()


class Kernels:
    """`RowKernels` in plain torch; `filters` says which of the three the last draw was given."""

    filters: tuple[bool, ...] = ()

    def argmax(self, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(TorchRows().argmax(logits))

    def draw(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor | None,
        min_p: torch.Tensor | None,
        unit: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        assert (rows.dtype, temperature.dtype, unit.dtype) == (torch.int32, torch.float32, torch.float64)
        self.filters = tuple(values is not None for values in (top_k, top_p, min_p))
        params = [
            SamplingParams(
                temperature=float(temperature[s]),
                top_k=0 if top_k is None else int(top_k[s]),
                top_p=1.0 if top_p is None else float(top_p[s]),
                min_p=0.0 if min_p is None else float(min_p[s]),
            )
            for s in range(len(rows))
        ]
        return out.copy_(TorchRows().draw(logits[rows.long()], range(len(rows)), params, unit.tolist()))


@pytest.mark.parametrize(
    ("params", "filters"),
    [
        ([{}, {"temperature": 0.5}, {"top_k": -1}], (False, False, False)),
        ([{"top_k": 5}, {"temperature": 0}, {"top_p": 0.3, "temperature": 1.7}], (True, True, False)),
        ([{"temperature": 0}, {"min_p": 0.2}, {"top_k": 5 * VOCAB}], (True, False, True)),
    ],
)
def test_kernels_get_every_parameter(params: list[dict[str, float]], filters: tuple[bool, ...]) -> None:
    logits = random_logits(3)
    requests = [make([1], seed=seed, **values) for seed, values in enumerate(params)]
    kernels = Kernels()
    samples = Sampler([], KernelRows(kernels)).launch(logits, requests).result()
    assert samples == Sampler([]).launch(logits, requests).result()
    assert kernels.filters == filters
