"""torchao.quantization.quant_api: `quantize_` and its configs.

A config is a dataclass with the parameters that it has there; `to_ao()` is the config or Spec of `ao` that it stands for. What
chooses kernels or packings is accepted and has no effect: `ao` has one packing per format, and chooses kernels by itself. A
layer whose shape does not fit is passed over, and the report that `quantize_` returns says so.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import ao
from ao import Config, Float8, Intx, QTensor, Report, Spec, SpecConfig, ZeroPointDomain
from ao.dtypes import BlockSparseLayout, Layout, MarlinSparseLayout, PlainLayout, SemiSparseLayout

from ..core.config import AOBaseConfig, Translated
from .granularity import Granularity, PerAxis, PerBlock, PerGroup, PerRow, PerTensor
from .quant_primitives import MappingType, TorchAODType, as_dtype
from .quantize_.common import KernelPreference
from .quantize_.workflows import (
    Float8PackingFormat,
    Int4ChooseQParamsAlgorithm,
    Int4PackingFormat,
    IntxChooseQParamsAlgorithm,
    IntxPackingFormat,
)
from .specs import FLOAT8, UINT4, bits_of, block_of, mapped, not_here
from .transform_module import HANDLERS, register_quantize_module_handler
from .unified import Quantizer, TwoStepQuantizer
from .utils import recommended_inductor_config_setter

Filter = Callable[[nn.Module, str], bool]


def _is_linear(module: nn.Module, *args: Any) -> bool:
    """The default filter: an `nn.Linear` that is not quantized yet, and is no part of PyTorch's attention."""
    return ao.is_linear(module, "") and not isinstance(module.weight, QTensor)


def quantize_(
    model: nn.Module,
    config: Any,
    filter_fn: Filter | None = _is_linear,
    device: torch.device | str | None = None,
    *,
    set_inductor_config: bool | None = None,
    calibration_data: Any = None,
) -> Report:
    """Quantize the layers of a model in place, as `config` says.

    config: a config of this package, or of your own (`register_quantize_module_handler`); a config, Spec or training config of
        `ao`; or a function that takes a layer and returns what to put in its place.
    filter_fn: `(module, fully qualified name) -> bool`, which layers; by default linear ones that are not quantized yet. With
        `FqnToConfig` the rules decide, and it must be left out.
    device: move the model there.
    calibration_data: as for `ao.quantize_`.

    Returns a Report, also of the layers that were passed over and why.
    """
    if isinstance(config, FqnToConfig):
        if filter_fn not in (None, _is_linear):
            raise ValueError(
                "quantize_: the rules of FqnToConfig decide; leave filter_fn out, and set a rule to None to skip"
            )
        return config.apply(model, device)
    filter_fn = filter_fn or _is_linear
    if not any(filter_fn(module, name) for name, module in model.named_modules()):
        return Report(notes=["nothing was quantized: filter_fn takes no layer"])
    if type(config) in HANDLERS:
        handler = HANDLERS[type(config)]
        return _replace_each(model, lambda module, _: handler(module, config), filter_fn, device)
    if isinstance(config, AOBaseConfig) and hasattr(config, "replace_in"):
        return config.replace_in(model, filter_fn, device)
    if isinstance(config, Translated):
        ours = config.to_ao()
        report = ao.quantize_(model, ours, filter_fn, device, calibration_data=calibration_data)
        return report
    if isinstance(config, AOBaseConfig):
        raise TypeError(
            f"quantize_: there is no handler for {type(config).__name__}; define one with "
            "@register_quantize_module_handler"
        )
    if not isinstance(config, (Config, Spec)) and not hasattr(config, "convert_layers") and callable(config):
        return _replace_each(model, lambda module, _: config(module), filter_fn, device)
    chosen = None if isinstance(config, ao.FqnToConfig) or filter_fn is _is_linear else filter_fn
    return ao.quantize_(model, config, chosen, device, calibration_data=calibration_data)


def _replace_each(
    model: nn.Module,
    function: Callable[[nn.Module, str], nn.Module],
    filter_fn: Filter,
    device: torch.device | str | None,
) -> Report:
    """Put `function(module, name)` in the place of each module that the filter takes, and look no deeper there."""
    report = Report()

    def visit(module: nn.Module, name: str) -> nn.Module:
        if filter_fn(module, name):
            report.notes.append(f"{name or 'the model'}: its handler was called")
            return function(module if device is None else module.to(device), name)
        for child_name, child in list(module.named_children()):
            new = visit(child, f"{name}.{child_name}" if name else child_name)
            if new is not child:
                setattr(module, child_name, new)
        return module

    new = visit(model, "")
    if new is not model and not isinstance(new, type(model)):
        raise TypeError("quantize_: the model itself would be replaced; give the handler a part of it, with filter_fn")
    if new is not model:
        model.__dict__, model.__class__ = new.__dict__, new.__class__
    if device is not None:
        model.to(device)
    report.measure(model)
    return report


def _replace_with_custom_fn_if_matches_filter(
    model: nn.Module,
    replacement_fn: Callable[..., nn.Module],
    filter_fn: Filter,
    cur_fqn: str = "",
    device: torch.device | None = None,
    extra_args: tuple[Any, ...] = (),
) -> nn.Module:
    """`replacement_fn(module, *extra_args)` in the place of each module that the filter takes."""
    if filter_fn(model, cur_fqn.removesuffix(".")):
        return replacement_fn(model if device is None else model.to(device), *extra_args)
    for name, child in list(model.named_children()):
        new = _replace_with_custom_fn_if_matches_filter(
            child, replacement_fn, filter_fn, f"{cur_fqn}{name}.", device, extra_args
        )
        if new is not child:
            setattr(model, name, new)
    return model


def _algorithm(config: Translated, hqq: bool) -> dict[str, Any]:
    return {"unsupported": "skip", "algorithm": "hqq" if hqq else "rtn"}


_SPARSE = (BlockSparseLayout, MarlinSparseLayout, SemiSparseLayout)


def _sparse(config: AOBaseConfig, layout: Any, *taken: type[Layout]) -> Layout | None:
    """The layout, if it is one of the sparse ones that are `taken`; None for one that is only a packing."""
    if isinstance(layout, taken):
        return layout
    if layout is not None and (not isinstance(layout, Layout) or isinstance(layout, _SPARSE)):
        raise not_here(f"{type(config).__name__}(layout={layout!r})", "the same config without a layout")
    return None


@dataclass
class Int4WeightOnlyConfig(Translated):
    """int4 weights in groups: `ao.Int4WeightOnlyConfig`. layout: Int4CPULayout() and TensorCoreTiledLayout() are the canonical
    packing too, which serves every device."""

    group_size: int = 128
    layout: Any = None
    use_hqq: bool = False
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.NONE
    set_inductor_config: bool = True
    preserve_zero: bool | None = None
    int4_packing_format: Int4PackingFormat | str = Int4PackingFormat.PLAIN
    int4_choose_qparams_algorithm: Int4ChooseQParamsAlgorithm | str = Int4ChooseQParamsAlgorithm.TINYGEMM
    int4_tile_packed_ntile: int = 8
    version: int = 2  # type: ignore[misc]
    packing_format: Any = None
    inner_k_tiles: int = 8

    def to_ao(self) -> Config | Spec:
        """`ao.Int4WeightOnlyConfig`."""
        Int4PackingFormat(self.int4_packing_format)
        if (sparse := _sparse(self, self.layout, MarlinSparseLayout)) is not None:
            return ao.Int4WeightOnlyConfig(self.group_size, layout=sparse, unsupported="skip")
        hqq = self.use_hqq or self.int4_choose_qparams_algorithm == Int4ChooseQParamsAlgorithm.HQQ
        return ao.Int4WeightOnlyConfig(
            self.group_size, zero_point_domain=self.zero_point_domain, **_algorithm(self, hqq)
        )


@dataclass
class Int8WeightOnlyConfig(Translated):
    """int8 weights: `ao.Int8WeightOnlyConfig`."""

    group_size: int | None = None
    granularity: Granularity | None = PerRow()
    set_inductor_config: bool = True
    version: int = 2  # type: ignore[misc]

    def to_ao(self) -> Config | Spec:
        """`ao.Int8WeightOnlyConfig`."""
        return ao.Int8WeightOnlyConfig(self.group_size, self.granularity or PerRow(), unsupported="skip")


def _one_or_two(granularity: Any) -> Any:
    """A granularity, or a pair of them as a tuple; None for None."""
    return tuple(granularity) if isinstance(granularity, list) else granularity


@dataclass
class Int8DynamicActivationInt8WeightConfig(Translated):
    """int8 weights and activations: `ao.Int8DynamicActivationInt8WeightConfig`.

    weight_only_decode, reduce_range: accepted and without effect; no sum here overflows, and a token alone is fast as it is.
    """

    layout: Any = None
    act_mapping_type: MappingType = MappingType.SYMMETRIC
    weight_only_decode: bool = False
    granularity: Any = PerRow()
    set_inductor_config: bool = True
    version: int = 2  # type: ignore[misc]
    reduce_range: bool = False

    def to_ao(self) -> Config | Spec:
        """`ao.Int8DynamicActivationInt8WeightConfig`."""
        return ao.Int8DynamicActivationInt8WeightConfig(
            _sparse(self, self.layout, SemiSparseLayout, BlockSparseLayout) or PlainLayout(),
            act_mapping_type=self.act_mapping_type,
            granularity=_one_or_two(self.granularity) or PerRow(),
            unsupported="skip",
        )


@dataclass
class Int8DynamicActivationInt4WeightConfig(Translated):
    """int4 weights and int8 activations, "8da4w": `ao.Int8DynamicActivationInt4WeightConfig`."""

    group_size: int | None = 32
    layout: Any = None
    mapping_type: MappingType = MappingType.SYMMETRIC
    act_mapping_type: MappingType = MappingType.ASYMMETRIC
    set_inductor_config: bool = True

    def to_ao(self) -> Config | Spec:
        """`ao.Int8DynamicActivationInt4WeightConfig`."""
        _sparse(self, self.layout)
        return ao.Int8DynamicActivationInt4WeightConfig(
            self.group_size,
            mapping_type=self.mapping_type,
            act_mapping_type=self.act_mapping_type,
            unsupported="skip",
        )


@dataclass
class Int4DynamicActivationInt4WeightConfig(Translated):
    """int4 weights and activations, per row."""

    layout: Any = None
    mapping_type: MappingType = MappingType.SYMMETRIC
    act_mapping_type: MappingType = MappingType.SYMMETRIC
    set_inductor_config: bool = True

    def to_ao(self) -> Config | Spec:
        """`Intx(4)` with an activation of `Intx(4)`."""
        act = Intx(4, (1, -1), **mapped(self.act_mapping_type))
        return SpecConfig(Intx(4, (1, -1), **mapped(self.mapping_type), act=act), unsupported="skip")


@dataclass
class Int8DynamicActivationIntxWeightConfig(Translated):
    """Weights of 1 to 8 bits and int8 activations per token.

    intx_packing_format, layout: accepted and without effect; weights are packed.
    """

    weight_dtype: torch.dtype | TorchAODType = torch.int8
    weight_granularity: Granularity = PerGroup(32)
    weight_mapping_type: MappingType = MappingType.SYMMETRIC
    weight_scale_dtype: torch.dtype | None = None
    act_mapping_type: MappingType = MappingType.ASYMMETRIC
    intx_packing_format: IntxPackingFormat | str = IntxPackingFormat.UNPACKED_TO_INT8
    intx_choose_qparams_algorithm: IntxChooseQParamsAlgorithm | str = IntxChooseQParamsAlgorithm.AFFINE
    version: int = 2  # type: ignore[misc]
    layout: Any = None
    packing_format: Any = None

    def to_ao(self) -> Config | Spec:
        """`Intx` with an activation of `Intx(8)`."""
        bits = bits_of(self.weight_dtype, type(self).__name__)
        act = Intx(8, (1, -1), **mapped(self.act_mapping_type))
        fields = mapped(self.weight_mapping_type)
        if self.weight_scale_dtype is not None:
            fields["scale_dtype"] = str(self.weight_scale_dtype).removeprefix("torch.")
        hqq = self.intx_choose_qparams_algorithm == IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
        return SpecConfig(Intx(bits, block_of(self.weight_granularity), **fields, act=act), **_algorithm(self, hqq))


@dataclass
class IntxWeightOnlyConfig(Translated):
    """Weights of 1 to 8 bits: `ao.IntxWeightOnlyConfig`."""

    weight_dtype: torch.dtype | TorchAODType = torch.int8
    granularity: Granularity = PerAxis(0)
    mapping_type: MappingType = MappingType.SYMMETRIC
    scale_dtype: torch.dtype | None = None
    intx_packing_format: IntxPackingFormat | str = IntxPackingFormat.UNPACKED_TO_INT8
    intx_choose_qparams_algorithm: IntxChooseQParamsAlgorithm | str = IntxChooseQParamsAlgorithm.AFFINE
    version: int = 2  # type: ignore[misc]
    layout: Any = None
    packing_format: Any = None

    def to_ao(self) -> Config | Spec:
        """`ao.IntxWeightOnlyConfig`."""
        hqq = self.intx_choose_qparams_algorithm == IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
        return ao.IntxWeightOnlyConfig(
            as_dtype(self.weight_dtype), self.granularity, self.mapping_type, self.scale_dtype, **_algorithm(self, hqq)
        )


@dataclass
class UIntXWeightOnlyConfig(Translated):
    """Unsigned weights of 1 to 8 bits: `ao.UIntXWeightOnlyConfig`. pack_dim: accepted and without effect."""

    dtype: torch.dtype = UINT4
    group_size: int = 64
    pack_dim: int = -1
    use_hqq: bool = False
    set_inductor_config: bool = True

    def to_ao(self) -> Config | Spec:
        """`ao.UIntXWeightOnlyConfig`."""
        return ao.UIntXWeightOnlyConfig(self.dtype, self.group_size, **_algorithm(self, self.use_hqq))


@dataclass
class GemliteUIntXWeightOnlyConfig(Translated):
    """`ao.GemliteUIntXWeightOnlyConfig`."""

    group_size: int | None = 128
    bit_width: int = 4
    packing_bitwidth: int | None = None
    mode: Literal["weight_only", "dynamic"] = "weight_only"
    set_inductor_config: bool = True
    contiguous: bool | None = None

    def to_ao(self) -> Config | Spec:
        """`ao.GemliteUIntXWeightOnlyConfig`."""
        return ao.GemliteUIntXWeightOnlyConfig(
            self.group_size, self.bit_width, self.packing_bitwidth, self.mode, unsupported="skip"
        )


@dataclass
class Float8WeightOnlyConfig(Translated):
    """float8 weights: `ao.Float8WeightOnlyConfig`."""

    weight_dtype: torch.dtype = torch.float8_e4m3fn
    set_inductor_config: bool = True
    version: int = 2  # type: ignore[misc]
    granularity: Granularity | None = None

    def to_ao(self) -> Config | Spec:
        """`ao.Float8WeightOnlyConfig`."""
        return ao.Float8WeightOnlyConfig(self.weight_dtype, self.granularity or PerRow(), unsupported="skip")


def _float8_pair(granularity: Any) -> tuple[Granularity, Granularity]:
    pair = _one_or_two(granularity) or PerTensor()
    return (pair[0], pair[1]) if isinstance(pair, tuple) else (pair, pair)


@dataclass
class Float8DynamicActivationFloat8WeightConfig(Translated):
    """float8 weights and activations: `ao.Float8DynamicActivationFloat8WeightConfig`.

    granularity: PerTensor(), PerRow(), a pair (activation, weight), or [PerBlock([1, 128]), PerBlock([128, 128])].
    activation_value_lb, activation_value_ub, kernel_preference, alg_id: accepted and without effect. mm_config: says how sums
    are kept, which is chosen by the chip here.
    """

    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Any = None
    packing_format: Float8PackingFormat | str = Float8PackingFormat.PLAIN
    mm_config: Any = None
    activation_value_lb: float | None = None
    activation_value_ub: float | None = None
    kernel_preference: KernelPreference | str = KernelPreference.AUTO
    set_inductor_config: bool = True
    version: int = 2  # type: ignore[misc]
    alg_id: int = 0

    def to_ao(self) -> Config | Spec:
        """`ao.Float8DynamicActivationFloat8WeightConfig`, or a `Float8` in blocks."""
        sparse = Float8PackingFormat(self.packing_format) is not Float8PackingFormat.PLAIN
        act, weight = _float8_pair(self.granularity)
        if sparse and (isinstance(act, PerBlock) or isinstance(weight, PerBlock)):
            raise not_here(f"{type(self).__name__}({self.packing_format}) in blocks", "granularity=PerRow()")
        if isinstance(act, PerBlock) or isinstance(weight, PerBlock):
            inner = Float8(FLOAT8[self.activation_dtype], block_of(act))
            return SpecConfig(Float8(FLOAT8[self.weight_dtype], block_of(weight), act=inner), unsupported="skip")
        return ao.Float8DynamicActivationFloat8WeightConfig(
            self.activation_dtype,
            self.weight_dtype,
            (act, weight),
            SemiSparseLayout() if sparse else PlainLayout(),
            unsupported="skip",
        )


@dataclass
class Float8StaticActivationFloat8WeightConfig(Translated):
    """float8 weights, and float8 activations with a known scale: `ao.Float8StaticActivationFloat8WeightConfig`."""

    scale: Tensor | float | None = None
    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Any = None
    mm_config: Any = None
    set_inductor_config: bool = True
    act_quant_scale: Tensor | float | None = None
    kernel_preference: KernelPreference | str = KernelPreference.AUTO

    def to_ao(self) -> Config | Spec:
        """`ao.Float8StaticActivationFloat8WeightConfig`."""
        scale = self.scale if self.act_quant_scale is None else self.act_quant_scale
        return ao.Float8StaticActivationFloat8WeightConfig(
            scale, self.activation_dtype, self.weight_dtype, _float8_pair(self.granularity)[1], unsupported="skip"
        )


@dataclass
class Float8DynamicActivationInt4WeightConfig(Translated):
    """int4 weights in groups of 128, float8 activations per row."""

    int4_packing_format: Int4PackingFormat | str = Int4PackingFormat.PRESHUFFLED
    group_size: int = 128
    packing_format: Any = None

    def to_ao(self) -> Config | Spec:
        """`Intx(4)` with an activation of `Float8`."""
        Int4PackingFormat(self.int4_packing_format)
        spec = Intx(4, (1, self.group_size), symmetric=True, act=Float8("e4m3", (1, -1)))
        return SpecConfig(spec, unsupported="skip")


@dataclass
class Int8StaticActivationInt8WeightConfig(AOBaseConfig):
    """int8 weights, and int8 activations with known qparams: `ao.Int8StaticActivationInt8WeightConfig` for one scale.

    act_quant_scale: one number, or one per row of the activation. act_quant_zero_point: of the same shape; None for none.
    """

    act_quant_scale: Tensor | None = None
    act_quant_zero_point: Tensor | None = None
    granularity: Any = PerRow()
    act_mapping_type: MappingType = MappingType.SYMMETRIC
    set_inductor_config: bool = True
    version: int = 1  # type: ignore[misc]
    reduce_range: bool = False
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.act_quant_scale is None:
            self.act_quant_scale = self.scale
        self.scale = self.act_quant_scale

    def replace_in(self, model: nn.Module, filter_fn: Filter, device: Any) -> Report:
        """Quantize the layers that the filter takes."""
        from .static import StaticInt8Linear

        scale = self.act_quant_scale
        weight = _one_or_two(self.granularity)[1] if isinstance(self.granularity, (tuple, list)) else self.granularity
        if scale is None or (scale.numel() == 1 and self.act_quant_zero_point is None):
            ours = ao.Int8StaticActivationInt8WeightConfig(scale, weight, unsupported="skip")
            return ao.quantize_(model, ours, filter_fn, device)
        report = ao.quantize_(model, ao.Int8WeightOnlyConfig(None, weight, unsupported="skip"), filter_fn, device)
        for row in report.rows:
            layer = model.get_submodule(row.name.rpartition(".")[0])
            StaticInt8Linear.of(layer, scale, self.act_quant_zero_point)
        return report


@dataclass
class FPXWeightOnlyConfig(Translated):
    """Floats of `ebits` exponent and `mbits` mantissa bits, with a scale per row."""

    ebits: int
    mbits: int
    set_inductor_config: bool = True

    def to_ao(self) -> Config | Spec:
        """The same in `ao`."""
        return ao.FPXWeightOnlyConfig(self.ebits, self.mbits)


@dataclass
class Float8DynamicActivationFloat8SemiSparseWeightConfig(Translated):
    """float8 weights that are 2:4, and float8 activations: `ao.Float8DynamicActivationFloat8WeightConfig`."""

    layout: Any = None
    activation_dtype: torch.dtype = torch.float8_e5m2
    weight_dtype: torch.dtype = torch.float8_e4m3fn

    def to_ao(self) -> Config | Spec:
        """The same in `ao`, with a scale per row."""
        return ao.Float8DynamicActivationFloat8WeightConfig(
            self.activation_dtype, self.weight_dtype, PerRow(), SemiSparseLayout(), unsupported="skip"
        )


def int8_dynamic_activation_int8_semi_sparse_weight() -> Int8DynamicActivationInt8WeightConfig:
    """int8 activations, and int8 weights that are 2:4."""
    return Int8DynamicActivationInt8WeightConfig(layout=SemiSparseLayout())


int4_weight_only = Int4WeightOnlyConfig
int8_weight_only = Int8WeightOnlyConfig
int8_dynamic_activation_int8_weight = Int8DynamicActivationInt8WeightConfig
int8_dynamic_activation_int4_weight = Int8DynamicActivationInt4WeightConfig
int4_dynamic_activation_int4_weight = Int4DynamicActivationInt4WeightConfig
float8_weight_only = Float8WeightOnlyConfig
float8_dynamic_activation_float8_weight = Float8DynamicActivationFloat8WeightConfig
float8_static_activation_float8_weight = Float8StaticActivationFloat8WeightConfig
uintx_weight_only = UIntXWeightOnlyConfig
fpx_weight_only = FPXWeightOnlyConfig
gemlite_uintx_weight_only = GemliteUIntXWeightOnlyConfig


@dataclass
class FqnToConfig(AOBaseConfig):
    """A config per layer or parameter, by name: the rules of `ao.FqnToConfig`, of which one that matches nothing is noted.

    Raises ValueError when both dicts are given and differ.
    """

    fqn_to_config: Mapping[str, Any] = field(default_factory=OrderedDict)
    module_fqn_to_config: Mapping[str, Any] = field(default_factory=OrderedDict)
    version: int = 1  # type: ignore[misc]

    def __post_init__(self) -> None:
        one, two = self.fqn_to_config, self.module_fqn_to_config
        if one and two and one != two:
            raise ValueError("FqnToConfig: give fqn_to_config or module_fqn_to_config, not two that differ")
        self.fqn_to_config = self.module_fqn_to_config = one or two

    def to_ao(self) -> ao.FqnToConfig:
        """The same in `ao`. Raises NotImplementedError for a config with a handler of its own."""
        table: dict[str, Any] = {}
        for key, config in self.fqn_to_config.items():
            if not (config is None or isinstance(config, (Config, Spec, Translated))):
                raise NotImplementedError(
                    f"FqnToConfig: {type(config).__name__}, for {key!r}, is applied by quantize_(model, config) alone; load the "
                    "model first"
                )
            table[key] = config.to_ao() if isinstance(config, Translated) else config
        return ao.FqnToConfig(table)

    def apply(self, model: nn.Module, device: Any) -> Report:
        """Quantize a model."""
        table: dict[str, Any] = {}
        own: dict[str, Any] = {}
        notes: list[str] = []
        names = [name for name, p in model.named_parameters() if p.dim() >= 2]
        rules = ao.FqnToConfig(dict.fromkeys(self.fqn_to_config))
        matched = {key for name in names for key in rules.rules_for(name)} | {"_default"}
        for key, config in self.fqn_to_config.items():
            if key not in matched:
                notes.append(f"the rule {key!r} matches nothing")
            elif isinstance(config, Translated):
                table[key] = config.to_ao()
            elif config is None or isinstance(config, (Config, Spec)):
                table[key] = config
            else:
                if key in dict(model.named_parameters()):
                    raise NotImplementedError(
                        f"FqnToConfig: {type(config).__name__} changes whole layers, and {key!r} is a parameter; name its layer"
                    )
                own[key] = config
                table[key] = None
        report = Report()
        for key, config in own.items():
            found = [n for n, m in model.named_modules() if self._first(f"{n}.weight" if n else "weight") == key]
            part = quantize_(model, config, _named(found))
            report.rows += part.rows
            report.notes += part.notes
        if table:
            done = ao.quantize_(model, ao.FqnToConfig(table), None, device)
            done.rows = [*report.rows, *done.rows]
            done.notes = [*report.notes, *done.notes]
            report = done
        report.notes += notes
        return report

    def _first(self, parameter: str) -> str | None:
        keys = ao.FqnToConfig(dict.fromkeys(self.fqn_to_config)).rules_for(parameter)
        return keys[0] if keys else "_default"


def _named(names: list[str]) -> Filter:
    return lambda module, name: name in names and _is_linear(module)


ModuleFqnToConfig = FqnToConfig
AOPerModuleConfig = FqnToConfig


def fqn_matches_fqn_config(fqn: str, config: FqnToConfig) -> bool:
    """Whether a rule has this name, or a regular expression that matches all of it."""
    rules = config.fqn_to_config
    return fqn in rules or any(key.startswith("re:") and re.fullmatch(key[3:], fqn) for key in rules)


def swap_conv2d_1x1_to_linear(model: nn.Module, filter_fn: Filter | None = None) -> None:
    """Let convolutions of 1 x 1 compute as linear layers, which can be quantized."""

    def is_one(module: nn.Module, name: str) -> bool:
        plain = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        return (
            plain
            and module.stride == (1, 1)
            and module.padding == (0, 0)
            and (not filter_fn or filter_fn(module, name))
        )

    _replace_with_custom_fn_if_matches_filter(model, _PermutedLinear, is_one)


class _PermutedLinear(nn.Module):
    """A 1 x 1 convolution as a linear layer over the channels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight
        self.linear = nn.Linear(
            conv.in_channels, conv.out_channels, conv.bias is not None, device=weight.device, dtype=weight.dtype
        )
        self.linear.weight = nn.Parameter(weight.detach()[:, :, 0, 0].contiguous())
        if conv.bias is not None:
            self.linear.bias = nn.Parameter(conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W)."""
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def insert_observers_(
    model: nn.Module,
    input_observer: nn.Module | None,
    weight_observer: nn.Module | None,
    *,
    filter_fn: Filter | None = None,
) -> None:
    """Have copies of two observers see the inputs and the weights of linear layers, as `layer.weight.input_observer` and
    `layer.weight.weight_observer`."""
    import copy

    from .linear_activation_weight_observed_tensor import LinearActivationWeightObservedTensor

    for name, module in list(model.named_modules()):
        if (filter_fn or _is_linear)(module, name):
            observers = copy.deepcopy(input_observer), copy.deepcopy(weight_observer)
            weight: Any = module.weight
            observed = LinearActivationWeightObservedTensor.from_float(weight, *observers)
            module.weight = nn.Parameter(observed, requires_grad=weight.requires_grad)


def change_linear_weights_to_int8_dqtensors(model: nn.Module, filter_fn: Filter | None = None, **kwargs: Any) -> None:
    """`quantize_` with int8 weights and activations. kwargs: accepted and without effect."""
    quantize_(model, int8_dynamic_activation_int8_weight(), filter_fn)


def change_linear_weights_to_int8_woqtensors(model: nn.Module, filter_fn: Filter | None = None, **kwargs: Any) -> None:
    """`quantize_` with int8 weights. kwargs: accepted and without effect."""
    quantize_(model, int8_weight_only(), filter_fn)


def change_linear_weights_to_int4_woqtensors(
    model: nn.Module, groupsize: int = 128, filter_fn: Filter | None = None, **kwargs: Any
) -> None:
    """`quantize_` with int4 weights in groups. kwargs: accepted and without effect."""
    quantize_(model, int4_weight_only(group_size=groupsize), filter_fn)


def __getattr__(name: str) -> Any:
    """Names that this module shares with others, which are imported when they are asked for."""
    if name in ("Int8DynActInt4WeightQuantizer", "Int8DynActInt4WeightGPTQQuantizer", "Int4WeightOnlyQuantizer"):
        from . import GPTQ

        return getattr(GPTQ, name)
    if name in ("autoquant", "intx_quantization_aware_training", "from_intx_quantization_aware_training"):
        from .. import quantization

        return getattr(quantization, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AOBaseConfig",
    "AOPerModuleConfig",
    "FPXWeightOnlyConfig",
    "Float8DynamicActivationFloat8SemiSparseWeightConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8DynamicActivationInt4WeightConfig",
    "Float8StaticActivationFloat8WeightConfig",
    "Float8WeightOnlyConfig",
    "FqnToConfig",
    "GemliteUIntXWeightOnlyConfig",
    "Int4DynamicActivationInt4WeightConfig",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
    "ModuleFqnToConfig",
    "PlainLayout",
    "Quantizer",
    "TwoStepQuantizer",
    "UIntXWeightOnlyConfig",
    "change_linear_weights_to_int4_woqtensors",
    "change_linear_weights_to_int8_dqtensors",
    "change_linear_weights_to_int8_woqtensors",
    "float8_dynamic_activation_float8_weight",
    "float8_static_activation_float8_weight",
    "float8_weight_only",
    "fpx_weight_only",
    "fqn_matches_fqn_config",
    "gemlite_uintx_weight_only",
    "insert_observers_",
    "int4_dynamic_activation_int4_weight",
    "int4_weight_only",
    "int8_dynamic_activation_int4_weight",
    "int8_dynamic_activation_int8_semi_sparse_weight",
    "int8_dynamic_activation_int8_weight",
    "int8_weight_only",
    "quantize_",
    "recommended_inductor_config_setter",
    "register_quantize_module_handler",
    "swap_conv2d_1x1_to_linear",
    "uintx_weight_only",
]
