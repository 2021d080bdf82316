"""torchao.dtypes.nf4tensor: `NF4Tensor` with the methods that it has there. Blocks run along rows here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ao
import ao.dtypes as dtypes
from ao.dtypes import CodebookTensor, dense, linear_nf4
from ao.matmul import set_parameter

from ..core.config import Translated

__all__ = ["NF4Tensor", "linear_nf4", "nf4_weight_only", "to_nf4"]


class NF4Tensor(CodebookTensor):
    """A `CodebookTensor` of NF4. `t.to(dtype)` is the plain tensor."""

    @property
    def block_size(self) -> int:
        """Elements that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def scaler_block_size(self) -> int:
        """Scales that share a scale of their own."""
        scales: Any = self.scale
        return scales.shape[-1] // scales.scale.shape[-1] if hasattr(scales, "scale") else 1

    @property
    def n_blocks(self) -> int:
        """The number of scales."""
        return self.scale.numel()

    @property
    def quantized_data(self) -> Tensor:
        """The packed codes."""
        return self.qdata

    @property
    def quantized_scalers(self) -> Tensor:
        """The scales, quantized."""
        scales: Any = self.scale
        return getattr(scales, "qdata", scales)

    @property
    def nf4(self) -> Tensor:
        """The table of values."""
        return self.table

    def get_original_weight(self) -> Tensor:
        """The plain tensor, in the dtype that it had."""
        return self.dequantize()

    def dequantize_scalers(self, *args: Any) -> Tensor:
        """The scales as numbers, one per block."""
        return dense(self.scale).flatten()

    @staticmethod
    def from_tensor(input_tensor: Tensor, block_size: int, scaler_block_size: int) -> NF4Tensor:
        """Quantize a tensor."""
        return to_nf4(input_tensor, block_size, scaler_block_size)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A dtype alone gives the plain tensor in it; all else is as for any tensor."""
        dtype = args[0] if len(args) == 1 and isinstance(args[0], torch.dtype) else None
        if not args and set(kwargs) == {"dtype"}:
            dtype = kwargs["dtype"]
        return self.dequantize().to(dtype) if dtype is not None else super().to(*args, **kwargs)


def to_nf4(tensor: Tensor, block_size: int = 64, scaler_block_size: int = 256) -> NF4Tensor:
    """Quantize to NF4 with double quantization: `ao.dtypes.to_nf4`."""
    q = dtypes.to_nf4(tensor, block_size, scaler_block_size)
    return NF4Tensor(q.spec, q.dtype, q.shape, q.whole, **q.fields())


class NF4WeightOnlyConfig(Translated):
    """NF4 weights: `NF4WeightOnlyConfig` of `ao`, whose weights are `NF4Tensor`."""

    def __init__(self, block_size: int = 64, scaler_block_size: int = 256) -> None:
        self.block_size, self.scaler_block_size = block_size, scaler_block_size

    def to_ao(self) -> Any:
        """`ao.NF4WeightOnlyConfig`."""
        return ao.NF4WeightOnlyConfig(self.block_size, self.scaler_block_size, unsupported="skip")

    def replace_in(self, model: Any, filter_fn: Any, device: Any) -> Any:
        """Quantize, and give the weights the class of this module."""
        report = ao.quantize_(model, self.to_ao(), filter_fn, device)
        for row in report.rows:
            name, _, leaf = row.name.rpartition(".")
            layer = model.get_submodule(name)
            q = getattr(layer, leaf).detach()
            new = NF4Tensor(q.spec, q.dtype, q.shape, q.whole, **q.fields())
            set_parameter(layer, leaf, torch.nn.Parameter(new, requires_grad=False))
        return report


nf4_weight_only = NF4WeightOnlyConfig
