"""torchao.prototype.mx_formats.nvfp4_tensor: NVFP4 tensors by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ao.dtypes import Float8, FloatX

from .mx_tensor import BlockTensor

__all__ = ["NVFP4Tensor", "per_tensor_amax_to_scale"]


def per_tensor_amax_to_scale(amax: Tensor) -> Tensor:
    """The scale of a tensor from its largest magnitude: amax / (448 * 6), at least the smallest normal number."""
    return (amax.float() / (448.0 * 6.0)).clamp(min=torch.finfo(torch.float32).tiny)


class NVFP4Tensor(BlockTensor):
    """A `FloatXTensor` of e2m1 numbers, whose blocks of 16 have e4m3 scales."""

    @staticmethod
    def to_nvfp4(
        data_hp: Tensor, block_size: int = 16, per_tensor_scale: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> NVFP4Tensor:
        """Quantize a tensor in blocks along its last dim.

        per_tensor_scale: None for scales of one level. A given one must be that of the data: the scale of a tensor is found
            with its blocks here. What follows chooses kernels, and has no effect.
        """
        block = (1,) * (data_hp.dim() - 1) + (block_size,)
        whole = Float8(block=(-1,) * data_hp.dim())
        kinds: Any = {"scale": "float32", "scale_spec": whole} if per_tensor_scale is not None else {"scale": "e4m3"}
        made: NVFP4Tensor = NVFP4Tensor.of(data_hp, FloatX(2, 1, block, **kinds))
        return made

    @property
    def per_tensor_scale(self) -> Tensor | None:
        """The scale of the scales; None where there is one level."""
        scales: Any = self.scale
        return scales.scale.reshape(()) if hasattr(scales, "scale") else None
