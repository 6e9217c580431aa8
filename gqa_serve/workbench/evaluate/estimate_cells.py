"""An estimate in a row of a table: the value, its interval, and both as shown.

Owns how they are written. Invariant: tables show one column, the JSON holds all.
"""

from __future__ import annotations

from gqa_serve.workbench.evaluate.compare import Estimate
from gqa_serve.workbench.evaluate.intervals import CONFIDENCE

Row = dict[str, str | int | float | bool | None]

SURE = f"[{CONFIDENCE:.0%}]"
"""Behind the title of the first column with intervals."""


def estimate_cells(key: str, estimate: Estimate | None, digits: int) -> Row:
    """`key`, `key_low`, `key_high`, and `key_shown` with so many digits; `key` None of nothing."""
    if estimate is None:
        return {key: None}
    low, high = estimate.interval if estimate.interval is not None else (None, None)
    return {
        key: estimate.value,
        f"{key}_low": low,
        f"{key}_high": high,
        f"{key}_shown": _shown(estimate, digits),
    }


def _shown(estimate: Estimate, digits: int) -> str:
    """1.234 [1.200, 1.268]"""
    if estimate.interval is None:
        return f"{estimate.value:.{digits}f}"
    low, high = estimate.interval
    return f"{estimate.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
