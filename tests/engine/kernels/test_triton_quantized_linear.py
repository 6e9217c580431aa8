"""Products with 8- and 4-bit weights, and lookups in such tables, against their twins and float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gqa_serve.engine.kernels.triton import quantized_linear as module
from gqa_serve.engine.kernels.triton.embedding import embed, embed_twin
from gqa_serve.engine.kernels.triton.quantized_linear import (
    Quantized,
    arrange,
    config,
    dequantize,
    quantized_linear,
    quantized_linear_twin,
)

# bits, group, what there is beside a scale
KINDS = [
    (8, 0, ""),
    (8, 32, ""),
    (8, 128, "zero"),
    (4, 32, "minimum"),
    (4, 64, "zero"),
    (4, 128, ""),
    (8, 64, "minimum"),
]


def random_weight(n: int, k: int, bits: int, group: int, extra: str) -> tuple[Quantized, torch.Tensor]:
    """A weight and its numbers [n, k] in float64, worked out one input at a time."""
    generator = torch.Generator().manual_seed(n * k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    groups = -(-k // group) if group else 1
    scale = ((torch.rand(n, groups, generator=generator) + 0.2) / (1 << bits)).half()
    zero = minimum = None
    if extra == "zero":
        zero = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8, generator=generator)
    if extra == "minimum":
        minimum = torch.randn(n, groups, generator=generator).half()
    numbers = torch.empty(n, k, dtype=torch.float64)
    for i in range(k):
        j = i // group if group else 0
        code = codes[:, i].double()
        if minimum is not None:
            numbers[:, i] = code * scale[:, j].double() + minimum[:, j].double()
        else:
            middle = 1 << (bits - 1) if zero is None else zero[:, j].double()
            numbers[:, i] = (code - middle) * scale[:, j].double()
    return arrange(codes, scale, zero, minimum, bits, group), numbers


def poisoned(rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, n), torch.nan, dtype=dtype)


@pytest.mark.parametrize(("bits", "group", "extra"), KINDS)
@pytest.mark.parametrize(("n", "k"), [(5, 1), (70, 129), (16, 256)])
def test_the_layout_holds_the_numbers(n: int, k: int, bits: int, group: int, extra: str) -> None:
    weight, numbers = random_weight(n, k, bits, group, extra)
    assert weight.codes.dtype == torch.uint8
    assert weight.codes.shape == (-(-k // ((group or 128) * (8 // bits))), n, group or 128)
    torch.testing.assert_close(dequantize(weight).double(), numbers, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "group", "extra"), KINDS)
@pytest.mark.parametrize(
    ("rows", "n", "k", "dtype"),
    [(1, 70, 260, torch.float16), (3, 17, 33, torch.float32), (66, 33, 256, torch.float16)],
)
def test_equals_its_twin_and_float64(
    rows: int, n: int, k: int, bits: int, group: int, extra: str, dtype: torch.dtype
) -> None:
    weight, numbers = random_weight(n, k, bits, group, extra)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.linspace(-1, 1, n) if group == 32 else None
    out = quantized_linear(x, weight, bias, poisoned(rows, n, dtype))
    exact = x.double() @ numbers.t() + (0 if bias is None else bias.double())
    error = 1e-5 if dtype == torch.float32 else 4e-3
    size = float(exact.abs().max())
    torch.testing.assert_close(out.double(), exact, rtol=error, atol=error * size)
    twin = quantized_linear_twin(x, weight, bias, poisoned(rows, n, dtype))
    torch.testing.assert_close(out, twin, rtol=error, atol=error * size)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(("bits", "group", "extra"), [(8, 0, ""), (4, 32, "minimum")])
def test_split_inputs_add_up(rows: int, bits: int, group: int, extra: str) -> None:
    """Enough inputs for several splits of unequal length, the last group cut short, with a bias."""
    n, k = 40, 1100
    weight, numbers = random_weight(n, k, bits, group, extra)
    steps = weight.codes.shape[0]
    tile = config(rows, n, steps, group or 128, bits, 2, deterministic=False)
    assert tile.splits > 1
    assert steps % tile.splits
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(7)).half()
    bias = torch.linspace(-3, 3, n)
    out = quantized_linear(x, weight, bias, poisoned(rows, n, torch.float16))
    exact = x.double() @ numbers.t() + bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=4e-3, atol=4e-3 * float(exact.abs().max()))
    again = quantized_linear(x, weight, bias, poisoned(rows, n, torch.float16))
    assert torch.equal(out, again)


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize(("bits", "group", "extra"), [(8, 0, ""), (4, 32, "minimum"), (4, 128, "zero")])
def test_a_row_does_not_depend_on_the_others_when_deterministic(bits: int, group: int, extra: str) -> None:
    n, k = 33, 264
    weight, _ = random_weight(n, k, bits, group, extra)
    x = torch.randn(71, k, generator=torch.Generator().manual_seed(3)).half()
    whole = quantized_linear(x, weight, None, poisoned(71, n, torch.float16), True)
    for begin, end in ((0, 1), (7, 24), (66, 71)):
        part = quantized_linear(x[begin:end], weight, None, poisoned(end - begin, n, torch.float16), True)
        assert torch.equal(part, whole[begin:end])


def test_the_tile_is_a_function_of_shapes_alone() -> None:
    fixed = {config(rows, 4096, 32, 128, 8, 2, deterministic=True) for rows in (1, 16, 17, 64, 65, 4096)}
    assert len(fixed) == 1
    assert fixed.pop().splits == 1
    assert config(1, 4096, 32, 128, 8, 2, deterministic=False).splits == 4
    assert config(1, 28672, 32, 128, 8, 2, deterministic=False).splits == 1  # enough programs without
    assert config(1, 64, 1, 128, 8, 2, deterministic=False).splits == 1  # nothing to split
    assert config(4096, 4096, 32, 128, 8, 2, deterministic=False).splits == 1


def test_rows_of_wider_tensors_and_no_rows() -> None:
    weight, numbers = random_weight(24, 64, 4, 32, "")
    wide = torch.full((5, 90), torch.nan)
    wide[:, :64] = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    out = poisoned(5, 30, torch.float32)
    quantized_linear(wide[:, :64], weight, None, out[:, 2:26])
    torch.testing.assert_close(
        out[:, 2:26].double(), wide[:, :64].double() @ numbers.t(), rtol=1e-5, atol=1e-5
    )
    assert out[:, :2].isnan().all()
    assert out[:, 26:].isnan().all()
    assert quantized_linear(wide[:0, :64], weight, None, out[:0, :24]).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "group", "extra"), KINDS)
def test_embedding_rows(bits: int, group: int, extra: str, dtype: torch.dtype) -> None:
    table, numbers = random_weight(37, 300, bits, group, extra)
    ids = torch.tensor([0, 36, 5, 5, 17], dtype=torch.int32)
    out = embed(table, ids, 2.5, poisoned(5, 300, dtype))
    error = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(out.double(), numbers[ids.long()] * 2.5, rtol=error, atol=error)
    assert torch.equal(out, embed_twin(table, ids, 2.5, poisoned(5, 300, dtype)))
    assert embed(table, ids[:0], 1.0, out[:0]).shape == (0, 300)


def test_variants_are_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled ahead of time has the arguments that a launch gives."""
    seen: list[dict[str, object]] = []

    class Recorded:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **kwargs: seen.append(kwargs)

    monkeypatch.setattr(module, "_quantized_linear_kernel", Recorded())
    weight, _ = random_weight(256, 4096, 4, 32, "minimum")
    quantized_linear(
        torch.zeros(2048, 4096, dtype=torch.float16), weight, None, poisoned(2048, 256, torch.float16)
    )
    (launch,) = seen
    monkeypatch.undo()
    constants = {name: value for name, value in launch.items() if name.isupper()}
    compiled = (launch["num_warps"], launch["num_stages"])
    assert any(
        variant.constexprs.items() >= constants.items()
        and (variant.num_warps, variant.num_stages) == compiled
        for variant in module.variants()
    )


@pytest.mark.parametrize(
    ("bits", "holder", "dtype", "pattern", "offset"),
    [
        (8, torch.int16, torch.float16, 0x6400, 1024),
        (4, torch.int16, torch.bfloat16, 0x4300, 128),
        (8, torch.int32, torch.float32, 0x4B000000, 1 << 23),
    ],
)
def test_codes_are_the_low_bits_of_their_numbers(
    bits: int, holder: torch.dtype, dtype: torch.dtype, pattern: int, offset: int
) -> None:
    """What `_numbers` relies on; the interpreter can't show it for bfloat16."""
    codes = torch.arange(1 << bits, dtype=holder)
    numbers = (codes | pattern).view(dtype)
    assert numbers.tolist() == [offset + code for code in range(1 << bits)]
    for zero in range(1 << bits):
        difference = numbers - torch.tensor(float(offset + zero)).to(dtype)
        assert difference.tolist() == [code - zero for code in range(1 << bits)]
