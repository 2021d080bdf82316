"""torchao.sparsity.training, which `ao` does not have yet: using a name raises NotImplementedError."""

from __future__ import annotations

from typing import Any

from . import _Missing, missing

__all__ = [
    "SemiSparseActivationLinear",
    "SemiSparseLinear",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
]


class SemiSparseLinear(_Missing):
    """Raises NotImplementedError."""

    @classmethod
    def from_dense(cls, linear: Any) -> Any:
        """Raises NotImplementedError."""
        missing(cls.__name__)


class SemiSparseActivationLinear(SemiSparseLinear):
    """Raises NotImplementedError."""


def swap_linear_with_semi_sparse_linear(model: Any, config: Any, current: str = "") -> Any:
    """Raises NotImplementedError."""
    missing("swap_linear_with_semi_sparse_linear")


def swap_semi_sparse_linear_with_linear(model: Any, current: str = "") -> Any:
    """Raises NotImplementedError."""
    missing("swap_semi_sparse_linear_with_linear")
