"""The trainable model computes transformers' logits and gradients, and writes back what it read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_model

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.engine.weights.safetensors_writer import TensorSpec, write_tensors
from gqa_serve.workbench.uptrain.backend import TrainingBackend
from gqa_serve.workbench.uptrain.corpus import IGNORED, Order, PackedSequence
from gqa_serve.workbench.uptrain.losses import Distillation
from gqa_serve.workbench.uptrain.model import TrainableModel
from gqa_serve.workbench.uptrain.options import Trained
from gqa_serve.workbench.uptrain.schedule import Schedule
from gqa_serve.workbench.uptrain.trainer import Trainer, TrainerSettings

CPU = torch.device("cpu")
LENS = [37, 20, 20, 1, 29]


def load(path: Path, trained: Trained = "all", *, recompute: bool = False) -> TrainableModel:
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
    return TrainableModel(checkpoint, config, trained=trained, device=CPU, recompute=recompute)


def texts(seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=generator) for length in LENS]


def weighted(logits: torch.Tensor) -> torch.Tensor:
    """A scalar of all logits whose gradient differs from number to number. logits [T, V]."""
    targets = torch.arange(logits.shape[0]) * 7 % logits.shape[1]
    return F.cross_entropy(logits, targets, reduction="sum")


def oracle(model: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """transformers' logits of each text by itself, and the gradients of their weighted sum."""
    all_logits = [model(text[None], use_cache=False).logits[0].float() for text in texts()]
    weighted(torch.cat(all_logits)).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [logits.detach() for logits in all_logits], grads


def gradients(model: TrainableModel) -> dict[str, torch.Tensor]:
    """By the checkpoint's names."""
    found: dict[str, list[torch.Tensor]] = {}
    for piece in model.pieces:
        assert piece.parameter.grad is not None, piece.key
        found.setdefault(piece.name, []).append(piece.parameter.grad)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(
    family: str, heads: tuple[int, int], tmp_path: Path
) -> None:
    hidden = 64 if heads[0] == 4 else 60
    reference = tiny_model(
        family, hidden_size=hidden, num_attention_heads=heads[0], num_key_value_heads=heads[1]
    )
    reference.save_pretrained(tmp_path)
    want_logits, want = oracle(reference)
    for recompute in (False, True):
        model = load(tmp_path, recompute=recompute)
        logits = model.logits(model.hidden(torch.cat(texts()), LENS))
        assert (logits - torch.cat(want_logits)).abs().max() < 1e-4
        weighted(logits).backward()
        got = gradients(model)
        assert got.keys() == want.keys()
        for name, grad in want.items():
            assert (got[name] - grad).abs().max() < 1e-3 * grad.abs().max() + 1e-5, name


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "qwen2"])
def test_an_untrained_model_is_written_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    layout = {name: TensorSpec(shape, dtype) for name, shape, dtype in model.layout()}
    (tmp_path / "out").mkdir()
    write_tensors(tmp_path / "out", layout, model.tensors())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_only_what_is_trained_has_gradients(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    for trained in ("attention", "kv"):
        model = load(tmp_path, trained)
        weighted(model.logits(model.hidden(torch.cat(texts()), LENS))).backward()
        for piece in model.pieces:
            expected = piece.projection in ("k", "v") if trained == "kv" else ".self_attn." in piece.name
            assert (piece.parameter.grad is not None) == expected, piece.key
        kv = [piece for piece in model.trained_pieces() if piece.projection in ("k", "v")]
        assert len(kv) == 4 * (4 if family == "qwen2" else 2)


def test_norms_that_are_stored_minus_one_are_not_rounded_after_the_one_is_added() -> None:
    backend = TrainingBackend(norm_plus_one=True)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-0.013, 0.017, 8).bfloat16()
    want = F.rms_norm(x, (8,), weight.float() + 1, 1e-6)
    assert torch.allclose(backend.rms_norm(x, weight, 1e-6), want, rtol=1e-5)


class _Texts:
    """Sequences of two texts each, the second of another length in each sequence."""

    def sequence(self, index: int, seq_len: int) -> PackedSequence:
        tokens = texts(index)[0].repeat(2)[: seq_len + 1].numpy()
        cut = 3 + 5 * index
        targets = tokens[1:].copy()
        targets[cut - 1] = IGNORED
        return PackedSequence(tokens[:-1], targets, [cut, seq_len - cut])


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_steps_are_those_of_transformers_and_adamw_by_hand(family: str, tmp_path: Path) -> None:
    """Packed texts, micro batches, the mean over a batch's tokens, clipping, decay and the learning rate."""
    reference, taught = tiny_model(family), tiny_model(family, seed=1)
    reference.save_pretrained(tmp_path / "student")
    taught.save_pretrained(tmp_path / "teacher")
    schedule = Schedule(peak=1e-2, num_steps=3, warmup_steps=1, final_share=0.1)
    mix = Distillation(0.3, 2.0)
    settings = TrainerSettings(24, 4, 2, schedule, 0.1, 0.5, torch.float32, mix)
    trainer = Trainer(
        load(tmp_path / "student"), load(tmp_path / "teacher", "none"), _Texts(), Order(4, 0, 0), settings
    )
    results = [trainer.step(index) for index in range(3)]

    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in reference.named_parameters()}
    for index, result in enumerate(results, start=1):
        total, count = torch.zeros(()), 0
        for sequence in (_Texts().sequence(i, 24) for i in range(4)):
            for begin, end in ((0, sequence.lens[0]), (sequence.lens[0], 24)):
                ids = torch.from_numpy(sequence.inputs[begin:end])[None]
                targets = torch.from_numpy(sequence.targets[begin:end])
                known = targets != IGNORED
                log_q = model_logits(reference, ids)[known]
                log_p = model_logits(taught, ids)[known].detach()
                entropy = -log_q.log_softmax(-1)[range(int(known.sum())), targets[known]].sum()
                p, q = (log_p / 2).softmax(-1), (log_q / 2).softmax(-1)
                total = total + 0.7 * entropy + 0.3 * 4 * (p * (p / q).log()).sum()
                count += int(known.sum())
        assert count == 4 * 23  # the second text's first token is predicted from nothing
        loss = total / count
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        reference.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in reference.parameters()]).sum().sqrt().item()
        assert result.gradient_norm == pytest.approx(norm, rel=1e-3)
        assert norm > 0.5
        rate = (1e-2, 1e-2, 1e-3)[index - 1]
        assert result.learning_rate == pytest.approx(rate)
        with torch.no_grad():
            for name, p in reference.named_parameters():
                grad = p.grad * 0.5 / norm
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * grad)
                second.mul_(0.95).add_(0.05 * grad.square())
                p.mul_(1 - rate * (0.1 if p.dim() == 2 else 0.0))
                p.sub_(rate * (first / (1 - 0.9**index)) / ((second / (1 - 0.95**index)).sqrt() + 1e-8))
    trained = dict(trainer.model.tensors())
    for name, parameter in reference.named_parameters():
        off = (trained[name] - parameter).abs()
        # Where a gradient is nearly zero its sign, and with it a whole step, is the rounding's.
        assert off.mean() < 1e-4, name


def model_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, use_cache=False).logits[0]
    return logits
