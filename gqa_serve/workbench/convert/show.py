"""What a conversion did, as tables and plots. Owns no numbers. Invariant: NaN is shown as a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gqa_serve.workbench.report import Column, Plot, Report, Section, Series, Table, number, percent

if TYPE_CHECKING:
    from gqa_serve.engine.model_config import ModelConfig
    from gqa_serve.workbench.convert.forward import CalibrationText, Variant

_ERRORS: tuple[tuple[str, Callable[[Variant], list[float]]], ...] = (
    ("keys", lambda variant: variant.k_errors),
    ("values", lambda variant: variant.v_errors),
)
_NOTES = {
    "keys": "Sum of squared differences over the sum of squares, over tokens and heads, before the rotation.",
    "values": "The same sums.",
}


def measured_sections(
    variants: Sequence[Variant], text: CalibrationText, config: ModelConfig, num_kv_heads: int
) -> list[Section]:
    """Loss by method, errors by layer, and their plots."""
    original, converted = variants[0], variants[1:]
    held_out = (len(text.tokens) - text.num_fitted) * (text.tokens.shape[1] - 1)
    fitted = text.num_fitted * text.tokens.shape[1]
    return [
        Table(
            f"{config.num_heads} query heads, {config.num_kv_heads} -> {num_kv_heads} KV heads",
            [
                Column("method", "Method"),
                Column("loss", "Loss, nats", number(4)),
                Column("change", "Change, nats", number(4)),
                Column("perplexity", "Perplexity", number(2)),
                Column("k_error", "K error, %", percent(2)),
                Column("v_error", "V error, %", percent(2)),
            ],
            [_loss_row(variant, original) for variant in variants],
            note=f"Loss per token on {held_out} tokens of {text.name} that no fit has seen; groups and fits "
            f"from {fitted} others. Errors: of reading back the original's keys and values, mean of layers. "
            "All before any further training: gqa-serve uptrain recovers much of the change.",
        ),
        *_layer_tables(converted),
        *_plots(converted),
    ]


def _loss_row(variant: Variant, original: Variant) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": variant.method or "original",
        "loss": variant.loss,
        "perplexity": math.exp(min(variant.loss, 700.0)),
    }
    if variant is not original:
        row |= {
            "change": variant.loss - original.loss,
            "k_error": _mean(variant.k_errors),
            "v_error": _mean(variant.v_errors),
        }
    return row


def _layer_tables(variants: Sequence[Variant]) -> list[Section]:
    """Of keys and of values: a row per layer, a column per method."""
    shown = [variant for variant in variants if variant.method != "random"]
    if not shown:
        return []
    columns = [Column("layer", "Layer", number())]
    columns += [Column(str(variant.method), f"{variant.method}, %", percent(2)) for variant in shown]
    tables: list[Section] = []
    for what, errors_of in _ERRORS:
        rows: list[dict[str, Any]] = [
            {"layer": layer, **{str(variant.method): errors_of(variant)[layer] for variant in shown}}
            for layer in range(len(shown[0].merges))
        ]
        title = f"Relative squared error of {what}, by layer"
        tables.append(Table(title, columns, rows, note=_NOTES[what], printed=False))
    return tables


def _plots(variants: Sequence[Variant]) -> list[Section]:
    shown = [variant for variant in variants if variant.method != "random"]
    if not shown:
        return []
    layers = list(range(len(shown[0].merges)))
    return [
        Plot(
            f"Error of {what} by layer",
            "layer",
            "relative squared error, %",
            [
                Series(str(variant.method), layers, [100 * error for error in errors_of(variant)])
                for variant in shown
            ],
        )
        for what, errors_of in _ERRORS
    ]


def measured_data(variants: Sequence[Variant], text: CalibrationText) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "calibration": {
            "text": text.name,
            "window": text.tokens.shape[1],
            "fitted_windows": text.num_fitted,
            "held_out_windows": len(text.tokens) - text.num_fitted,
        },
        "losses": {str(variant.method or "original"): variant.loss for variant in variants},
    }


def groups_paragraph(report: Report, variant: Variant) -> None:
    """Name the groups that were chosen, if there was a choice."""
    if len(variant.merges[0].groups) == 1:
        return
    layers = [
        f"{layer}: " + " ".join("+".join(map(str, group)) for group in merge.groups)
        for layer, merge in enumerate(variant.merges)
    ]
    report.sections.append("KV heads that became one, by layer: " + "; ".join(layers) + ".")


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None
