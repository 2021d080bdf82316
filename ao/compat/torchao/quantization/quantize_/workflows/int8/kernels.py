"""torchao.quantization.quantize_.workflows.int8.kernels: products of int8."""

from .....kernel import int_scaled_matmul, safe_int_mm

__all__ = ["int_scaled_matmul", "safe_int_mm"]
