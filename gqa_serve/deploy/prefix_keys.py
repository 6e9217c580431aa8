"""The beginning of a request's prompt as a chain of keys: equal keys, equal text up to there.

Owns which fields of a body make the prompt, in the order in which templates put them, and where the chain is
cut. Works on the body as it was sent, without a template and a tokenizer: a client that continues a
conversation sends the same bytes again and more behind them. Invariant: the keys of a body whose prompt
begins as another's does begin with the same keys, in any process. A body that cannot be read has no keys;
saying what is wrong with it is up to the application.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

_FIRST_BYTES = 256  # about 64 tokens
_FINE_BYTES = 4096  # up to here every 256 bytes, then an eighth further each time
_KEY_BYTES = 8


class _Body(msgspec.Struct):
    """The fields of all endpoints that make the prompt; `cache_salt` keeps caches apart."""

    cache_salt: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Body)


def prefix_keys(body: bytes) -> tuple[bytes, ...]:
    """The keys of a JSON body, from the shortest beginning to the longest; () if it has none."""
    try:
        fields = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError):  # of text that is no UTF-8, too
        return ()
    text = b"\0".join(bytes(raw) for raw in msgspec.structs.astuple(fields)).lstrip(b"\0")
    hasher = hashlib.blake2b(digest_size=_KEY_BYTES)
    keys = []
    begin = 0
    for end in _cuts(len(text)):
        hasher.update(text[begin:end])
        keys.append(hasher.digest())
        begin = end
    return tuple(keys)


def _cuts(length: int) -> Iterator[int]:
    """Where keys end: the same places in every text, so that texts of any lengths compare."""
    end = _FIRST_BYTES
    while end <= length:
        yield end
        end += max(_FIRST_BYTES, end // 8) if end >= _FINE_BYTES else _FIRST_BYTES
