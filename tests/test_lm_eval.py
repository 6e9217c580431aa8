"""lm-evaluation-harness against a running server: its log-likelihoods are the model's, its texts greedy."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gqa_serve import LLM, SamplingParams

if TYPE_CHECKING:
    from demo_server import RunningServer

TASKS = Path(__file__).parent / "data" / "lm_eval"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'lm-eval[api]'"
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The same exact weights through the other backend, and through no server."""
    return LLM("demo", backend="reference", quantization="none", kv_cache_memory="16MiB", progress=False)


@pytest.fixture(scope="module")
def harness(demo_server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness says of both tasks. The tokenizer it finds at the server: nobody names another."""
    environment = {
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).parent / "lm_eval_run.py")),
            *(f"{demo_server.url}/v1/completions", str(TASKS)),
            json.dumps({"model": "demo", "num_concurrent": 4}),
        ],
        env={**os.environ, **environment},
        cwd=TASKS,  # where the tasks' data is
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def test_loglikelihoods_are_the_model_s(harness: dict[str, Any], llm: LLM) -> None:
    pairs = [
        (context, continuation, answer)
        for arguments, answers in harness["samples"]["capitals"]
        for (context, continuation), answer in zip(arguments, answers, strict=True)
    ]
    assert len(pairs) == 15
    encode = llm.tokenizer.encode
    wholes = [encode(context + continuation) for context, continuation, _ in pairs]
    scored = llm.generate(wholes, SamplingParams(max_tokens=0, prompt_logprobs=0))
    greedy = 0
    for (context, _, (loglikelihood, is_greedy)), output in zip(pairs, scored, strict=True):
        assert output.prompt_logprobs is not None
        entries = [entry for entry in output.prompt_logprobs[len(encode(context)) :] if entry is not None]
        assert entries
        assert loglikelihood == pytest.approx(sum(entry.logprob for entry in entries), abs=1e-3)
        assert is_greedy == all(entry.rank == 1 for entry in entries)
        greedy += is_greedy
    assert 0 < greedy < 15
    assert harness["scores"]["capitals"] == {"acc,none": 1.0}


def test_texts_are_greedy_up_to_the_stop_string(harness: dict[str, Any], llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, stop=[".", "\n"])
    samples = harness["samples"]["capitals_written"]
    outputs = llm.generate([arguments[0][0] for arguments, _ in samples], params)
    wanted = [output.outputs[0].text.strip() for output in outputs]
    assert [answers[0] for _, answers in samples] == wanted
    assert harness["scores"]["capitals_written"] == {"exact_match,trimmed": 0.6}
