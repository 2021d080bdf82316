"""torchao.quantization.GPTQ_MT."""

from .GPTQ import GPTQQuantizer, Int4WeightOnlyGPTQQuantizer, MultiTensor, MultiTensorInputRecorder

__all__ = ["GPTQQuantizer", "Int4WeightOnlyGPTQQuantizer", "MultiTensor", "MultiTensorInputRecorder"]
