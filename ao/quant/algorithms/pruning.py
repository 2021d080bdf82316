"""Pruning: which weights become 0, by their size or by what they do to the output of the layer.

With a score for each weight of a layer (N, K), the largest are kept:

- of each M along a row, N (`"2:4"`, any N:M);
- a share of a row, or of the layer (`0.5` are zeros);
- a share of the square blocks, by the root of the sum of the squares of their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...dtypes import BlockSparse, Sparse24, Spec
from ..calibration.observers import Hessian
from ..calibration.statistics import Statistics
from .recipe import Recipe, Rounded


@dataclass(frozen=True)
class Sparsity:
    """How many zeros, and where they may be.

    kept, of: so many of so many along a row; of=0 for a share.
    share: of zeros, where of=0.
    block: rows and columns of the blocks that become 0 as a whole; 0 for single weights.
    """

    kept: int = 0
    of: int = 0
    share: float = 0.0
    block: int = 0

    @staticmethod
    def parse(sparsity: str | float, block: int | None = None) -> Sparsity:
        """ "2:4" or a share of zeros such as 0.5, of single weights or, with `block`, of square blocks.

        Raises ValueError for anything else.
        """
        if isinstance(sparsity, str) and ":" in sparsity:
            kept, _, of = sparsity.partition(":")
            if kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of) and block is None:
                return Sparsity(int(kept), int(of))
        else:
            try:
                share = float(sparsity)
            except (TypeError, ValueError):
                share = -1.0
            if 0 < share < 1 and (block is None or block > 0):
                return Sparsity(share=share, block=block or 0)
        raise ValueError(
            f"sparsity must be N:M such as '2:4' (without block), or the share of zeros such as 0.5, got {sparsity!r}"
            + (f" with block={block}" if block is not None else "")
        )

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError where a weight of `shape` has no such pattern."""
        if len(shape) != 2:
            raise ValueError(
                f"pruning takes a weight of two dims, got shape {tuple(shape)}; leave it out with filter_fn"
            )
        if self.of and shape[1] % self.of:
            raise ValueError(
                f"sparsity {self}: {shape[1]} inputs are not a multiple of {self.of}; leave it out with filter_fn"
            )
        if self.block and (shape[0] % self.block or shape[1] % self.block):
            raise ValueError(
                f"sparsity {self}: shape {tuple(shape)} is not made of blocks of {self.block}; use another block, or leave it "
                "out with filter_fn"
            )

    def keep(self, scores: Tensor, by_row: bool) -> Tensor:
        """Which weights stay: bool, of the shape of `scores` (N, K). by_row: compare the weights of a row, not of the layer."""
        n, k = scores.shape
        if self.of:
            return _most(scores.view(n, k // self.of, self.of), self.kept).view(n, k)
        if self.block:
            b = self.block
            blocks = scores.square().view(n // b, b, k // b, b).sum((1, 3))
            kept = _most(blocks.reshape(1, -1), blocks.numel() - round(blocks.numel() * self.share)).view_as(blocks)
            return kept.repeat_interleave(b, 0).repeat_interleave(b, 1)
        rows = scores if by_row else scores.reshape(1, -1)
        return _most(rows, rows.shape[1] - round(rows.shape[1] * self.share)).view(n, k)

    def __str__(self) -> str:
        if self.of:
            return f"{self.kept}:{self.of}"
        return f"{self.share:g}" + (f" of blocks of {self.block}" if self.block else "")


def _most(scores: Tensor, count: int) -> Tensor:
    """The `count` largest along the last dim, the first of equal ones: bool."""
    first = scores.sort(dim=-1, descending=True, stable=True)[1][..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, first, True)


@dataclass(frozen=True)
class Pruner(Recipe):
    """What pruners have in common.

    sparsity: "2:4", any N:M, or the share of zeros.
    block: of whole blocks of so many rows and columns; None for single weights.
    """

    sparsity: str | float = "2:4"
    block: int | None = None

    prunes: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.pattern  # noqa: B018  which raises

    @property
    def pattern(self) -> Sparsity:
        """The pattern that sparsity and block name."""
        return Sparsity.parse(self.sparsity, self.block)

    def check(self, spec: Spec, shape: Sequence[int]) -> None:
        self.pattern.check(shape)
        fits = isinstance(spec, Sparse24) and (self.pattern.kept, self.pattern.of) == (2, 4)
        if not fits and not (isinstance(spec, BlockSparse) and self.pattern.block == spec.size):
            raise ValueError(
                f"algorithm={self.name!r} prunes to {self.pattern}, which {spec} does not store; use Sparse24(...) with '2:4', "
                "BlockSparse(...) with blocks, or ao.sparsity.prune_, which leaves the zeros in a dense weight"
            )

    def pruned(self, weight: Tensor, seen: Statistics | None) -> Rounded:
        """The weight (N, K) with zeros, float32, and notes."""
        weight = weight.float()
        return Rounded(torch.where(self.pattern.keep(self.scores(weight, seen), self.by_row), weight, 0), {})

    def scores(self, weight: Tensor, seen: Statistics | None) -> Tensor:
        """What each weight counts, (N, K)."""
        raise NotImplementedError

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        pruned = self.pruned(weight, seen).values
        qparams = spec.choose_qparams(pruned, spec.grid(pruned.shape))
        return Rounded(spec.round(pruned, **qparams), qparams)


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Score: |w|, compared over the layer. Needs no data."""

    name: ClassVar[str] = "magnitude"
    by_row: ClassVar[bool] = False

    def scores(self, weight: Tensor, seen: Statistics | None) -> Tensor:
        return weight.abs()


@dataclass(frozen=True)
class Wanda(Pruner):
    """Score: |w_ij| * |X_j|_2, the norm over all tokens of what the weight meets, compared within a row (arXiv:2306.11695)."""

    name: ClassVar[str] = "wanda"
    observes: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def scores(self, weight: Tensor, seen: Statistics | None) -> Tensor:
        assert seen is not None
        hessian: Hessian = seen.observers["hessian"]
        return weight.abs() * hessian.diagonal().sqrt() if hessian.tokens else weight.abs()
