"""torchao.float8.float8_training_tensor: float8 tensors by hand."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ao.dtypes as dtypes
from ao import Float8, QTensor

from ..kinds import Kind
from ..quantization.specs import FLOAT8
from .config import ScalingGranularity

__all__ = [
    "Float8TrainingTensor",
    "GemmInputRole",
    "LinearMMConfig",
    "ScaledMMConfig",
    "hp_tensor_and_scale_to_float8",
    "hp_tensor_to_float8_dynamic",
]


class ScaledMMConfig(NamedTuple):
    """How one product is computed. Accepted; the chip chooses here."""

    emulate: bool = False
    use_fast_accum: bool = False
    fp8_output: bool = False
    pad_inner_dim: bool = False


class LinearMMConfig(NamedTuple):
    """How the three products of a linear layer are computed."""

    output: ScaledMMConfig = ScaledMMConfig(False, True, False, False)
    grad_input: ScaledMMConfig = ScaledMMConfig()
    grad_weight: ScaledMMConfig = ScaledMMConfig()


class GemmInputRole(Enum):
    """What an operand is to a linear layer."""

    INPUT = "input"
    WEIGHT = "weight"
    GRAD_OUTPUT = "grad_output"


class _Kind(Kind, type(Tensor)):  # type: ignore[misc]
    """A Kind that is a class of tensors too, and made of codes and a scale: `Float8TrainingTensor(data, scale, dtype)`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            return _of_parts(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class Float8TrainingTensor(dtypes.Float8Tensor, metaclass=_Kind):  # type: ignore[metaclass]
    """A `Float8Tensor` of `ao.dtypes`, whose cast lets gradients pass."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, QTensor) and isinstance(x.spec, Float8)

    def to_original_precision(self) -> Tensor:
        """The plain tensor, in the dtype that it had."""
        return _FromFloat8.apply(self)

    @property
    def _data(self) -> Tensor:
        return self.qdata

    @property
    def _scale(self) -> Tensor:
        return 1.0 / self.scale

    @property
    def _orig_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def _linear_mm_config(self) -> LinearMMConfig:
        return LinearMMConfig()


Float8Tensor = Float8TrainingTensor


def _of_parts(data: Tensor, scale: Tensor, orig_dtype: torch.dtype, *args: Any, **kwargs: Any) -> Float8TrainingTensor:
    spec = Float8(FLOAT8[data.dtype], (-1,) * max(data.dim(), 1) if scale.numel() == 1 else (1, -1))
    grid = spec.grid(data.shape)
    q: Any = spec.wrap({"qdata": data, "scale": (1.0 / scale.float()).reshape(grid)}, orig_dtype, data.shape)
    return Float8TrainingTensor(q.spec, q.dtype, q.shape, q.whole, **q.fields())


class _ToFloat8(torch.autograd.Function):
    """Quantize; gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: Float8, scale: Tensor | None) -> Tensor:
        q: Any = spec.quantize(x, **({} if scale is None else {"scale": scale}))
        return Float8TrainingTensor(q.spec, q.dtype, q.shape, q.whole, **q.fields())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g, None, None


class _FromFloat8(torch.autograd.Function):
    """Dequantize; gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, q: Any) -> Tensor:
        return q.dequantize()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def hp_tensor_and_scale_to_float8(
    hp_tensor: Tensor, s: Tensor, float8_dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    """x * s as float8. s: what the other library multiplies by; its inverse is the scale here."""
    whole = s.numel() == 1
    spec = Float8(FLOAT8[float8_dtype], (-1,) * hp_tensor.dim() if whole else (1, -1))
    return _ToFloat8.apply(hp_tensor, spec, (1.0 / s.float()).reshape(spec.grid(hp_tensor.shape)))


def hp_tensor_to_float8_dynamic(
    hp_tensor: Tensor,
    float8_dtype: torch.dtype,
    linear_mm_config: LinearMMConfig | None = None,
    reduce_amax: bool = False,
    gemm_input_role: GemmInputRole = GemmInputRole.INPUT,
    device_mesh: Any = None,
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE,
    axiswise_dim: int | None = None,
    round_scales_to_power_of_2: bool = False,
) -> Any:
    """Quantize a tensor by a scale of its own, or one per index of the other dims (axiswise_dim -1 or 0)."""
    inner = (1,) * (hp_tensor.dim() - 1)
    block = (-1,) * hp_tensor.dim()
    if scaling_granularity is ScalingGranularity.AXISWISE:
        block = (-1, *inner) if axiswise_dim == 0 else (*inner, -1)
    return _ToFloat8.apply(hp_tensor, Float8(FLOAT8[float8_dtype], block, round_scales_to_power_of_2), None)
