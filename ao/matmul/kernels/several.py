"""Which of several weights a program of one launch works on, and where the products go: one below the other."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv


@triton.jit
def of_three(program, first, second, a, b, c):
    """The value for the part of the grid that a program is in: the second of three begins at `first`, the third at `second`."""
    return tl.where(program < first, a, tl.where(program < second, b, c))


def counted(rows: Sequence[int], height: int) -> list[int]:
    """The blocks of `height` rows of each of two or three weights; of two, the third has none."""
    return [*(cdiv(n, height) for n in rows), 0][:3]


def cut(flat: Tensor, m: int, rows: Sequence[int]) -> list[Tensor]:
    """The products (m, n) of weights with so many rows, which stand in `flat` one after the other."""
    return [part.view(m, n) for part, n in zip(flat.split([m * n for n in rows]), rows)]
