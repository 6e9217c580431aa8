"""The user's text as tokens: found, tokenized once into a memory-mapped cache, cut into sequences.

    texts     doc 0 ............ | doc 1 .... | doc 2 ........................  tokens of all, end to end
    sequences [0 ....... S)[S ....... 2S)[2S ....... 3S) ...                    seq_len each, nothing padded

Owns the cache's files and what a sequence is: its tokens, the token to predict after each, and the lengths of
the texts in it. Knows no model.
Invariant: a token is predicted from tokens of its own document alone, and the first token of a document,
which nothing precedes, from nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gqa_serve.errors import ConfigError

if TYPE_CHECKING:
    from gqa_serve.engine.tokenizer import Tokenizer

IGNORED = -100
"""As a target: nothing to predict here."""
SUFFIXES = (".txt", ".md", ".jsonl")
_PIECE_CHARS = 1 << 18  # of a long text that are tokenized together
_BATCH_PIECES = 64  # that are tokenized in parallel
_TOKENS, _STARTS, _META = "tokens.bin", "starts.bin", "meta.json"
OnBytes = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""


def find_texts(paths: Sequence[Path], outside: Path | None = None) -> list[Path]:
    """The text files among `paths` and in the folders among them, each folder in the order of names; of
    folders only what lies outside of `outside`, the run's own output."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if outside is not None:
                own = outside.resolve()
                found = [file for file in found if not file.resolve().is_relative_to(own)]
            if not found:
                raise ConfigError(f"{path} holds no text: no file ends in {', '.join(SUFFIXES)}.")
            files += found
        elif not path.exists():
            raise ConfigError(f"There is no text {path}; give files or folders to --text.")
        elif path.suffix not in SUFFIXES:
            raise ConfigError(f"{path} does not end in {', '.join(SUFFIXES)}; rename or convert it.")
        else:
            files.append(path)
    return files


def documents(file: Path) -> Iterator[tuple[str, bool]]:
    """(text, whether it begins a document), long documents in pieces that end with a line."""
    try:
        with file.open(encoding="utf-8") as stream:
            if file.suffix == ".jsonl":
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield from _pieces(_text_of(file, number, line))
            else:
                yield from _read_pieces(stream.read)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error


def _text_of(file: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file}, line {number}: not valid JSON ({error}).") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f'{file}, line {number}: must be an object with a "text".')
    return text


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    position = 0

    def read(size: int) -> str:
        nonlocal position
        position += size
        return text[position - size : position]

    return _read_pieces(read)


def _read_pieces(read: Callable[[int], str]) -> Iterator[tuple[str, bool]]:
    """One document, by pieces of about _PIECE_CHARS; nothing for an empty one."""
    first, rest = True, ""
    while True:
        more = read(_PIECE_CHARS)
        rest += more
        cut = len(rest) if not more else rest.rfind("\n") + 1
        if cut and (not more or len(rest) >= _PIECE_CHARS):
            yield rest[:cut], first
            first, rest = False, rest[cut:]
        if not more:
            return


@dataclass(frozen=True)
class PackedSequence:
    """inputs, targets: [S] int64, targets[i] the token after inputs[i] or IGNORED. `lens`: of its texts."""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    lens: list[int]


class Corpus:
    """Tokenized texts in a folder: memory-mapped, so that text of any size costs no memory."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        self.identity: str = meta["identity"]
        self.tokens = np.memmap(folder / _TOKENS, dtype=meta["dtype"], mode="r")
        self.starts = np.fromfile(folder / _STARTS, dtype=np.int64)  # of documents, ascending

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    def num_sequences(self, seq_len: int) -> int:
        """Whole ones; each needs one token more, its last target."""
        return max(0, (len(self.tokens) - 1) // seq_len)

    def sequence(self, index: int, seq_len: int) -> PackedSequence:
        begin, end = index * seq_len, (index + 1) * seq_len
        tokens = self.tokens[begin : end + 1].astype(np.int64)
        first, last = np.searchsorted(self.starts, [begin + 1, end + 1])
        cuts = self.starts[first:last] - begin  # places 1 .. S at which a document begins
        targets = tokens[1:].copy()
        targets[cuts - 1] = IGNORED
        inside = [int(cut) for cut in cuts if cut < seq_len]
        lens = [b - a for a, b in itertools.pairwise([0, *inside, seq_len])]
        return PackedSequence(tokens[:-1], targets, lens)


def digest(tokenizer: Tokenizer) -> str:
    """Of a vocabulary: every entry by id, and the end of a text."""
    total = hashlib.sha256(str(tokenizer.eos_token_id).encode())
    for token_id in range(tokenizer.vocab_size):
        total.update(tokenizer.token(token_id).encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()


def identity_of(files: Sequence[Path], tokenizer: Tokenizer) -> str:
    """Names the texts' contents and the tokenizer: the same for the same tokens."""
    total = hashlib.sha256(digest(tokenizer).encode())
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
        total.update(file.suffix.encode() + content.digest())
    return total.hexdigest()


def build_corpus(folder: Path, files: Sequence[Path], tokenizer: Tokenizer, on_bytes: OnBytes) -> Corpus:
    """The corpus of `files` in `folder`, tokenized unless it is there already.

    Each document is encoded as the tokenizer begins a text, and ends with the end-of-sequence token if the
    tokenizer has one.
    """
    identity = identity_of(files, tokenizer)
    meta = folder / _META
    if meta.exists() and json.loads(meta.read_text(encoding="utf-8"))["identity"] == identity:
        return Corpus(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta.unlink(missing_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with (folder / _TOKENS).open("wb") as stream:
        starts = _write_tokens(stream, files, tokenizer, dtype, on_bytes)
    np.asarray(starts, dtype=np.int64).tofile(folder / _STARTS)
    if not starts:
        raise ConfigError("The text is empty.")
    partial = folder / f"{_META}.partial"
    facts: dict[str, Any] = {"identity": identity, "dtype": dtype}
    partial.write_text(json.dumps(facts), encoding="utf-8")
    os.replace(partial, meta)  # written last: what is there is whole
    return Corpus(folder)


def _write_tokens(
    stream: BinaryIO, files: Sequence[Path], tokenizer: Tokenizer, dtype: str, on_bytes: OnBytes
) -> list[int]:
    """Write all tokens; where documents start."""
    total_bytes = sum(file.stat().st_size for file in files)
    eos = tokenizer.eos_token_id
    starts: list[int] = []
    count = done_bytes = 0
    ends_open = False  # whether the document under way still needs its end

    def write(ids: list[int]) -> None:
        nonlocal count
        stream.write(np.asarray(ids, dtype=dtype).tobytes())
        count += len(ids)

    def encode(piece: tuple[str, bool]) -> list[int]:
        return tokenizer.encode(piece[0], add_special_tokens=piece[1])

    with ThreadPoolExecutor() as pool:
        for file in files:
            pieces = documents(file)
            while batch := list(itertools.islice(pieces, _BATCH_PIECES)):
                for (text, first), ids in zip(batch, pool.map(encode, batch), strict=True):
                    if first:
                        if ends_open and eos is not None:
                            write([eos])
                        starts.append(count)
                    ends_open = not (ids and ids[-1] == eos)
                    write(ids)
                    done_bytes += len(text.encode("utf-8", "surrogatepass"))
                on_bytes(min(done_bytes, total_bytes), total_bytes)
    if ends_open and eos is not None:
        write([eos])
    on_bytes(total_bytes, total_bytes)
    return starts


def spread(total: int, count: int) -> list[int]:
    """`count` of 0 .. total - 1, evenly over them."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


class Order:
    """Which sequences are trained on, in which order, and which are held out.

    Held out: `num_held_out` sequences that lie evenly over the corpus. The others are shuffled anew for each
    epoch, by (seed, epoch) alone: the place of a run in its data is one number, how many sequences it has
    used.
    """

    def __init__(self, num_sequences: int, num_held_out: int, seed: int) -> None:
        self.held_out = spread(num_sequences, num_held_out)
        held_out = set(self.held_out)
        self.trained = np.array([i for i in range(num_sequences) if i not in held_out], dtype=np.int64)
        self.seed = seed
        self._epoch = -1
        self._shuffled = self.trained

    def take(self, position: int, count: int) -> list[int]:
        """Sequences number position .. position + count - 1 of the run."""
        size = len(self.trained)
        return [
            int(self._epoch_order(place // size)[place % size]) for place in range(position, position + count)
        ]

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.trained)
        return self._shuffled
