"""torchao.dtypes.affine_quantized_tensor: tensors quantized by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ao import HQQ, Float8, FPXWeightOnlyConfig, MappingType, QTensor, ZeroPointDomain
from ao.dtypes import Layout, PlainLayout

from ..kinds import Kind
from ..quantization.specs import FLOAT8, block_in, intx, not_here
from .utils import FloatxTensorCoreLayout

__all__ = [
    "AffineQuantizedTensor",
    "to_affine_quantized_floatx",
    "to_affine_quantized_floatx_static",
    "to_affine_quantized_fpx",
    "to_affine_quantized_intx",
    "to_affine_quantized_intx_static",
]


PLAIN = PlainLayout()


def to_affine_quantized_intx(
    input_float: Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
    _layout: Any = PLAIN,
    use_hqq: bool = False,
    *,
    custom_scale: Tensor | None = None,
    custom_zero_point: Tensor | None = None,
) -> QTensor:
    """Quantize a tensor to integers: `Intx(...).quantize(input_float)`, of the bits that the range of codes has.

    eps, zero_point_dtype, _layout: accepted and without effect. Raises NotImplementedError for a sparse layout, and for a range
    of codes that no number of bits has.
    """
    _no_sparsity(_layout)
    fields: dict[str, Any] = {}
    if not preserve_zero or zero_point_domain is ZeroPointDomain.FLOAT:
        fields["zero_point"] = "float"
    if scale_dtype in (torch.bfloat16, torch.float16):
        fields["scale_dtype"] = str(scale_dtype).removeprefix("torch.")
    if use_hqq:
        mapping_type = MappingType.ASYMMETRIC
    spec = intx(target_dtype, block_in(block_size, input_float.shape), mapping_type, quant_min, quant_max, **fields)
    if custom_scale is not None:
        return to_affine_quantized_intx_static(
            input_float, custom_scale, custom_zero_point, block_size, target_dtype, quant_min, quant_max
        )
    if use_hqq:
        found = HQQ().quantize(input_float.detach(), spec, None)
        return spec.quantize(input_float, **found.qparams)
    return spec.quantize(input_float)


def to_affine_quantized_intx_static(
    input_float: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
    _layout: Any = PLAIN,
) -> QTensor:
    """Quantize a tensor to integers with known qparams."""
    _no_sparsity(_layout)
    block = block_in(block_size, input_float.shape)
    floating = zero_point_domain is ZeroPointDomain.FLOAT
    kind = MappingType.SYMMETRIC if zero_point is None else MappingType.ASYMMETRIC
    spec = intx(target_dtype, block, kind, quant_min, quant_max, zero_point="float" if floating else "int")
    grid = spec.grid(input_float.shape)
    known = {"scale": scale.float().reshape(grid)}
    if zero_point is not None and floating:
        middle = 2 ** (spec.bits - 1) if not spec.signed else 0
        known["zero_point"] = middle - zero_point.float().reshape(grid) / known["scale"]
    elif zero_point is not None:
        known["zero_point"] = zero_point.reshape(grid).to(torch.int8 if spec.signed else torch.uint8)
    return spec.quantize(input_float, **known)


def to_affine_quantized_floatx(
    input_float: Tensor,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    _layout: Any = PLAIN,
    scale_dtype: torch.dtype | None = None,
) -> QTensor:
    """Quantize a tensor to float8. Raises NotImplementedError for other floats."""
    if target_dtype not in FLOAT8:
        raise not_here(f"floats of {target_dtype}", "torch.float8_e4m3fn or torch.float8_e5m2")
    return Float8(FLOAT8[target_dtype], block_in(block_size, input_float.shape)).quantize(input_float)


def to_affine_quantized_floatx_static(
    input_float: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    _layout: Any = PLAIN,
    scale_dtype: torch.dtype | None = None,
) -> QTensor:
    """Quantize a tensor to float8 with a known scale."""
    spec = Float8(FLOAT8[target_dtype], block_in(block_size, input_float.shape))
    return spec.quantize(input_float, scale=scale.float().reshape(spec.grid(input_float.shape)))


def to_affine_quantized_fpx(input_float: Tensor, _layout: Any) -> QTensor:
    """Quantize a matrix to the floats of a FloatxTensorCoreLayout. Raises NotImplementedError for other layouts."""
    if not isinstance(_layout, FloatxTensorCoreLayout):
        raise not_here(f"_layout={_layout!r}", "FloatxTensorCoreLayout(ebits, mbits)")
    return FPXWeightOnlyConfig(_layout.ebits, _layout.mbits).weight(input_float.shape).quantize(input_float)


def _no_sparsity(layout: Any) -> None:
    if not isinstance(layout, Layout):
        raise not_here(f"_layout={layout!r}", "PlainLayout()")


class AffineQuantizedTensor(metaclass=Kind):
    """A QTensor that does not quantize the activation it meets."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, QTensor) and x.spec.act is None

    from_hp_to_intx = staticmethod(to_affine_quantized_intx)
    from_hp_to_intx_static = staticmethod(to_affine_quantized_intx_static)
    from_hp_to_floatx = staticmethod(to_affine_quantized_floatx)
    from_hp_to_floatx_static = staticmethod(to_affine_quantized_floatx_static)
    from_hp_to_fpx = staticmethod(to_affine_quantized_fpx)
