"""Layouts as other libraries name them: a word of the user for how int4 weights are stored.

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
