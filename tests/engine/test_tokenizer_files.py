"""The settings files beside a tokenizer.json: whatever they hold, they are read or refused."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from gqa_serve.engine.chat_template_files import load_chat_template
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.engine.tokenizer_files import SPECIAL_TOKEN_NAMES, load_directory_tokenizer
from gqa_serve.errors import ModelError

BACKEND = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
BACKEND.decoder = decoders.ByteLevel()
TOKENIZER = BACKEND.to_str()


def load(folder: Path, config: object) -> Tokenizer:
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_directory_tokenizer(folder)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"3": {}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"3": "<s>"}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"3": {"content": 5}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"3": {"content": "\ud800"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ({"additional_special_tokens": 5}, "additional_special_tokens"),
        ({"additional_special_tokens": "<x>"}, "additional_special_tokens"),
        ({"additional_special_tokens": ["<x>", None]}, "additional_special_tokens"),
        ({"extra_special_tokens": {"a": [1]}}, "extra_special_tokens"),
        ({"bos_token": 5}, "bos_token"),
        ({"eos_token": {"text": "x"}}, "eos_token"),
    ],
)
def test_damage_names_the_file_and_the_key(tmp_path: Path, config: object, key: str) -> None:
    with pytest.raises(ModelError, match=rf"(?s)^(?=.*tokenizer_config\.json)(?=.*\b{key}\b)"):
        load(tmp_path, config)


def test_what_the_settings_list_is_added_in_id_order(tmp_path: Path) -> None:
    tokenizer = load(
        tmp_path,
        {
            "added_tokens_decoder": {"10": {"content": "<y>"}, "9": {"content": "<x>", "special": True}},
            "additional_special_tokens": ["<z>", {"content": "<w>"}],
            "bos_token": {"content": "<s>"},
            "eos_token": None,
        },
    )
    spelled = {text: tokenizer.token_id(text) for text in ("<x>", "<y>", "<s>", "<z>", "<w>")}
    assert spelled == {"<x>": 3, "<y>": 4, "<s>": 5, "<z>": 6, "<w>": 7}
    assert tokenizer.bos_token_id == 5
    assert tokenizer.eos_token_id is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["content", "special", "3"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
TOKEN = st.fixed_dictionaries({"content": VALUES}, optional={"special": VALUES, "lstrip": VALUES}) | VALUES
KEYS = (*SPECIAL_TOKEN_NAMES, "additional_special_tokens", "extra_special_tokens")
CONFIG = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(KEYS, TOKEN),
        "added_tokens_decoder": st.dictionaries(st.text("0123456789x", max_size=3), TOKEN, max_size=3)
        | VALUES,
        "add_bos_token": VALUES,
        "chat_template": VALUES,
    },
)


@settings(max_examples=300, deadline=None)
@given(CONFIG | VALUES)
def test_any_settings_are_read_or_refused(config: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.suppress(ModelError):
            tokenizer = load(folder, config)
            assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
            load_chat_template(folder, "{{ messages }}")
            load_chat_template(folder)
