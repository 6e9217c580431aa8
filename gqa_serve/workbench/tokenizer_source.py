"""A tokenizer by name: `demo`, a directory, a GGUF file or a hub id, without the model's weights.

Owns how the tools find one. Imports no torch. Invariant: nothing but tokenizer files is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gqa_serve.errors import HubError

if TYPE_CHECKING:
    from gqa_serve.engine.tokenizer import Tokenizer


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer. Raises ModelError, HubError."""
    from gqa_serve.engine.tokenizer import load_tokenizer
    from gqa_serve.engine.weights.hub import DEMO, resolve_model

    local = Path(name).expanduser()
    if name == DEMO:
        return load_tokenizer(resolve_model(name))
    if local.exists():
        return load_tokenizer(local.parent if local.suffix == ".json" else local)
    return load_tokenizer(_download(name))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from gqa_serve.engine.weights.hub import SMALL_FILES

    try:
        return Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
    except (OSError, HFValidationError) as error:  # hub errors are OSErrors: no network, no model
        raise HubError(
            f"Could not get the tokenizer of {name}: {str(error).splitlines()[0]} Give --tokenizer a "
            "directory, a GGUF file, or a hub id."
        ) from error
