"""torchao.quantization.quantize_.common.kernel_preference."""

from . import KernelPreference

__all__ = ["KernelPreference"]
