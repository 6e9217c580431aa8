"""Several arrays in one copy: what is unpacked is what was packed, at addresses that kernels like."""

from __future__ import annotations

import numpy as np
import torch

from gqa_serve.engine.transfer import all_to_device, pack, select_rows, to_device, unpack

ARRAYS = [
    np.arange(3, dtype=np.int32),
    np.array([[1.5, -2.0], [0.1, 1e300]]),
    np.empty(0, np.int64),
    np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
    np.array([2.5], np.float32),
]


def test_what_is_packed_is_unpacked() -> None:
    buffer = torch.from_numpy(pack(ARRAYS))
    for array, tensor in zip(ARRAYS, unpack(buffer, ARRAYS), strict=True):
        assert tensor.shape == array.shape
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)
        assert array.size == 0 or (tensor.data_ptr() - buffer.data_ptr()) % 16 == 0


def test_every_device_gets_the_same() -> None:
    for array, tensor in zip(ARRAYS, all_to_device(ARRAYS, torch.device("cpu")), strict=True):
        assert np.array_equal(tensor.numpy(), array)
    shapes = [(t.shape, t.dtype) for t in all_to_device(ARRAYS, torch.device("meta"))]
    assert shapes == [(t.shape, t.dtype) for t in all_to_device(ARRAYS, torch.device("cpu"))]


def test_integers_are_int64_even_if_there_are_none() -> None:
    assert to_device([], torch.device("cpu")).dtype == torch.int64
    assert to_device([3, 1], torch.device("cpu")).tolist() == [3, 1]


def test_all_rows_are_the_tensor_itself() -> None:
    tensor = torch.arange(6).view(3, 2)
    assert select_rows(tensor, [0, 1, 2]) is tensor
    assert select_rows(tensor, [0, 2]).tolist() == [[0, 1], [4, 5]]
