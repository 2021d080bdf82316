"""SparseGPT: pruning in GPTQ's loop, and quantizing in the same pass (arXiv:2301.00774).

Columns from left to right, each made 0 or rounded after the errors of those before it are made good. What making w_j zero at its
turn does to the output is D_j w_j**2, with H = U D U^T (gptq.py): of each M columns the N are kept of which that is largest, just
before the first of them has its turn. Then, with the zeros where they are, coordinate descent over the numbers that are kept, and
in between qparams fitted to their codes, as GPTQ here does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...dtypes import Sparse24, Spec
from ..calibration.observers import Hessian
from ..calibration.statistics import Statistics
from .factor import BLOCK, Factored
from .gptq import GPTQ, Solver
from .hqq import Qparams, check_scaled, search
from .pruning import Pruner, Sparsity
from .recipe import Rounded


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Zeros, and codes for what is kept, of the least error in the layer's output, on calibration data.

    damping: this fraction of the mean of the diagonal of H is added to it.
    rounds: of coordinate descent after the first pass; 0 is the algorithm of the paper.
    match_original: aim at the original model's outputs where they are known; False at the layer's own.

    A layer whose H cannot be factored, or that saw no data, is pruned by magnitude, and noted.
    """

    damping: float = 0.01
    rounds: int = 4
    match_original: bool = True

    name: ClassVar[str] = "sparsegpt"
    observes: ClassVar[frozenset[str]] = frozenset({"hessian"})

    @property
    def wants_target(self) -> bool:
        return self.match_original

    def check(self, spec: Spec, shape: Sequence[int]) -> None:
        super().check(spec, shape)
        self.check_pattern()
        if isinstance(spec, Sparse24) and spec.values is not None:
            check_scaled(spec, tuple(shape), "SparseGPT")

    def check_pattern(self) -> None:
        """Raise ValueError for groups or blocks that its blocks of columns would cut."""
        size = self.pattern.of or self.pattern.block
        if size and BLOCK % size:
            raise ValueError(
                f"SparseGPT works on {BLOCK} columns at a time, which {self.pattern} does not divide; use 'wanda'"
            )

    def pruned(self, weight: Tensor, seen: Statistics | None) -> Rounded:
        return self._found(weight, None, seen)

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        return self._found(weight, spec, seen)

    def _found(self, weight: Tensor, spec: Spec | None, seen: Statistics | None) -> Rounded:
        """spec: `Sparse24`, whose values are quantized along, or another, whose numbers stay as they are, as with None."""
        assert seen is not None
        hessian: Hessian = seen.observers["hessian"]
        values = spec.values if isinstance(spec, Sparse24) else None
        importance = hessian.diagonal() if hessian.tokens else torch.zeros((), dtype=torch.float32, device="cpu")
        h = None
        if hessian.tokens and torch.isfinite(importance).all() and (importance > 0).any():
            h = hessian.factored(False, self.damping)
        if h is None:
            weight = weight.float()
            pruned = torch.where(self.pattern.keep(weight.abs(), True), weight, 0)
            qparams = {} if spec is None else spec.choose_qparams(pruned, spec.grid(pruned.shape))
            made = pruned if spec is None else spec.round(pruned, **qparams)
            return Rounded(made, qparams, notes=["pruned by magnitude: no data came to it, or its Hessian is singular"])
        target = seen.target.total if seen.target is not None and self.match_original else None
        loop = GPTQ(damping=self.damping, act_order=False, rounds=self.rounds, match_original=self.match_original)
        found = _SparseSolver(values or _AsTheyAre(), h, loop, importance, self.pattern).run(weight, target)
        if values is None:
            return Rounded(
                found.values, {} if spec is None else spec.choose_qparams(found.values, spec.grid(weight.shape))
            )
        return found


class _AsTheyAre:
    """Numbers that are not rounded, in the words of a Spec."""

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return shape[0], 1

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        return {"scale": x.new_ones(grid)}

    def round(self, x: Tensor, **qparams: Tensor) -> Tensor:
        return x


class _SparseSolver(Solver):
    """GPTQ on one weight, where a mask is chosen on the way."""

    def __init__(self, spec: Any, h: Factored, loop: GPTQ, importance: Tensor, pattern: Sparsity) -> None:
        super().__init__(spec, h, loop, importance)
        self.pattern = pattern
        self.keep = torch.empty(0, dtype=torch.bool, device="cpu")

    def start(self, w: Tensor) -> Qparams:
        self.keep = torch.ones_like(w, dtype=torch.bool)
        if isinstance(self.spec, _AsTheyAre):
            return self.spec.choose_qparams(w, self.spec.grid(w.shape))
        likely = torch.where(self.pattern.keep(w.abs() * self.importance.sqrt(), True), w, 0)
        return search(likely, self.spec, self.importance)

    def rounded(self, part: Tensor, start: int, j: int, qparams: list[Qparams]) -> Tensor:
        self._choose(part, start, j)
        return super().rounded(part, start, j, qparams) * self.keep[:, start + j : start + j + 1]

    def _choose(self, part: Tensor, start: int, j: int) -> None:
        """Which of the columns from j on are kept, as many as are compared with each other."""
        size = self.pattern.of or self.pattern.block or part.shape[1]
        if j % size:
            return
        columns = slice(j, j + size)
        scores = part[:, columns].square() * self.h.pivots[start + j : start + j + size]
        scores = scores.sqrt() if self.pattern.block else scores
        self.keep[:, start + j : start + j + size] = self.pattern.keep(scores, False)

    def again(self, column: Tensor, j: int, qparams: list[Qparams]) -> Tensor:
        return super().again(column, j, qparams) * self.keep[:, j : j + 1]

    def fit(self, left: Tensor, q: Tensor, qparams: Qparams) -> Qparams:
        """Of codes without a zero point, whose zeros stay; others keep their qparams."""
        fits = "zero_point" not in qparams and not isinstance(self.spec, _AsTheyAre)
        return super().fit(left, q, qparams) if fits else qparams
