"""torchao.prototype.quantization: formats that are not settled there."""

from .quant_api import Int8DynamicActivationUIntxWeightConfig, UIntxWeightOnlyConfig

__all__ = ["Int8DynamicActivationUIntxWeightConfig", "UIntxWeightOnlyConfig"]
