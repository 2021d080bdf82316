"""torchao.prototype.quantization.int4."""

from __future__ import annotations

from dataclasses import dataclass

from ....quantization.quant_api import Int4WeightOnlyConfig

__all__ = ["PrototypeInt4WeightOnlyConfig"]


@dataclass
class PrototypeInt4WeightOnlyConfig(Int4WeightOnlyConfig):
    """int4 weights in groups, for a CPU too: `ao.Int4WeightOnlyConfig`, whose packing serves every device."""
