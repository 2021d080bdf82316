"""torchao.kernel: products of integers."""

from ao import int_scaled_matmul

from .intmm import int_matmul, safe_int_mm

__all__ = ["int_matmul", "int_scaled_matmul", "safe_int_mm"]
