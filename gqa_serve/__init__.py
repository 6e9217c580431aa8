"""gqa-serve: an inference server for grouped-query attention models.

The public names are loaded on first use, so that `import gqa_serve` (and with it `gqa-serve --help`)
costs no torch import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from gqa_serve.config import EngineConfig
    from gqa_serve.engine.llm import LLM
    from gqa_serve.engine.request import SamplingParams

_HOMES = {
    "LLM": "gqa_serve.engine.llm",
    "EngineConfig": "gqa_serve.config",
    "SamplingParams": "gqa_serve.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gqa_serve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
