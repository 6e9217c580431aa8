"""The text that is scored: the user's files, or a short one of our own.

Owns reading, cutting to size, and which bytes of a text belong together in a block. Knows no model.
Invariant: blocks are ranges of bytes of a document, so they are the same for every tokenizer and can be
compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from gqa_serve.errors import ConfigError

BUILTIN = "built-in"
BLOCK_BYTES = 2048
MANY_DOCUMENTS = 20
"""With so many documents each is a block: passages of one document are not independent of each other."""

_PIECE_BYTES = 16 * 1024
_RULE = "\n=====\n"


@dataclass(frozen=True)
class Document:
    """A text that is scored by itself. `name` tells where it comes from."""

    name: str
    text: str
    source: str = ""
    """The file that this is a piece of, else empty."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the text as UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Documents, and how many bytes of one make a block of the bootstrap; None: each document is one."""

    documents: Sequence[Document]
    block_bytes: int | None
    left_out_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        return sum(document.num_bytes for document in self.documents)

    def num_blocks(self, document: int) -> int:
        """Blocks of a document; the last is up to twice as long as the others."""
        return (
            1 if self.block_bytes is None else max(1, self.documents[document].num_bytes // self.block_bytes)
        )

    def block_in(self, document: int, offset: int) -> int:
        """The block of a document, counted from 0, that its byte `offset` lies in."""
        if self.block_bytes is None:
            return 0
        return min(offset // self.block_bytes, self.num_blocks(document) - 1)


def read_corpus(paths: Sequence[Path], max_bytes: int, flag: str = "--text") -> Corpus:
    """The files, or our own text if there are none, of which at most about `max_bytes` are kept.

    What is too long is cut into pieces at line ends or spaces, and pieces that lie evenly over the whole are
    kept. `flag` named them. Raises ConfigError for a file that can't be read, is not UTF-8, or holds nothing.
    """
    documents = [_read(path, flag) for path in paths] if paths else builtin_documents()
    total = sum(document.num_bytes for document in documents)
    kept = documents if total <= max_bytes else _thin(documents, max_bytes)
    many = len({document.source or document.name for document in kept}) >= MANY_DOCUMENTS
    left_out = total - sum(document.num_bytes for document in kept)
    return Corpus(kept, None if many else BLOCK_BYTES, left_out)


def builtin_documents() -> list[Document]:
    """Short passages on many subjects, written for this package."""
    text = resources.files(__package__).joinpath("passages.txt").read_text(encoding="utf-8")
    passages = [passage.strip() for passage in text.split(_RULE)]
    return [Document(f"passage {number}", passage) for number, passage in enumerate(passages, 1)]


def _read(path: Path, flag: str) -> Document:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name its files, e.g. {flag} {path}/book.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {path} is not UTF-8 text (byte {error.start}); convert it.") from error
    if not text.strip():
        raise ConfigError(f"{flag} {path} holds no text.")
    return Document(str(path), text)


def _thin(documents: Sequence[Document], max_bytes: int) -> list[Document]:
    """Pieces of the documents, evenly spaced, of about `max_bytes` together."""
    size = min(_PIECE_BYTES, max(256, max_bytes // MANY_DOCUMENTS))
    pieces = [piece for document in documents for piece in _cut(document, size)]
    total = sum(piece.num_bytes for piece in pieces)
    count = max(1, round(len(pieces) * max_bytes / total))
    return [pieces[index * len(pieces) // count] for index in range(count)]


def _cut(document: Document, size: int) -> list[Document]:
    """Pieces of about `size` characters that begin where a line or a word does."""
    text, pieces, begin = document.text, [], 0
    while begin < len(text):
        end = begin + size
        if end < len(text):
            half = begin + size // 2
            ends = [place + 1 for mark in "\n " if (place := text.rfind(mark, half, end)) >= 0]
            end = ends[0] if ends else end
        piece = text[begin:end]
        if piece.strip():
            pieces.append(Document(f"{document.name}:{begin}", piece, document.name))
        begin = end
    return pieces
