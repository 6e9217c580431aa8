"""Telling that memory ran out from other failures of a step.

Owns the forms in which Python, torch, its CUDA libraries and native code say so. A process that the system's
own out-of-memory killer ends says nothing; `client.py` replaces that. Knows nothing of what to do about it.
"""

from __future__ import annotations

_SENTENCES = (
    "out of memory",  # torch.OutOfMemoryError, and CUDA's own where torch did not allocate
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # errno ENOMEM
    "bad_alloc",
    "alloc_failed",  # cuBLAS, cuDNN
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller step may work where this one failed."""
    if isinstance(error, MemoryError):  # nanobind's translation of std::bad_alloc, too
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(sentence in text for sentence in _SENTENCES)
