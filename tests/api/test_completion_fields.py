"""Fields of /v1/completions beyond the common ones, and the sampling fields that servers added."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import tokenizers
from fake_engine import (
    IM_END,
    MAX_MODEL_LEN,
    MODEL,
    TEMPLATE,
    FakeEngine,
    Script,
    Server,
    fake_info,
    fake_tokenizer,
    serving,
)

from gqa_serve.engine.request import EngineRequest, TokenLogprobs, TokenOutput
from gqa_serve.engine.tokenizer import Tokenizer

NEWLINE = 10


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    reply = server.post("/v1/completions", {"prompt": "p", **fields})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def stream(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The choice of each chunk."""
    reply = server.post("/v1/completions", {"prompt": "p", "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


# --- best_of -----------------------------------------------------------------------------------------------


class Graded(FakeEngine):
    """Choice number i of each prompt gets the log-probabilities `grades[i]`, one per token of its text."""

    grades: tuple[tuple[float, ...], ...] = ()

    def outputs(self, request: EngineRequest, script: Script) -> list[TokenOutput]:
        outputs = super().outputs(request, script)
        grades = iter(self.grades[int(request.request_id.rsplit("-", 1)[1]) % len(self.grades)])
        for output in outputs:
            if output.logprobs is not None:
                output.logprobs = [TokenLogprobs(e.token_id, next(grades), 1, e.top) for e in output.logprobs]
        return outputs


@pytest.fixture(scope="module")
def graded() -> Any:
    with serving(Graded()) as running:
        yield running


def test_best_of_returns_the_likeliest_per_token(graded: Server) -> None:
    engine = graded.engine
    assert isinstance(engine, Graded)
    # two tokens of text and the end of sequence; the longest text is the best per token, not in sum
    engine.grades = ((-1.0, -1.0, -4.0), (-0.5, -0.5, -0.4), (-0.1, -0.2, -9.0), (-0.6, -0.6, -0.6))
    engine.reset(lambda request: Script(["x", request.request_id[-1]]))
    answer = complete(graded, prompt=["p", "q"], n=2, best_of=4, seed=7)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "x1"),
        (1, "x3"),
        (2, "x5"),
        (3, "x7"),
    ]
    assert all(choice["logprobs"] is None for choice in answer["choices"])  # nobody asked for them
    assert answer["usage"]["completion_tokens"] == 2 * 4 * 3  # what was computed, not what is shown
    assert answer["usage"]["prompt_tokens"] == 2
    assert [request.params.seed for request in engine.requests] == [7, 8, 9, 10] * 2
    assert {request.params.logprobs for request in engine.requests} == {0}
    assert len({request.group for request in engine.requests}) == 2


def test_best_of_with_echo_and_logprobs(graded: Server) -> None:
    engine = graded.engine
    assert isinstance(engine, Graded)
    engine.grades = ((-2.0, -2.0, -2.0), (-1.0, -1.0, -1.0))
    engine.reset(lambda request: Script(["ab"]))
    (choice,) = complete(graded, prompt=[97, 98], best_of=2, echo=True, logprobs=1)["choices"]
    assert choice["text"] == "abab"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -1.0, -1.0, -1.0]


def test_a_candidate_without_a_token_is_the_last_choice(graded: Server) -> None:
    engine = graded.engine
    assert isinstance(engine, Graded)
    engine.grades = ((-50.0, -50.0), (-50.0, -50.0))
    engine.reset(lambda request: Script([""] if request.request_id[-1] == "0" else ["z"], finish="length"))
    (choice,) = complete(graded, best_of=2)["choices"]
    assert choice["text"] == "z"


def test_best_of_equal_to_n_ranks_nothing_and_streams(server: Server, engine: FakeEngine) -> None:
    assert stream(server, n=2, best_of=2)[-1]["finish_reason"] == "stop"
    assert {request.params.logprobs for request in engine.requests} == {None}


# --- suffix ------------------------------------------------------------------------------------------------


def coder(*names: str) -> Tokenizer:
    """The byte tokenizer with markers after its own special tokens (ids from 258 on)."""
    backend = tokenizers.Tokenizer.from_str(fake_tokenizer()._backend.to_str())
    backend.add_special_tokens(list(names))
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def coding() -> Any:
    markers = coder("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>")
    engine = FakeEngine()
    with serving(engine, template=TEMPLATE, tokenizer=markers) as running:
        yield running


def coded(server: Server, **fields: Any) -> dict[str, Any]:
    server.engine.reset(lambda request: Script(["x + ", [261], "never"]))
    server.engine.model_info = fake_info(vocab_size=262)
    return complete(server, **fields)


def test_a_suffix_is_filled_in(coding: Server) -> None:
    answer = coded(coding, prompt="a=", suffix="\n<|fim_middle|>", max_tokens=9)
    (request,) = coding.engine.requests
    # what spells a marker in the text is text
    assert request.prompt == [258, *b"a=", 259, *b"\n<|fim_middle|>", 260]
    assert request.end_token_ids == (258, 259, 260, 261)
    assert request.params.stop_token_ids == []
    assert answer["usage"]["prompt_tokens"] == len(request.prompt)


def test_what_ends_the_middle_ends_the_text_and_nothing_else(coding: Server) -> None:
    engine = coding.engine
    coded(coding, prompt="a", suffix="b", ignore_eos=True)
    assert engine.requests[0].params.ignore_eos  # of which the engine makes that nothing ends it
    assert engine.requests[0].params.stop_token_ids == []
    coded(coding, prompt="a", suffix="b", echo=True, stop_token_ids=[NEWLINE])
    assert engine.requests[0].params.stop_token_ids == [NEWLINE]
    assert engine.requests[0].end_token_ids == (258, 259, 260, 261)
    coded(coding, prompt="a", suffix="")
    assert engine.requests[0].prompt == [97]
    assert engine.requests[0].params.stop_token_ids == []
    assert engine.requests[0].end_token_ids == ()
    answer = coded(coding, prompt=["a", "b"], suffix="c", n=2, echo=True)
    assert [choice["text"][0] for choice in answer["choices"]] == ["a", "a", "b", "b"]


def test_the_model_s_own_stop_is_not_the_request_s(coding: Server) -> None:
    engine = coding.engine

    def ends(request: EngineRequest) -> Script:
        return Script(["x", [261]], finish="stop")

    for asked, told in (([], None), ([261], 261)):
        coded(coding)
        engine.script = ends
        stops = engine.outputs

        def outputs(request: EngineRequest, script: Script, stops: Any = stops) -> list[TokenOutput]:
            made = [output for output in stops(request, script) if output.token_ids]
            made[-1].finish_reason, made[-1].stop_token_id = "stop", 261
            return made

        engine.outputs = outputs  # type: ignore[method-assign]
        try:
            (choice,) = complete(coding, prompt="a", suffix="b", stop_token_ids=asked)["choices"]
        finally:
            del engine.outputs  # type: ignore[method-assign]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("x", "stop", told)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"suffix": "x", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"suffix": ["x"]}, "suffix"),
        ({"suffix": "x" * (MAX_MODEL_LEN - 4)}, "prompt"),
        ({"suffix": "x" * MAX_MODEL_LEN}, "suffix"),
        ({"suffix": "x" * 100_000}, "suffix"),
        ({"suffix": "x", "stop_token_ids": list(range(256)) * 4}, None),
        ({"suffix": "x", "stop_token_ids": [0] * 1025}, "stop_token_ids"),
    ],
)
def test_what_a_suffix_does_not_go_with(coding: Server, fields: dict[str, Any], param: str | None) -> None:
    coded(coding)
    reply = coding.post("/v1/completions", {"prompt": "p", **fields})
    assert reply.status_code == (400 if param else 200)
    assert param is None or reply.json()["error"]["param"] == param


def test_a_model_without_markers_refuses_a_suffix(server: Server) -> None:
    reply = server.post("/v1/completions", {"prompt": "p", "suffix": "s"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    assert "fill-in-the-middle" in error["message"]


# --- scores ------------------------------------------------------------------------------------------------


def test_prompt_logprobs(server: Server, engine: FakeEngine) -> None:
    answer = complete(server, prompt="ab", prompt_logprobs=2, max_tokens=1)
    (choice,) = answer["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            "99": {"logprob": -9999.0, "rank": 2, "decoded_token": "c"},
        },
    ]
    assert choice["logprobs"] is None
    assert "prompt_logprobs" not in complete(server, echo=True, logprobs=1)["choices"][0]
    assert [request.params.prompt_logprobs for request in engine.requests] == [2, 1]


def test_prompt_logprobs_of_zero_beside_echo_of_more(server: Server, engine: FakeEngine) -> None:
    (choice,) = complete(server, prompt="ab", prompt_logprobs=0, echo=True, logprobs=3)["choices"]
    assert list(choice["prompt_logprobs"][1]) == ["98"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 3
    assert engine.requests[0].params.prompt_logprobs == 3


def test_prompt_logprobs_come_once_in_a_stream(server: Server) -> None:
    whole = complete(server, prompt=["ab", "cd"], prompt_logprobs=1, n=2)["choices"]
    chunks = stream(server, prompt=["ab", "cd"], prompt_logprobs=1, n=2)
    told = {chunk["index"]: chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk}
    assert told == {choice["index"]: choice["prompt_logprobs"] for choice in whole}
    assert sum("prompt_logprobs" in chunk for chunk in chunks) == 4


def test_the_token_that_ends_the_text_has_a_logprob(server: Server, engine: FakeEngine) -> None:
    """Harnesses drop the one generated token from the lists; it must be there also when it is the last."""
    engine.script = lambda request: Script([])
    (choice,) = complete(server, prompt="ab", echo=True, logprobs=1, max_tokens=1)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "b", "<|im_end|>"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    engine.script = lambda request: Script(["xy"])
    (choice,) = complete(server, prompt="ab", logprobs=1)["choices"]
    streamed = [chunk["logprobs"] for chunk in stream(server, prompt="ab", logprobs=1)]
    assert choice["logprobs"]["tokens"] == ["x", "y", "<|im_end|>"]
    assert [token for piece in streamed for token in piece["tokens"]] == ["x", "y", "<|im_end|>"]
    assert [offset for piece in streamed for offset in piece["text_offset"]] == [0, 1, 2]


def test_tokens_as_ids(server: Server) -> None:
    fields = {"echo": True, "logprobs": 2, "prompt_logprobs": 0, "return_tokens_as_token_ids": True}
    (choice,) = complete(server, prompt="ab", max_tokens=1, **fields)["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:97", "token_id:98", "token_id:72"]
    assert list(choice["logprobs"]["top_logprobs"][1]) == ["token_id:98", "token_id:99"]
    assert choice["prompt_logprobs"][1]["98"]["decoded_token"] == "token_id:98"
    assert choice["text"] == "abH"


def test_return_token_ids(server: Server, engine: FakeEngine) -> None:
    (choice,) = complete(server, prompt="ab", return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == [97, 98]
    assert choice["token_ids"] == [*b"Hello world", IM_END]
    engine.script = lambda request: Script([b"\xc3", b"\xa9"])
    chunks = stream(server, prompt="ab", return_token_ids=True)
    assert [token for chunk in chunks for token in chunk["token_ids"]] == [0xC3, 0xA9, IM_END]
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert not {"token_ids", "prompt_token_ids"} & complete(server)["choices"][0].keys()


def test_stop_reason(server: Server) -> None:
    assert complete(server, stop=["zz", "wor"])["choices"][0]["stop_reason"] == "wor"
    assert complete(server)["choices"][0]["stop_reason"] is None
    chunks = stream(server, stop="wor")
    assert chunks[-1]["stop_reason"] == "wor"
    assert not any("stop_reason" in chunk for chunk in chunks[:-1])


# --- prompts -----------------------------------------------------------------------------------------------


def test_truncation_keeps_the_end(server: Server, engine: FakeEngine) -> None:
    (choice,) = complete(server, prompt="abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=1)[
        "choices"
    ]
    assert choice["text"] == "efH"
    complete(server, prompt=["abc", "d"], truncate_prompt_tokens=2)
    complete(server, prompt=[7] * (MAX_MODEL_LEN + 9), truncate_prompt_tokens=-1, max_tokens=12)
    complete(server, prompt=[7] * 5, truncate_prompt_tokens=-1)
    complete(server, prompt=[7] * (MAX_MODEL_LEN + 9), truncate_prompt_tokens=-1, max_tokens=0)
    lengths = [len(request.prompt) for request in engine.requests]
    assert lengths == [2, 2, 1, MAX_MODEL_LEN - 12, 5, MAX_MODEL_LEN]
    assert engine.requests[3].params.max_tokens == 12
    reply = server.post(
        "/v1/completions",
        {"prompt": "x" * 600, "truncate_prompt_tokens": MAX_MODEL_LEN, "max_tokens": 1},
    )
    assert reply.json()["error"]["code"] == "context_length_exceeded"  # no room for the one token


# --- sampling fields that other servers added ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 7}, {"top_k": 7}),
        ({"min_p": 0.25}, {"min_p": 0.25}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"repeat_penalty": 1.5, "repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"stop_token_ids": [5, 6]}, {"stop_token_ids": [5, 6]}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"allowed_token_ids": [4, 9]}, {"allowed_token_ids": [4, 9]}),
        ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"spaces_between_special_tokens": True}, {"skip_special_tokens": True}),
        (
            {"spaces_between_special_tokens": False, "skip_special_tokens": False},
            {"skip_special_tokens": False},
        ),
        ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_each_field_reaches_the_engine(
    server: Server, engine: FakeEngine, path: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]} if path.startswith("chat") else {"prompt": "a"}
    assert server.post(f"/v1/{path}", {**body, **fields}).status_code == 200
    (request,) = engine.requests
    assert {name: getattr(request.params, name) for name in expected} == expected


def test_priority_and_salt_reach_the_engine(server: Server, engine: FakeEngine) -> None:
    complete(server, priority=-3, cache_salt="mine")
    assert (engine.requests[0].priority, engine.requests[0].cache_salt) == (-3, "mine")


def test_stop_strings_and_special_tokens_are_shown_where_asked(server: Server, engine: FakeEngine) -> None:
    assert complete(server, stop="lo", include_stop_str_in_output=True)["choices"][0]["text"] == "Hello"
    assert complete(server, stop="lo")["choices"][0]["text"] == "Hel"
    engine.script = lambda request: Script(["a", [256], "b"])
    assert complete(server)["choices"][0]["text"] == "ab"
    assert complete(server, skip_special_tokens=False)["choices"][0]["text"] == "a<|im_start|>b"


def test_min_tokens_holds_back_stop_strings(server: Server) -> None:
    assert complete(server, stop="l")["choices"][0]["text"] == "He"
    assert complete(server, stop="l", min_tokens=4)["choices"][0]["text"] == "Hel"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"bad_words": ["x"]}, "bad_words"),
    ],
)
def test_what_is_not_honoured_is_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = server.post("/v1/completions", {"prompt": "p", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_the_openai_client_reads_what_it_knows(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="ab", best_of=3, n=1, echo=True, logprobs=2, extra_body={"return_token_ids": True}
    )
    (choice,) = answer.choices
    assert choice.text == "abHello world"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == 2 + 11 + 1
    assert choice.model_extra is not None
    assert choice.model_extra["prompt_token_ids"] == [97, 98]


@pytest.mark.parametrize(
    ("length", "max_tokens", "status"),
    [
        (MAX_MODEL_LEN - 1, 1, 200),  # the harness's largest request: it leaves room for one token
        (MAX_MODEL_LEN, 0, 200),
        (MAX_MODEL_LEN, 1, 400),
        (MAX_MODEL_LEN + 1, 0, 400),
    ],
)
def test_scoring_at_the_edge_of_the_context(
    server: Server, engine: FakeEngine, length: int, max_tokens: int, status: int
) -> None:
    engine.script = lambda request: Script([""] if max_tokens == 0 else ["x"])
    body = {"prompt": [[7] * length], "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    reply = server.post("/v1/completions", body)
    assert reply.status_code == status
    if status == 200:
        (choice,) = reply.json()["choices"]
        assert len(choice["logprobs"]["token_logprobs"]) == length + max_tokens
        assert choice["logprobs"]["token_logprobs"][0] is None
    else:
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert reply.json()["error"]["param"].startswith("prompt")
