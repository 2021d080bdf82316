"""A path: one way to multiply an activation and a quantized weight, and when it can be taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..dtypes.base import QTensor

Product = Callable[..., Tensor]
"""Of x and w, and of a bias (N,) where the path takes one."""


@dataclass(frozen=True)
class Path:
    """accepts: of x (M, K) and w (N, K), whether `run` can multiply them.
    run: x @ w.T (M, N) in x's dtype.
    launch: of such x and w, what multiplies any x (..., K) and weights of the form of w in eager mode; for a path that decides
        much beforehand.
    few: whether it is for a few tokens only; an exported program has one graph for any number.
    operator: whether it calls operators of ours; an exported program runs where nobody defines them.
    adds_bias: of x (M, K), whether `run`, and what `launch` gives for it, take a bias (N,) as a third argument, which they add to
        the sum in float32. Otherwise it is added to the result.
    """

    accepts: Callable[[Tensor, QTensor], bool]
    run: Product
    launch: Callable[[Tensor, QTensor], Product] | None = None
    few: bool = False
    operator: bool = False
    adds_bias: Callable[[Tensor], bool] = lambda x: False

    @property
    def name(self) -> str:
        """That of the function."""
        return self.run.__name__
