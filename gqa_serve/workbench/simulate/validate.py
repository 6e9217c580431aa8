"""A measured run as traffic, so that the twin can be asked what it would have taken.

Owns how records become a trace. Lengths and times are those that were measured; which prompts share a prefix
records do not say, so that a trace that bench wrote is better where there are shared ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.records import RequestRecord
from gqa_serve.workbench.trace import TraceRequest, checked


def trace_of(records: Sequence[RequestRecord]) -> list[TraceRequest]:
    """The requests that ended well, sent when they were sent. Raises ConfigError if there are none."""
    requests: list[TraceRequest] = []
    ends: dict[str, float] = {}
    for record in sorted(records, key=lambda record: record.sent_s):
        if record.error is not None or record.output_tokens < 1:
            continue
        name, think_s = record.conversation, 0.0
        if name is not None and record.turn:
            if name not in ends:
                continue  # the turn before it failed
            think_s = max(0.0, record.sent_s - ends[name])
        if name is not None:
            ends[name] = record.sent_s + record.e2e_s
        requests.append(
            TraceRequest(
                arrival_s=0.0 if record.turn else record.sent_s,
                prompt_tokens=record.prompt_tokens,
                output_tokens=record.output_tokens,
                conversation=name,
                turn=record.turn,
                think_s=think_s,
            )
        )
    if not requests:
        raise ConfigError("The records hold no request that ended well; there is nothing to compare with.")
    return checked(requests, "the records")
