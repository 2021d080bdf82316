"""`Factored`: a symmetric matrix H and its factor H = U D U^T, U unit upper triangular, in the memory of one matrix.

GPTQ needs both: U tells how the error of one column is made good in the columns that follow, H what error is left. For a
layer with 14336 inputs either takes 822 MB. H lives in the upper triangle with the diagonal, U^T below it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


class Factored:
    """H with its columns in another order, damped, and its factor. Takes over the memory of `h`.

    h: (K, K) float32, symmetric, positive semidefinite. order: (K,) the column that comes first, second, ...
    """

    def __init__(self, h: Tensor, order: Tensor) -> None:
        self.size = h.shape[0]
        self.m = h
        self.order = order
        self.damp = torch.zeros((), dtype=torch.float32, device=h.device)
        self.pivots = torch.empty(self.size, dtype=torch.float32, device=h.device)
        _permute(self.m, order)
        self.diagonal = self.m.diagonal().clone()

    def factor(self, damping: float) -> bool:
        """Add `damping * mean(diag H)` to the diagonal, and factor; with ten times that where H is not positive definite even
        so, and so on, up to the mean itself. Returns whether that helped."""
        mean = (self.diagonal - self.damp).mean()
        while damping <= 1:
            self._add(damping * mean - self.damp)
            if self._factor():
                return True
            damping *= 10
        return False

    def _add(self, amount: Tensor) -> None:
        self.m.diagonal().add_(amount)
        self.damp = self.damp + amount
        self.diagonal = self.m.diagonal().clone()

    def matrix(self) -> Tensor:
        """H as it was given, made anew; whatever became of its factor."""
        h = self.rows(slice(0, self.size))
        h.diagonal().sub_(self.damp)
        _permute(h, torch.argsort(self.order))
        return h

    def blocks(self) -> list[tuple[int, int]]:
        """[start, stop) of the blocks of columns, in which everything goes."""
        return [(s, min(s + BLOCK, self.size)) for s in range(0, self.size, BLOCK)]

    def rows(self, index: Tensor | slice) -> Tensor:
        """Rows of H: (rows, K)."""
        columns = torch.arange(self.size, device=self.m.device)
        return torch.where(columns >= columns[index][:, None], self.m[index], self.m[:, index].t())

    def back(self, start: int, stop: int) -> Tensor:
        """U[:start, start:stop], (start, stop - start): what errors before a block do to it."""
        return self.m[start:stop, :start].t()

    def within(self, start: int, stop: int) -> Tensor:
        """U[start:stop, start:stop], upper triangular with ones on its diagonal."""
        lower = self.m[start:stop, start:stop].tril(-1)
        return lower.t() + torch.eye(stop - start, dtype=torch.float32, device=self.m.device)

    def product(self, x: Tensor) -> Tensor:
        """x @ H. x: (rows, K)."""
        out = torch.empty_like(x)
        for start, stop in self.blocks():
            out[:, start:stop] = x @ self.rows(slice(start, stop)).t()
        return out

    def solve(self, b: Tensor) -> Tensor:
        """Z with Z D U^T = b: T U, where T H = b. b: (rows, K)."""
        y = b.clone()
        for start, stop in reversed(self.blocks()):
            part = y[:, start:stop]
            if stop < self.size:
                part -= y[:, stop:] @ self.m[stop:, start:stop]
            u = self.within(start, stop)
            part.copy_(torch.linalg.solve_triangular(u.t(), part, upper=False, left=False, unitriangular=True))
        return y.div_(self.pivots)

    def _factor(self) -> bool:
        """From the last block of columns to the first, as H = U D U^T goes."""
        for start, stop in reversed(self.blocks()):
            # What is left of H[:stop, start:stop] after the blocks behind it, which are done.
            rest = self.m[:stop, start:stop].clone()
            rest[start:] = rest[start:].triu() + rest[start:].triu(1).t()
            if stop < self.size:
                done = self.m[stop:, :stop]  # (D-free) U^T
                rest -= done.t() @ (done[:, start:] * self.pivots[stop:, None])
            # The factor of a square from its last column on is that of the square turned around.
            root, info = torch.linalg.cholesky_ex(rest[start:].flip(0, 1))
            if info.item() or not torch.isfinite(root).all():
                return False
            root = root.flip(0, 1)  # upper
            pivots = root.diagonal()
            self.pivots[start:stop] = pivots.square()
            u = root / pivots
            above = torch.linalg.solve_triangular(
                u.t(), rest[:start], upper=False, left=False, unitriangular=True
            ).div_(self.pivots[start:stop])
            self.m[start:stop, :start] = above.t()
            square = self.m[start:stop, start:stop]
            square.copy_(square.triu() + u.triu(1).t())
        return True


def _permute(m: Tensor, order: Tensor) -> None:
    """Rows and columns of a square matrix in another order, in place, a block at a time."""
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return
    for start in range(0, m.shape[0], BLOCK):
        m[start : start + BLOCK] = m[start : start + BLOCK].index_select(1, order)
    for start in range(0, m.shape[1], BLOCK):
        m[:, start : start + BLOCK] = m[:, start : start + BLOCK].index_select(0, order)
