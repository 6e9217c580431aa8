"""The chat of the page at `/`, in Chromium: over a scripted engine, and once over the demo model."""

from __future__ import annotations

import json
import re
from typing import Any

from actions import answered, answers, ask, nameless, probe, until
from demo_server import RunningServer
from fake_engine import MODEL, FakeEngine, Script, Server, fake_info, serving, wait_until

QUESTION = "What is shared?"
KEYS = ("sk-page",)


def sse(*chunks: dict[str, Any]) -> dict[str, Any]:
    """A stream of chat chunks for `page.route`, whose choices are deltas."""
    frames = [
        {"choices": [{"index": 0, "delta": chunk, "logprobs": None, "finish_reason": None}]}
        for chunk in chunks
    ]
    body = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames) + "data: [DONE]\n\n"
    return {"status": 200, "content_type": "text/event-stream", "body": body}


# --- the demo model ----------------------------------------------------------------------------------------


def test_a_conversation_with_the_demo_model(demo_server: RunningServer, open_page: Any) -> None:
    page = open_page(demo_server.url)
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "24")
    page.fill("#system", "You answer in few words.")
    ask(page, "The capital of France is")
    ask(page, "And of Italy?")
    with demo_server.client() as client:
        said = [{"role": "system", "content": "You answer in few words."}]
        for question, shown in zip(("The capital of France is", "And of Italy?"), answers(page), strict=True):
            said.append({"role": "user", "content": question})
            reply = client.chat.completions.create(model="demo", messages=said, temperature=0, max_tokens=24)
            text = reply.choices[0].message.content
            said.append({"role": "assistant", "content": text})
            assert " ".join(shown.split()) == " ".join(re.sub(r"[*`#]", "", text).split())
    usage = reply.usage
    stats = page.locator(".answer.last .stats").inner_text()
    assert f"prompt {usage.prompt_tokens} " in stats
    assert f"output {usage.completion_tokens}" in stats
    assert re.search(r"\(\d+ cached\)", stats), "the second prompt begins as the first"
    assert re.search(r"[\d.]+ tok/s · first token [\d.]+ m?s", stats)


def test_stopping_ends_the_request_in_the_engine(demo_server: RunningServer, open_page: Any) -> None:
    page = open_page(demo_server.url)
    page.fill("#max_tokens", "4000")
    page.fill("#stop-strings", "\x01")  # a stop string that never comes
    page.route(  # so that the model cannot end before it is stopped
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True})
        ),
    )
    before = len([line for line in demo_server.lines if "finish=" in line])
    ask(page, "Count as far as you can.", wait=False)
    until(page, "document.querySelector('.answer > .text').textContent.length > 20")
    page.click("#stop")
    answered(page)
    assert "stopped" in page.locator(".answer .stats").inner_text()
    text = answers(page)[0]
    state = "fetch('ui/state').then((reply) => reply.json()).then((state) => state.picture.requests.length)"
    wait_until(lambda: page.evaluate(state) == 0)
    wait_until(lambda: len([line for line in demo_server.lines if "finish=" in line]) > before)
    assert "finish=cancelled" in [line for line in demo_server.lines if "finish=" in line][-1]
    assert answers(page)[0] == text


# --- what is sent and shown --------------------------------------------------------------------------------


def test_every_control_is_sent_and_empty_ones_are_not(server: Server, open_page: Any) -> None:
    page = open_page(server.url)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, QUESTION)
    plain = sent.value.post_data_json
    assert plain["messages"] == [{"role": "user", "content": QUESTION}]
    assert set(plain) == {"model", "stream", "stream_options", "messages", "logprobs", "top_logprobs"}
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 7, "seed": 11,
        "presence_penalty": 0.1, "frequency_penalty": -0.2, "repetition_penalty": 1.1,
    }  # fmt: skip
    page.click("#clear")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.fill("#stop-strings", "END\nHALT")
    page.fill("#system", "Be kind.")
    page.uncheck("#with-logprobs")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, QUESTION)
    body = sent.value.post_data_json
    assert {name: body[name] for name in values} == values
    assert body["stop"] == ["END", "HALT"]
    assert body["messages"][0] == {"role": "system", "content": "Be kind."}
    assert "logprobs" not in body
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0.5, 40, 11, 7)
    page.reload()
    assert page.input_value("#temperature") == "0.5"
    page.click("#reset")
    assert page.input_value("#temperature") == ""


def test_the_conversation_lives_as_long_as_the_tab(server: Server, open_page: Any) -> None:
    page = open_page(server.url)
    ask(page, QUESTION)
    page.reload()
    assert answers(page) == ["Hello world"]
    ask(page, "More.")
    prompt = bytes(token for token in server.engine.requests[-1].prompt if token < 256).decode()
    assert QUESTION in prompt
    assert "Hello world" in prompt
    page.click("#clear")
    page.reload()
    assert page.locator(".message").count() == 0
    assert page.locator("#empty").is_visible()


def test_regenerate_and_edit_replace_what_followed(server: Server, open_page: Any) -> None:
    texts = iter(["one", "two", "three", "four"])
    server.engine.script = lambda request: Script([next(texts)])
    page = open_page(server.url)
    ask(page, QUESTION)
    ask(page, "Second?")
    page.click(".last .regenerate")
    answered(page)
    assert answers(page) == ["one", "three"]
    assert page.locator(".regenerate:visible").count() == 1
    page.click(".user.last .edit")
    assert page.input_value("#prompt") == "Second?"
    page.press("#prompt", "Escape")
    assert page.input_value("#prompt") == ""
    assert answers(page) == ["one", "three"]
    page.click(".user.last .edit")
    ask(page, "Third?")
    assert answers(page) == ["one", "four"]
    assert page.locator(".user .text").all_inner_texts() == [QUESTION, "Third?"]


def test_tokens_show_their_probabilities_and_alternatives(server: Server, open_page: Any) -> None:
    page = open_page(server.url)
    ask(page, QUESTION)
    page.click("button:text-is('Tokens')")
    tokens = page.locator(".token-list .token")
    assert "".join(tokens.all_text_contents()) == "Hello world"
    assert {"p1"} == set(
        re.findall(r"p\d", str(tokens.evaluate_all("all => all.map((one) => one.className)")))
    )
    tokens.nth(1).hover()
    assert page.locator(".token-detail caption").inner_text() == "Token 2"
    page.locator(".token-list").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    rows = page.locator(".token-detail tbody tr")
    assert page.locator(".token-detail caption").inner_text() == "Token 10"
    assert rows.count() == 5
    # The fake engine's are exp(-0.5), exp(-2), ... and an impossible one.
    assert re.sub(r"\s+", " ", rows.nth(0).inner_text()).startswith("l (chosen) 61 %")
    assert "14 %" in rows.nth(1).inner_text()
    assert "< 0.1 %" in rows.nth(4).inner_text()
    assert nameless(page) == []
    page.click("button:text-is('Tokens')")
    assert answers(page) == ["Hello world"]


def test_thinking_is_folded_away(server: Server, open_page: Any) -> None:
    page = open_page(server.url)
    chunks = sse({"role": "assistant", "content": ""}, {"reasoning_content": "hm, <b>"}, {"content": "So."})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**chunks))
    ask(page, QUESTION)
    assert page.locator(".thinking").get_attribute("open") is None
    page.click(".thinking summary")
    assert page.locator(".thinking .text").inner_text() == "hm, <b>"
    assert answers(page) == ["So."]


def test_errors_are_the_servers_words(server: Server, open_page: Any) -> None:
    page = open_page(server.url, refused=True)
    page.fill("#temperature", "3")
    ask(page, QUESTION)
    error = page.locator(".answer .error")
    assert "temperature must be" in error.inner_text()
    assert page.locator("#temperature").get_attribute("aria-invalid") == "true"
    page.fill("#temperature", "")
    server.engine.capacity = 0
    page.click(".regenerate:visible")
    answered(page)
    assert "queue is full" in error.inner_text()
    assert "Try again in 3 s." in error.inner_text()
    assert page.locator("[aria-invalid]").count() == 0
    server.engine.capacity = None
    server.engine.script = lambda request: Script(["Half"], finish="error", error="The step failed.")
    page.click(".regenerate:visible")
    answered(page)
    assert "The step failed." in error.inner_text()
    page.wait_for_selector("#connection[data-kind=ready]")
    assert page.locator("#connection-text").inner_text() == "ready", "the server was there all the time"
    server.engine.script = lambda request: Script()
    page.click(".regenerate:visible")
    answered(page)
    assert answers(page) == ["Hello world"]
    assert error.is_hidden()


def test_a_stream_that_breaks_is_told(server: Server, open_page: Any) -> None:
    page = open_page(server.url)
    broken = {
        **sse({"content": "Hal"}),
        "body": sse({"content": "Hal"})["body"].replace("data: [DONE]\n\n", ""),
    }
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**broken))
    ask(page, QUESTION)
    assert answers(page) == ["Hal"]
    assert "before the answer was complete" in page.locator(".error").inner_text()


def test_an_engine_that_restarts_is_waited_for(server: Server, open_page: Any) -> None:
    server.engine.state = "restarting"
    page = open_page(server.url, ready=False, refused=True)
    page.wait_for_selector("#connection[data-kind=wait]")
    assert "restarting" in page.locator("#connection-text").inner_text()
    server.engine.state = "ready"
    page.wait_for_selector("#connection[data-kind=ready]")
    assert page.locator("#model-name").inner_text() == MODEL


def test_a_key_is_asked_for_and_stays_in_the_tab(open_page: Any) -> None:
    engine = FakeEngine()
    engine.model_info = fake_info(max_model_len=4096)
    with serving(engine, api_key=KEYS) as guarded:
        page = open_page(guarded.url, ready=False, refused=True)
        page.wait_for_selector("#key-dialog[open]")
        assert "wants an API key" in page.locator("#key-text").inner_text()
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", KEYS[0])
        page.press("#key", "Enter")
        page.wait_for_selector("#connection[data-kind=ready]")
        ask(page, QUESTION)
        assert answers(page) == ["Hello world"]
        page.click("#to-dashboard")
        until(page, "document.getElementById('tile-running').textContent === '0'")
        stored = page.evaluate("[JSON.stringify(localStorage), document.cookie, location.href]")
        assert KEYS[0] not in str(stored)
        assert KEYS[0] in page.evaluate("JSON.stringify(sessionStorage)")


def test_under_a_path_prefix(open_page: Any) -> None:
    with serving(FakeEngine(), root_path="/llm") as prefixed:
        page = open_page(f"{prefixed.url}/llm")
        assert page.url == f"{prefixed.url}/llm/"
        ask(page, "Hi")
        assert answers(page) == ["Hello world"]


# --- keyboard and screen reader ----------------------------------------------------------------------------


def tab_to(page: Any, id: str) -> list[str]:
    """Press Tab until the focus is on `id`; what it passed. Each stop must be visible."""
    passed: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        at = probe(page, "focus")
        if at["tag"] == "BODY":
            continue
        assert at["visible"], at
        passed.append(at["id"] or at["text"])
        if at["id"] == id:
            return passed
    raise AssertionError(f"never came to {id}: {passed}")


def test_a_conversation_with_the_keyboard_alone(server: Server, open_page: Any) -> None:
    server.engine.script = lambda request: Script(["Hel", "lo"], hold_at=1)
    page = open_page(server.url)
    passed = tab_to(page, "prompt")
    assert passed[:4] == ["skip", "to-chat", "to-dashboard", "API"]
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:not([hidden])")
    until(page, "document.querySelector('.answer > .text').textContent === 'Hel'")
    page.keyboard.press("Enter")  # nothing to send; does not disturb
    page.keyboard.press("Escape")
    answered(page)
    wait_until(lambda: server.engine.ends() == ["abort"])
    assert page.locator(".user .text").inner_text() == "First\nline"
    assert probe(page, "focus")["id"] == "prompt"
    server.engine.script = lambda request: Script(["Fine"])
    page.keyboard.type("Again")
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelectorAll('.answer').length === 2")
    answered(page)
    assert answers(page) == ["Hel", "Fine"]
    tab_to(page, "to-dashboard")
    page.keyboard.press("Enter")
    page.wait_for_selector("#dashboard:not([hidden])")


def test_a_screen_reader_hears_answers_not_tokens(server: Server, open_page: Any) -> None:
    server.engine.script = lambda request: Script(["Hel", "lo", " you"], hold_at=2)
    page = open_page(server.url)
    page.evaluate(
        "window.heard = []; new MutationObserver(() => heard.push(document.getElementById('announcer')"
        ".textContent)).observe(document.getElementById('announcer'), {childList: true, characterData: true})"
    )
    ask(page, QUESTION, wait=False)
    until(page, "document.querySelector('.answer > .text').textContent === 'Hello'")
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    server.engine.release.set()
    answered(page)
    assert page.evaluate("heard") == ["Answering.", "Answer: Hello you"]
    assert page.locator("#log").get_attribute("aria-live") == "off"
    assert nameless(page) == []
