"""The parts of uptraining by themselves: text, order, budget, schedule, losses, states."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_config, tiny_model
from tokenizers import decoders, models, pre_tokenizers

from gqa_serve.cli import main
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import family_of
from gqa_serve.engine.models.family import weight_slots
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import ConfigError, ModelError
from gqa_serve.workbench.uptrain import losses as losses_module
from gqa_serve.workbench.uptrain.budget import (
    Budget,
    Memory,
    Parameters,
    parse_count,
    training_flops_per_token,
    write_count,
)
from gqa_serve.workbench.uptrain.corpus import IGNORED, Corpus, Order, build_corpus, documents, find_texts
from gqa_serve.workbench.uptrain.journal import Journal, read_journal
from gqa_serve.workbench.uptrain.losses import Distillation, cross_entropy, divergence, summed_losses
from gqa_serve.workbench.uptrain.model import FreshTensors, TrainableModel, first_names
from gqa_serve.workbench.uptrain.options import Trained
from gqa_serve.workbench.uptrain.schedule import Schedule
from gqa_serve.workbench.uptrain.state import State, StateFolder

END = 256


def byte_tokenizer() -> Tokenizer:
    """Ids 0-255 for bytes (in the order of the alphabet), 256 for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<end>"})


def build(folder: Path, files: list[Path]) -> Corpus:
    return build_corpus(folder, files, byte_tokenizer(), lambda done, total: None)


# --- text --------------------------------------------------------------------------------------------------


def test_texts_are_found_and_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("b", encoding="utf-8")
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    files = find_texts([tmp_path])
    assert [file.name for file in files] == ["a.txt", "c.jsonl", "b.md"]
    assert [list(documents(file)) for file in files] == [
        [("a", True)],
        [("one", True), ("two", True)],
        [("b", True)],
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "ok"}\nnot json\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "ok"}\n', 'line 1: must be an object with a "text"'),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt", b"", "The text is empty"),
        ("a.pdf", b"x", "does not end in"),
    ],
)
def test_bad_texts_are_refused_by_name(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        build(tmp_path / "out", find_texts([tmp_path / name]))


def test_a_long_document_is_read_in_pieces_and_stays_one(tmp_path: Path) -> None:
    lines = [f"line {index} of a long text, with an é in it\n" for index in range(20000)]
    (tmp_path / "long.txt").write_text("".join(lines), encoding="utf-8")
    pieces = list(documents(tmp_path / "long.txt"))
    assert len(pieces) > 2
    assert "".join(text for text, _ in pieces) == "".join(lines)
    assert [first for _, first in pieces] == [True] + [False] * (len(pieces) - 1)
    corpus = build(tmp_path / "out", [tmp_path / "long.txt"])
    assert byte_tokenizer().decode(corpus.tokens.tolist()) == "".join(lines)
    assert corpus.tokens[-1] == END
    assert corpus.num_documents == 1


@settings(max_examples=40)
@given(
    texts=st.lists(st.text("abc\n", min_size=1, max_size=30), min_size=1, max_size=12),
    seq_len=st.integers(2, 9),
)
def test_sequences_hold_every_token_and_never_look_across_documents(
    texts: list[str], seq_len: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = build(folder / "out", [folder / "t.jsonl"])
    tokenizer = byte_tokenizer()
    stream = list(itertools.chain.from_iterable([*tokenizer.encode(text), END] for text in texts))
    assert corpus.tokens.tolist() == stream
    owner = list(itertools.chain.from_iterable([i] * (len(text) + 1) for i, text in enumerate(texts)))
    assert corpus.num_sequences(seq_len) == (len(stream) - 1) // seq_len
    for index in range(corpus.num_sequences(seq_len)):
        sequence = corpus.sequence(index, seq_len)
        begin = index * seq_len
        places = range(begin, begin + seq_len)
        assert sequence.inputs.tolist() == stream[begin : begin + seq_len]
        assert sequence.targets.tolist() == [
            stream[p + 1] if owner[p + 1] == owner[p] else IGNORED for p in places
        ]
        assert sequence.lens == [len(list(group)) for _, group in itertools.groupby(owner[p] for p in places)]


def test_text_is_tokenized_once_and_again_when_it_changes(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text", encoding="utf-8")
    first = build(tmp_path / "out", [text])
    written = (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns
    os.utime(text)
    assert build(tmp_path / "out", [text]).identity == first.identity
    assert (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns == written
    text.write_text("some tex!", encoding="utf-8")
    assert build(tmp_path / "out", [text]).identity != first.identity


@given(count=st.integers(2, 200), share=st.floats(0, 0.5), seed=st.integers(0, 99), cut=st.integers(0, 300))
def test_each_epoch_takes_every_sequence_once_in_an_order_of_its_own(
    count: int, share: float, seed: int, cut: int
) -> None:
    held_out = int(share * count)
    order = Order(count, held_out, seed)
    size = len(order.trained)
    assert len(order.held_out) == held_out
    assert sorted([*order.trained.tolist(), *order.held_out]) == list(range(count))
    two = order.take(0, 2 * size)
    assert sorted(two[:size]) == sorted(two[size:]) == order.trained.tolist()
    cut = min(cut, 2 * size)
    again = Order(count, held_out, seed)
    assert again.take(cut, 2 * size - cut) == two[cut:]


def test_the_seed_and_the_epoch_shuffle() -> None:
    orders = [Order(100, 0, seed) for seed in (0, 1)]
    epochs = [order.take(begin, 100) for order in orders for begin in (0, 100)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


# --- budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("500k", 500_000), ("1.5B", 1_500_000_000), ("2T", 2 * 10**12), ("1,000", 1000), ("3e6", 3 * 10**6)],
)
def test_counts_are_read_and_written(text: str, count: int) -> None:
    assert parse_count(text) == count
    assert parse_count(write_count(count)) == count


@pytest.mark.parametrize("text", ["", "many", "-5", "0", "1.5 X"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like"):
        parse_count(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    model = tiny_model(family)
    config = ModelConfig.from_hf({**tiny_config(family).to_dict(), "architectures": [type(model).__name__]})
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    counts = Parameters.of(config, "all")
    assert counts.total == counts.trained == sum(sizes.values())
    embedding = 0 if config.tie_embeddings else sizes["model.embed_tokens.weight"]
    assert counts.multiplied == counts.total - embedding
    attention = sum(size for name, size in sizes.items() if ".self_attn." in name)
    assert Parameters.of(config, "attention").trained == attention


def test_the_budget_is_the_recipe() -> None:
    parameters = Parameters(total=1000, multiplied=900, trained=1000)
    known = Budget.choose(parameters, tokens=None, original_tokens=2 * 10**12, alpha=0.05)
    assert known.num_tokens == 10**11
    assumed = Budget.choose(parameters, tokens=None, original_tokens=None, alpha=0.05)
    assert assumed.num_tokens == 0.05 * 20 * 1000
    assert "assumed" in assumed.source
    assert Budget.choose(parameters, tokens=7, original_tokens=None, alpha=0.05).num_tokens == 7


def test_operations_are_counted_as_torch_counts_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama", num_hidden_layers=2)
    config = ModelConfig.from_hf({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    tokens = torch.arange(64)[None]
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    parameters = Parameters.of(config, "all")
    causal = training_flops_per_token(config, parameters, 64) * 64
    # transformers' eager attention computes the masked half too, ours leaves it out; norms are no products.
    masked = 3 * 4 * config.num_heads * config.head_dim * config.num_layers * (64 - 65 / 2) * 64
    norms = 6 * 64 * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert causal + masked - norms == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_what_is_not_trained_costs_no_gradient_of_its_own() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    raw = tiny_config("llama", num_hidden_layers=16).to_dict()
    config = ModelConfig.from_hf({**raw, "architectures": ["LlamaForCausalLM"]})
    family = family_of(config.architecture)
    source = FreshTensors(config, first_names(weight_slots(config, family, "model.")), 0)
    counts: dict[str, tuple[float, float]] = {}
    kinds: tuple[Trained, ...] = ("all", "attention", "kv")
    for trained in kinds:
        model = TrainableModel(source, config, trained=trained, device=torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            model.logits(model.hidden(torch.arange(64), [64])).sum().backward()
        parameters = Parameters.of(config, trained)
        counts[trained] = counter.get_total_flops(), 64 * training_flops_per_token(config, parameters, 64)
    # The engine joins Q, K and V in one product, so Q's gradient comes along with those of K and V.
    queries = 2 * 64 * config.hidden_size * config.num_heads * config.head_dim * config.num_layers
    for trained, joined in (("attention", 0), ("kv", queries)):
        measured, counted = (counts["all"][i] - counts[trained][i] for i in (0, 1))
        assert measured + joined == pytest.approx(counted, rel=0.05)


def test_memory_counts_sixteen_bytes_of_a_trained_parameter() -> None:
    config = ModelConfig.from_hf({**tiny_config("llama").to_dict(), "architectures": ["LlamaForCausalLM"]})
    parameters = Parameters.of(config, "all")
    sizes = {}
    for recompute in (False, True):
        memory = Memory.of(config, parameters, micro_tokens=512, number_bytes=4, recompute=recompute)
        assert memory.weights + memory.gradients + memory.optimizer == 16 * parameters.total
        sizes[recompute] = memory.activations
    assert sizes[True] < sizes[False]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_kv_heads", [8, 2])
def test_activations_are_about_what_autograd_keeps(num_kv_heads: int, recompute: bool) -> None:
    raw = tiny_config("llama", hidden_size=128, intermediate_size=352, num_attention_heads=8).to_dict()
    raw.update(architectures=["LlamaForCausalLM"], num_key_value_heads=num_kv_heads)
    config = ModelConfig.from_hf(raw)
    family = family_of(config.architecture)
    source = FreshTensors(config, first_names(weight_slots(config, family, "model.")), 0)
    model = TrainableModel(source, config, trained="all", device=torch.device("cpu"), recompute=recompute)
    own = {piece.parameter.untyped_storage().data_ptr() for piece in model.pieces}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(torch.arange(256) % 100, [256])
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    memory = Memory.of(
        config, Parameters.of(config, "all"), micro_tokens=256, number_bytes=4, recompute=recompute
    )
    estimate = memory.activations - 256 * config.vocab_size * 12  # without the logits
    if recompute:  # while it goes back, one layer's are there as well
        estimate -= _one_layer(config)
    assert hidden.shape == (256, 128)
    assert 0.8 * measured < estimate < 1.4 * measured


def _one_layer(config: ModelConfig) -> int:
    """What the estimate has for one layer of 256 tokens."""
    parameters = Parameters.of(config, "all")
    whole = Memory.of(config, parameters, micro_tokens=256, number_bytes=4, recompute=False)
    return (whole.activations - 256 * config.vocab_size * 12) // config.num_layers


def test_budget_only_answers_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**tiny_config("llama").to_dict(), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out.json"
    words = [
        "uptrain",
        "--model",
        str(tmp_path),
        "--budget-only",
        "--original-tokens",
        "1M",
        "--json",
        str(out),
    ]
    assert main(words) == 0
    facts = json.loads(out.read_text())
    assert facts["steps"] == math.ceil(50_000 / (16 * 256))
    assert "0.05 x 1 M tokens" in " ".join(capsys.readouterr().out.split())


# --- schedule and losses -----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_follows_half_a_cosine() -> None:
    schedule = Schedule(peak=1.0, num_steps=111, warmup_steps=10, final_share=0.1)
    rates = [schedule.rate(step) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert Schedule(2.0, 1, 0, 0.1).rate(0) == 2.0


def test_divergence_is_that_of_the_formula_in_float64() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(9, 17) * 3, torch.randn(9, 17) * 3
    targets = torch.arange(9)
    targets[4] = IGNORED
    temperature = 1.7
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    rows = (p * (p.log() - q.log())).sum(-1)
    expected = (rows.sum() - rows[4]) * temperature**2
    assert divergence(student, teacher, targets, temperature).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert abs(divergence(student, student, targets, temperature).item()) < 1e-5
    chosen = [i for i in range(9) if i != 4]
    entropy = -student.double().log_softmax(-1)[chosen, chosen].sum()
    assert cross_entropy(student, targets).item() == pytest.approx(entropy.item(), rel=1e-6)


@pytest.mark.parametrize("distilled", [False, True])
def test_losses_in_parts_are_the_losses_of_the_whole(
    distilled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head, taught_head = torch.randn(50, 8, requires_grad=True), torch.randn(50, 6)
    hidden, taught = torch.randn(33, 8, requires_grad=True), torch.randn(33, 6)
    targets = torch.randint(0, 50, (33,))
    targets[::5] = IGNORED
    teacher = (taught, lambda x: F.linear(x, taught_head), Distillation(0.3, 2.0)) if distilled else None
    results = []
    for most in (1 << 20, 50 * 7):
        monkeypatch.setattr(losses_module, "MAX_LOGITS", most)
        found = summed_losses(hidden, targets, lambda x: F.linear(x, head), 50, teacher)
        found[0].backward()
        assert hidden.grad is not None
        assert head.grad is not None
        results.append([*(loss.detach() for loss in found), hidden.grad.clone(), head.grad.clone()])
        hidden.grad = head.grad = None
    for whole, parts in zip(*results, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)
    minimised, entropy, distance = results[0][:3]
    expected = 0.7 * entropy + 0.3 * distance if distilled else entropy
    assert torch.allclose(minimised, expected)


# --- states and journal ------------------------------------------------------------------------------------


def state_of(step: int) -> State:
    return State(
        step, {"w": torch.full((2,), float(step))}, {"w|step": torch.tensor(float(step))}, {"seconds": 1.5}
    )


def test_states_are_kept_whole_and_the_last_few(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", keep=2)
    assert folder.load() is None
    for step in (3, 6, 9):
        folder.save(state_of(step))
    assert folder.steps() == [6, 9]
    (tmp_path / "state" / "step-00000012.partial").mkdir()  # what a kill leaves behind
    loaded = folder.load()
    assert loaded is not None
    assert loaded.step == 9
    assert loaded.facts["seconds"] == 1.5
    assert torch.equal(loaded.masters["w"], torch.full((2,), 9.0))
    folder.save(state_of(12))
    assert folder.steps() == [9, 12]


def test_a_full_disk_is_an_error_with_a_cure_and_leaves_the_states_before(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", keep=2)
    folder.save(state_of(3))
    large = State(6, {"w": torch.zeros(100_000)}, {}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"File too large.*free space and run the same command"):
            folder.save(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "state") == ["step-00000003"]
    folder.save(large)
    assert folder.steps() == [3, 6]


def test_a_damaged_state_is_refused_with_the_cure(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", keep=2)
    path = folder.save(state_of(3))
    (path / "masters.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="delete it to go on from the state before"):
        folder.load()


def test_the_journal_drops_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    journal = Journal(path, 0)
    for step in range(1, 6):
        journal.write({"step": step, "divergence": None})
    journal.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')  # a kill in the middle of a line
    assert [entry["step"] for entry in read_journal(path)] == [1, 2, 3, 4, 5]
    Journal(path, 3).close()
    assert read_journal(path) == [{"step": step} for step in (1, 2, 3)]
