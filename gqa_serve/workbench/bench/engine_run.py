"""One run of `bench engine`, from settings to a report.

Owns the order: what fits is chosen, the model loaded, the machine's limits measured before and after, cases
run, a trace replayed, tables made. Knows no words of a command line beyond its parsed flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence

from gqa_serve.config import EngineConfig
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.model_runner import choose_device, free_memory
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.case_progress import CaseProgress
from gqa_serve.workbench.bench.engine_cases import Case, CaseRunner, PrefillCase
from gqa_serve.workbench.bench.engine_command import GRID, PARTS
from gqa_serve.workbench.bench.engine_measure import DEFAULT, FIT, QUICK, CaseResult, Grid, fitting, measure
from gqa_serve.workbench.bench.engine_replay import Replay
from gqa_serve.workbench.bench.engine_report import Variant, describe, kind, sections
from gqa_serve.workbench.bench.limits import Ceiling, Limits
from gqa_serve.workbench.bench.loaded_engine import (
    LoadedEngine,
    load_engine,
    model_path,
    need_memory,
    with_kv_memory,
)
from gqa_serve.workbench.hardware import CPU, GPUS, find_hardware
from gqa_serve.workbench.model_source import ModelSource, group_counts, read_model
from gqa_serve.workbench.records import latency_table, summarize, write_records
from gqa_serve.workbench.report import Report
from gqa_serve.workbench.step_cost import weight_bytes
from gqa_serve.workbench.step_samples import StepSample, write_samples
from gqa_serve.workbench.trace import TraceRequest, read_trace

_MEMORY_SHARE = 0.4  # of what is free, for models that are to be in memory together, and for a KV cache
_DIMENSIONS = {
    "decode": ("batch_size", "context_len"),
    "prefill": ("prompt_len", "num_prompts"),
    "mixed": ("mixed_batch_size", "mixed_prompt_len"),
}


class EngineRun:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace, config: EngineConfig, report: Report) -> None:
        self._args = args
        self._config = config
        self._report = report
        self._progress = CaseProgress()
        self._samples: list[StepSample] = []
        self._variants: list[Variant] = []
        self._results: list[CaseResult] = []
        self._left_out: dict[str, None] = {}
        self._device = choose_device(config.device)
        self._hardware = None if args.hardware is None else find_hardware(args.hardware)
        if self._hardware is not None and self._hardware.is_cpu != (self._device.type == "cpu"):
            raise ConfigError(
                f"--hardware {args.hardware} is not what computes here ({self._device.type}); leave it out, "
                "or choose --device."
            )
        if args.compute_prompts and self._device.type != "cpu":
            raise ConfigError(
                "--compute-prompts takes the prompts of a batch as a single step, for which a GPU lacks the "
                "memory; leave it out."
            )
        only_trace = args.trace is not None and args.only is None and args.steps is None
        self._parts: Sequence[str] = () if only_trace else args.only or PARTS

    def all(self) -> None:
        """Everything that was asked for, into the report and the files."""
        args = self._args
        traffic = None if args.trace is None else read_trace(args.trace)
        if args.num_kv_heads is not None:
            self._compare()
        else:
            model = read_model(
                self._config.model, revision=self._config.revision, offline=self._config.offline
            ).config
            loaded = self._load(model, traffic)
            if self._parts:
                self._measure({_name(loaded.runner.config): loaded})
            if traffic is not None:
                self._replay(loaded, traffic)
        if args.steps is not None:
            write_samples(args.steps, self._samples)
            self._report.sections.append(f"{len(self._samples):,} steps are in {args.steps}.")

    # --- which cases, on what ---

    def _grid(self) -> Grid:
        grid = QUICK if self._args.quick else FIT if self._args.steps is not None else DEFAULT
        given = {field: value for name, field in GRID.items() if (value := getattr(self._args, name))}
        return dataclasses.replace(grid, **given)

    def _cases(self, max_model_len: int, kv_tokens: int) -> list[Case]:
        """Those that fit; what doesn't is left out if nobody asked for it, else refused when it runs."""
        chosen: list[Case] = []
        for part in [part for part in PARTS if part in self._parts]:
            cases = self._grid().cases([part])
            if all(getattr(self._args, name) is None for name in _DIMENSIONS[part]):
                cases, too_large = fitting(
                    cases,
                    max_model_len=max_model_len,
                    kv_tokens=kv_tokens,
                    max_num_seqs=self._config.max_num_seqs,
                )
                self._left_out |= dict.fromkeys(map(str, too_large))
            chosen += cases
        if not chosen:
            raise ConfigError(
                f"No case fits a context of {max_model_len:,} tokens and a KV cache of {kv_tokens:,}; "
                "give a smaller --batch-size, --context-len and --prompt-len, or more --kv-cache-memory."
            )
        return chosen

    def _settings(self, model: ModelConfig, share: float) -> EngineConfig:
        """The user's, with a KV cache that holds the largest case rather than what a server would take."""
        if self._device.type != "cpu" or self._config.kv_cache_memory is not None:
            return self._config
        limit = int(share * free_memory(self._device))
        most = limit // need_memory(model, 1, 0, 0)
        max_model_len = min(model.max_model_len, self._config.max_model_len or model.max_model_len)
        cases = self._cases(max_model_len, most)
        block = self._config.block_size
        need = max(need_memory(model, case.kv_tokens(), block, case.requests() + 16) for case in cases)
        config = with_kv_memory(self._config, min(need, limit))
        if config.max_model_len is None and need <= limit:  # no longer than what is measured, and no warning
            longest = max(case.longest() for case in cases)
            config = dataclasses.replace(config, max_model_len=min(longest, max_model_len))
        return config

    def _load(self, model: ModelConfig, traffic: Sequence[TraceRequest] | None) -> LoadedEngine:
        config = self._config if traffic is not None else self._settings(model, _MEMORY_SHARE)
        fill = bool(self._parts) and not self._args.compute_prompts
        return load_engine(config, self._progress, fill=fill)

    # --- cases ---

    def _compare(self) -> None:
        """Variants with other numbers of KV heads: together if they fit into memory, else one by one."""
        source = read_model(self._config.model, revision=self._config.revision, offline=self._config.offline)
        variants = [source.with_kv_heads(count) for count in self._counts(source.config)]
        self._config = _quantized_as(source, self._config)
        each = [weight_bytes(variant) for variant in variants]
        groups = [[variant] for variant in variants]
        if self._device.type == "cpu" and sum(each) < _MEMORY_SHARE * free_memory(self._device):
            groups = [variants]
        for group in groups:
            engines = {}
            for variant in group:
                settings = self._settings(variant, _MEMORY_SHARE / len(group))
                fill = not self._args.compute_prompts
                engines[_name(variant)] = load_engine(
                    settings, self._progress, fill=fill, random_config=variant
                )
            self._measure(engines, last=group is groups[-1])

    def _counts(self, model: ModelConfig) -> list[int]:
        """The numbers of KV heads that were asked for, largest first."""
        words = self._args.num_kv_heads
        if words == ["all"]:
            return group_counts(model)
        try:
            return sorted({int(word) for word in words}, reverse=True)
        except ValueError as error:
            raise ConfigError(f"--num-kv-heads takes numbers, or all; got {' '.join(words)}.") from error

    def _measure(self, engines: Mapping[str, LoadedEngine], *, last: bool = True) -> None:
        smallest = min(engines.values(), key=lambda loaded: loaded.runner.info.num_blocks)
        info = smallest.runner.info
        cases = self._cases(info.max_model_len, info.num_blocks * info.block_size)
        limits = self._limits(smallest)
        results = measure(
            engines,
            cases,
            self._args.rounds,
            self._progress,
            compute_prompts=self._args.compute_prompts,
        )
        if limits is not None:
            limits = limits.better(self._limits(smallest) or limits)
        for result in results:
            self._samples += result.samples()
        self._variants += self._describe(engines, results, limits)
        self._results += results
        if last:
            self._report.sections += sections(self._variants, self._results)
            self._report.data["rounds"] = [result.to_json() for result in self._results]
            if self._left_out:
                names = "; ".join(self._left_out)
                self._report.sections.append(f"Left out, too large for the context or the KV cache: {names}.")

    def _describe(
        self, engines: Mapping[str, LoadedEngine], results: Sequence[CaseResult], limits: Limits | None
    ) -> list[Variant]:
        """The engines as the report shows them, which is told what they are."""
        variants = []
        for name, loaded in engines.items():
            works = {
                (result.case, number): loaded.work(sample)
                for result in results
                if result.variant == name
                for number, sample in enumerate(result.timings[0].samples)
            }
            info, ceiling = loaded.runner.info, self._ceiling(loaded, limits)
            variants.append(Variant(name, loaded.runner.config, info, ceiling, works))
            note = " Its weights are random." if loaded.random else ""
            told = (
                f"Limits: {ceiling}." if ceiling is not None else "Its limits are not known; give --hardware."
            )
            self._report.sections.append(f"{describe(info)}{note} {told}")
        return variants

    def _limits(self, loaded: LoadedEngine) -> Limits | None:
        """This CPU's, measured with the kernels' own instructions, unless the user says what they are."""
        given = self._hardware is not None and self._args.hardware.lower() != CPU
        if given or loaded.runner.info.backend != "native":
            return None
        with self._progress.task("Measuring what the machine can do at most"):
            return Limits.measure(loaded.runner.info.instruction_set, loaded.threads)

    def _ceiling(self, loaded: LoadedEngine, limits: Limits | None) -> Ceiling | None:
        if limits is not None:
            return Ceiling.of_cpu(limits, loaded.runner.info.dtype)
        hardware = self._hardware
        if hardware is None and self._device.type == "cuda":
            import torch

            name = torch.cuda.get_device_name()
            hardware = next((gpu for gpu in GPUS if gpu.name.split()[0] in name), None)
        return None if hardware is None else Ceiling.of_sheet(hardware, loaded.runner.info.dtype)

    # --- traffic ---

    def _replay(self, loaded: LoadedEngine, traffic: Sequence[TraceRequest]) -> None:
        CaseRunner(loaded.recorder, loaded.config).run(
            PrefillCase(1, min(64, loaded.runner.info.max_model_len - 1))
        )
        encode = None
        if any(request.prompt is not None for request in traffic):
            tokenizer = load_tokenizer(model_path(self._config))
            encode = functools.partial(tokenizer.encode, parse_special=True)
        replay = Replay(loaded.timer(), traffic, encode)
        with self._progress.task("Replaying the trace") as update:
            replay.run(update)
        self._samples += replay.samples
        summary = summarize(replay.records)
        if not self._parts:
            self._report.sections.append(describe(loaded.runner.info))
        steps_s = sum(sample.seconds for sample in replay.samples)
        preemptions = sum(record.preemptions or 0 for record in replay.records)
        self._report.sections += [
            f"{summary.num_requests} requests in {summary.duration_s:.1f} s, {summary.num_failed} failed: "
            f"{summary.request_rate:.2f} requests/s, {summary.output_rate:,.1f} output tokens/s, "
            f"{summary.prompt_rate:,.1f} prompt tokens/s; {summary.cached_tokens or 0:,} of these came "
            f"from the prefix cache. {len(replay.samples):,} steps took {steps_s:.1f} s; {preemptions} "
            "preemptions.",
            latency_table(summary),
        ]
        self._report.data["trace"] = summary.to_json()
        if self._args.records is not None:
            write_records(self._args.records, replay.records)


def _quantized_as(source: ModelSource, config: EngineConfig) -> EngineConfig:
    """Settings that hold random weights in as many bits as the model's own, unless they say more."""
    if config.quantization != "auto" or source.weights is None or source.weights.bits > 8:
        return config
    return dataclasses.replace(config, quantization="int8" if source.weights.bits == 8 else "int4")


def _name(config: ModelConfig) -> str:
    return f"{config.num_kv_heads} ({kind(config)})"
