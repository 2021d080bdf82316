"""Layouts as other libraries name them: a word of the user for how weights are stored.

`ao` has one packing per dtype, which serves every device. A layout other than that is an explicit request.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How the quantized weight is stored."""


@dataclass(frozen=True)
class PlainLayout(Layout):
    """The canonical packing, on every device."""


@dataclass(frozen=True)
class TensorCoreTiledLayout(Layout):
    """The tiles of `torch._weight_int4pack_mm`, CUDA only. inner_k_tiles: 2, 4 or 8 tiles of 16 along K."""

    inner_k_tiles: int = 8


@dataclass(frozen=True)
class Int4CPULayout(Layout):
    """The tiles of `torch._weight_int4pack_mm_for_cpu`, CPU only."""


@dataclass(frozen=True)
class Int4XPULayout(Layout):
    """Intel GPUs: the canonical packing, for which Inductor generates the kernels."""


@dataclass(frozen=True)
class SemiSparseLayout(Layout):
    """Two of four along a row, for weights that are 2:4: `Sparse24`, which multiplies on NVIDIA's sparse units."""


@dataclass(frozen=True)
class MarlinSparseLayout(Layout):
    """The same of int4 weights, symmetric, in groups of 128 or per row. The storage is that of `Sparse24` on every device, and
    not the tiles of the kernel that the name is from."""


@dataclass(frozen=True)
class BlockSparseLayout(Layout):
    """The blocks that are not all zeros: `BlockSparse`. blocksize: their rows and columns."""

    blocksize: int = 64
