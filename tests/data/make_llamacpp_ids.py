"""Regenerates llamacpp_ids.json: what llama.cpp makes of the hard texts.

Run by hand, in an environment with `llama-cpp-python` and `gguf` (neither is needed to run the tests):

    python tests/data/make_llamacpp_ids.py [SMOLLM2.gguf]

The vocabularies are this folder's own (small_bpe.json, small_spm.json), so one small file covers every
pre-tokenizer name; the demo model's file, if given, is recorded too. For each vocabulary and text: ids
without special tokens and control tokens read as text, then ids with both. A name whose ids are those of an
earlier name is recorded as that name.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import gguf
from llama_cpp import Llama

DATA = Path(__file__).parent
TEXTS = json.loads((DATA / "hard_texts.json").read_text(encoding="utf-8"))


def write_gguf(path: Path, vocabulary: dict, *, pre: str | None, **flags: bool) -> None:
    """A model file with this vocabulary and no weights, as llama.cpp's vocab-only mode accepts."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary["tokens"]))
    writer.add_tokenizer_model(vocabulary["model"])
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    writer.add_bos_token_id(vocabulary["bos"])
    writer.add_eos_token_id(vocabulary["eos"])
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def llamacpp_ids(path: Path) -> list[list[list[int]]]:
    model = Llama(str(path), vocab_only=True, verbose=False)
    return [
        [
            model.tokenize(text.encode(), add_bos=False, special=False),
            model.tokenize(text.encode(), add_bos=True, special=True),
        ]
        for text in TEXTS
    ]


def main() -> None:
    from gqa_serve.engine.pre_tokenizers import PRE_TOKENIZERS

    bpe = json.loads((DATA / "small_bpe.json").read_text(encoding="utf-8"))
    spm = json.loads((DATA / "small_spm.json").read_text(encoding="utf-8"))
    recorded = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        for name in PRE_TOKENIZERS:
            write_gguf(file, bpe, pre=name)
            ids = llamacpp_ids(file)
            recorded[f"bpe/{name}"] = next((known for known, value in recorded.items() if value == ids), ids)
        write_gguf(file, spm, pre="default")
        recorded["spm/prefix"] = llamacpp_ids(file)
        write_gguf(file, spm, pre="default", add_space_prefix=False, add_bos_token=False, add_eos_token=True)
        recorded["spm/no_prefix"] = llamacpp_ids(file)
    for demo in sys.argv[1:]:
        recorded["demo"] = llamacpp_ids(Path(demo))
    text = json.dumps(recorded, separators=(",", ":")).replace('"bpe', '\n"bpe').replace('"spm', '\n"spm')
    (DATA / "llamacpp_ids.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
