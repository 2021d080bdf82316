"""torchao.prototype.low_bit_optim.quant_utils."""

from ...optim.quant_utils import (  # noqa: F401
    _fp32_to_bf16_sr,
    create_dynamic_map,
    dequant_with_qmap,
    quantize_4bit_with_qmap,
    quantize_8bit_with_qmap,
    scale_tensor,
)

__all__ = [
    "create_dynamic_map",
    "dequant_with_qmap",
    "quantize_4bit_with_qmap",
    "quantize_8bit_with_qmap",
    "scale_tensor",
]
