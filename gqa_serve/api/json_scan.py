"""What a JSON text holds, counted before anything is built of it: containers, strings, values, numbers.

Owns one pass over the bytes, in pieces, by numpy, which lets go of the interpreter's lock: sixteen megabytes
take a tenth of a second of one core, and no other thread waits. Knows no fields and words no errors. The
counts are right for well-formed JSON; for anything else they are some numbers. Invariant: memory is that of a
few pieces, whatever the text.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import numpy.typing as npt

MAX_DIGITS = 308  # numbers beyond 64-bit floats have more, or an exponent
_PIECE_BYTES = 256 * 1024
_QUOTE, _OPEN, _CLOSE, _COMMA, _DIGIT, _EXPONENT, _PLUS = range(1, 8)
_RUN = 100  # of digits, aligned: a number of too many has one, and one of 200 that an e99 makes too large
_LONGEST_NUMBER = 2 * MAX_DIGITS + 100
_NOT_IN_NUMBER = re.compile(rb"[^0-9+\-.eE]")
_NUMBER_START = re.compile(rb"[0-9.\-]+$")
_NUMBER_END = re.compile(rb"[eE]\+?[0-9]+")


def _kinds() -> npt.NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    for kind, characters in {
        _QUOTE: b'"',
        _OPEN: b"[{",
        _CLOSE: b"]}",
        _COMMA: b",",
        _DIGIT: b"0123456789",
        _EXPONENT: b"eE",
        _PLUS: b"+",
    }.items():
        table[list(characters)] = kind
    return table


_KINDS = _kinds()


@dataclasses.dataclass
class Counts:
    """Of a JSON text. `values`: commas; `fields`: the outermost ones; `large_exponents`: of three digits."""

    depth: int = 0
    containers: int = 0
    strings: int = 0
    backslashes: int = 0
    values: int = 0
    fields: int = 0
    large_exponents: int = 0
    has_too_large_number: bool = False


def scan(text: bytes, *, most_exponents: int = 1000) -> Counts:
    """The counts of `text`; of numbers with exponents of three digits only so many are looked at."""
    counts = Counts()
    start, depth, inside, backslash = 0, 0, False, b""
    while start < len(text):
        end = _end_of_piece(text, start)
        counts.backslashes += text.count(b"\\", start, end)
        piece = backslash + text[start:end]
        piece, backslash = _without_escapes(piece)
        kinds = _KINDS[np.frombuffer(piece, np.uint8)]
        quotes = kinds == _QUOTE
        in_string = np.logical_xor.accumulate(np.concatenate(([inside], quotes)))[1:]
        counts.strings += int(np.count_nonzero(quotes & in_string))
        kinds[in_string] = 0
        depth = _count_structure(kinds, depth, counts)
        _check_numbers(piece, kinds, counts, most_exponents)
        inside = bool(in_string[-1]) if len(in_string) else inside
        start = end
    return counts


def _end_of_piece(text: bytes, start: int) -> int:
    """Not inside a number, if that is one."""
    end = start + _PIECE_BYTES
    if end >= len(text):
        return len(text)
    after = _NOT_IN_NUMBER.search(text, end, end + _LONGEST_NUMBER)
    return after.start() if after else min(end + _LONGEST_NUMBER, len(text))


def _without_escapes(piece: bytes) -> tuple[bytes, bytes]:
    """`piece` without escaped backslashes and quotes, and a backslash at its end, for the next."""
    if b"\\" not in piece:
        return piece, b""
    plain = piece.replace(b"\\\\", b"")
    rest = b"\\" if plain.endswith(b"\\") else b""
    return plain.replace(b'\\"', b"").removesuffix(rest), rest


def _count_structure(kinds: npt.NDArray[np.uint8], depth: int, counts: Counts) -> int:
    """Count what is outside of strings, beginning at `depth`; the depth at the end."""
    opens, commas = kinds == _OPEN, kinds == _COMMA
    counts.containers += int(np.count_nonzero(opens))
    counts.values += int(np.count_nonzero(commas))
    depths = np.cumsum(opens.view(np.int8) - (kinds == _CLOSE).view(np.int8), dtype=np.int32)
    depths += depth
    counts.depth = max(counts.depth, int(depths.max(initial=depth)))
    counts.fields += int(np.count_nonzero(commas & (depths == 1)))
    return int(depths[-1]) if len(depths) else depth


def _check_numbers(piece: bytes, kinds: npt.NDArray[np.uint8], counts: Counts, most_exponents: int) -> None:
    """Find numbers that no 64-bit float holds: by their digits, or by digits and an exponent."""
    digits = kinds == _DIGIT
    whole = len(digits) // _RUN * _RUN
    has_run = bool(digits[:whole].reshape(-1, _RUN).all(axis=1).any())
    if has_run:
        others = np.flatnonzero(~np.concatenate(([False], digits, [False])))
        counts.has_too_large_number |= int(np.diff(others).max()) > MAX_DIGITS + 1
    exponents = np.flatnonzero(digits[:-1] & (kinds[1:] == _EXPONENT)) + 1
    if not has_run:  # then an exponent below 100 is harmless
        padded = np.concatenate((kinds, np.zeros(5, np.uint8)))
        first = exponents + 1 + (padded[exponents + 1] == _PLUS)
        exponents = exponents[(padded[first[:, None] + np.arange(3)] == _DIGIT).all(axis=1)]
    counts.large_exponents += len(exponents)
    for position in exponents[:most_exponents].tolist():
        begin = _NUMBER_START.search(piece[max(0, position - _LONGEST_NUMBER) : position])
        end = _NUMBER_END.match(piece, position)
        if begin and end:  # else it is no number, and no JSON
            counts.has_too_large_number |= _is_infinite(begin[0] + end[0])


def _is_infinite(number: bytes) -> bool:
    try:
        return math.isinf(float(number))
    except ValueError:
        return False
