"""Recording a forward pass: the model's definition runs once, over symbols in place of tensors.

    decoder.forward ... x = linear(x) ...   ->   Symbol in, Symbol out, one operation more on the list
    finish                                  ->   symbols get buffers (a dead one's is used again), operations
                                                 go to the native Program in the order they were called

Owns symbols and their lifetimes. Does not know what an operation computes, nor the model.
Invariants: a buffer is given to another symbol only after the last operation that reads the first; what a
linear layer of gate and up gives is read by its gated activation alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from gqa_serve.engine.backends.base import AttentionLayout, Entries, HeadNorms, InPlace
from gqa_serve.engine.rope import Rotary


@dataclass(eq=False)
class Symbol:
    """A [T, width] float32 activation of the recorded step; `value` is its buffer, once it has one."""

    width: int
    value: int = -1


@dataclass
class _Operation:
    """`emit` adds the operation to the program once its symbols have buffers; `parts` are the matrices of a
    linear layer."""

    inputs: Sequence[Symbol]
    output: Symbol | None
    emit: Callable[[], None]
    parts: Sequence[Any] = ()


class Recorder:
    """Collects the operations of one forward pass for `program`."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.operations: list[_Operation] = []
        self._keep: list[torch.Tensor] = []

    def embed(self, table: Any, scale: float, entries: Entries | None) -> torch.Tensor:
        out = Symbol(table.k)
        first, _, total = entries or Entries(0, table.n, table.n)
        return self._record((), out, lambda: self.program.embed(table, out.value, scale, first, total))

    def apply(self, function: InPlace, x: torch.Tensor) -> torch.Tensor:
        """`function` is called in the middle of a step, and sees the step's rows as a tensor."""
        source = _symbol(x)

        def call(address: int, rows: int) -> None:
            function(_floats_at(address, rows, source.width))

        self._record((source,), None, lambda: self.program.call(call, source.value))
        return x

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        source, out = _symbol(x), Symbol(_symbol(x).width)
        address, n = self._floats(weight)
        return self._record(
            (source,), out, lambda: self.program.rms_norm(source.value, address, n, out.value, eps)
        )

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, scale: float
    ) -> torch.Tensor:
        source, total = _symbol(x), _symbol(residual)
        address, n = self._floats(weight)
        if weight is None:
            self._record(
                (source, total),
                None,
                lambda: self.program.add_rms_norm(source.value, total.value, 0, 0, total.value, eps, scale),
            )
            return residual
        out = Symbol(total.width)
        return self._record(
            (source, total),
            out,
            lambda: self.program.add_rms_norm(source.value, total.value, address, n, out.value, eps, scale),
        )

    def linear(self, x: torch.Tensor, parts: list[Any], out_features: int) -> torch.Tensor:
        source, out = _symbol(x), Symbol(out_features)
        return self._record(
            (source,), out, lambda: self.program.linear(parts, source.value, out.value), parts=parts
        )

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """If `gate_up` is what the operation before computes with two matrices, the three become one."""
        source = _symbol(gate_up)
        out = Symbol(source.width // 2)
        before = self.operations[-1]
        if before.output is source and _are_gate_and_up(before.parts):
            self.operations.pop()
            (x,), (gate, up) = before.inputs, before.parts
            return self._record(
                (x,), out, lambda: self.program.gated_linear(gate, up, x.value, out.value, activation)
            )
        return self._record((source,), out, lambda: self.program.gated(source.value, out.value, activation))

    def add_rotary(self, rotary: Rotary) -> tuple[int, int]:
        """(its number in the program, rotary_dim)"""
        address, n = self._floats(rotary.inv_freq)
        return self.program.add_rotary(address, n, rotary.scale), 2 * n

    def rotate_and_write(
        self,
        layer: int,
        qkv: torch.Tensor,
        layout: AttentionLayout,
        rotary: tuple[int, int] | None,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        source, out = _symbol(qkv), Symbol(layout.num_heads * layout.head_dim)
        number, rotary_dim = rotary if rotary is not None else (-1, 0)
        heads = (layout.num_heads, layout.num_kv_heads, layout.head_dim, number, rotary_dim)
        norm: tuple[Any, ...] = ("none", 0, 0, 0, 0, 0.0)
        if norms is not None:
            norm = (norms.mode, *self._floats(norms.q), *self._floats(norms.k), norms.eps)
        return self._record(
            (source,),
            out,
            lambda: self.program.rotate_and_write(layer, source.value, out.value, *heads, *norm),
        )

    def attend(self, layer: int, q: torch.Tensor, layout: AttentionLayout) -> torch.Tensor:
        source, out = _symbol(q), Symbol(layout.num_heads * layout.head_dim)
        window = layout.windows[layout.layer_windows[layer]] or 0
        sizes = (layout.num_heads, layout.num_kv_heads, layout.head_dim)
        numbers = (layout.scale, layout.soft_cap or 0.0, window)
        return self._record(
            (source,), out, lambda: self.program.attend(layer, source.value, out.value, *sizes, *numbers)
        )

    def finish(self, result: torch.Tensor) -> int:
        """Give symbols their buffers, add all operations to the program; the result's buffer."""
        last: dict[Symbol, int] = {}
        for index, operation in enumerate(self.operations):
            for symbol in operation.inputs:
                last[symbol] = index
        last[_symbol(result)] = len(self.operations)
        free: dict[int, list[int]] = {}
        for index, operation in enumerate(self.operations):
            if (out := operation.output) is not None:
                spare = free.get(out.width)
                out.value = spare.pop() if spare else self.program.add_value(out.width)
            operation.emit()
            for symbol in {*operation.inputs}:
                if last[symbol] == index:
                    free.setdefault(symbol.width, []).append(symbol.value)
        return _symbol(result).value

    def _record(
        self,
        inputs: Sequence[Symbol],
        out: Symbol | None,
        emit: Callable[[], None],
        parts: Sequence[Any] = (),
    ) -> torch.Tensor:
        self.operations.append(_Operation(inputs, out, emit, parts))
        return cast(torch.Tensor, out)

    def _floats(self, tensor: torch.Tensor | None) -> tuple[int, int]:
        """Address and length of a float32 copy that lives until the program has read it."""
        if tensor is None:
            return 0, 0
        tensor = tensor.detach().float().contiguous().cpu()
        self._keep.append(tensor)
        return tensor.data_ptr(), tensor.numel()


def _floats_at(address: int, rows: int, width: int) -> torch.Tensor:
    """The [rows, width] float32 that lie there, as a tensor."""
    numbers = (ctypes.c_float * (rows * width)).from_address(address)
    return torch.frombuffer(numbers, dtype=torch.float32).view(rows, width)


def _are_gate_and_up(parts: Sequence[Any]) -> bool:
    """Whether a gated activation can be computed panel by panel with these matrices."""
    if len(parts) != 2:
        return False
    gate, up = parts
    return bool(gate.n == up.n and gate.same_input(up))


def _symbol(x: torch.Tensor) -> Symbol:
    """The symbol that stands for a tensor in a recording."""
    if not isinstance(x, Symbol):
        raise TypeError(f"A {type(x).__name__} is handed to an operation that is being recorded.")
    return x
