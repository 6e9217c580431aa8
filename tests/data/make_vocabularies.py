"""Regenerates small_bpe.json, small_spm.model, small_spm.json and sentencepiece_ids.json.

Run by hand, in an environment with `tokenizers` and `sentencepiece` (the tests need only the results):

    python tests/data/make_vocabularies.py

Both vocabularies are trained on hard_texts.json. The byte-level one is trained *without* splitting text
into words, so that its merges cross every boundary a pre-tokenizer draws: a wrong boundary changes ids.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

DATA = Path(__file__).parent
TEXTS = json.loads((DATA / "hard_texts.json").read_text(encoding="utf-8"))
CONTROL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
USER_DEFINED = ["<tool>", "    ", "\n\n\n"]
UNMERGED = ["Ġcamel", "StraÃŁe", "Ġunmergeable"]  # vocabulary entries that no merge produces


def make_bpe() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = [text for text in TEXTS if not any(name in text for name in CONTROL + USER_DEFINED[:1])]
    tokenizer.train_from_iterator(corpus * 3, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)
    merges = [" ".join(merge) for merge in trained["merges"]]
    extra = [token for token in UNMERGED if token not in tokens]
    names = CONTROL + USER_DEFINED
    vocabulary = {
        "model": "gpt2",
        "tokens": tokens + extra + names,
        "types": [1] * len(tokens + extra) + [3] * len(CONTROL) + [4] * len(USER_DEFINED),
        "merges": merges,
        "bos": len(tokens + extra),
        "eos": len(tokens + extra) + 2,
    }
    write("small_bpe.json", vocabulary)


def make_spm() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n") if line] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_whitespace=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>"],
        control_symbols=["<|im_end|>"],
        minloglevel=2,
    )
    (DATA / "small_spm.model").write_bytes(model.getvalue())
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    write(
        "small_spm.json",
        {
            "model": "llama",
            "tokens": [piece.piece for piece in proto.pieces],
            "scores": [piece.score for piece in proto.pieces],
            "types": [piece.type for piece in proto.pieces],
            "bos": 1,
            "eos": 2,
        },
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    write("sentencepiece_ids.json", [processor.encode(text) for text in TEXTS])


def write(name: str, value: object) -> None:
    (DATA / name).write_text(
        json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    make_bpe()
    make_spm()
