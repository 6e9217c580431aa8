"""The plots of the HTML report, as data; `workbench/plots.py` draws them."""

from __future__ import annotations

from collections.abc import Sequence

from gqa_serve.workbench.plan.answer import Answer, batch_ladder
from gqa_serve.workbench.plan.decode_cost import LINEAR
from gqa_serve.workbench.report import Plot, Series

ROOF_POINTS = 60  # so many that it is drawn without markers


def figures(answers: Sequence[Answer]) -> list[Plot]:
    """Of one case: tokens/s over the batch, latency against throughput, the roofline, KV of a token."""
    served = [answer for answer in answers if answer.max_requests]
    plots = [_kv_bars(answers), _roofline(answers)]
    if not served:
        return plots
    curves = [(answer, batch_ladder(answer.max_requests)) for answer in served]
    throughput = Plot(
        "Most tokens per second, to the largest batch that fits",
        "requests in the batch",
        "tokens/s of all requests",
        [
            Series(answer.label, batches, [answer.tokens_per_second(batch) for batch in batches])
            for answer, batches in curves
        ],
        log_x=True,
        log_y=True,
    )
    frontier = Plot(
        "Speed of one request against throughput of all",
        "tokens/s of each request",
        "tokens/s of all requests",
        [
            Series(
                answer.label,
                [1 / answer.decode.seconds(batch) for batch in batches],
                [answer.tokens_per_second(batch) for batch in batches],
            )
            for answer, batches in curves
        ],
        log_y=True,
    )
    return [throughput, frontier, *plots]


def _kv_bars(answers: Sequence[Answer]) -> Plot:
    return Plot(
        "KV cache of one token",
        "KV heads",
        "KiB per token",
        [
            Series(
                "KV cache",
                [answer.label for answer in answers],
                [answer.kv_bytes_per_token / 1024 for answer in answers],
            )
        ],
        kind="bar",
    )


def _roofline(answers: Sequence[Answer]) -> Plot:
    """Where attention and linear layers lie under the roof, at the largest batch that fits."""
    hardware = answers[0].hardware
    peak = hardware.peak(answers[0].formats.weights.precision)
    low, high = 0.25, max(4096.0, 8 * peak / hardware.bandwidth)
    steps = [low * (high / low) ** (index / (ROOF_POINTS - 1)) for index in range(ROOF_POINTS)]
    series = [
        Series(f"roof of {hardware.name}", steps, [min(peak, x * hardware.bandwidth) / 1e12 for x in steps])
    ]
    for answer in answers:
        decode, batch = answer.decode, max(1, answer.max_requests)
        x = [decode.intensity(decode.attention, batch), decode.intensity(LINEAR, batch)]
        series.append(
            Series(
                f"{answer.label}: attention, linear layers",
                x,
                [min(peak, value * hardware.bandwidth) / 1e12 for value in x],
                joined=False,
            )
        )
    return Plot(
        "Roofline at the largest batch that fits",
        "operations per byte",
        "TFLOP/s at most",
        series,
        log_x=True,
        log_y=True,
    )
