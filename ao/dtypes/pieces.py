"""Large data in pieces: boxes that cut no block and stay in cache.

An op over a large weight at once reads main memory and writes fresh memory, which the operating system zeroes page by page
as it is touched: that alone takes ten times as long as the arithmetic. Over pieces neither happens, and temporaries are as
large as a piece rather than as the weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
"""The elements of a piece, by kind of device; others are taken for a GPU."""

Box = Sequence[tuple[int, int]]
"""[start, stop) along each dim."""


def is_eager(x: Tensor, or_recorded: bool = True, on_meta: bool = False) -> bool:
    """Whether ops on `x` run at once and on memory: nothing is being traced, and `x` is neither a subclass nor on meta, nor
    one of torch.func's.

    or_recorded: also where torch.jit.trace records what runs. on_meta: whether that holds of an `x` on meta, where there is no
    memory.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta is not on_meta:
        return False
    if not or_recorded and torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return torch._guards.TracingContext.try_get() is None


def piece_size(x: Tensor) -> int:
    """How many elements a piece of `x` may have."""
    return ELEMENTS.get(x.device.type, ELEMENTS["cuda"])


def boxes(shape: Sequence[int], unit: Sequence[int], size: int) -> Iterator[Box]:
    """Cut `shape` at multiples of `unit` into boxes of at most `size` elements, or of one unit where that is more.

    The first dims are cut before the last ones, so that boxes are as contiguous as can be. Together they cover `shape`.
    """
    steps = list(shape)
    for d, n in enumerate(shape):
        units = math.ceil(n / unit[d])
        most = size // (unit[d] * math.prod(shape[d + 1 :]))  # units that fit with all of the dims after this one
        count = math.ceil(units / max(most, 1))
        steps[d] = math.ceil(units / count) * unit[d]
        if most:
            break
        size //= unit[d]
    return itertools.product(*([(a, min(a + step, n)) for a in range(0, n, step)] for n, step in zip(shape, steps)))


def part(t: Tensor, box: Box, shape: Sequence[int]) -> Tensor:
    """The part of `t` that belongs to `box` of data of `shape`.

    t: the data, or a field of the same rank, as long as the data, a fraction of that (packed, or one per block) or 1.
    """
    for d, ((start, stop), n) in enumerate(zip(box, shape)):
        f = t.shape[d]
        if stop - start < n and f > 1:
            t = t.narrow(d, start * f // n, (stop - start) * f // n)
    return t
