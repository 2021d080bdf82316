"""torchao.quantization.GPTQ_MT."""

from .GPTQ import GPTQQuantizer, Int4WeightOnlyGPTQQuantizer, MultiTensor

__all__ = ["GPTQQuantizer", "Int4WeightOnlyGPTQQuantizer", "MultiTensor"]
