"""torchao.quantization.GPTQ: quantizers of int4, with GPTQ and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ao
from ao import Config, Intx, QTensor

from ..kinds import Kind
from .quant_primitives import MappingType
from .specs import mapped
from .unified import Quantizer
from .utils import (
    MultiInput,
    groupwise_affine_dequantize_tensor_from_qparams,
    per_token_dynamic_quant,
    unpack_tinygemm_scales_and_zeros,
)

__all__ = [
    "GPTQQuantizer",
    "Int4WeightOnlyGPTQQuantizer",
    "Int4WeightOnlyQuantizer",
    "Int8DynActInt4WeightGPTQQuantizer",
    "Int8DynActInt4WeightLinear",
    "Int8DynActInt4WeightQuantizer",
    "MultiTensor",
    "MultiTensorInputRecorder",
    "WeightOnlyInt4Linear",
]


def _quantize(model: nn.Module, config: Config, batches: Any = None) -> nn.Module:
    ao.quantize_(model, config, ao.is_linear, calibration_data=batches)
    return model


def _int4(groupsize: int, algorithm: Any = "rtn") -> Config:
    return ao.Int4WeightOnlyConfig(groupsize, algorithm=algorithm, unsupported="skip")


def _8da4w(groupsize: int, mapping_type: MappingType, precision: torch.dtype, algorithm: Any = "rtn") -> Config:
    scales = str(precision).removeprefix("torch.")
    spec = Intx(4, (1, groupsize), scale_dtype=scales, act=Intx(8, (1, -1), symmetric=False), **mapped(mapping_type))
    return ao.SpecConfig(spec, algorithm=algorithm, unsupported="skip")


class MultiTensor:
    """Several tensors that stand for one argument in a calibration."""

    def __init__(self, input: Any, **kwargs: Any) -> None:
        self.values = list(input) if isinstance(input, (list, tuple)) else [input]

    @property
    def count(self) -> int:
        """How many."""
        return len(self.values)

    def add_tensors(self, input: Any) -> MultiTensor:
        """More of them."""
        self.values += list(input) if isinstance(input, (list, tuple)) else [input]
        return self

    def pad_to_length(self, length: int, pad_in_place: bool = True) -> MultiTensor:
        """As many as `length`, the last one again and again."""
        made = self if pad_in_place else MultiTensor(self.values)
        made.values += [made.values[-1]] * (length - len(made.values))
        return made

    def unpad(self, count: int = 1, force: bool = False) -> MultiTensor:
        """The first `count`."""
        self.values = self.values[:count]
        return self


class MultiTensorInputRecorder:
    """Called with the arguments of a model, again and again; gives them with a `MultiTensor` for each tensor."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)

    def get_recorded_inputs(self) -> tuple[Any, ...]:
        """The arguments."""
        return tuple(_joined(values) for values in zip(*self.calls))


def _joined(values: tuple[Any, ...]) -> Any:
    if isinstance(values[0], Tensor):
        return MultiTensor(list(values))
    if isinstance(values[0], (list, tuple)):
        return type(values[0])(_joined(each) for each in zip(*values))
    return values[0]


def batches_of(inputs: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The calls that arguments of many values each stand for; a plain one is the same in each call."""
    many = [x.values if isinstance(x, (MultiInput, MultiTensor)) else None for x in inputs]
    count = max((len(values) for values in many if values is not None), default=1)
    return [tuple(x if v is None else v[i % len(v)] for x, v in zip(inputs, many)) for i in range(count)]


class GPTQQuantizer(Quantizer):
    """Quantizes with the codes of `ao.GPTQ`."""

    def __init__(self, config: Callable[[Any], Config], percdamp: float) -> None:
        self.config, self.percdamp = config, percdamp

    def quantize(self, model: nn.Module, *inputs: Any, **kwargs: Any) -> nn.Module:
        """The model, quantized in place.

        inputs: the arguments of the model, each a `MultiTensor` or `MultiInput` of many values; or a list of them.
        """
        arguments = list(inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], (list, tuple)) else list(inputs)
        return _quantize(model, self.config(ao.GPTQ(damping=self.percdamp)), batches_of(arguments))


class Int4WeightOnlyGPTQQuantizer(GPTQQuantizer):
    """int4 weights in groups. blocksize, inner_k_tiles, padding_allowed: accepted; rows that groups do not divide are skipped."""

    def __init__(
        self,
        blocksize: int = 128,
        percdamp: float = 0.01,
        groupsize: int = 64,
        inner_k_tiles: int = 8,
        padding_allowed: bool = True,
        device: Any = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__(lambda gptq: _int4(group_size or groupsize, gptq), percdamp)


class Int8DynActInt4WeightGPTQQuantizer(GPTQQuantizer):
    """int4 weights in groups, int8 activations per token."""

    def __init__(
        self,
        blocksize: int = 128,
        percdamp: float = 0.01,
        groupsize: int = 64,
        inner_k_tiles: int = 8,
        padding_allowed: bool = True,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(lambda gptq: _8da4w(groupsize, MappingType.SYMMETRIC, torch.float32, gptq), percdamp)


class Int4WeightOnlyQuantizer(Quantizer):
    """int4 weights in groups. precision: the dtype that the model is given; None keeps its own."""

    def __init__(
        self,
        groupsize: int = 256,
        padding_allowed: bool = True,
        inner_k_tiles: int | None = 8,
        device: Any = None,
        precision: torch.dtype | None = None,
    ) -> None:
        if groupsize not in (32, 64, 128, 256):
            raise AssertionError(f"Int4WeightOnlyQuantizer: groupsize must be 32, 64, 128 or 256, got {groupsize}")
        self.groupsize, self.inner_k_tiles, self.precision = groupsize, inner_k_tiles, precision

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, quantized in place."""
        return _quantize(model if self.precision is None else model.to(self.precision), _int4(self.groupsize))


class Int8DynActInt4WeightQuantizer(Quantizer):
    """int4 weights in groups, int8 activations per token."""

    def __init__(
        self,
        groupsize: int = 256,
        padding_allowed: bool = False,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
        device: Any = None,
        mapping_type: MappingType = MappingType.SYMMETRIC,
    ) -> None:
        self.groupsize, self.precision, self.scales_precision = groupsize, precision, scales_precision
        self.mapping_type = mapping_type

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, quantized in place."""
        return _quantize(model, _8da4w(self.groupsize, self.mapping_type, self.scales_precision))


class Int8DynActInt4WeightLinear(nn.Module, metaclass=Kind):
    """A layer of codes: int8 of 4 bits, a scale and a zero point per group, int8 activations per token.

    `isinstance` holds for an `nn.Linear` too whose weight is so quantized. weight: (N, K) int8. scales, zeros: (N, K / group).
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        groupsize: int = 256,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if in_features % groupsize:
            raise AssertionError(f"groupsize={groupsize} must divide in_features={in_features}")
        self.in_features, self.out_features, self.groupsize = in_features, out_features, groupsize
        grid = (out_features, in_features // groupsize)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(grid, dtype=scales_precision, device=device))
        self.register_buffer("zeros", torch.zeros(grid, dtype=scales_precision, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=precision, device=device) if bias else None)

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is a linear layer so quantized."""
        weight = getattr(x, "weight", None) if isinstance(x, nn.Linear) else None
        spec = weight.spec if isinstance(weight, QTensor) else None
        return isinstance(spec, Intx) and spec.bits == 4 and isinstance(spec.act, Intx)

    def decoded(self) -> Tensor:
        """The weight as numbers."""
        codes = self.weight.to(self.scales.dtype).reshape(self.out_features, -1, self.groupsize)
        zeros = self.zeros.to(self.scales.dtype)[..., None]
        return ((codes - zeros) * self.scales[..., None]).reshape(self.weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in)."""
        x = per_token_dynamic_quant(input)
        return F.linear(x, self.decoded().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class WeightOnlyInt4Linear(nn.Module, metaclass=Kind):
    """A layer of codes of 4 bits. `isinstance` holds for an `nn.Linear` too whose weight is so quantized.

    weight: (N, K) int32, or (N, K / 2) uint8. scales_and_zeros: (K / group, N, 2), as `pack_tinygemm_scales_and_zeros` has it.
    """

    weight: Tensor
    scales_and_zeros: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        groupsize: int = 128,
        inner_k_tiles: int = 8,
        precision: torch.dtype = torch.bfloat16,
        scales_precision: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if bias:
            raise AssertionError("WeightOnlyInt4Linear has no bias; give bias=False")
        self.in_features, self.out_features, self.groupsize, self.precision = (
            in_features,
            out_features,
            groupsize,
            precision,
        )
        self.inner_k_tiles = inner_k_tiles
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int32, device=device))
        pairs = torch.zeros(in_features // groupsize, out_features, 2, dtype=scales_precision, device=device)
        self.register_buffer("scales_and_zeros", pairs)

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is a linear layer so quantized."""
        weight = getattr(x, "weight", None) if isinstance(x, nn.Linear) else None
        spec = weight.spec if isinstance(weight, QTensor) else None
        return isinstance(spec, Intx) and spec.bits == 4 and spec.act is None

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in)."""
        scales, zeros = unpack_tinygemm_scales_and_zeros(self.scales_and_zeros)
        weight = groupwise_affine_dequantize_tensor_from_qparams(self.weight, scales, zeros, 4, self.groupsize)
        return F.linear(input.to(self.precision), weight.to(self.precision)).to(input.dtype)
