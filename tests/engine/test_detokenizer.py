"""Incremental text equals the full decode; stop strings are found, held back and cut exactly."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import (
    HARD_TEXTS,
    demo_tokenizer,
    many_tokenizers,
    metaspace_backend,
    small_bpe,
    small_spm,
)

from gqa_serve.engine.detokenizer import IncrementalDetokenizer, TextAssembler, TextDelta
from gqa_serve.engine.request import SamplingParams, TokenLogprobs, TokenOutput
from gqa_serve.engine.stop_strings import StopMatcher, StopStrings
from gqa_serve.engine.token_pieces import incomplete_suffix
from gqa_serve.engine.tokenizer import Tokenizer

TOKENIZERS = many_tokenizers()


def incremental(
    tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool, prompt: Sequence[int] = ()
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, prompt_ids=prompt)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@st.composite
def token_lists(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A tokenizer and ids of it: any, byte tokens, special ones, ids outside the vocabulary, real text."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer = TOKENIZERS[name]
    single_bytes = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    some = st.one_of(
        st.integers(0, tokenizer.vocab_size + 2),
        st.sampled_from(single_bytes or [0]),
        st.sampled_from(sorted(tokenizer.special_ids)),
    )
    random_ids = st.lists(some, max_size=12)
    text_ids = st.text(max_size=12).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    parts = draw(st.lists(st.one_of(random_ids, text_ids), max_size=3))
    return name, [token_id for part in parts for token_id in part]


@given(case=token_lists(), skip=st.booleans())
@settings(deadline=None, max_examples=500)
def test_deltas_joined_are_the_full_decode(case: tuple[str, list[int]], skip: bool) -> None:
    tokenizer, ids = TOKENIZERS[case[0]], case[1]
    assert "".join(incremental(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(case=token_lists(), cut=st.integers(0, 12))
@settings(deadline=None, max_examples=500)
def test_a_continuation_is_what_the_full_decode_has_after_the_prompt(
    case: tuple[str, list[int]], cut: int
) -> None:
    tokenizer, ids = TOKENIZERS[case[0]], case[1]
    prompt, rest = ids[:cut], ids[cut:]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
    if not before.endswith("\ufffd") and whole.startswith(before):  # else the prompt's own text changes
        assert before + "".join(incremental(tokenizer, rest, skip=True, prompt=prompt)) == whole


@pytest.mark.parametrize("name", ["bpe", "spm", "spm without prefix", "bytes"])
def test_real_text_streams_without_half_characters(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        deltas = incremental(tokenizer, ids, skip=True)
        assert "".join(deltas) == tokenizer.decode(ids)
        assert not any("\ufffd" in delta for delta in deltas)


def test_demo_model_streams_every_hard_text() -> None:
    tokenizer = demo_tokenizer()
    for text in HARD_TEXTS:
        assert "".join(incremental(tokenizer, tokenizer.encode(text), skip=True)) == text


def test_text_appears_as_soon_as_it_is_certain() -> None:
    tokenizer = small_bpe("gpt-2")
    ids = tokenizer.encode("a🇿b")
    assert len(ids) > 3  # the character is more than one token
    deltas = incremental(tokenizer, ids, skip=True)
    assert deltas == ["a", *[""] * (len(ids) - 3), "🇿", "b", ""]


def test_the_space_at_the_start_is_kept_in_a_continuation() -> None:
    tokenizer = small_spm()
    ids = tokenizer.encode("a", add_special_tokens=False)
    assert incremental(tokenizer, ids, skip=True) == ["a", ""]
    assert incremental(tokenizer, ids, skip=True, prompt=ids) == [" a", ""]
    assert incremental(tokenizer, ids, skip=True, prompt=[tokenizer.bos_token_id or 1]) == ["a", ""]
    metaspace = Tokenizer(metaspace_backend("always"))
    the = metaspace.token_id("▁the") or -1
    assert incremental(metaspace, [the, the], skip=True) == ["the", " the", ""]
    assert incremental(metaspace, [the], skip=True, prompt=[the]) == [" the", ""]


@pytest.mark.parametrize("tokenizer", [small_bpe("gpt-2"), small_spm(False)], ids=["bpe", "spm"])
def test_a_character_begun_by_the_prompt_is_completed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🇿", add_special_tokens=False)
    assert len(ids) > 1
    for cut in range(1, len(ids)):
        assert "".join(incremental(tokenizer, ids[cut:], skip=True, prompt=ids[:cut])) == "🇿"
    after = tokenizer.encode("a", add_special_tokens=False)
    assert "".join(incremental(tokenizer, after, skip=True, prompt=ids[:1])) == "a"
    assert "".join(incremental(tokenizer, [], skip=True, prompt=ids[:1])) == ""


@given(text=st.text(max_size=3), cut=st.integers(0, 12))
def test_the_incomplete_suffix_of_cut_text_is_what_the_cut_left(text: str, cut: int) -> None:
    data = text.encode()[:cut]
    whole = data.decode("utf-8", "ignore").encode()
    assert incomplete_suffix(data) == data[len(whole) :]


@pytest.mark.parametrize("data", [b"\x80\x80", b"a\xff", b"\xc0", b"\xf5\x80", b"\xe2\x82\xac\x80", b""])
def test_invalid_bytes_begin_no_character(data: bytes) -> None:
    assert incomplete_suffix(data) == b""


# Stop strings


def naive_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The first stop string to be complete, the longest of those that end at the same character."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def longest_held(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    lengths = {cut for stop in stops for cut in range(1, len(stop)) if text.endswith(stop[:cut])}
    return max(lengths, default=0)


@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=6),
    include=st.booleans(),
)
@settings(max_examples=400)
def test_stops_are_found_and_held_exactly(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(StopStrings(stops), include=include)
    shown = seen = ""
    matched = None
    for piece in pieces:
        text, matched = matcher.feed(piece)
        shown, seen = shown + text, seen + piece
        if matched is not None:
            break
        assert shown + matcher.held == seen
        assert len(matcher.held) == longest_held(seen, stops)
    if matched is None:
        shown += matcher.flush()
    assert (shown, matched) == naive_stop("".join(pieces), stops, include)


def test_a_stop_ignored_while_disabled_may_begin_there() -> None:
    matcher = StopMatcher(StopStrings(["ab", "bcd"]))
    assert matcher.feed("xab", enabled=False) == ("xa", None)
    assert matcher.held == "b"
    assert matcher.feed("c") == ("", None)
    assert matcher.feed("d tail") == ("", "bcd")


def test_sixty_four_stops_over_a_long_text_stay_cheap() -> None:
    stops = ["a" * 500 + chr(0x4E00 + index) for index in range(64)]
    matcher = StopMatcher(StopStrings(stops))
    steps = sum(len(matcher.feed("a")[0]) for _ in range(20_000))
    assert steps == 20_000 - 500
    assert len(matcher.held) == 500
    assert matcher.feed(chr(0x4E00 + 63)) == ("", stops[63])


def test_matchers_share_an_automaton_without_sharing_state() -> None:
    stops = StopStrings(["END"])
    first, second = StopMatcher(stops), StopMatcher(stops)
    assert first.feed("xEN") == ("x", None)
    assert second.feed("DEN") == ("D", None)
    assert first.feed("D") == ("", "END")
    assert second.flush() == "EN"


# TextAssembler


def test_an_assembler_uses_the_compiled_stops_it_is_given() -> None:
    assembler = TextAssembler(small_bpe("gpt-2"), SamplingParams(), stops=StopStrings(["b"]))
    delta = assembler.feed(output(small_bpe("gpt-2").encode("abc", add_special_tokens=False)))
    assert (delta.text, delta.stop_reason) == ("a", "b")


def output(ids: Sequence[int], **fields: object) -> TokenOutput:
    logprobs = [TokenLogprobs(token_id, -1.0, 1, []) for token_id in ids]
    return msgspec.structs.replace(
        TokenOutput(request_id="r", token_ids=list(ids), logprobs=logprobs), **fields
    )


def run(params: SamplingParams, outputs: Sequence[TokenOutput], tokenizer: Tokenizer) -> list[TextDelta]:
    assembler = TextAssembler(tokenizer, params)
    deltas = []
    for item in outputs:
        deltas.append(assembler.feed(item))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def joined(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@given(
    text=st.sampled_from(HARD_TEXTS),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    stops=st.lists(st.text("aeo n1\n=", min_size=1, max_size=3), max_size=3),
    include=st.booleans(),
)
@settings(max_examples=150)
def test_the_text_does_not_depend_on_how_tokens_arrive(
    text: str, chunks: list[int], stops: list[str], include: bool
) -> None:
    tokenizer = small_bpe("gpt-2")
    ids = tokenizer.encode(text)
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    outputs, position, index = [], 0, 0
    while position < len(ids):
        size = chunks[index % len(chunks)]
        outputs.append(output(ids[position : position + size]))
        position, index = position + size, index + 1
    outputs.append(output([], finish_reason="length"))
    deltas = run(params, outputs, tokenizer)
    expected, matched = naive_stop(text, stops, include)
    assert joined(deltas) == expected
    assert deltas[-1].finish_reason == ("stop" if matched else "length")
    assert deltas[-1].stop_reason == matched
    counted = [token_id for delta in deltas for token_id in delta.token_ids]
    assert counted == ids[: len(counted)]
    if matched is None:
        assert counted == ids
    elif len(counted) > 1:  # it ended at the very token that completed the stop string
        assert naive_stop(tokenizer.decode(counted[:-1]).rstrip("\ufffd"), stops, include)[1] is None


def test_an_end_of_sequence_token_is_counted_but_not_shown() -> None:
    tokenizer = small_bpe("gpt-2")
    eos = tokenizer.eos_token_id or -1
    ids = tokenizer.encode("hi")
    for skip in (True, False):
        params = SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=True)
        (delta,) = run(params, [output([*ids, eos], finish_reason="stop", stop_token_id=eos)], tokenizer)
        assert delta.text == "hi"
        assert delta.token_ids == [*ids, eos]
        assert [entry.token_id for entry in delta.logprobs or []] == ids
        assert (delta.finish_reason, delta.stop_reason) == ("stop", None)


def test_an_ordinary_stop_token_is_shown_only_if_asked_for() -> None:
    tokenizer = small_bpe("gpt-2")
    ids = tokenizer.encode("a!")
    assert len(ids) == 2
    last = output(ids, finish_reason="stop", stop_token_id=ids[-1])
    for include, text in ((False, "a"), (True, "a!")):
        params = SamplingParams(stop_token_ids=[ids[-1]], include_stop_str_in_output=include)
        (delta,) = run(params, [last], tokenizer)
        assert (delta.text, delta.stop_reason) == (text, ids[-1])
        assert len(delta.logprobs or []) == len(text)


def test_special_tokens_within_the_text_never_leak() -> None:
    tokenizer = small_bpe("gpt-2")
    inside = tokenizer.token_id("<|im_start|>") or -1
    ids = [*tokenizer.encode("a"), inside, *tokenizer.encode("b")]
    ended = output(ids, finish_reason="length")
    assert joined(run(SamplingParams(), [ended], tokenizer)) == "ab"
    assert joined(run(SamplingParams(skip_special_tokens=False), [ended], tokenizer)) == "a<|im_start|>b"


@pytest.mark.parametrize("reason", ["length", "stop", "abort", "error"])
def test_held_text_comes_out_at_the_end(reason: str) -> None:
    tokenizer = small_bpe("gpt-2")
    first, last = output(tokenizer.encode("see ===")), output([], finish_reason=reason, error="why")
    deltas = run(SamplingParams(stop=["====="]), [first, last], tokenizer)
    assert [delta.text for delta in deltas] == ["see ", "==="]
    assert (deltas[-1].finish_reason, deltas[-1].error) == (reason, "why")


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    tokenizer = small_bpe("gpt-2")
    ids = tokenizer.encode("x🇿")[:-1]
    deltas = run(SamplingParams(), [output(ids), output([], finish_reason="length")], tokenizer)
    assert [delta.text for delta in deltas] == ["x", "\ufffd"]


def test_a_stop_string_in_the_last_characters_wins_over_length() -> None:
    tokenizer = small_spm(False)
    ids = tokenizer.encode("a\n", add_special_tokens=False)
    assert tokenizer.token_bytes(ids[-1]) == b"\n"
    (delta,) = run(SamplingParams(stop=["\n"]), [output(ids, finish_reason="length")], tokenizer)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", "stop", "\n")


def test_stop_strings_wait_for_min_tokens() -> None:
    tokenizer = small_bpe("gpt-2")
    ids = tokenizer.encode("a!b!c")
    assert len(ids) == 5
    for min_tokens, text in ((0, "a"), (2, "a"), (3, "a!b"), (4, "a!b"), (5, "a!b!c")):
        params = SamplingParams(stop=["!"], min_tokens=min_tokens)
        outputs = [*(output([token_id]) for token_id in ids), output([], finish_reason="length")]
        assert joined(run(params, outputs, tokenizer)) == text, min_tokens


def test_nothing_may_be_fed_after_the_end() -> None:
    assembler = TextAssembler(small_bpe("gpt-2"), SamplingParams(stop=["a"]))
    assert assembler.feed(output(small_bpe("gpt-2").encode("a"), num_cached_tokens=7)).num_cached_tokens == 7
    with pytest.raises(RuntimeError, match="ended"):
        assembler.feed(output([]))
