"""GPTQ: codes that make good for each other's errors, as the inputs of the layer weigh them.

With H = sum over the calibration tokens of x x^T, what a weight Q does to the output of the layer is, row by row,

    |Y - X Q^T|**2 = tr(Q H Q^T) - 2 tr(B Q^T) + const,        B = Y^T X

where Y is what the layer should give: W x for its own inputs, or, where `quantize_` knows it, what the original model gave
at this place, so that a layer also makes good for the errors of the layers before it (GPTAQ, arXiv:2504.02692).

1. qparams: a search over cut ranges, each column weighted by its H_jj (hqq.py)
2. columns in the order of falling H_jj, each rounded after the errors of those before it are made good as the factor
   H = U D U^T says (GPTQ, arXiv:2210.17323, in the form of LDLQ, arXiv:2307.13304: no inverse is needed)
3. `rounds` times: qparams fitted to the codes, by least squares under H, group after group; then one sweep of coordinate
   descent, in which each column is rounded anew with all others in place. Either can only lower the error.

A group keeps its place whatever the order of the columns, so that the format does not change. Cost: 1 + rounds times
K small steps per layer and 2 K**2 (N + K / 3) operations each; memory: H, two float32 copies of the weight's size and
pieces of `PIECE` elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...dtypes import Spec, dense
from ..calibration.observers import Hessian
from ..calibration.statistics import Statistics
from .factor import Factored
from .group_fit import fit_group, held_as, stored_as
from .hqq import Qparams, check_scaled, magnitude, search
from .recipe import Recipe, Rounded

PIECE = 2**24
"""Elements of a weight whose rows are worked on at a time."""


@dataclass(frozen=True)
class GPTQ(Recipe):
    """Codes and qparams of the least error in the layer's output, on calibration data.

    damping: this fraction of the mean of the diagonal of H is added to it, and pulls towards the original weight.
    act_order: columns in the order of falling H_jj; False from left to right.
    search: choose the range of each group by its weighted error; False takes the Spec's own qparams.
    rounds: of fitting qparams and of coordinate descent; 0 stops after the second step.
    match_original: aim at the original model's outputs where they are known; False at the layer's own.

    `GPTQ(act_order=False, search=False, rounds=0, match_original=False)` is the algorithm of the paper.

    A layer whose H cannot be factored, or that saw no data, is searched for its best qparams without data, and noted.
    """

    damping: float = 0.01
    act_order: bool = True
    search: bool = True
    rounds: int = 4
    match_original: bool = True

    name: ClassVar[str] = "gptq"
    observes: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if not self.damping > 0 or self.rounds < 0:
            raise ValueError(
                f"GPTQ: damping must be positive and rounds at least 0, got damping={self.damping}, rounds={self.rounds}"
            )

    @property
    def wants_target(self) -> bool:
        return self.match_original

    def check(self, spec: Spec, shape: Sequence[int]) -> None:
        if len(shape) != 2:
            raise ValueError(
                f"GPTQ takes a weight of two dims, and this one has shape {tuple(shape)}; use 'hqq' for it"
            )
        check_scaled(spec, tuple(shape), "GPTQ")

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        assert seen is not None
        hessian: Hessian = seen.observers["hessian"]
        if not hessian.tokens:
            return _without_data(weight, spec, "no data came to it")
        importance = hessian.diagonal()
        if not (torch.isfinite(importance).all() and (importance > 0).any()):
            return _without_data(weight, spec, "its inputs were not finite, or all zero")
        h = hessian.factored(self.act_order, self.damping)
        if h is None:
            return _without_data(weight, spec, "its Hessian is singular")
        target = seen.target.total if seen.target is not None and self.match_original else None
        found = Solver(spec, h, self, importance).run(weight, target)
        dead = int((importance == 0).sum())
        if dead:
            found.notes.append(
                f"{dead} of its {len(importance)} inputs were always zero: their weights are rounded to nearest"
            )
        return found


def _without_data(weight: Tensor, spec: Spec, why: str) -> Rounded:
    weight = weight.float()
    qparams = search(weight, spec)
    return Rounded(spec.round(weight, **qparams), qparams, notes=[f"fell back to a search without data: {why}"])


class Solver:
    """GPTQ on one weight, in pieces of rows. Inside a piece, columns stand in the order of `h`."""

    def __init__(self, spec: Spec, h: Factored, recipe: GPTQ, importance: Tensor) -> None:
        self.spec, self.h, self.recipe, self.importance = spec, h, recipe, importance

    def run(self, weight: Tensor, target: Tensor | None) -> Rounded:
        """weight, target: (N, K); the values replace the target."""
        n, k = weight.shape
        by_row = self.spec.grid(weight.shape)[0] == n
        step = max(min(PIECE // k, n), 1) if by_row else n
        values = torch.empty(n, k, dtype=torch.float32, device=weight.device) if target is None else target
        found: list[Qparams] = []
        order = self.h.order
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            w = weight[rows].float()
            qparams = self.start(w)
            w = w[:, order]
            if target is None:
                b = self.h.product(w)
            else:
                b = target[rows][:, order].add_(w.mul_(self.h.damp))
            del w
            q, qparams = self.piece(b, qparams)
            values[rows] = b.index_copy_(1, order, q)
            found.append(qparams)
        whole = found[0] if len(found) == 1 else {name: torch.cat([f[name] for f in found]) for name in found[0]}
        return Rounded(values, whole)

    def start(self, w: Tensor) -> Qparams:
        """The qparams of the first step, of a piece of rows."""
        if self.recipe.search:
            return search(w, self.spec, self.importance)
        return self.spec.choose_qparams(w, self.spec.grid(w.shape))

    def piece(self, b: Tensor, qparams: Qparams) -> tuple[Tensor, Qparams]:
        """b: (n, K). Returns the values (n, K) and their qparams."""
        groups = qparams["scale"].shape[1]
        self.group = (self.h.order // (b.shape[1] // groups)).tolist()
        q = self.feedback(self.h.solve(b), self.by_row(qparams, b.shape[0]))
        b -= self.h.product(q)  # from here on what is left: (target - q) H
        for _ in range(self.recipe.rounds):
            qparams = self.fit(b, q, qparams)
            self.descend(b, q, self.by_row(qparams, b.shape[0]))
        return q, qparams

    def by_row(self, qparams: Qparams, rows: int) -> list[Qparams]:
        """The qparams of each group, dense, (rows, 1) each."""
        whole = {name: dense(t) for name, t in qparams.items()}
        whole = {name: t.repeat_interleave(rows // t.shape[0], 0) for name, t in whole.items()}
        groups = whole["scale"].shape[1]
        return [{name: t[:, i : i + 1].contiguous() for name, t in whole.items()} for i in range(groups)]

    def feedback(self, z: Tensor, qparams: list[Qparams]) -> Tensor:
        """q_j = round(z_j - sum over i < j of q_i U_ij), with z = T U for a target T. z: (n, K), overwritten."""
        q = torch.zeros_like(z)
        for start, stop in self.h.blocks():
            part = z[:, start:stop]
            part -= q[:, :start] @ self.h.back(start, stop)
            u = self.h.within(start, stop)
            for j in range(stop - start):
                column = self.rounded(part, start, j, qparams)
                q[:, start + j : start + j + 1] = column
                part[:, j + 1 :].addmm_(column, u[j : j + 1, j + 1 :], alpha=-1)
        return q

    def rounded(self, part: Tensor, start: int, j: int, qparams: list[Qparams]) -> Tensor:
        """Column j of a block of columns that begins at `start`, rounded when its turn comes: (n, 1)."""
        return self.spec.round(part[:, j : j + 1], **qparams[self.group[start + j]])

    def descend(self, left: Tensor, q: Tensor, qparams: list[Qparams]) -> None:
        """Round each column anew: q_j = round(q_j + left_j / H_jj), with left = (T - q) H. Both (n, K), in place."""
        for start, stop in self.h.blocks():
            rows = self.h.rows(slice(start, stop))  # (columns of the block, K)
            square = rows[:, start:stop]
            part = left[:, start:stop].clone()
            before = q[:, start:stop].clone()
            steps = self.h.diagonal[start:stop].reciprocal().tolist()
            for j in range(stop - start):
                old = q[:, start + j : start + j + 1]
                new = self.again(torch.add(old, part[:, j : j + 1], alpha=steps[j]), start + j, qparams)
                part.addmm_(new - old, square[j : j + 1], alpha=-1)
                old.copy_(new)
            left -= (q[:, start:stop] - before) @ rows

    def again(self, column: Tensor, j: int, qparams: list[Qparams]) -> Tensor:
        """Column j, (n, 1), rounded once more."""
        return self.spec.round(column, **qparams[self.group[j]])

    def fit(self, left: Tensor, q: Tensor, qparams: Qparams) -> Qparams:
        """The qparams of least error for the codes of `q`, group after group; `left` and `q`, (n, K), are kept true.

        With u = q / scale + zero_point the codes of one group, the error is a quadratic form in scale and
        offset = scale * zero_point, whose values are scale * u - offset.
        """
        fitted = {name: dense(t).clone() for name, t in qparams.items()}
        fitted = {name: t.float() if t.is_floating_point() else t for name, t in fitted.items()}
        group = torch.tensor(self.group, dtype=torch.int64, device=q.device)
        size = magnitude(q, (1, 1))[0, 0]
        for i in range(fitted["scale"].shape[1]):
            columns = (group == i).nonzero()[:, 0]
            h = self.h.rows(columns)  # (group, K)
            square = h[:, columns]
            values = q[:, columns]
            b = values @ square + left[:, columns]  # what the group should be, times its H
            now = {name: t[:, i : i + 1] for name, t in fitted.items()}  # (rows of the grid, 1)
            made, now = fit_group(self.spec, values, square, b, now, size, partial(held_as, qparams["scale"], i))
            left -= (made - values) @ h
            q[:, columns] = made
            for name, t in now.items():
                fitted[name][:, i : i + 1] = t
        if fitted.keys() == {"scale"}:
            return {"scale": stored_as(qparams["scale"], fitted["scale"])}
        return self.spec.stored(**fitted)
