"""torchao.prototype.smoothquant.api."""

from . import (
    SmoothQuantConfig,
    insert_smooth_quant_observer_,
    load_smooth_quant_recipe,
    save_smooth_quant_recipe,
    smooth_quant,
)

__all__ = [
    "SmoothQuantConfig",
    "insert_smooth_quant_observer_",
    "load_smooth_quant_recipe",
    "save_smooth_quant_recipe",
    "smooth_quant",
]
