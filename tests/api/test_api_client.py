"""The API as the official `openai` client sees it, over real HTTP."""

from __future__ import annotations

import asyncio

import openai
import pytest
from fake_engine import IM_END, MAX_MODEL_LEN, MODEL, FakeEngine, Script, Server, fake_info, wait_until

from gqa_serve.engine.request import EngineRequest

USER = [{"role": "user", "content": "Hi"}]
RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
# Each control token is one id, all else one id per byte.
NUM_RENDERED = len("user\nHi\nassistant\n") + 3


def test_chat(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=USER)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.system_fingerprint is not None
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", "Hello world")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == NUM_RENDERED
    assert answer.usage.completion_tokens == len("Hello world") + 1  # the stop token was computed
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    (request,) = engine.requests
    assert request.prompt.count(IM_END) == 1
    assert request.params.max_tokens == MAX_MODEL_LEN - NUM_RENDERED
    assert engine.ends() == ["stop"]


def test_chat_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert deltas[0].content == ""
    assert "".join(delta.content or "" for delta in deltas) == "Hello world"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(stream.aborts for stream in engine.streams)


def test_stream_without_usage_has_no_usage_chunk(client: openai.OpenAI) -> None:
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": None}}):
        chunks = list(client.chat.completions.create(model=MODEL, messages=USER, stream=True, **options))
        assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


def test_running_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=USER, stream=True, stream_options=options)  # type: ignore[call-overload]
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_async_client_streams_32_at_once(engine: FakeEngine, server: Server) -> None:
    engine.script = lambda request: Script([bytes(request.prompt[-14:-12])] * 5)

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        text = ""
        stream = await client.completions.create(
            model=MODEL, prompt=f"{number:02d}" + "x" * 12, max_tokens=100, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(32)))

    assert asyncio.run(all_of_them()) == [f"{number:02d}" * 5 for number in range(32)]
    assert engine.ends() == ["stop"] * 32


def test_choices_share_a_group_and_count_their_seeds(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=USER, n=3, seed=2**63 - 2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [request.params.seed for request in engine.requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({request.group for request in engine.requests}) == 1
    assert engine.requests[0].group is not None
    assert len({request.request_id for request in engine.requests}) == 3
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == NUM_RENDERED
    assert answer.usage.completion_tokens == 36


def test_choices_stream_interleaved(client: openai.OpenAI, engine: FakeEngine) -> None:
    texts = iter(["one", "two", "three"])
    engine.script = lambda request: Script(list(next(texts)))
    got = {0: "", 1: "", 2: ""}
    ends: list[int] = []
    for chunk in client.chat.completions.create(model=MODEL, messages=USER, n=3, stream=True):
        (choice,) = chunk.choices
        got[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends.append(choice.index)
    assert got == {0: "one", 1: "two", 2: "three"}
    assert sorted(ends) == [0, 1, 2]


def test_prompts_times_n_are_prompt_major(client: openai.OpenAI, engine: FakeEngine) -> None:
    numbers = iter("abcd")
    engine.script = lambda request: Script([next(numbers)])
    answer = client.completions.create(model=MODEL, prompt=["p", "q"], n=2, seed=5, echo=True)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "pa"),
        (1, "pb"),
        (2, "qc"),
        (3, "qd"),
    ]
    groups = [request.group for request in engine.requests]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert [request.params.seed for request in engine.requests] == [5, 6, 5, 6]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", [[104, 105]]),
        (["hi", "yo"], [[104, 105], [121, 111]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, IM_END]], [[1], [2, IM_END]]),
        ("<|im_end|>", [[IM_END]]),  # raw input: the token, as in transformers
    ],
)
def test_prompt_forms(
    client: openai.OpenAI, engine: FakeEngine, prompt: object, ids: list[list[int]]
) -> None:
    client.completions.create(model=MODEL, prompt=prompt)  # type: ignore[call-overload]
    assert [request.prompt for request in engine.requests] == ids
    assert {request.params.max_tokens for request in engine.requests} == {16}


def test_completion_stream(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="p", echo=True, stream=True, max_tokens=8))
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == "pHello wo"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_chat_logprobs(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["é"])
    answer = client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 2  # the stop token is not shown
    first, second = logprobs.content
    assert (first.bytes, second.bytes) == ([0xC3], [0xA9])
    assert first.logprob == -0.5
    assert [top.logprob for top in first.top_logprobs] == [-0.5, -2.0, -9999.0]
    assert first.top_logprobs[0].bytes == [0xC3]


def test_chat_logprobs_stream_equals_whole(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a", "é".encode()[:1], "é".encode()[1:], "STOP", "z"])
    options = {"logprobs": True, "top_logprobs": 2, "stop": "STOP"}
    whole = client.chat.completions.create(model=MODEL, messages=USER, **options).choices[0]  # type: ignore[call-overload]
    entries = []
    text = ""
    for chunk in client.chat.completions.create(model=MODEL, messages=USER, stream=True, **options):  # type: ignore[call-overload]
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs:
            entries += chunk.choices[0].logprobs.content
    assert text == whole.message.content == "aé"
    assert whole.logprobs is not None
    assert entries == whole.logprobs.content


def test_legacy_logprobs_with_echo(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["é!"])
    answer = client.completions.create(model=MODEL, prompt="ab", echo=True, logprobs=2, max_tokens=3)
    (choice,) = answer.choices
    assert choice.text == "abé!"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs.text_offset == [0, 1, 2, 2, 3]
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1] == {"b": -0.5, "c": -9999.0}
    assert engine.requests[0].params.prompt_logprobs == 2


def test_scoring_a_prompt(client: openai.OpenAI, engine: FakeEngine) -> None:
    """max_tokens=0 with echo and logprobs: what evaluation harnesses ask for."""
    engine.script = lambda request: Script([""])
    answer = client.completions.create(model=MODEL, prompt=[97, 98], echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("ab", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.5]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    streamed = client.completions.create(
        model=MODEL, prompt=[97, 98], echo=True, logprobs=1, max_tokens=0, stream=True
    )
    (chunk,) = list(streamed)
    assert chunk.choices[0] == choice


def test_echo_stream_equals_whole(client: openai.OpenAI) -> None:
    options = {"prompt": ["abc", "xyz"], "echo": True, "logprobs": 2, "n": 2, "max_tokens": 7}
    whole = client.completions.create(model=MODEL, **options)  # type: ignore[call-overload]
    texts = [""] * 4
    offsets: list[list[int]] = [[], [], [], []]
    for chunk in client.completions.create(model=MODEL, stream=True, **options):  # type: ignore[call-overload]
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_split_over_tokens(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = lambda request: Script(["ab", "c<", "ST", "OP", ">never", "more"], hold_at=5)
    if stream:
        chunks = list(
            client.chat.completions.create(model=MODEL, messages=USER, stop=["<STOP>"], stream=True)
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(model=MODEL, messages=USER, stop=["<STOP>"])
        text, reason = answer.choices[0].message.content or "", answer.choices[0].finish_reason
    assert (text, reason) == ("abc", "stop")
    assert engine.ends() == ["abort"]  # the engine had no reason to stop


def test_held_back_text_is_flushed_at_the_end(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["abc<ST"])
    chunks = client.chat.completions.create(model=MODEL, messages=USER, stop=["<STOP>"], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "abc<ST"


def test_nulls_everywhere(client: openai.OpenAI) -> None:
    names = [
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "skip_special_tokens",
        "priority",
        "cache_salt",
        "logprobs",
        "top_logprobs",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "reasoning_effort",
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "response_format",
        "modalities",
        "audio",
        "prediction",
        "web_search_options",
        "user",
        "metadata",
        "store",
        "service_tier",
        "best_of",
        "echo",
        "suffix",
        "chat_template",
        "structured_outputs",
        "guided_json",
        "model",
        "parallel_tool_calls",
        "verbosity",
        "prompt_logprobs",
    ]
    nulls = dict.fromkeys(names)
    answer = client.chat.completions.create(model=MODEL, messages=USER, extra_body=nulls)
    assert answer.choices[0].message.content == "Hello world"
    whole = client.completions.create(model=MODEL, prompt="p", extra_body=nulls)
    assert whole.choices[0].text == "Hello world"


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=USER,
        temperature=0.25,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": 3},
        seed=11,
        stop="x",
        max_completion_tokens=9,
        extra_body={
            "max_tokens": 400,
            "top_k": -1,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [3],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "priority": -4,
            "cache_salt": "salt",
        },
    )
    (request,) = engine.requests
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.25, 0.5, 0, 0.125)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 1, -1)
    assert (params.logit_bias, params.seed, params.stop_token_ids) == ({7: 3.0}, 11, [3])
    assert params.stop == []  # text is not the engine's business
    assert params.include_stop_str_in_output
    assert params.ignore_eos
    assert not params.skip_special_tokens
    assert (params.max_tokens, params.min_tokens) == (9, 2)  # the newer name wins
    assert (request.priority, request.cache_salt) == (-4, "salt")
    assert params.logprobs is None


def test_checkpoint_defaults_apply_where_a_request_is_silent(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 3, "do_sample": True, "top_p": None}
    engine.model_info = fake_info(generation_config=defaults)
    client.chat.completions.create(model=MODEL, messages=USER)
    client.chat.completions.create(model=MODEL, messages=USER, temperature=0, extra_body={"top_k": 0})
    silent, spoken = (request.params for request in engine.requests)
    assert (silent.temperature, silent.top_k, silent.top_p) == (0.6, 20, 1.0)
    assert (spoken.temperature, spoken.top_k) == (0, 0)


def test_assistant_message_as_dumped_by_the_client(client: openai.OpenAI, engine: FakeEngine) -> None:
    first = client.chat.completions.create(model=MODEL, messages=USER)
    dumped = first.choices[0].message.model_dump()
    assert None in dumped.values()
    again = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *USER,
        dumped,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
    ]
    client.chat.completions.create(model=MODEL, messages=again)  # type: ignore[arg-type]
    prompt = bytes(token for token in engine.requests[-1].prompt if token < 256).decode()
    for text in ("Be brief.", "Hi", "Hello world", "42"):
        assert text in prompt


def test_continue_final_message(client: openai.OpenAI, engine: FakeEngine) -> None:
    messages = [*USER, {"role": "assistant", "content": "Sure, "}]
    client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        extra_body={"continue_final_message": True},
    )
    assert bytes(engine.requests[0].prompt[-6:]) == b"Sure, "


def test_models(client: openai.OpenAI, engine: FakeEngine) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL, "alias"]
    assert client.models.retrieve(MODEL).model_dump()["max_model_len"] == MAX_MODEL_LEN
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"
    assert client.chat.completions.create(model="alias", messages=USER).model == "alias"


def test_unknown_model(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=USER)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert engine.requests == []


@pytest.mark.parametrize("length", [MAX_MODEL_LEN, MAX_MODEL_LEN + 100])
def test_prompt_that_does_not_fit(client: openai.OpenAI, engine: FakeEngine, length: int) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=["ok", "x" * length])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt[1]"
    assert engine.requests == []


def test_max_tokens_is_a_cap(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model=MODEL, prompt="x" * (MAX_MODEL_LEN - 1), max_tokens=64_000)
    assert engine.requests[0].params.max_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_queue_too_full_for_all_takes_none(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.capacity = 2
    engine.script = lambda request: Script(hold_at=0)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=MODEL, messages=USER, n=3, stream=stream)
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "queue_full"
    assert engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_error_before_the_first_token(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = lambda request: Script([], finish="error", error="The step failed.")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=USER, stream=stream)
    assert "The step failed." in caught.value.message
    assert caught.value.code == "engine_error"


def test_error_of_one_choice_ends_the_others(client: openai.OpenAI, engine: FakeEngine) -> None:
    scripts = iter([Script(hold_at=1), Script(["a"], finish="error", error="The step failed.")])
    engine.script = lambda request: next(scripts)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=USER, n=2)
    assert sorted(map(str, engine.ends())) == ["abort", "error"]


def test_error_after_the_first_token(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["Hel", "lo"], finish="error", error="The step failed.", hold_at=1)
    stream = client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - the loop is the test
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text:
                engine.release.set()
    assert text.startswith("Hel")
    assert "The step failed." in caught.value.message


def test_bug_in_the_engine_is_a_500_that_says_nothing(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script([], fault=RuntimeError("secret /path"))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=USER)
    assert "secret" not in str(caught.value.body)
    assert set(caught.value.body or {}) == {"message", "type", "param", "code"}


def test_engine_not_ready(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.state = "restarting"
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=USER)
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_leaving_a_stream_early_frees_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a"] * 100, hold_at=3)
    with client.chat.completions.create(model=MODEL, messages=USER, n=2, stream=True) as stream:
        next(iter(stream))
        assert engine.num_running == 2
    wait_until(lambda: engine.num_running == 0)
    assert engine.ends() == ["abort", "abort"]


def test_cached_tokens_counts_each_prompt_once(client: openai.OpenAI, engine: FakeEngine) -> None:
    def script(request: EngineRequest) -> Script:
        return Script(num_cached_tokens=16)

    engine.script = script
    answer = client.completions.create(model=MODEL, prompt=["x" * 20, "y" * 20], n=3)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 32


def test_a_chat_ends_where_the_template_ends_an_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(model=MODEL, messages=USER, stop=["x"])
    client.completions.create(model=MODEL, prompt="Hi")
    chat, completion = engine.requests
    assert chat.end_token_ids == (IM_END,)
    assert chat.params.stop_token_ids == []  # which would be told as the request's own
    assert completion.end_token_ids == ()


def test_stop_reason_of_chats(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=USER, stop=["wor"])
    assert answer.choices[0].model_extra == {"stop_reason": "wor"}
    chunks = list(client.chat.completions.create(model=MODEL, messages=USER, stop=["wor"], stream=True))
    reasons = [chunk.choices[0].model_extra.get("stop_reason", "none") for chunk in chunks]
    assert reasons == ["none"] * (len(chunks) - 1) + ["wor"]
