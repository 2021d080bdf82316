"""torchao.dtypes.utils: layouts. `ao` has one packing per format; a layout that is only a packing has no effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ao.dtypes import (
    BlockSparseLayout,
    Int4CPULayout,
    Int4XPULayout,
    Layout,
    MarlinSparseLayout,
    PlainLayout,
    SemiSparseLayout,
    TensorCoreTiledLayout,
)

__all__ = [
    "BlockSparseLayout",
    "CutlassInt4PackedLayout",
    "CutlassSemiSparseLayout",
    "Float8Layout",
    "FloatxTensorCoreLayout",
    "GemlitePackedLayout",
    "Int4CPULayout",
    "Int4XPULayout",
    "Int8DynamicActInt4WeightCPULayout",
    "Layout",
    "MarlinQQQLayout",
    "MarlinSparseLayout",
    "PackedLinearInt8DynamicActivationIntxWeightLayout",
    "PlainLayout",
    "QDQLayout",
    "SemiSparseLayout",
    "TensorCoreTiledLayout",
    "UintxLayout",
]


@dataclass(frozen=True)
class UintxLayout(Layout):
    """Packed integers of fewer than 8 bits: what `ao` always has."""

    dtype: torch.dtype | None = None
    pack_dim: int = -1


@dataclass(frozen=True)
class Float8Layout(Layout):
    """float8 codes: what `ao` always has."""

    mm_config: Any = None


@dataclass(frozen=True)
class QDQLayout(Layout):
    """The canonical packing."""


@dataclass(frozen=True)
class MarlinQQQLayout(Layout):
    """The canonical packing."""


@dataclass(frozen=True)
class CutlassInt4PackedLayout(Layout):
    """The canonical packing."""


@dataclass(frozen=True)
class GemlitePackedLayout(Layout):
    """The canonical packing."""

    group_size: int | None = 128
    bit_width: int = 4
    packing_bitwidth: int | None = None
    mode: str = "weight_only"


@dataclass(frozen=True)
class Int8DynamicActInt4WeightCPULayout(Layout):
    """The canonical packing."""


@dataclass(frozen=True)
class PackedLinearInt8DynamicActivationIntxWeightLayout(Layout):
    """The canonical packing."""

    target: str = "auto"


@dataclass(frozen=True)
class CutlassSemiSparseLayout(SemiSparseLayout):
    """The same as SemiSparseLayout: `ao` has one storage of 2:4 weights."""


# Not a layout of ao: a config that is given it raises when it is used.


@dataclass(frozen=True)
class FloatxTensorCoreLayout:
    """Floats of 1 + ebits + mbits bits with a scale per row: what `to_affine_quantized_fpx` takes."""

    ebits: int
    mbits: int
