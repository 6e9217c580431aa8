"""Log-probabilities in JSON: finite, with bytes, aligned with the text."""

from __future__ import annotations

import json
import math

import msgspec
from fake_engine import IM_END, fake_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.api.logprobs import LegacyLogprobsWriter, chat_logprobs, finite, join_legacy, legacy_token
from gqa_serve.engine.request import TokenLogprobs

TOKENIZER = fake_tokenizer()


def entry(token: int, logprob: float = -0.5, top: list[tuple[int, float]] | None = None) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, 1, top or [])


@given(value=st.floats())
def test_finite(value: float) -> None:
    assert math.isfinite(finite(value))
    assert finite(value) == (value if math.isfinite(value) and value > -9999 else -9999)


def test_nothing_infinite_reaches_json() -> None:
    entries = [entry(65, -math.inf, [(65, -math.inf), (66, math.nan)])]
    for made in (
        chat_logprobs(entries, 2, TOKENIZER),
        LegacyLogprobsWriter(TOKENIZER, 2, False).output(entries),
    ):
        text = msgspec.json.encode(made).decode()
        assert "null" not in text.replace('"refusal":null', "")
        json.loads(text, parse_constant=lambda name: 1 / 0)
    assert made.token_logprobs == [-9999.0]
    assert made.top_logprobs == [{"A": -9999.0, "B": -9999.0}]


def test_pieces_of_characters_have_keys_of_their_own() -> None:
    assert legacy_token(0xC3, TOKENIZER) == "bytes:\\xc3"
    top = [(0xC3, -1.0), (0xC4, -2.0), (65, -3.0)]
    (alternatives,) = LegacyLogprobsWriter(TOKENIZER, 2, False).output([entry(66, -9.0, top)]).top_logprobs
    assert alternatives == {"bytes:\\xc3": -1.0, "bytes:\\xc4": -2.0, "B": -9.0}


def test_special_tokens_have_width_only_where_shown() -> None:
    entries = [entry(65), entry(IM_END), entry(66)]
    assert LegacyLogprobsWriter(TOKENIZER, 0, False).output(entries).text_offset == [0, 1, 1]
    assert LegacyLogprobsWriter(TOKENIZER, 0, True).output(entries).text_offset == [
        0,
        1,
        1 + len("<|im_end|>"),
    ]


def test_a_space_the_tokenizer_invents_takes_no_room() -> None:
    writer = LegacyLogprobsWriter(TOKENIZER, 0, False)
    prompt = writer.prompt([0x20, 65, 66], [None, entry(65), entry(66)], "AB")
    assert prompt.text_offset == [0, 0, 1]
    assert writer.output([entry(67)]).text_offset == [2]


@given(text=st.text(max_size=30), cut=st.integers(0, 60))
def test_offsets_point_at_the_characters(text: str, cut: int) -> None:
    data = text.encode()
    writer = LegacyLogprobsWriter(TOKENIZER, 0, False)
    entries = [entry(byte) for byte in data]
    joined = join_legacy([writer.output(entries[:cut]), writer.output(entries[cut:])])
    starts = [len(data[:number].decode(errors="ignore")) for number in range(len(data))]
    assert joined.text_offset == starts
    assert len(joined.tokens) == len(joined.token_logprobs) == len(joined.top_logprobs) == len(data)
