"""Large data in pieces: boxes that cut no block and stay in cache.

An op over a large weight at once reads main memory and writes fresh memory, which the operating system zeroes page by page
as it is touched: that alone takes ten times as long as the arithmetic. Over pieces neither happens, and temporaries are as
large as a piece rather than as the weight.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor

ELEMENTS = defaultdict(lambda: 2**23, cpu=2**20)
"""The elements of a piece, by kind of device; others are taken for a GPU."""

Box = Sequence[tuple[int, int]]
"""[start, stop) along each dim."""


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
