"""What `bench engine` shows: tables of decoding, prompts and both at once, KV heads side by side, and plots.

Owns columns and axes. Knows no engine beyond its numbers, and no flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.request import ModelInfo
from gqa_serve.workbench.bench.engine_cases import Case, DecodeCase, MixedCase, PrefillCase
from gqa_serve.workbench.bench.engine_measure import CaseResult
from gqa_serve.workbench.bench.limits import Ceiling, Work
from gqa_serve.workbench.report import Cell, Column, Plot, Section, Series, Table, number, percent, scaled

_MS = scaled(1e3, 2)
_LIMIT_NOTE = (
    "Of the limit: the least time in which the device could read the weights once and K and V once a KV "
    "head, or do the arithmetic, whichever is longer, over the measured time."
)


@dataclass(frozen=True)
class Variant:
    """One engine of a run: its numbers, and what its device does at most, if that is known."""

    name: str
    config: ModelConfig
    info: ModelInfo
    ceiling: Ceiling | None
    works: Mapping[tuple[Case, int], Work]
    """(case, number of the step) -> what that step must read and compute, of the first round."""

    def least_s(self, result: CaseResult) -> float | None:
        """The least time of the steps of the first round, all together."""
        if self.ceiling is None:
            return None
        steps = len(result.timings[0].samples)
        return sum(self.ceiling.seconds(self.works[result.case, step]) for step in range(steps))

    def share(self, result: CaseResult) -> float | None:
        """That over the time that the rounds took, the median."""
        least = self.least_s(result)
        return None if least is None else least / result.seconds().median

    def bound(self, result: CaseResult) -> str | None:
        """What bounds the last of the steps."""
        if self.ceiling is None:
            return None
        return self.ceiling.bound(self.works[result.case, len(result.timings[0].samples) - 1])


def kind(config: ModelConfig) -> str:
    """MHA, GQA or MQA."""
    if config.num_kv_heads == config.num_heads:
        return "MHA"
    return "MQA" if config.num_kv_heads == 1 else "GQA"


def describe(info: ModelInfo) -> str:
    """The engine in one sentence."""
    isa = f" with {info.instruction_set}" if info.instruction_set else ""
    return (
        f"{info.model}: {info.num_heads} query heads over {info.num_kv_heads} KV heads; "
        f"{info.weight_bytes / 2**20:,.0f} MiB of weights ({info.dtype}); "
        f"{info.kv_bytes_per_token / 1024:,.1f} KiB of KV cache a token ({info.kv_dtype}); "
        f"{info.backend} backend on {info.device}{isa}."
    )


def sections(variants: Sequence[Variant], results: Sequence[CaseResult]) -> list[Section]:
    """Tables, then plots, of whatever was measured."""
    by_name = {variant.name: variant for variant in variants}
    parts: list[Section] = []
    if len(variants) > 1:
        parts.append(_variants(variants))
    for make in (_decode, _prefill, _mixed):
        table = make(by_name, results)
        if table.rows:
            parts.append(table)
    return [*parts, *_plots(by_name, results)]


def _columns(several: bool, *columns: Column) -> list[Column]:
    return [Column("variant", "KV heads"), *columns] if several else list(columns)


def _variants(variants: Sequence[Variant]) -> Table:
    most = max(variant.info.kv_bytes_per_token for variant in variants)
    rows: list[dict[str, Cell]] = [
        {
            "variant": variant.name,
            "group_size": variant.config.group_size,
            "weights": variant.info.weight_bytes,
            "kv_bytes_per_token": variant.info.kv_bytes_per_token,
            "tokens_per_gib": 2**30 // variant.info.kv_bytes_per_token,
            "kv_share": variant.info.kv_bytes_per_token / most,
        }
        for variant in variants
    ]
    columns = [
        Column("variant", "KV heads"),
        Column("group_size", "query heads each", number()),
        Column("weights", "weights, MiB", scaled(2.0**-20)),
        Column("kv_bytes_per_token", "KV, KiB a token", scaled(2.0**-10)),
        Column("tokens_per_gib", "tokens in 1 GiB of KV cache", number()),
        Column("kv_share", "KV memory of the largest, %", percent()),
    ]
    return Table("The same model with other numbers of KV heads (random weights)", columns, rows)


def _decode(variants: Mapping[str, Variant], results: Sequence[CaseResult]) -> Table:
    rows: list[dict[str, Cell]] = []
    first: dict[object, float] = {}
    for result in results:
        case = result.case
        if not isinstance(case, DecodeCase):
            continue
        variant = variants[result.variant]
        step = result.step_s()
        first.setdefault(case, step.median)
        rows.append(
            {
                "variant": result.variant,
                "batch_size": case.batch_size,
                "context_len": case.context_len,
                "step_s": step.median,
                "spread": step.spread,
                "tokens_per_s": case.batch_size / step.median,
                "kv_bytes": case.batch_size * case.context_len * variant.info.kv_bytes_per_token,
                "share": variant.share(result),
                "bound": variant.bound(result),
                "speedup": first[case] / step.median,
            }
        )
    several = len(variants) > 1
    columns = _columns(
        several,
        Column("batch_size", "batch", number()),
        Column("context_len", "context, tokens", number()),
        Column("step_s", "step, ms", _MS),
        Column("spread", "± %", percent()),
        Column("tokens_per_s", "tokens/s", number(1)),
        Column("kv_bytes", "KV held, MiB", scaled(2.0**-20)),
        Column("share", "of the limit, %", percent(0)),
        Column("bound", "limit"),
    )
    if several:
        columns.append(Column("speedup", "faster than the first, x", number(2)))
    return Table("Decoding", columns, rows, _LIMIT_NOTE if _known(variants) else "")


def _prefill(variants: Mapping[str, Variant], results: Sequence[CaseResult]) -> Table:
    rows: list[dict[str, Cell]] = []
    for result in results:
        case = result.case
        if not isinstance(case, PrefillCase):
            continue
        variant, seconds = variants[result.variant], result.seconds()
        rows.append(
            {
                "variant": result.variant,
                "num_prompts": case.num_prompts,
                "prompt_len": case.prompt_len,
                "seconds": seconds.median,
                "spread": seconds.spread,
                "steps": len(result.timings[0].samples),
                "tokens_per_s": case.num_prompts * case.prompt_len / seconds.median,
                "share": variant.share(result),
                "bound": variant.bound(result),
            }
        )
    columns = _columns(
        len(variants) > 1,
        Column("num_prompts", "prompts", number()),
        Column("prompt_len", "tokens each", number()),
        Column("seconds", "to the first tokens, ms", _MS),
        Column("spread", "± %", percent()),
        Column("steps", "steps", number()),
        Column("tokens_per_s", "prompt tokens/s", number()),
        Column("share", "of the limit, %", percent(0)),
        Column("bound", "limit"),
    )
    return Table("Prompts", columns, rows)


def _mixed(variants: Mapping[str, Variant], results: Sequence[CaseResult]) -> Table:
    rows: list[dict[str, Cell]] = []
    for result in results:
        case = result.case
        if not isinstance(case, MixedCase):
            continue
        step, alone, seconds = result.step_s(), result.alone_s(), result.seconds()
        steps = len(result.timings[-1].samples)
        rows.append(
            {
                "variant": result.variant,
                "batch_size": case.batch_size,
                "context_len": case.context_len,
                "prompt_len": case.prompt_len,
                "steps": steps,
                "alone_s": alone.median,
                "step_s": step.median,
                "spread": step.spread,
                "slowdown": step.median / alone.median,
                "prompt_tokens_per_s": case.prompt_len / seconds.median,
            }
        )
    columns = _columns(
        len(variants) > 1,
        Column("batch_size", "decoding", number()),
        Column("context_len", "context, tokens", number()),
        Column("prompt_len", "prompt, tokens", number()),
        Column("steps", "in steps", number()),
        Column("alone_s", "step before, ms", _MS),
        Column("step_s", "step beside it, ms", _MS),
        Column("spread", "± %", percent()),
        Column("slowdown", "longer, x", number(2)),
        Column("prompt_tokens_per_s", "prompt tokens/s", number()),
    )
    note = "How many tokens of the prompt go into a step is the scheduler's decision, as in the server."
    return Table("A prompt beside decoding requests", columns, rows, note)


def _known(variants: Mapping[str, Variant]) -> bool:
    return any(variant.ceiling is not None for variant in variants.values())


# --- plots -------------------------------------------------------------------------------------------------


def _plots(variants: Mapping[str, Variant], results: Sequence[CaseResult]) -> Iterator[Plot]:
    decode = [(result, result.case) for result in results if isinstance(result.case, DecodeCase)]
    prefill = [(result, result.case) for result in results if isinstance(result.case, PrefillCase)]
    yield from _over_batch(variants, decode)
    yield from _over_context(variants, decode)
    points: dict[str, list[tuple[float, float, float]]] = {}
    for result, prompt in prefill:
        rate = result.seconds().per(prompt.num_prompts * prompt.prompt_len)
        label = _label(variants, result, f"{prompt.num_prompts} at once")
        points.setdefault(label, []).append((prompt.prompt_len, rate.median, rate.spread * rate.median))
    if any(len(of) > 1 for of in points.values()):
        yield Plot("Prompts", "tokens of a prompt", "prompt tokens/s", _series(points), log_x=True)


def _over_batch(
    variants: Mapping[str, Variant], decode: Sequence[tuple[CaseResult, DecodeCase]]
) -> Iterator[Plot]:
    points: dict[str, list[tuple[float, float, float]]] = {}
    for result, case in decode:
        rate = result.step_s().per(case.batch_size)
        label = _label(variants, result, f"context {case.context_len:,}")
        points.setdefault(label, []).append((case.batch_size, rate.median, rate.spread * rate.median))
    if any(len(of) > 1 for of in points.values()):
        yield Plot("Decoding", "batch size, requests", "output tokens/s", _series(points))


def _over_context(
    variants: Mapping[str, Variant], decode: Sequence[tuple[CaseResult, DecodeCase]]
) -> Iterator[Plot]:
    points: dict[str, list[tuple[float, float, float]]] = {}
    for result, case in decode:
        step = result.step_s()
        label = _label(variants, result, f"batch {case.batch_size}")
        points.setdefault(label, []).append(
            (case.context_len, 1e3 * step.median, 1e3 * step.spread * step.median)
        )
    if any(len(of) > 1 for of in points.values()):
        yield Plot("A decode step over the context", "context, tokens", "step, ms", _series(points))


def _label(variants: Mapping[str, Variant], result: CaseResult, text: str) -> str:
    return f"{result.variant} KV heads, {text}" if len(variants) > 1 else text


def _series(points: Mapping[str, list[tuple[float, float, float]]]) -> list[Series]:
    series = []
    for label, of in points.items():
        x, y, errors = zip(*sorted(of), strict=True)
        series.append(Series(label, x, y, errors))
    return series
