"""torchao.prototype.hqq: HQQ is an algorithm of configs: `Int4WeightOnlyConfig(use_hqq=True)`. What is here raises."""

from __future__ import annotations

from typing import Any

__all__ = ["pack_2xint4", "triton_mixed_mm"]


def pack_2xint4(t: Any) -> Any:
    """Raises NotImplementedError: it packs for a kernel that is not here."""
    raise NotImplementedError("pack_2xint4: this is a kernel's packing; use Int4WeightOnlyConfig(use_hqq=True)")


def triton_mixed_mm(*args: Any, **kwargs: Any) -> Any:
    """Raises NotImplementedError: a kernel that is not here."""
    raise NotImplementedError(
        "triton_mixed_mm: quantize the layer with Int4WeightOnlyConfig(use_hqq=True), and call it"
    )
