"""The attention kernels on a GPU, compiled, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from paged_layer import paged
from test_triton_attention import CHUNKS, DECODE, FORMATS, attend, oracle, queries

from gqa_serve.engine.kernels.triton.decode_attention import Scores
from gqa_serve.engine.kv_cache import LayerKV

# What a product in this precision may be off by, relative to values of about 1.
TOLERANCES = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2, "int8": 3e-2, "fp8": 3e-2}
DTYPES = {**FORMATS, "bfloat16": torch.bfloat16}


def on(device: torch.device, kv: LayerKV) -> LayerKV:
    return LayerKV(*(tensor if tensor is None else tensor.to(device) for tensor in kv))


@pytest.mark.parametrize("lens", [DECODE, CHUNKS, DECODE + CHUNKS], ids=["decode", "chunks", "mixed"])
@pytest.mark.parametrize("form", TOLERANCES)
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim", "window", "soft_cap"),
    [
        (8, 4, 128, None, None),
        (2, 7, 128, None, None),
        (3, 3, 64, None, None),
        (8, 1, 96, 100, None),
        (1, 5, 80, None, None),
        (1, 4, 256, 64, None),
        (4, 2, 256, 300, 50.0),
        (2, 16, 128, 64, 30.0),
    ],
)
def test_attention(
    gpu: torch.device,
    lens: list[tuple[int, int]],
    form: str,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None,
    soft_cap: float | None,
) -> None:
    if form == "fp8" and torch.cuda.get_device_capability(gpu) < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    case = paged(lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=16, dtype=DTYPES[form])
    dtype = DTYPES[form] if DTYPES[form].itemsize > 1 else torch.bfloat16
    q = queries(case, group, dtype)
    scores = Scores(head_dim**-0.5, soft_cap, window)
    expected = oracle(case, q, scores)
    case.kv = on(gpu, case.kv)
    for exact in (False, True):
        got = attend(case, q.to(gpu), scores, exact=exact, twin=False, programs=40).double().cpu()
        torch.testing.assert_close(got, expected, rtol=TOLERANCES[form], atol=TOLERANCES[form])


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize(("group", "head_dim"), [(4, 128), (3, 64), (1, 128), (8, 256), (20, 64)])
def test_exact_chunks_have_the_bytes_of_decoding(
    gpu: torch.device, form: str, group: int, head_dim: int
) -> None:
    length = 700
    scores = Scores(head_dim**-0.5, None, None)
    case = paged([(0, length)], num_kv_heads=2, head_dim=head_dim, block_size=16, dtype=DTYPES[form])
    q = queries(case, group, torch.float16 if form == "float16" else torch.bfloat16).to(gpu)
    case.kv = on(gpu, case.kv)
    (row,) = case.plan.rows
    expected = attend(case, q, scores, exact=True, twin=False)
    for begin, end in itertools.pairwise([0, 1, 2, 35, 255, 256, 257, 512, 699, length]):
        row.start, row.token_ids = begin, [1] * (end - begin)
        part = attend(case, q[begin:end], scores, exact=True, twin=False, programs=7)
        assert torch.equal(part, expected[begin:end])
