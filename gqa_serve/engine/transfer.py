"""Between host and device without waiting: pinned memory on the way in, an event on the way out.

Owns the rule that makes both asynchronous on a GPU: the device computes and copies in the order it is told,
so only who reads a result on the host has to wait, and nobody else does. Knows nothing of what is copied.
On other devices copies are plain ones, and on the CPU there are none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

# Kernels are compiled for what divides their addresses, up to this; so all addresses are of one kind.
_ALIGNMENT = 16


def to_device(values: np.ndarray | Sequence[int], device: torch.device) -> torch.Tensor:
    """The array, or the integers as int64, on `device`. What is given must not change afterwards."""
    tensor = torch.from_numpy(np.asarray(values) if len(values) else np.empty(0, np.int64))
    if device.type == "cuda":
        # torch keeps the pinned copy until the device has read it, then uses the memory again.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def all_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on `device`, in order; on a GPU by one copy."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    return unpack(to_device(pack(arrays), device), arrays)


def pack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The bytes of the arrays one after another, each beginning at a multiple of `_ALIGNMENT`."""
    buffer = np.zeros(sum(_room(array) for array in arrays), np.uint8)
    begin = 0
    for array in arrays:
        buffer[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        begin += _room(array)
    return buffer


def unpack(buffer: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Views of what `pack` made of `arrays`, with their dtypes and shapes. buffer [bytes] uint8."""
    tensors, begin = [], 0
    for array in arrays:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors.append(buffer[begin : begin + array.nbytes].view(dtype).view(array.shape))
        begin += _room(array)
    return tensors


def _room(array: np.ndarray) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


def select_rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """`tensor[rows]`, `rows` ascending; the tensor itself where they are all of its rows."""
    return tensor if len(rows) == tensor.shape[0] else tensor[to_device(rows, tensor.device)]


class HostCopy:
    """Tensors of one device on their way to the host. They must not be written to afterwards."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            # non_blocking to the CPU goes to pinned memory, of which torch keeps a stock
            tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, in order. Raises what the device failed with."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.cpu() for tensor in self._tensors]
