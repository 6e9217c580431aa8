"""What a new checkpoint takes over from the one it is made of: small files, and config.json.

Owns which files these are (tokenizer, templates, licence). Imports no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gqa_serve.engine.weights.hub import SMALL_FILES

_LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*processor_config.json")
CONFIG = "config.json"
GENERATION = "generation_config.json"


def copy_small_files(source: Path, target: Path, *, but: Collection[str] = (CONFIG,)) -> None:
    """Of the folder `source` into `target`, except files named in `but`. May raise OSError."""
    for pattern in (*SMALL_FILES, *_LICENSES):
        for file in sorted(source.glob(pattern)):
            if not file.is_file() or file.name in but:
                continue
            copied = target / file.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)


def set_dtype(raw: dict[str, Any], dtype: str) -> None:
    """In a config.json, under the name in use, here and in the text part of a multimodal model."""
    raw["torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"] = dtype
    inner = raw.get("text_config")
    if isinstance(inner, dict):
        for key in ("dtype", "torch_dtype"):
            if key in inner:
                inner[key] = dtype
