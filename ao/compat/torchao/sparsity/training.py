"""torchao.sparsity.training: `ao.sparsity`."""

from ao.sparsity import (
    SemiSparseActivationLinear,
    SemiSparseLinear,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)

__all__ = [
    "SemiSparseActivationLinear",
    "SemiSparseLinear",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
]
