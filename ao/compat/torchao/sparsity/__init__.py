"""torchao.sparsity, which `ao` does not have yet: the names are here, and using one raises NotImplementedError."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from ao import Config, Spec

from ..core.config import Translated
from ..quantization.quant_api import int8_dynamic_activation_int8_semi_sparse_weight

__all__ = [
    "BlockSparseWeightConfig",
    "PerChannelNormObserver",
    "SemiSparseWeightConfig",
    "SupermaskLinear",
    "WandaSparsifier",
    "apply_fake_sparsity",
    "block_sparse_weight",
    "int8_dynamic_activation_int8_semi_sparse_weight",
    "semi_sparse_weight",
    "sparsify_",
]

INSTEAD = "torch.nn.utils.prune to prune, torch.sparse.to_sparse_semi_structured to compute, or a dense format of ao.quantize_"


def missing(name: str) -> NoReturn:
    """Raise NotImplementedError for a name of sparsity."""
    raise NotImplementedError(f"{name}: ao has no sparse formats; use {INSTEAD}")


def sparsify_(model: Any, config: Any, filter_fn: Any = None) -> Any:
    """Raises NotImplementedError."""
    missing("sparsify_")


@dataclass
class SemiSparseWeightConfig(Translated):
    """2:4 sparse weights. Using it raises NotImplementedError."""

    def to_ao(self) -> Config | Spec:
        """Raises NotImplementedError."""
        missing(type(self).__name__)


@dataclass
class BlockSparseWeightConfig(Translated):
    """Block-sparse weights. Using it raises NotImplementedError."""

    blocksize: int = 64

    def to_ao(self) -> Config | Spec:
        """Raises NotImplementedError."""
        missing(type(self).__name__)


semi_sparse_weight = SemiSparseWeightConfig
block_sparse_weight = BlockSparseWeightConfig


def apply_fake_sparsity(*args: Any, **kwargs: Any) -> Any:
    """Raises NotImplementedError."""
    missing("apply_fake_sparsity")


class _Missing:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        missing(type(self).__name__)


class WandaSparsifier(_Missing):
    """Raises NotImplementedError."""


class SupermaskLinear(_Missing):
    """Raises NotImplementedError."""


class PerChannelNormObserver(_Missing):
    """Raises NotImplementedError."""
