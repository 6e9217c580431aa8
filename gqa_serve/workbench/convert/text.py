"""The text that conversions are fitted on and judged by, as windows of tokens.

Owns where it comes from and which windows are held out. Knows no model.
Invariant: the windows that judge a fit are not among those it was made on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.evaluate.text import builtin_documents

if TYPE_CHECKING:
    from gqa_serve.engine.tokenizer import Tokenizer
    from gqa_serve.workbench.convert.forward import CalibrationText

_HELD_OUT = 4  # one window of so many


def read_text(file: Path | None, tokenizer: Tokenizer, length: int, max_tokens: int) -> CalibrationText:
    """Windows of `length` tokens, evenly over the text, at most `max_tokens` in all.

    Each begins as the model's texts do, with its beginning-of-sequence token if it has one. `file` None:
    short passages of our own. Every fourth window is held out; they come last. Raises ConfigError for a file
    that cannot be read or is too short.
    """
    import torch

    from gqa_serve.workbench.convert.forward import CalibrationText

    if file is None:
        text, name = "\n\n".join(document.text for document in builtin_documents()), "built-in passages"
    else:
        text, name = _read(file), str(file)
    beginning = tokenizer.encode("")[:1]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    step = length - len(beginning)
    starts = range(0, len(tokens) - step + 1, step)
    if len(starts) < 2:
        raise ConfigError(
            f"{name} has {len(tokens)} tokens, and two windows of {length} are needed; give a longer "
            "--calibration text, or a smaller --window."
        )
    count = max(2, min(len(starts), max_tokens // length))
    chosen = [starts[index * len(starts) // count] for index in range(count)]
    windows = [beginning + tokens[start : start + step] for start in chosen]
    held = [window for index, window in enumerate(windows) if index % _HELD_OUT == 1]
    fitted = [window for index, window in enumerate(windows) if index % _HELD_OUT != 1]
    return CalibrationText(torch.tensor(fitted + held), len(fitted), name)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--calibration {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibration {file} is not UTF-8 text; convert it.") from error
