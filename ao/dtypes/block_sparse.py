"""`BlockSparse`: of a matrix that is cut into square blocks, those that are not all zeros are stored.

Bytes are in proportion to what is kept: the values of a block in any format, plain, int8 or int4, and 4 bytes for where it is,
0.008 bits per kept element in blocks of 64. The order is that of PyTorch's BSR tensors: row after row of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Opaque, QTensor, Spec
from .operand import Operand
from .sparse24 import LeavesOutZeros, numbers
from .tracing import is_eager


@dataclass(frozen=True, repr=False)
class BlockSparse(LeavesOutZeros, Spec):
    """The blocks of a matrix (N, K) that are not all zeros.

    block: rows and columns of a block, `(64, 64)` or just 64.
    values: how the kept blocks are stored, each a matrix (size, size): `Intx(8)` has a scale per row of a block,
        `Intx(4, (1, 32))` two; None for numbers in the dtype of the data.

    Traced code, which cannot look at numbers, keeps all blocks. Raises ValueError for a matrix that is not made of whole blocks,
    and for `act` in values.
    """

    block: Any = (64, 64)
    values: Spec | None = None

    part = "blocks"

    def __post_init__(self) -> None:
        if isinstance(self.block, int):
            object.__setattr__(self, "block", (self.block, self.block))
        if len(self.block) != 2 or self.block[0] != self.block[1] or self.size < 8 or self.size % 8:
            raise ValueError(f"BlockSparse: block must be a multiple of 8 such as 64, got {self.block!r}")
        self.check_values()

    @property
    def size(self) -> int:
        """Rows and columns of a block."""
        return self.block[0]

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The number of blocks along both dims. Raises ValueError for what is not made of whole ones."""
        if len(shape) != 2 or shape[0] % self.size or shape[1] % self.size:
            raise ValueError(
                f"{self} needs a matrix of blocks of {self.size} x {self.size}, got shape {tuple(shape)}; use another block, or "
                "leave this tensor out"
            )
        return super().grid(shape)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """None: those of the kept blocks are chosen when they are known."""
        return {}

    def stored(self, **qparams: Any) -> dict[str, Tensor]:
        """None."""
        return {}

    def encode(self, x: Tensor) -> dict[str, Tensor | None]:
        """Where the kept blocks of `x` (float32) are, and what is in them."""
        (rows, columns), size = self.grid(x.shape), self.size
        blocks = (
            x.unflatten(0, (rows, size)).unflatten(2, (columns, size)).transpose(1, 2)
        )  # (rows, columns, size, size)
        if is_eager(x):
            kept = (blocks != 0).flatten(2).any(2)  # a NaN is not 0
            starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
            where = kept.nonzero()[:, 1].to(torch.int32)
            found = blocks[kept].reshape(-1, size)
        else:
            starts = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32, device=x.device)
            where = torch.arange(columns, dtype=torch.int32, device=x.device).repeat(rows)
            found = blocks.reshape(rows * columns * size, size)
        return {
            "starts": starts,
            "columns": where,
            "blocks": found if self.values is None else self.values.quantize(found),
        }

    def operand(self, q: Any) -> Operand | None:
        """Where the kept blocks are, and what is in them: a QTensor or plain."""
        return Operand(q.columns, q.starts, None, "blocks", part=q.blocks)


class BlockSparseTensor(QTensor, spec=BlockSparse):
    """Kept blocks, and zeros.

    starts: (N / size + 1,) int32, where each row of blocks begins among the kept ones.
    columns: (kept,) int32, the column of blocks of each.
    blocks: (kept * size, size), a QTensor, or plain.
    """

    starts: Opaque
    columns: Opaque
    blocks: Opaque

    spec: BlockSparse

    @property
    def density(self) -> float:
        """The share of blocks that are kept."""
        return self.columns.numel() * self.spec.size**2 / max(self.numel(), 1)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        size = self.spec.size
        rows, columns = self.shape[0] // size, self.shape[1] // size
        kept = numbers(self.blocks, dtype)
        out = torch.zeros(rows * columns, size, size, dtype=dtype, device=kept.device)
        at = block_rows(self.starts, self.columns.shape[0]) * columns + self.columns
        out = out.index_copy(0, at, kept.unflatten(0, (self.columns.shape[0], size)))
        return out.unflatten(0, (rows, columns)).transpose(1, 2).reshape(self.shape)


def block_rows(starts: Tensor, kept: int) -> Tensor:
    """The row of blocks of each kept one: (kept,) int64."""
    each = torch.arange(kept, dtype=starts.dtype, device=starts.device)
    return torch.searchsorted(starts[1:].contiguous(), each, right=True)
