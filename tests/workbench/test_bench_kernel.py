"""`bench kernel`: the kernels compute the case that is told, against float64, and the account is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench import kernel_command, kernel_run
from gqa_serve.workbench.bench.case_progress import CaseProgress
from gqa_serve.workbench.bench.cpu_kernels import NativeAttention, NativeLinear, repeated
from gqa_serve.workbench.bench.kernel_cases import AttentionCase, KernelCase, LinearCase
from gqa_serve.workbench.bench.kernel_run import run_cases
from gqa_serve.workbench.bench.limits import Limits, Work
from gqa_serve.workbench.kernel_cost import DEFAULT, Heads, decode_attention, linear, prefill_attention


@pytest.fixture
def native() -> Any:
    from gqa_serve.engine.kernels.cpu import NativeUnavailableError, load

    try:
        return load()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


def table(width: int) -> torch.Tensor:
    """What `random_table` draws."""
    return torch.randn(2048, width, generator=torch.Generator().manual_seed(0)).double()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int) -> torch.Tensor:
    """q [H, D], k and v [T, KV, D], float64: what one token sees."""
    heads = [
        torch.softmax(k[:, head // group] @ q[head] * q.shape[1] ** -0.5, 0) @ v[:, head // group]
        for head in range(q.shape[0])
    ]
    return torch.cat(heads)


def test_one_small_kv_head_still_reads_what_is_asked_for(native: Any) -> None:
    """With fewer layers the processor's cache would be measured, and of the fewest KV heads alone."""
    case = AttentionCase("decode", Heads(2, 1, 32), "int8", 1, 16)
    bench = NativeAttention(native, native.isa_levels()[-1], 1, case, min_bytes=2**20)
    assert bench.layers * bench.token_bytes * 16 >= 2**20


@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
@pytest.mark.parametrize(("part", "batch", "context"), [("decode", 3, 75), ("prefill", 2, 33)])
def test_attention_is_of_the_case(
    native: Any, num_kv_heads: int, part: str, batch: int, context: int
) -> None:
    heads = Heads(8, num_kv_heads, 32)
    case = AttentionCase(part, heads, "float32", batch, context)  # type: ignore[arg-type]
    bench = NativeAttention(native, native.isa_levels()[-1], 1, case, min_bytes=200_000)
    out = bench.run().double()
    assert bench.token_bytes == 2 * num_kv_heads * 32 * 4
    assert bench.layers == (1 if part == "prefill" else -(-200_000 // (3 * 80 * bench.token_bytes)))
    rows = table((8 + 2 * num_kv_heads) * 32)[:context]
    k = rows[:, 8 * 32 : (8 + num_kv_heads) * 32].view(context, num_kv_heads, 32)
    v = rows[:, (8 + num_kv_heads) * 32 :].view(context, num_kv_heads, 32)
    queries = table(8 * 32).view(-1, 8, 32)
    group = 8 // num_kv_heads
    if part == "decode":
        expected = [attention(queries[request], k, v, group) for request in range(batch)]
    else:
        expected = [attention(queries[t], k[: t + 1], v[: t + 1], group) for t in range(context)] * batch
    torch.testing.assert_close(out, torch.stack(expected), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("weights", "error"), [("float32", 1e-4), ("bfloat16", 0.02), ("int8", 0.05), ("int4", 0.4)]
)
def test_a_product_is_of_the_case(native: Any, weights: str, error: float) -> None:
    case = LinearCase("x", 256, 48, weights, 5)
    bench = NativeLinear(native, native.isa_levels()[-1], 1, case, min_bytes=100_000)
    assert bench.layers == -(-100_000 // bench.matrix_bytes)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)).double() * 256**-0.5
    expected = table(256)[:5] @ weight.T
    assert (bench.run().double() - expected).abs().max() < error


def test_the_account_is_that_of_kernel_cost() -> None:
    """What must be read, without the queries, and operations; at a batch of one context each."""
    heads = Heads(32, 8, 128)
    token = DEFAULT.kv.bytes_per_token(8, 128)
    decode = AttentionCase("decode", heads, "bfloat16", 4, 1000).work(token)
    cost = decode_attention(heads, [1000] * 4)
    assert decode.attention_ops == cost.flops
    queries = 4 * (2 * 32 * 128 * 2 + 4 * 63)  # rows in and out, and ids of blocks
    assert decode.read_bytes == cost.must_bytes - queries == 4 * 1000 * token
    prefill = AttentionCase("prefill", heads, "bfloat16", 2, 100).work(token)
    assert prefill.attention_ops == prefill_attention(heads, [(100, 100)] * 2).flops
    product = LinearCase("o", 4096, 1024, "bfloat16", 16).work(4096 * 1024 * 2)
    assert product.product_ops == linear(16, 4096, 1024).flops


def test_a_group_reads_as_much_less_as_it_is_large() -> None:
    def read(num_kv_heads: int) -> float:
        token = DEFAULT.kv.bytes_per_token(num_kv_heads, 128)
        return (
            AttentionCase("decode", Heads(32, num_kv_heads, 128), "bfloat16", 1, 512).work(token).read_bytes
        )

    assert (read(32) / read(8), read(32) / read(1)) == (4, 32)


def test_repetitions_take_at_least_so_long() -> None:
    time = [0.0]

    def run() -> None:
        time[0] += 0.3

    assert repeated(run, 1.0, lambda: time[0]) == pytest.approx(0.3)
    assert time[0] == pytest.approx(1.2)


def test_kv_heads_take_turns_and_others_wait_until_memory_is_free() -> None:
    seen: list[str] = []

    def prepare(case: KernelCase) -> tuple[Callable[[], float], Work]:
        assert isinstance(case, AttentionCase)
        name = f"{case.heads.num_kv_heads}/{case.context_len}"
        seen.append(f"prepare {name}")
        return lambda: (seen.append(name), 2.0)[1], case.work(1)

    cases = [AttentionCase("decode", Heads(4, kv, 16), "int8", 1, n) for n in (8, 16) for kv in (4, 1)]
    results = run_cases(cases, prepare, 1, CaseProgress())
    assert [result.case for result in results] == cases
    assert {result.seconds.median for result in results} == {2.0}
    for length in (8, 16):
        assert seen[:2] == [f"prepare 4/{length}", f"prepare 1/{length}"]
        assert seen[2:6] == [f"1/{length}", f"4/{length}", f"4/{length}", f"1/{length}"]
        del seen[:6]


SHAPE = "--num-heads 4 --num-kv-heads 4 1 --head-dim 32 --context-len 64 128 --prompt-len 32 --batch-size 2"
SMALL = [
    *SHAPE.split(" "),
    "--only",
    "decode",
    "prefill",
    "--rounds",
    "2",
    "--memory",
    "100KB",
    "--threads",
    "1",
]


@pytest.fixture
def quiet(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "measure", classmethod(lambda cls, *args: cls(1e10, 1e11, 1e12, 0.0)))
    monkeypatch.setattr(kernel_command, "adopt_engine_environment", lambda: None)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr(kernel_run, "_MIN_S", 0.0)


@pytest.mark.usefixtures("quiet")
def test_the_command_shows_what_a_group_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, page = tmp_path / "n.json", tmp_path / "p.html"
    kernel_command.run([*SMALL, "--kv-cache-dtype", "float32", "--json", str(numbers), "--html", str(page)])
    tables = json.loads(numbers.read_text())["tables"]
    rows = tables["Attention of decoding"]
    assert [(row["num_kv_heads"], row["context_len"]) for row in rows] == [
        (4, 64),
        (1, 64),
        (4, 128),
        (1, 128),
    ]
    for row in rows:
        assert row["read_bytes"] == 2 * row["context_len"] * 2 * row["num_kv_heads"] * 32 * 4
        assert row["bytes_per_s"] == pytest.approx(row["read_bytes"] / row["seconds"])
        assert row["bytes_per_s_by_query_head"] == pytest.approx(row["bytes_per_s"] * 4 / row["num_kv_heads"])
    assert [row["speedup"] for row in rows[::2]] == [1.0, 1.0]
    assert rows[1]["speedup"] == pytest.approx(rows[0]["seconds"] / rows[1]["seconds"])
    assert len(tables["Attention of prompts"]) == 2
    assert "10.0 GB/s is possible here" in capsys.readouterr().out.replace("\n", " ")
    assert page.read_text().count("<svg") == 2


@pytest.mark.usefixtures("quiet")
def test_shapes_come_from_a_model(tmp_path: Path) -> None:
    from tiny import tiny_config

    tiny_config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    numbers = tmp_path / "n.json"
    words = ["--model", str(tmp_path / "config.json"), "--rounds", "1", "--memory", "10KB", "--threads", "1"]
    kernel_command.run(
        [*words, "--only", "linear", "--tokens", "3", "--weights", "int8", "--json", str(numbers)]
    )
    rows = json.loads(numbers.read_text())["tables"]["Matrix products"]
    assert {row["name"]: (row["inputs"], row["outputs"]) for row in rows} == {
        "qkv": (64, 128), "o": (64, 64), "gate, up": (64, 192), "down": (96, 64)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "cuda"], "there is none here; use --backend native"),
        (["--num-kv-heads", "3"], "do not divide"),
        (["--kv-cache-dtype", "fp8"], "one of bfloat16, int8, float32"),
        (["--weights", "fp8"], "one of bfloat16, int8, int4, float32"),
        (["--only", "linear", "--context-len", "5"], "is for decode, which --only leaves out"),
        (["--model", "demo", "--head-dim", "64"], "the model's"),
        (["--context-len", "0"], "at least 1"),
        (["--hardware", "h100", "--backend", "native"], "leave it out"),
        (["--cpu-isa", "sse2"], "not of this processor"),
    ],
)
@pytest.mark.usefixtures("quiet")
def test_what_makes_no_sense_is_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        kernel_command.run(words)
