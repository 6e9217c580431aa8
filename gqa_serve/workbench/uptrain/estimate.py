"""What a run would take, before it runs: tokens, steps, memory, and with --dry-run the time, measured.

Owns the two answers that train nothing. Writes no file.
Invariant: `--budget-only` reads a config and no weights, and needs no torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.model_source import read_model
from gqa_serve.workbench.report import Cell, Column, Report, Table, number
from gqa_serve.workbench.uptrain.budget import (
    Budget,
    Memory,
    Parameters,
    training_flops_per_token,
    write_count,
)
from gqa_serve.workbench.uptrain.defaults import (
    choose_budget,
    choose_micro_batch,
    choose_num_steps,
    choose_seq_len,
)
from gqa_serve.workbench.uptrain.options import Options

if TYPE_CHECKING:
    from gqa_serve.workbench.uptrain.compute import Machine


@dataclass(frozen=True)
class _Plan:
    """A run's sizes."""

    config: ModelConfig
    parameters: Parameters
    budget: Budget
    seq_len: int
    num_steps: int
    num_tokens: int
    flops: float
    teacher: Parameters | None


def report(options: Options, command: str) -> Report:
    """The budget, and what it takes. With `options.dry_run` the model is loaded and two steps are timed."""
    name = str(options.from_config) if options.model is None else options.model
    source = read_model(name, revision=options.revision, offline=options.offline)
    plan = _plan(options, source.config)
    machine = step_s = None
    if options.dry_run:
        from gqa_serve.workbench.uptrain.compute import Machine

        machine = Machine.choose(options)
        step_s = _measure(options, plan, machine)
    number_bytes = 4
    if options.dtype == "bfloat16" or (machine is not None and machine.compute_dtype.itemsize == 2):
        number_bytes = 2
    memory = Memory.of(
        plan.config,
        plan.parameters,
        micro_tokens=choose_micro_batch(options, plan.seq_len) * plan.seq_len,
        number_bytes=number_bytes,
        recompute=options.recompute,
        teacher=plan.teacher,
    )
    shown = Report("uptrain", f"Budget of uptraining {name}", command)
    shown.sections = [_budget_table(options, plan, step_s), _memory_table(memory, machine)]
    if machine is not None:
        shown.sections.append(f"Measured on: {machine}.")
    elif options.device in ("auto", "cpu"):
        shown.sections.append(_bound(plan))
    shown.data = {
        "tokens": plan.num_tokens,
        "steps": plan.num_steps,
        "parameters": plan.parameters.total,
        "flops": plan.flops,
        "memory_bytes": memory.total,
        "step_seconds": step_s,
    }
    return shown


def _plan(options: Options, config: ModelConfig) -> _Plan:
    parameters = Parameters.of(config, options.train)
    budget = choose_budget(options, parameters)
    seq_len = choose_seq_len(options, config)
    num_steps = choose_num_steps(options, budget, seq_len)
    num_tokens = num_steps * options.batch_size * seq_len
    taught = None
    if options.teacher is not None:
        taught = read_model(options.teacher, offline=options.offline).config
    teacher = None if taught is None else Parameters.of(taught, "all")
    flops = num_tokens * training_flops_per_token(config, parameters, seq_len, teacher=teacher)
    return _Plan(config, parameters, budget, seq_len, num_steps, num_tokens, flops, teacher)


def _budget_table(options: Options, plan: _Plan, step_s: float | None) -> Table:
    rows: list[dict[str, Cell]] = [
        {"what": "parameters", "value": write_count(plan.parameters.total)},
        {"what": "of these trained", "value": write_count(plan.parameters.trained)},
        {"what": "budget (tokens)", "value": write_count(plan.budget.num_tokens)},
        {"what": "steps", "value": f"{plan.num_steps:,} x {options.batch_size} x {plan.seq_len} tokens"},
        {"what": "arithmetic (operations)", "value": f"{plan.flops:.3g}"},
    ]
    if step_s is not None:
        speed = options.batch_size * plan.seq_len / step_s
        reached = plan.flops / plan.num_steps / step_s
        rows += [
            {"what": "speed (tokens/s)", "value": f"{speed:,.0f}"},
            {"what": "arithmetic reached (operations/s)", "value": f"{reached:.3g}"},
            {"what": "one step (s)", "value": f"{step_s:.3g}"},
            {"what": "all steps", "value": _time(step_s * plan.num_steps)},
        ]
    return Table(
        "Budget", [Column("what", ""), Column("value", "value")], rows, note=f"Tokens: {plan.budget.source}."
    )


def _memory_table(memory: Memory, machine: Machine | None) -> Table:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations and logits, roughly": memory.activations,
        "together": memory.total,
    }
    if machine is not None:
        parts["free now"] = machine.free_bytes
    rows: list[dict[str, Cell]] = [{"part": name, "mib": size / 2**20} for name, size in parts.items()]
    return Table("Memory", [Column("part", ""), Column("mib", "MiB", number(0))], rows)


def _bound(plan: _Plan) -> str:
    """How long this CPU would multiply if it did nothing else."""
    from gqa_serve.workbench.machine import measure_machine

    cpu = measure_machine()
    return (
        f"On {cpu.name} at least {_time(plan.flops / cpu.bf16_flops)}: the products alone, at its "
        "peak rate. --dry-run measures two steps."
    )


def _measure(options: Options, plan: _Plan, machine: Machine) -> float:
    """Seconds of a step, the second of two. The model is thrown away."""
    from gqa_serve.workbench.uptrain.rehearsal import rehearse

    trainer = rehearse(options, plan.config, plan.seq_len, plan.num_steps, machine)
    seconds = 0.0
    for index in range(2):
        began = time.perf_counter()
        trainer.step(index)  # ends with the gradient's norm on the host, so it waits for the device
        seconds = time.perf_counter() - began
    return seconds


def _time(seconds: float) -> str:
    """In the unit that fits."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
