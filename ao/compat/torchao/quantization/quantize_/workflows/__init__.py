"""torchao.quantization.quantize_.workflows: the formats as classes of tensors.

Here a format is a Spec, and a class of that library is what such a tensor holds: `isinstance(w, Int8Tensor)` is true for an
`ao.dtypes.IntxTensor` of 8 bits. `from_hp` quantizes a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ao import Float8, Granularity, Intx, MappingType, PerRow, QTensor, Spec

from ....kinds import Kind
from ...specs import FLOAT8, block_of, mapped

__all__ = [
    "Float8PackingFormat",
    "Float8Tensor",
    "Int4ChooseQParamsAlgorithm",
    "Int4PackingFormat",
    "Int4PlainInt32Tensor",
    "Int4PreshuffledTensor",
    "Int4Tensor",
    "Int4TilePackedTo4dTensor",
    "Int8Tensor",
    "IntxChooseQParamsAlgorithm",
    "IntxOpaqueTensor",
    "IntxPackingFormat",
    "IntxUnpackedToInt8Tensor",
    "QuantizeTensorToFloat8Kwargs",
    "QuantizeTensorToInt8Kwargs",
]


ROW = PerRow()


class Int4PackingFormat(str, Enum):
    """Accepted and without effect: `ao` has one packing of int4, on every device."""

    PLAIN = "plain"
    PRESHUFFLED = "preshuffled"
    PLAIN_INT32 = "plain_int32"
    TILE_PACKED_TO_4D = "tile_packed_to_4d"
    OPAQUE = "opaque"
    MARLIN_SPARSE = "marlin_sparse"


class Int4ChooseQParamsAlgorithm(str, Enum):
    """TINYGEMM is round-to-nearest."""

    TINYGEMM = "tinygemm"
    HQQ = "hqq"


class IntxPackingFormat(str, Enum):
    """Accepted and without effect."""

    UNPACKED_TO_INT8 = "unpacked_to_int8"
    OPAQUE_ATEN_KLEIDIAI = "opaque_aten_kleidiai"
    OPAQUE_TORCHAO_AUTO = "opaque_torchao_auto"
    OPAQUE_TORCHAO_KLEIDIAI = "opaque_torchao_kleidiai"
    OPAQUE_TORCHAO_LOWBIT = "opaque_torchao_lowbit"


class IntxChooseQParamsAlgorithm(str, Enum):
    """AFFINE is round-to-nearest."""

    AFFINE = "affine"
    HQQ_SCALE_ONLY = "hqq_scale_only"


class Float8PackingFormat(str, Enum):
    """PLAIN, and two for 2:4 sparse weights."""

    PLAIN = "plain"
    SPARSE_2D_DATA_2D_METADATA = "sparse_2d_data_2d_metadata"
    SPARSE_1D_DATA_1D_METADATA = "sparse_1d_data_1d_metadata"
    SPARSE_CUTLASS = "sparse_2d_data_2d_metadata"  # noqa: PIE796  an alias


@dataclass
class QuantizeTensorToFloat8Kwargs:
    """How an activation becomes float8 where it meets a weight. What chooses kernels is accepted and has no effect."""

    float8_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity = ROW
    mm_config: Any = None
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None
    kernel_preference: Any = None


@dataclass
class QuantizeTensorToInt8Kwargs:
    """How an activation becomes int8 where it meets a weight."""

    granularity: Granularity = ROW
    mapping_type: MappingType = MappingType.SYMMETRIC


def _activation(kwargs: QuantizeTensorToFloat8Kwargs | QuantizeTensorToInt8Kwargs | None) -> Spec | None:
    if kwargs is None:
        return None
    block = block_of(kwargs.granularity)
    if isinstance(kwargs, QuantizeTensorToFloat8Kwargs):
        return Float8(FLOAT8[kwargs.float8_dtype], block)
    return Intx(8, block, **mapped(kwargs.mapping_type))


def _is_intx(x: Any, low: int, high: int) -> bool:
    return isinstance(x, QTensor) and isinstance(x.spec, Intx) and low <= x.spec.bits <= high


class Int8Tensor(metaclass=Kind):
    """An `IntxTensor` of 8 bits."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return _is_intx(x, 8, 8)

    @staticmethod
    def _normalize_granularity(granularity: Any) -> tuple[Granularity, Granularity]:
        pair = granularity if isinstance(granularity, (tuple, list)) else (granularity, granularity)
        return pair[0], pair[1]

    @staticmethod
    def from_hp(
        hp_tensor: Tensor,
        granularity: Granularity = ROW,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        **kwargs: Any,
    ) -> QTensor:
        """Quantize a tensor. scale, zero_point: known ones, one per block. act_quant_kwargs: of the activations it meets."""
        if zero_point is not None and zero_point.any():
            mapping_type = MappingType.ASYMMETRIC
        spec = Intx(8, block_of(granularity), **mapped(mapping_type), act=_activation(kwargs.get("act_quant_kwargs")))
        grid = spec.grid(hp_tensor.shape)
        known = {} if scale is None else {"scale": scale.float().reshape(grid)}
        if zero_point is not None and not spec.symmetric:
            known["zero_point"] = zero_point.reshape(grid).to(torch.int8)
        return spec.quantize(hp_tensor, **known)


class Int4Tensor(metaclass=Kind):
    """An `IntxTensor` of 4 bits."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return _is_intx(x, 4, 4)

    @staticmethod
    def from_hp(w: Tensor, block_size: Sequence[int], **kwargs: Any) -> QTensor:
        """Quantize a tensor in groups, with zero points."""
        return Intx(4, tuple(block_size), signed=False, symmetric=False).quantize(w)


class Int4PreshuffledTensor(Int4Tensor):
    """As `Int4Tensor`: one packing."""


class Int4PlainInt32Tensor(Int4Tensor):
    """As `Int4Tensor`: one packing."""


class Int4TilePackedTo4dTensor(Int4Tensor):
    """As `Int4Tensor`: one packing."""


class IntxUnpackedToInt8Tensor(metaclass=Kind):
    """An `IntxTensor` of any number of bits. It is packed."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return _is_intx(x, 1, 8)

    @staticmethod
    def from_hp(
        hp_tensor: Tensor,
        block_size: Sequence[int],
        target_dtype: torch.dtype,
        *,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        **kwargs: Any,
    ) -> QTensor:
        """Quantize a tensor. target_dtype: torch.int1 to torch.int8."""
        bits = int(str(target_dtype).removeprefix("torch.int"))
        block = tuple(-1 if b == n else b for b, n in zip(block_size, hp_tensor.shape))
        return Intx(bits, block, **mapped(mapping_type)).quantize(hp_tensor)


class IntxOpaqueTensor(IntxUnpackedToInt8Tensor):
    """As `IntxUnpackedToInt8Tensor`: one packing."""


class Float8Tensor(metaclass=Kind):
    """A `Float8Tensor` of `ao.dtypes`."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, QTensor) and isinstance(x.spec, Float8)

    @staticmethod
    def from_hp(
        hp_tensor: Tensor,
        float8_dtype: torch.dtype = torch.float8_e4m3fn,
        granularity: Granularity = ROW,
        *args: Any,
        act_quant_kwargs: QuantizeTensorToFloat8Kwargs | None = None,
        scale: Tensor | None = None,
        **kwargs: Any,
    ) -> QTensor:
        """Quantize a tensor. act_quant_kwargs: of the activations that it meets in a product. scale: a known one per block."""
        spec = Float8(FLOAT8[float8_dtype], block_of(granularity), act=_activation(act_quant_kwargs))
        known = {} if scale is None else {"scale": scale.float().reshape(spec.grid(hp_tensor.shape))}
        return spec.quantize(hp_tensor, **known)
