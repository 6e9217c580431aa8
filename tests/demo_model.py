"""The demo model twice: as transformers loads and runs it (the oracle), and in our engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gqa_serve.config import EngineConfig
from gqa_serve.engine.core import Engine
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.errors import ModelError


def demo_path() -> Path:
    """The GGUF file; skips the test where the package with the weights is not installed."""
    try:
        return resolve_model("demo")
    except ModelError as error:
        pytest.skip(str(error))


def oracle(path: Path) -> Any:
    """transformers' own reading of the GGUF file, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def oracle_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation by transformers' `generate`, end-of-sequence ignored."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()


def demo_engine(path: Path, runner: ModelRunner | None = None, **settings: Any) -> Engine:
    """The reference backend over the demo model, in float32, unless `settings` say otherwise.

    Pass another engine's runner to share its weights and cache size.
    """
    config = EngineConfig(
        model="demo", **{"dtype": "float32", "backend": "reference", "kv_cache_memory": 2**28, **settings}
    )
    return Engine(runner or ModelRunner(path, config), config)
