"""torchao.prototype.mx_formats.mx_tensor: MX tensors by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ao.dtypes import FloatX, FloatXTensor

from .config import ScaleCalculationMode
from .constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2, SUPPORTED_ELEM_DTYPES

__all__ = ["MXTensor", "ScaleCalculationMode", "element"]

_ELEMENTS: dict[Any, tuple[int, int]] = dict(zip(SUPPORTED_ELEM_DTYPES, ((4, 3), (5, 2), (2, 3), (3, 2), (2, 1))))
_ELEMENTS["fp4_e2m1"] = (2, 1)


def element(dtype: Any) -> tuple[int, int]:
    """The bits of the exponent and the mantissa of an element. Raises ValueError for a dtype that MX does not have."""
    if dtype not in _ELEMENTS:
        raise ValueError(f"elem_dtype must be one of {', '.join(map(str, SUPPORTED_ELEM_DTYPES))}, got {dtype}")
    return _ELEMENTS[dtype]


class BlockTensor(FloatXTensor):
    """A `FloatXTensor` with blocks along its last dim, by the names of torchao."""

    @classmethod
    def of(cls, data: Tensor, spec: FloatX) -> Any:
        """A tensor of this class: `data` quantized by `spec`."""
        q: Any = spec.quantize(data)
        return cls(q.spec, q.dtype, q.shape, q.whole, **q.fields())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain tensor, in `dtype` or in the dtype that it had."""
        plain = super().dequantize()
        return plain if dtype is None else plain.to(dtype)

    @property
    def block_size(self) -> int:
        """Elements that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]


class MXTensor(BlockTensor):
    """A `FloatXTensor` whose scales are powers of two."""

    @staticmethod
    def to_mx(
        data_hp: Tensor,
        elem_dtype: Any,
        block_size: int = 32,
        scaling_mode: ScaleCalculationMode = ScaleCalculationMode.FLOOR,
        *args: Any,
        **kwargs: Any,
    ) -> MXTensor:
        """Quantize a tensor in blocks along its last dim. What follows scaling_mode chooses kernels, and has no effect."""
        block = (1,) * (data_hp.dim() - 1) + (block_size,)
        made: MXTensor = MXTensor.of(data_hp, FloatX(*element(elem_dtype), block, scale_rule=scaling_mode.value))
        return made

    def to_dtype(self, target_dtype: torch.dtype) -> Tensor:
        """The plain tensor."""
        return self.dequantize(target_dtype)

    @property
    def elem_dtype(self) -> Any:
        """The format of the elements."""
        ours = {(2, 3): DTYPE_FP6_E2M3, (3, 2): DTYPE_FP6_E3M2, (2, 1): torch.float4_e2m1fn_x2}
        known: dict[Any, Any] = {value: key for key, value in _ELEMENTS.items()} | ours
        return known[self.spec.exponent, self.spec.mantissa]
