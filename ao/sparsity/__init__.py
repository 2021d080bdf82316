"""Sparsity: prune a model, store and multiply what is left, and train with zeros.

    report = prune_(model, "wanda", sparsity="2:4", calibration_data=batches)
    sparsify_(model, SemiSparseWeightConfig())

docs/sparsity.md says what it costs and where it pays.
"""

from ..quant import BlockSparseWeightConfig, Magnitude, SemiSparseWeightConfig, SparseGPT, Sparsity, Wanda
from .fake import SparsitySchedule, fake_sparsify_
from .prune import PruneReport, prune_, sparsity_of
from .sparsify import (
    block_sparse_weight,
    int8_dynamic_activation_int8_semi_sparse_weight,
    semi_sparse_weight,
    sparsify_,
)
from .supermask import SupermaskLinear
from .training import (
    SemiSparseActivationLinear,
    SemiSparseLinear,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)

__all__ = [
    "BlockSparseWeightConfig",
    "Magnitude",
    "PruneReport",
    "SemiSparseActivationLinear",
    "SemiSparseLinear",
    "SemiSparseWeightConfig",
    "SparseGPT",
    "Sparsity",
    "SparsitySchedule",
    "SupermaskLinear",
    "Wanda",
    "block_sparse_weight",
    "fake_sparsify_",
    "int8_dynamic_activation_int8_semi_sparse_weight",
    "prune_",
    "semi_sparse_weight",
    "sparsify_",
    "sparsity_of",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
]
