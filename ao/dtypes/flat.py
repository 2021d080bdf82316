"""`Flat`: blocks over the elements in row-major order, whatever the shape: for data that no matmul reads.

An optimizer state has the shape of its parameter, and blocks of 256 that follow one another through memory across rows. A
`FlatTensor` says the first and keeps the second: one field, `blocks`, which is a QTensor of shape (numel / block, block).
So a kernel over it needs no shape, and views cost nothing; a slice along the first dim falls between blocks, or raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Opaque, QTensor, Spec

aten = torch.ops.aten


@dataclass(frozen=True, repr=False)
class Flat(Spec):
    """Quantize the elements, read as rows of `inner.block[-1]`, by `inner`.

    inner: a Spec whose block is (1, n). Raises ValueError for another block, and for data whose number of elements is no
        multiple of n.
    """

    inner: Spec

    def __post_init__(self) -> None:
        block = self.inner.block
        if len(block) != 2 or block[0] != 1 or block[1] < 1:
            raise ValueError(f"Flat: inner must have block=(1, n), got {self.inner}")

    @property
    def block(self) -> tuple[int, ...]:
        """None along any dim: blocks run through the rows."""
        return ()

    @property
    def block_size(self) -> int:
        """Elements that share a scale."""
        return self.inner.block[-1]

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """(number of blocks,)."""
        if math.prod(shape) % self.block_size:
            raise ValueError(
                f"{self}: the {math.prod(shape)} elements of shape {tuple(shape)} are no multiple of the block "
                f"{self.block_size}; choose a block that divides them, or leave this tensor out"
            )
        return (math.prod(shape) // self.block_size,)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """None of its own: `inner` chooses them."""
        return {}

    def encode(self, x: Tensor) -> dict[str, Tensor | None]:
        """The blocks of `x` (float32)."""
        return {"blocks": self.inner.quantize(x.reshape(-1, self.block_size))}


class FlatTensor(QTensor, spec=Flat):
    """x = blocks, reshaped.

    blocks: QTensor of shape (numel / block, block).
    """

    blocks: Opaque

    spec: Flat
    own_ops: ClassVar[dict[Any, Callable[..., Any]]] = {}

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        assert isinstance(self.blocks, QTensor)
        return self.blocks.decode(dtype).reshape(self.shape)


def _implements(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        FlatTensor.own_ops.update(dict.fromkeys(ops, handler))
        return handler

    return register


def _with(q: FlatTensor, shape: Sequence[int], blocks: Tensor) -> QTensor:
    return q.like(shape, q.dtype, {"blocks": blocks})


@_implements(aten.copy_.default)
def _copy(target: FlatTensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, FlatTensor) and source.blocks.shape == target.blocks.shape and source.shape == target.shape:
        target.blocks.copy_(source.blocks, non_blocking)
    else:
        values = source.dequantize() if isinstance(source, QTensor) else source
        target.blocks.copy_(values.expand(target.shape).reshape(target.blocks.shape), non_blocking)
    return target


@_implements(aten.view.default, aten._unsafe_view.default)
def _view(q: FlatTensor, size: Sequence[int]) -> QTensor:
    return _with(q, torch.empty(q.shape, dtype=torch.float32, device="meta").view(size).shape, aten.alias(q.blocks))


@_implements(aten.slice.Tensor)
def _slice(q: FlatTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> QTensor:
    d = dim % q.dim()
    lo, hi, _ = slice(start, end).indices(q.shape[d])
    hi = max(lo, hi)
    if (lo, hi, step) == (0, q.shape[d], 1):
        return _with(q, q.shape, aten.alias(q.blocks))
    row, block = math.prod(q.shape[1:]), q.spec.block_size
    if d != 0 or step != 1 or lo * row % block or hi * row % block:
        rows = block // math.gcd(block, row)
        raise ValueError(
            f"cannot take [{lo}:{hi}:{step}) of dim {d} of this FlatTensor of shape {tuple(q.shape)}: its blocks of {block} "
            f"run through the rows; cut dim 0 at multiples of {rows}, or call .dequantize() first"
        )
    blocks = aten.slice(q.blocks, 0, lo * row // block, hi * row // block)
    return _with(q, [hi - lo, *q.shape[1:]], blocks)


@_implements(aten.split_with_sizes.default)
def _split_with_sizes(q: FlatTensor, sizes: Sequence[int], dim: int = 0) -> list[QTensor]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(q, dim, end - n, end) for end, n in zip(ends, sizes)]


@_implements(aten.split.Tensor)
def _split(q: FlatTensor, size: int, dim: int = 0) -> list[QTensor]:
    n = q.shape[dim]
    return [_slice(q, dim, a, min(a + size, n)) for a in range(0, max(n, 1), size)]


def _new(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def handler(q: FlatTensor, size: Sequence[int], *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        block = q.spec.block_size
        if math.prod(size) % block:
            return allocate(list(size), dtype=dtype or q.dtype, device=device or q.device)
        make = getattr(q.blocks, f"new_{allocate.__name__}")
        return q.like(size, dtype or q.dtype, {"blocks": make([math.prod(size) // block, block], device=device)})

    return handler


FlatTensor.own_ops[aten.new_zeros.default] = _new(torch.zeros)
FlatTensor.own_ops[aten.new_empty.default] = _new(torch.empty)

if torch.distributed.is_available():

    @_implements(torch.ops._c10d_functional.all_gather_into_tensor.default)
    def _all_gather(q: FlatTensor, group_size: int, group_name: Any) -> QTensor:
        gather = torch.ops._c10d_functional.all_gather_into_tensor.default
        return _with(q, [q.shape[0] * group_size, *q.shape[1:]], gather(q.blocks, group_size, group_name))
