"""What a decode step would take on hardware that is not here: the roofline account of `plan`.

Owns the translation of a candidate into that account. Measures nothing. Invariant: the formats are those the
server would use on that hardware for the candidate's settings, or a reason why it would not serve them.
"""

from __future__ import annotations

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.evaluate.candidates import Candidate
from gqa_serve.workbench.hardware import Hardware
from gqa_serve.workbench.model_source import read_model
from gqa_serve.workbench.plan.serving_formats import served_formats, served_kv_dtype
from gqa_serve.workbench.step_cost import decode_step


def roofline_tokens_per_s(
    candidate: Candidate, hardware: Hardware, context: int, requests: int
) -> float | str:
    """Decode tokens per second of all requests together that `hardware` allows at most, or why none."""
    config = candidate.config
    source = read_model(str(candidate.path))
    try:
        kv_dtype = served_kv_dtype(source, hardware, config.quantization, config.kv_cache_dtype)
        formats = served_formats(source, hardware, config.quantization, kv_dtype, config.block_size)
    except ConfigError as error:
        return str(error)
    cost = decode_step(candidate.model, requests, context, formats, post_norms=source.post_norms)
    return requests / cost.seconds(hardware)
