"""The state of a run on disk: written whole or not at all, the last few kept.

    state/step-00000400/   masters.safetensors    trained parameters, float32
                           optimizer.safetensors  AdamW's moments and step counts
                           state.json             step, sequences used, losses so far

Owns the files. Knows no training: tensors and facts come in and go out. The order of the data and the
learning rate are functions of the step, so nothing random needs to be kept.
Invariant: a folder named step-N was renamed to that after all its files had reached the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_serve.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

_STEP = re.compile(r"step-(\d{8})")
_MASTERS, _OPTIMIZER, _FACTS = "masters.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """What a run goes on from: after `step` steps."""

    step: int
    masters: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


class StateFolder:
    """The states of one run. `keep`: how many are left when a new one has been written."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep

    def steps(self) -> list[int]:
        """Of the states that are there, ascending."""
        if not self.path.is_dir():
            return []
        matches = [_STEP.fullmatch(entry.name) for entry in self.path.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def save(self, state: State) -> Path:
        """Write it and drop the oldest. Raises ConfigError if the disk refuses, with nothing left of it."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        target = self.folder(state.step)
        partial = self.path / "partial"  # one name for all steps: what a kill left behind goes with the next
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(dict(state.masters), partial / _MASTERS)
            save_file(dict(state.optimizer), partial / _OPTIMIZER)
            facts = json.dumps({"step": state.step, **state.facts})
            (partial / _FACTS).write_text(facts, encoding="utf-8")
            for file in (*partial.iterdir(), partial):
                sync(file)
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
            sync(self.path)
        except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
            shutil.rmtree(partial, ignore_errors=True)
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"The state of step {state.step} could not be written to {self.path} ({reason}); "
                "free space and run the same command again, which goes on from the last state."
            ) from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder(old))
        return target

    def load(self) -> State | None:
        """The newest, None if there is none. Raises ModelError if it is damaged."""
        steps = self.steps()
        if not steps:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = self.folder(steps[-1])
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            return State(steps[-1], load_file(folder / _MASTERS), load_file(folder / _OPTIMIZER), facts)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"{folder} is damaged ({error}); delete it to go on from the state before, or use --restart."
            ) from error

    def clear(self) -> None:
        """Remove all states."""
        shutil.rmtree(self.path, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's or folder's contents are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
