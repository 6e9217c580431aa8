"""What several servers say on `/metrics`, as one text in which a label tells them apart.

Owns the merging, of Prometheus's text format and line by line: a sample gets the label `replica`, the lines
of one family are put together under its first HELP and TYPE. Knows no metric's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{?)(.*)", re.DOTALL)


def merged_metrics(texts: Mapping[str, str]) -> str:
    """`texts` by replica, in Prometheus's text format (version 0.0.4)."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.split("\n"):
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, replica))
    lines = [
        line for family in {**heads, **samples} for line in (*heads.get(family, ()), *samples.get(family, ()))
    ]
    return "\n".join(lines) + "\n"


def _labelled(line: str, replica: str) -> str:
    match = _SAMPLE.fullmatch(line)
    if match is None:
        return line
    name, brace, rest = match.groups()
    label = f'replica="{replica}"'
    if not brace:
        return f"{name}{{{label}}}{rest}"
    return f"{name}{{{label}{rest}" if rest.startswith("}") else f"{name}{{{label},{rest}"
