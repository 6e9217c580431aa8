"""A run from beginning to end: prepare, go on where the last state is, train, write the checkpoint.

    OUTPUT/config.json, model.safetensors, tokenizer...   the result, an ordinary checkpoint
    OUTPUT/uptrain/run.json                               the flags, and what the run found before it began
    OUTPUT/uptrain/log.jsonl                              a line per step
    OUTPUT/uptrain/text/, held_out/                       tokens
    OUTPUT/uptrain/state/                                 what a killed run goes on from
    OUTPUT/uptrain/start/                                 from scratch: the model before its first step

Owns these files and the order of things. Knows no arithmetic of training.
Invariant: the result depends on the flags and the texts alone, not on how often the run was interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.engine.weights.safetensors import DirectoryCheckpoint
from gqa_serve.engine.weights.safetensors_writer import FULL_DISK
from gqa_serve.errors import ConfigError, ModelError
from gqa_serve.workbench.report import Report, write_text
from gqa_serve.workbench.uptrain.budget import Budget, Parameters, write_count
from gqa_serve.workbench.uptrain.compute import Machine
from gqa_serve.workbench.uptrain.corpus import PackedSequence, documents, find_texts
from gqa_serve.workbench.uptrain.defaults import choose_budget, choose_num_steps, choose_seq_len
from gqa_serve.workbench.uptrain.folder_lock import alone, clear
from gqa_serve.workbench.uptrain.journal import Display, Journal, read_journal
from gqa_serve.workbench.uptrain.model import TrainableModel
from gqa_serve.workbench.uptrain.options import Options
from gqa_serve.workbench.uptrain.output import layout_of, write_checkpoint
from gqa_serve.workbench.uptrain.preparation import (
    check_vocabulary,
    held_sequences,
    load_teacher,
    open_trainable,
    order_of,
    read_texts,
    start_of,
    trainer_settings,
)
from gqa_serve.workbench.uptrain.results import summarize
from gqa_serve.workbench.uptrain.state import State, StateFolder
from gqa_serve.workbench.uptrain.trainer import NonFiniteError, Trainer

_REPEATS_WARNED = 4.0


def uptrain(options: Options, command: str) -> Report:
    """Train to the end and write the result; a report of how it went. Raises ConfigError, ModelError."""
    if options.output is None:
        raise ValueError("an output is needed")
    folder = options.output / "uptrain"
    _claim(options, options.output)
    with alone(folder):
        _begin(options, folder)
        try:
            session = Session.prepare(options, folder)
            if not session.is_done:
                session.train()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "The GPU does not have the memory; give --recompute or a smaller --micro-batch-size "
                "(--budget-only tells the need), or train less of the model with --train kv."
            ) from error
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise ConfigError(
                f"The disk of {options.output} is full ({error.strerror}); free space and run the same "
                "command again, which goes on from the last state."
            ) from error
        return summarize(session.facts(), read_journal(folder / "log.jsonl"), command)


def _claim(options: Options, output: Path) -> None:
    """Make `output`, or see that what is there is of a run."""
    for source in (options.model, options.teacher, options.tokenizer):
        if source is not None and Path(source).expanduser().resolve() == output.resolve():
            raise ConfigError("--output is the folder of a model that is read; give another.")
    begun = (output / "uptrain" / "run.json").exists()
    if not begun and output.is_dir() and any(entry.name != "uptrain" for entry in output.iterdir()):
        raise ConfigError(f"{output} is not empty and not of a run; give a new folder.")
    try:
        (output / "uptrain").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output} can't be made ({error.strerror}); give another --output.") from error


def _begin(options: Options, folder: Path) -> None:
    """Check that `folder` is new or of the same run, and note the flags."""
    file = folder / "run.json"
    flags = options.identity()
    begun = file.exists()
    if begun and options.restart:
        clear(folder)
    elif begun:
        before = json.loads(file.read_text(encoding="utf-8"))["flags"]
        changed = [name for name in flags if flags[name] != before.get(name)]
        if changed:
            said = ", ".join(f"--{name.replace('_', '-')} was {before.get(name)}" for name in changed)
            raise ConfigError(
                f"{options.output} holds a run with other flags ({said}); give those to go on, another "
                "--output, or --restart to begin again."
            )
        return
    write_text(file, json.dumps({"flags": flags}, indent=1) + "\n")


@dataclass
class Session:
    """A prepared run. `source`: the checkpoint it began from; `known`: what run.json has."""

    options: Options
    folder: Path
    source: DirectoryCheckpoint
    trainer: Trainer
    held_out: list[PackedSequence]
    budget: Budget
    num_steps: int
    machine: Machine
    states: StateFolder
    known: dict[str, Any]

    @classmethod
    def prepare(cls, options: Options, folder: Path) -> Session:
        """Read model, teacher and text."""
        machine = Machine.choose(options)
        files = find_texts(options.text, outside=options.output)
        start = start_of(options, folder, files)
        source = open_trainable(start)
        config = ModelConfig.from_hf(source.raw_config, source.generation_config)
        tokenizer = load_tokenizer(start)
        check_vocabulary(tokenizer, config)
        seq_len = choose_seq_len(options, config)
        text, held_text = read_texts(options, folder, files, tokenizer)
        order = order_of(options, text, held_text, seq_len)
        if held_text is None:
            held_out = [text.sequence(i, seq_len) for i in order.held_out]
        else:
            held_out = [held_text.sequence(i, seq_len) for i in held_sequences(held_text, seq_len)]
        budget = choose_budget(options, Parameters.of(config, options.train))
        num_steps = choose_num_steps(options, budget, seq_len)
        model = TrainableModel(
            source, config, trained=options.train, device=machine.device, recompute=options.recompute
        )
        teacher = None
        if options.teacher is not None:
            sample, _ = next(documents(files[0]), ("", True))
            teacher = load_teacher(
                options.teacher, tokenizer, config, machine, sample, offline=options.offline
            )
        layout_of(model, source, options.save_dtype)  # raises before the work what would fail after it
        settings = trainer_settings(options, config, machine, num_steps)
        trainer = Trainer(model, teacher, text, order, settings)
        states = StateFolder(folder / "state", options.keep)
        known = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        session = cls(options, folder, source, trainer, held_out, budget, num_steps, machine, states, known)
        session._note(text=[text.identity] + ([] if held_text is None else [held_text.identity]))
        if options.from_config is not None:
            session._note(config=options.from_config.read_text(encoding="utf-8"))
        session._note(model=model.fingerprint())
        if teacher is not None:
            session._note(teacher=teacher.fingerprint())
        return session

    @property
    def is_done(self) -> bool:
        return bool(self.known.get("done"))

    def _note(self, **facts: Any) -> None:
        """Keep facts in run.json; those that are there must be the same."""
        for name, value in facts.items():
            if self.known.setdefault(name, value) != value:
                raise ConfigError(
                    f"The {name} is not that of the run in {self.options.output}; give the same, another "
                    "--output, or --restart."
                )
        partial = self.folder / "run.partial"
        write_text(partial, json.dumps(self.known, indent=1) + "\n")
        os.replace(partial, self.folder / "run.json")

    # --- training ---

    def train(self) -> None:
        """From the last state to the end, then write the result."""
        done, used_s = self._resume()
        settings = self.trainer.settings
        display = Display(self.num_steps, settings.batch_size * settings.seq_len, done)
        journal = Journal(self.folder / "log.jsonl", done)
        try:
            self._announce(display, done)
            if self.held_out and "loss_before" not in self.known:
                self._measure_before(display)
            self._loop(display, journal, done, used_s)
        finally:
            display.close()
            journal.close()
        self._write_result()

    def _resume(self) -> tuple[int, float]:
        """(steps done, seconds they took) of the last state, which is loaded; (0, 0) if there is none."""
        state = self.states.load()
        if state is None:
            return 0, 0.0
        self.trainer.model.load_masters(state.masters)
        self.trainer.load_optimizer(state.optimizer)
        return state.step, float(state.facts["seconds"])

    def _announce(self, display: Display, done: int) -> None:
        order, settings = self.trainer.order, self.trainer.settings
        tokens = self.num_steps * settings.batch_size * settings.seq_len
        text_tokens = len(order.trained) * settings.seq_len
        repeats = tokens / text_tokens
        display.say(f"Budget: {write_count(self.budget.num_tokens)} tokens ({self.budget.source}).")
        display.say(
            f"{self.num_steps} steps of {settings.batch_size} x {settings.seq_len} tokens; the text has "
            f"{write_count(text_tokens)} and is read {repeats:.2g} times; {self.machine}."
        )
        if repeats > _REPEATS_WARNED:
            display.say(
                "Text that is repeated more than about 4 times teaches little (Muennighoff et al. 2023, "
                "arXiv 2305.16264): more text would serve better."
            )
        if done:
            display.say(f"Going on after step {done}.")

    def _measure_before(self, display: Display) -> None:
        """The losses that the end is compared with."""
        before = self.trainer.validate(self.trainer.model, self.held_out)
        facts = {"loss_before": before}
        if self.trainer.teacher is not None:
            facts["teacher_loss"] = self.trainer.validate(self.trainer.teacher, self.held_out)
        self._note(**{name: round(value, 6) for name, value in facts.items()})
        display.validated(before)
        display.say(
            f"Validation loss before: {before:.4f}"
            + (f"; of the teacher: {facts['teacher_loss']:.4f}" if "teacher_loss" in facts else "")
        )

    def _loop(self, display: Display, journal: Journal, done: int, used_s: float) -> None:
        settings = self.trainer.settings
        every = self.options.validate_steps or max(1, self.num_steps // 10)
        began = time.monotonic()
        saved_at = began
        with _Stop() as stop:
            for index in range(done, self.num_steps):
                try:
                    result = self.trainer.step(index)
                except NonFiniteError as error:
                    raise self._not_finite(error) from error
                step, last = index + 1, index + 1 == self.num_steps
                validation = None
                if self.held_out and (step % every == 0 or last):
                    validation = self.trainer.validate(self.trainer.model, self.held_out)
                    display.validated(validation)
                seconds = used_s + time.monotonic() - began
                journal.write(
                    {
                        "step": step,
                        "tokens": step * settings.batch_size * settings.seq_len,
                        "loss": result.loss,
                        "cross_entropy": result.cross_entropy,
                        "divergence": result.divergence,
                        "validation_loss": validation,
                        "learning_rate": result.learning_rate,
                        "gradient_norm": result.gradient_norm,
                        "seconds": round(seconds, 3),
                    }
                )
                display.step(step, result.loss)
                due = self.options.save_steps is not None and step % self.options.save_steps == 0
                late = time.monotonic() - saved_at >= 60 * self.options.save_minutes
                if due or late or last or stop.asked:
                    self._save(step, seconds)
                    saved_at = time.monotonic()
                if stop.asked and not last:
                    display.say(f"Stopped after step {step}; the same command goes on from there.")
                    raise KeyboardInterrupt

    def _save(self, step: int, seconds: float) -> None:
        masters = self.trainer.model.masters()
        self.states.save(State(step, masters, self.trainer.optimizer_tensors(), {"seconds": seconds}))

    def _not_finite(self, error: NonFiniteError) -> ModelError:
        steps = self.states.steps()
        kept = f"the state of step {steps[-1]} is kept in {self.states.folder(steps[-1])}" if steps else (
            "no state was saved yet"
        )  # fmt: skip
        lower = self.trainer.settings.schedule.peak / 3
        cure = f"begin again with --restart --learning-rate {lower:.2g}"
        if self.trainer.settings.compute_dtype != torch.float32:
            cure += ", or with --dtype float32"
        return ModelError(
            f"Training broke down at {error}; {kept}. The model's numbers are too large: {cure}."
        )

    def _write_result(self) -> None:
        if self.options.output is None:
            raise ValueError("an output is needed")
        write_checkpoint(self.options.output, self.trainer.model, self.source, self.options.save_dtype)
        self._note(done=True)
        self.states.clear()

    def facts(self) -> dict[str, Any]:
        """What the report tells beside the log."""
        settings, model = self.trainer.settings, self.trainer.model
        return {
            "output": str(self.options.output),
            "parameters": model.num_parameters,
            "trained_parameters": sum(piece.parameter.numel() for piece in model.trained_pieces()),
            "num_heads": model.config.num_heads,
            "num_kv_heads": model.config.num_kv_heads,
            "budget_tokens": self.budget.num_tokens,
            "budget_source": self.budget.source,
            "steps": self.num_steps,
            "batch_size": settings.batch_size,
            "seq_len": settings.seq_len,
            "held_out_tokens": len(self.held_out) * settings.seq_len,
            "machine": str(self.machine),
            "loss_before": self.known.get("loss_before"),
            "teacher_loss": self.known.get("teacher_loss"),
            "seed": self.options.seed,
        }


class _Stop:
    """SIGINT and SIGTERM ask for a stop at the end of the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread, which alone may: then a signal does what it did
                break
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
