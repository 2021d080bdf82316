"""torchao.quantization.quantize_: formats and their settings. The function of this name is in `quant_api`."""
