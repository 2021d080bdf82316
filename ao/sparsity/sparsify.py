"""`sparsify_`: store and multiply the weights of a model without their zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..dtypes import SemiSparseLayout, Spec
from ..quant import (
    BlockSparseWeightConfig,
    Config,
    Int8DynamicActivationInt8WeightConfig,
    Report,
    SemiSparseWeightConfig,
    is_linear,
    quantize_,
)
from .training import SemiSparseLinear

semi_sparse_weight = SemiSparseWeightConfig
block_sparse_weight = BlockSparseWeightConfig


def int8_dynamic_activation_int8_semi_sparse_weight() -> Int8DynamicActivationInt8WeightConfig:
    """int8 activations and 2:4 int8 weights."""
    return Int8DynamicActivationInt8WeightConfig(layout=SemiSparseLayout())


def sparsify_(
    model: nn.Module,
    config: Config | Spec | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    **options: Any,
) -> Report:
    """Store the weights of a model without their zeros, in place.

    config: `SemiSparseWeightConfig()` (None), `BlockSparseWeightConfig(64)`, a config of `quantize_` with a sparse layout, or a
        Spec such as `Sparse24(Intx(8))`. The weights have their zeros already, unless an algorithm of the config makes them.
    filter_fn: `(module, fully qualified name) -> bool`, which layers; as of `quantize_`, of which options are parameters too.

    A `SemiSparseLinear` that is taken becomes an `nn.Linear` with the weight that it computed with, so that the model gives the
    same numbers. Returns the Report of `quantize_`, and raises as that does: a ValueError counts the groups that are not 2:4.
    A call that raises leaves the model as it was.
    """
    trained = [(name, m) for name, m in model.named_modules() if isinstance(m, SemiSparseLinear)]
    taken = [m for name, m in trained if (filter_fn or is_linear)(m, name)]
    before = [(m, type(m), m.weight) for m in taken]
    try:
        for m in taken:
            m.weight = nn.Parameter(m.sparse_weight(), requires_grad=m.weight.requires_grad)
            m.__class__ = nn.Linear  # type: ignore[assignment]
        return quantize_(model, SemiSparseWeightConfig() if config is None else config, filter_fn, **options)
    except BaseException:
        for m, cls, weight in before:
            m.__class__ = cls
            m.weight = weight
        raise
