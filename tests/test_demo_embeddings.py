"""Embeddings of the demo model: over HTTP, offline, alone and together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from demo_model import demo_path

from gqa_serve import LLM, SamplingParams
from gqa_serve.errors import RequestError

if TYPE_CHECKING:
    from demo_server import RunningServer

TEXTS = ["A cat sleeps on the sofa.", "Ein Kätzchen schläft.", "Interest rates rose " * 20, "42"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    demo_path()
    return LLM("demo", backend="reference", quantization="none", kv_cache_memory="16MiB", progress=False)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_server_says_what_the_library_says(demo_server: RunningServer, llm: LLM, pooling: Any) -> None:
    with demo_server.client() as client:
        answer = client.embeddings.create(model="demo", input=TEXTS, extra_body={"pooling": pooling})
    offline = llm.embed(TEXTS, pooling=pooling)
    assert len(answer.data) == len(offline) == len(TEXTS)
    assert answer.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in offline)
    for served, output in zip(answer.data, offline, strict=True):
        assert np.linalg.norm(served.embedding) == pytest.approx(1, abs=1e-6)
        assert np.dot(served.embedding, output.embedding) == pytest.approx(1, abs=1e-5)


def test_an_embedding_has_the_same_bits_alone_and_in_company(demo_server: RunningServer) -> None:
    with demo_server.client() as client:

        def embed(texts: list[str], pooling: str) -> list[list[float]]:
            extra = {"pooling": pooling}
            answer = client.embeddings.create(model="demo", input=texts, extra_body=extra)
            return [item.embedding for item in answer.data]

        for pooling in ("last", "mean"):
            together = embed(TEXTS * 3, pooling)
            assert together == [embed([text], pooling)[0] for text in TEXTS] * 3


def test_dimensions_and_what_is_refused(llm: LLM) -> None:
    (whole,) = llm.embed("a b c")
    (cut,) = llm.embed([5, 6], dimensions=8)
    assert whole.embedding.shape == (llm.engine.info.hidden_size,)
    assert (whole.prompt, cut.prompt, cut.prompt_token_ids) == ("a b c", None, [5, 6])
    assert cut.embedding.shape == (8,)
    assert cut.embedding.dtype == np.float32
    for prompts, options in (
        ("a", {"pooling": "max"}),
        ("a", {"dimensions": 0}),
        ("a", {"dimensions": 10**6}),
        ("", {}),
        ([[1], []], {}),
        ([1.5], {}),
        ([[1] * 10**4], {}),
        ([10**9], {}),
    ):
        with pytest.raises(RequestError):
            llm.embed(prompts, **options)  # type: ignore[arg-type]
        assert not llm.engine.has_work
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].outputs[0].token_ids
