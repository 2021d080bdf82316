"""Presets: configs by the names and with the parameters that users of the field know.

Whatever a preset does not offer, a bare Spec does: `quantize_(model, Intx(bits=3, block=(1, 64)))`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..dtypes import (
    NVFP4,
    BlockSparse,
    BlockSparseLayout,
    Codebook,
    Float8,
    FloatX,
    Int4CPULayout,
    Int4Prepacked,
    Intx,
    Layout,
    MarlinSparseLayout,
    MXInt,
    PlainLayout,
    SemiSparseLayout,
    Sparse24,
    Spec,
    TensorCoreTiledLayout,
    Ternary,
    nf4_spec,
)
from .algorithms.clip import Clip
from .algorithms.recipe import RoundToNearest
from .calibration.observers import RangeMethod
from .calibration.statistics import RANGES
from .config import Allowed, Config
from .granularity import (
    Granularity,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    ZeroPointDomain,
)

FLOAT8_FORMATS: dict[torch.dtype, Literal["e4m3", "e5m2"]] = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def _int_bits(config: Config, name: str, prefix: str) -> int:
    text = str(getattr(config, name)).removeprefix("torch.")
    if text.startswith(prefix) and text[len(prefix) :] in "12345678":
        return int(text[len(prefix) :])
    raise ValueError(f"{type(config).__name__}: {name} must be torch.{prefix}1 to torch.{prefix}8, got {text}")


def _mapping(mapping: MappingType) -> dict[str, Any]:
    """The fields of `Intx` that a MappingType stands for."""
    return {
        "symmetric": mapping is not MappingType.ASYMMETRIC,
        "clip": mapping is not MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    }


def _zero_point(config: Config, domain: ZeroPointDomain, bits: int) -> dict[str, Any]:
    """The fields of `Intx` that say what an asymmetric weight's zero point is.

    Where nothing was asked for, round-to-nearest takes an integer; "clip", up to 4 bits, one that shares 16 bits with the scale;
    and other recipes, whose point is accuracy, a fraction: that one and the scale in 16 bits each take less memory than a
    float32 scale and an integer. They are bfloat16, which has the range of float32: weights of 1e-20 or 1e30 keep their scales.
    """
    usual = domain is ZeroPointDomain.NONE
    if usual and isinstance(config.recipe, Clip) and bits <= 4:
        return {"zero_point": "joint"}
    if (usual and isinstance(config.recipe, (RoundToNearest, Clip))) or domain is ZeroPointDomain.INT:
        return {"zero_point": "int"}
    return {"zero_point": "float", "scale_dtype": "float32" if domain is ZeroPointDomain.FLOAT else "bfloat16"}


def _say_hqq(config: Config) -> None:
    """`use_hqq=True` is algorithm="hqq". Raises ValueError where another one is given beside it."""
    if config.algorithm not in ("rtn", "hqq"):
        name = type(config).__name__
        raise ValueError(f"{name}: give use_hqq=True or algorithm={config.algorithm!r}, not both")
    object.__setattr__(config, "algorithm", "hqq")


def _pair(granularity: Granularity | tuple[Granularity, Granularity] | None) -> tuple[Granularity, Granularity]:
    """(activation, weight) granularity from one or two of them; None is PerTensor()."""
    act, weight = granularity if isinstance(granularity, (tuple, list)) else (granularity, granularity)
    return act or PerTensor(), weight or PerTensor()


def _sparse(layout: Layout, values: Spec) -> Spec:
    """The Spec of a weight that leaves out zeros, whose numbers are stored as `values`; values itself for the plain layout."""
    if isinstance(layout, BlockSparseLayout):
        return BlockSparse((layout.blocksize, layout.blocksize), values)
    return Sparse24(values) if isinstance(layout, (SemiSparseLayout, MarlinSparseLayout)) else values


@dataclass(frozen=True)
class Int8WeightOnlyConfig(Config):
    """Symmetric int8 weights: 8 + 32 / block bits per element.

    group_size: elements of a row that share a scale; None for the granularity.
    granularity: PerRow(), PerTensor() or PerGroup(g).
    """

    group_size: int | None = None
    granularity: Granularity = PerRow()

    allowed: ClassVar[Allowed] = {"granularity": (PerRow, PerTensor, PerGroup, PerAxis), "group_size": (None, int)}

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return Intx(8, self.granularity.block() if self.group_size is None else (1, self.group_size))


@dataclass(frozen=True)
class Int4WeightOnlyConfig(Config):
    """Asymmetric int4 weights in groups: 4 + 40 / group_size bits per element, on every device; 4 + 16 / group_size with
    algorithm="clip", and 4 + 32 / group_size with others.

    group_size: elements of a row that share a scale.
    layout: PlainLayout(), or a device's own: TensorCoreTiledLayout() (CUDA, bfloat16), Int4CPULayout(). Int4XPULayout()
        is the plain one. MarlinSparseLayout() is for weights that are 2:4, symmetric, with group_size 128 or -1:
        3 + 16 / group_size bits per element.
    zero_point_domain: INT (an 8-bit zero point, 0 is exact), FLOAT (32 bits), NONE for the usual one of the layout and the
        algorithm.
    use_hqq: another way to say algorithm="hqq".
    """

    group_size: int = 128
    layout: Layout = PlainLayout()
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.NONE
    use_hqq: bool = False

    allowed: ClassVar[Allowed] = {
        "layout": (Layout,),
        "zero_point_domain": tuple(ZeroPointDomain),
        "group_size": (int,),
    }

    def __post_init__(self) -> None:
        if self.use_hqq:
            _say_hqq(self)
        super().__post_init__()
        if (
            isinstance(self.layout, (TensorCoreTiledLayout, Int4CPULayout))
            and self.zero_point_domain is ZeroPointDomain.INT
        ):
            raise ValueError(
                f"Int4WeightOnlyConfig: {self.layout} stores float zero points; "
                "use zero_point_domain=ZeroPointDomain.FLOAT or layout=PlainLayout()"
            )
        sparse = isinstance(self.layout, MarlinSparseLayout)
        if isinstance(self.layout, (SemiSparseLayout, BlockSparseLayout)):
            raise ValueError(f"Int4WeightOnlyConfig: {self.layout} is for int8 and float8; use MarlinSparseLayout()")
        if sparse and (self.group_size not in (128, -1) or self.zero_point_domain is ZeroPointDomain.FLOAT):
            raise ValueError(
                "Int4WeightOnlyConfig: layout=MarlinSparseLayout() is symmetric, with group_size=128 or -1; for others give "
                "Sparse24(Intx(4, ...)) in place of the config"
            )

    def weight(self, shape: tuple[int, ...]) -> Spec:
        block = (1, self.group_size)
        if isinstance(self.layout, TensorCoreTiledLayout):
            return Int4Prepacked("cuda", block, self.layout.inner_k_tiles)
        if isinstance(self.layout, Int4CPULayout):
            return Int4Prepacked("cpu", block)
        if isinstance(self.layout, MarlinSparseLayout):
            return Sparse24(Intx(4, block, symmetric=True, scale_dtype="bfloat16"))
        return Intx(4, block, signed=False, symmetric=False, **_zero_point(self, self.zero_point_domain, 4))


@dataclass(frozen=True)
class Int8DynamicActivationInt8WeightConfig(Config):
    """int8 weights and int8 activations, scaled anew at each call; the product runs on the integer units.

    layout: PlainLayout(), or for weights that leave out zeros SemiSparseLayout() (2:4) or BlockSparseLayout(blocksize).
    act_mapping_type: SYMMETRIC, or ASYMMETRIC for activations that are not centred.
    granularity: PerRow() (a scale per token and per output channel), PerTensor(), or a pair (activation, weight).
    """

    layout: Layout = PlainLayout()
    act_mapping_type: MappingType = MappingType.SYMMETRIC
    granularity: Granularity | tuple[Granularity, Granularity] = PerRow()

    allowed: ClassVar[Allowed] = {
        "layout": (PlainLayout, SemiSparseLayout, BlockSparseLayout),
        "act_mapping_type": tuple(MappingType),
        "granularity": (PerTensor, PerRow, PerToken, tuple),
    }

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return _sparse(self.layout, Intx(8, _pair(self.granularity)[1].block()))

    def act(self) -> Spec:
        return Intx(8, _pair(self.granularity)[0].block(), **_mapping(self.act_mapping_type))


@dataclass(frozen=True)
class Int8DynamicActivationInt4WeightConfig(Config):
    """int4 weights in groups and int8 activations per token ("8da4w").

    group_size: elements of a weight's row that share a scale; None or -1 for the whole row.
    mapping_type: of the weight. act_mapping_type: of the activation.
    """

    group_size: int | None = 32
    layout: Layout = PlainLayout()
    mapping_type: MappingType = MappingType.SYMMETRIC
    act_mapping_type: MappingType = MappingType.ASYMMETRIC

    allowed: ClassVar[Allowed] = {
        "layout": (PlainLayout,),
        "mapping_type": tuple(MappingType),
        "act_mapping_type": tuple(MappingType),
        "group_size": (None, int),
    }

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return Intx(4, (1, self.group_size or -1), **_mapping(self.mapping_type))

    def act(self) -> Spec:
        return Intx(8, (1, -1), **_mapping(self.act_mapping_type))


@dataclass(frozen=True)
class IntxWeightOnlyConfig(Config):
    """Signed integer weights of 1 to 8 bits, packed; for linears, embeddings and convolutions.

    weight_dtype: torch.int1 to torch.int8.
    granularity: PerAxis(0) or PerRow() (a scale per row), PerGroup(g), PerTensor(), PerBlock(...).
    mapping_type: of the weight.
    scale_dtype: torch.float32, torch.bfloat16 or torch.float16; None for float32, but bfloat16 beside a zero point that
        is a fraction.
    zero_point_domain: of an asymmetric weight: INT, FLOAT, or NONE for an integer, and a fraction with an algorithm.
    """

    weight_dtype: torch.dtype = torch.int8
    granularity: Granularity = PerAxis(0)
    mapping_type: MappingType = MappingType.SYMMETRIC
    scale_dtype: torch.dtype | None = None
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.NONE

    allowed: ClassVar[Allowed] = {
        "granularity": (Granularity,),
        "mapping_type": tuple(MappingType),
        "scale_dtype": (None, torch.float32, torch.bfloat16, torch.float16),
        "zero_point_domain": tuple(ZeroPointDomain),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _int_bits(self, "weight_dtype", "int")

    def weight(self, shape: tuple[int, ...]) -> Spec:
        settings, bits = _mapping(self.mapping_type), _int_bits(self, "weight_dtype", "int")
        if not settings["symmetric"]:
            settings |= _zero_point(self, self.zero_point_domain, bits)
        if self.scale_dtype is not None:
            settings["scale_dtype"] = str(self.scale_dtype).removeprefix("torch.")
            if settings.get("zero_point") == "joint":
                settings["zero_point"] = "int"
        return Intx(bits, self.granularity.block(), **settings)


@dataclass(frozen=True)
class UIntXWeightOnlyConfig(Config):
    """Unsigned asymmetric integer weights of 1 to 8 bits in groups, packed: bits + 40 / group_size bits per element;
    bits + 16 / group_size with algorithm="clip" up to 4 bits, and bits + 32 / group_size with others.

    dtype: torch.uint1 to torch.uint8.
    group_size: elements of a row that share a scale.
    pack_dim: -1, the only one.
    use_hqq: another way to say algorithm="hqq".
    zero_point_domain: INT, FLOAT, or NONE for an integer, and a fraction with an algorithm.
    """

    dtype: torch.dtype = torch.uint4  # type: ignore[attr-defined]
    group_size: int = 64
    pack_dim: int = -1
    use_hqq: bool = False
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.NONE

    allowed: ClassVar[Allowed] = {"group_size": (int,), "pack_dim": (-1,), "zero_point_domain": tuple(ZeroPointDomain)}

    def __post_init__(self) -> None:
        if self.use_hqq:
            _say_hqq(self)
        super().__post_init__()
        _int_bits(self, "dtype", "uint")

    def weight(self, shape: tuple[int, ...]) -> Spec:
        bits = _int_bits(self, "dtype", "uint")
        zero_point = _zero_point(self, self.zero_point_domain, bits)
        return Intx(bits, (1, self.group_size), signed=False, symmetric=False, **zero_point)


@dataclass(frozen=True)
class GemliteUIntXWeightOnlyConfig(Config):
    """What the gemlite library's formats store, with generated kernels in place of its own.

    group_size: elements of a row that share a scale; None for the whole row.
    bit_width: 4 (asymmetric), or 8 (symmetric).
    packing_bitwidth: accepted and without effect: ao has one packing.
    mode: "weight_only", or "dynamic" for int8 activations per token.
    """

    group_size: int | None = 128
    bit_width: int = 4
    packing_bitwidth: int | None = None
    mode: Literal["weight_only", "dynamic"] = "weight_only"

    allowed: ClassVar[Allowed] = {
        "bit_width": (4, 8),
        "packing_bitwidth": (None, 8, 16, 32),
        "mode": ("weight_only", "dynamic"),
        "group_size": (None, int),
    }

    def weight(self, shape: tuple[int, ...]) -> Spec:
        block = (1, self.group_size or -1)
        if self.bit_width == 8:
            return Intx(8, block)
        return Intx(4, block, signed=False, symmetric=False)

    def act(self) -> Spec | None:
        return Intx(8, (1, -1)) if self.mode == "dynamic" else None


@dataclass(frozen=True)
class NF4WeightOnlyConfig(Config):
    """QLoRA's 4-bit NormalFloat weights with double quantization (arXiv:2305.14314).

    block_size: elements of a row that share a scale.
    scaler_block_size: at most so many scales of a row share a scale of their own.
    """

    block_size: int = 64
    scaler_block_size: int = 256

    allowed: ClassVar[Allowed] = {"block_size": (int,), "scaler_block_size": (int,)}

    def weight(self, shape: tuple[int, ...]) -> Codebook:
        return nf4_spec(shape, self.block_size, self.scaler_block_size)


@dataclass(frozen=True)
class Float8WeightOnlyConfig(Config):
    """float8 weights: 8 + 32 / block bits per element.

    weight_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
    granularity: PerRow(), PerTensor(), PerGroup(g) or PerBlock(...).
    """

    weight_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity = PerRow()

    allowed: ClassVar[Allowed] = {"weight_dtype": tuple(FLOAT8_FORMATS), "granularity": (Granularity,)}

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return Float8(FLOAT8_FORMATS[self.weight_dtype], self.granularity.block())


@dataclass(frozen=True)
class Float8DynamicActivationFloat8WeightConfig(Config):
    """float8 weights and float8 activations, scaled anew at each call. Computed in float32 where the chip has no float8.

    activation_dtype, weight_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
    granularity: PerTensor() (None), PerRow(), or a pair (activation, weight).
    layout: PlainLayout(), or SemiSparseLayout() for weights that are 2:4.
    """

    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity | tuple[Granularity, Granularity] | None = None
    layout: Layout = PlainLayout()

    allowed: ClassVar[Allowed] = {
        "layout": (PlainLayout, SemiSparseLayout),
        "activation_dtype": tuple(FLOAT8_FORMATS),
        "weight_dtype": tuple(FLOAT8_FORMATS),
        "granularity": (None, PerTensor, PerRow, PerToken, tuple),
    }

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return _sparse(self.layout, Float8(FLOAT8_FORMATS[self.weight_dtype], _pair(self.granularity)[1].block()))

    def act(self) -> Spec:
        return Float8(FLOAT8_FORMATS[self.activation_dtype], _pair(self.granularity)[0].block())


def _static_scale(config: Config) -> None:
    """Check `scale` of a static activation, and make a number of it."""
    name, scale = type(config).__name__, config.scale  # type: ignore[attr-defined]
    if scale is None:
        return
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"{name}: scale must have one element, got shape {tuple(scale.shape)}; take its maximum")
    object.__setattr__(config, "scale", float(scale))
    if not float(scale) > 0:
        raise ValueError(f"{name}: scale must be positive, got {float(scale)}")


@dataclass(frozen=True)
class Float8StaticActivationFloat8WeightConfig(Config):
    """float8 weights and float8 activations with one scale that was found beforehand.

    scale: of all activations, max|x| / max of the format: a number or a tensor of one element; None for one per layer, found
        by calibration.
    range_method: how calibration finds it: "minmax", "moving_average", "percentile" (99.99 %) or "mse".
    granularity: PerTensor() or PerRow(), of the weight.
    """

    scale: float | Tensor | None = None
    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity = PerTensor()
    range_method: RangeMethod = "minmax"

    allowed: ClassVar[Allowed] = {
        "range_method": tuple(RANGES),
        "activation_dtype": tuple(FLOAT8_FORMATS),
        "weight_dtype": tuple(FLOAT8_FORMATS),
        "granularity": (PerTensor, PerRow),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _static_scale(self)

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return Float8(FLOAT8_FORMATS[self.weight_dtype], self.granularity.block())

    def act(self) -> Spec:
        return Float8(FLOAT8_FORMATS[self.activation_dtype], (-1, -1))

    def act_scale(self) -> float | None:
        return None if self.scale is None else float(self.scale)

    def act_range(self) -> RangeMethod | None:
        return self.range_method if self.scale is None else None


@dataclass(frozen=True)
class Int8StaticActivationInt8WeightConfig(Config):
    """int8 weights and int8 activations with one scale per layer that was found beforehand.

    scale: of all activations, max|x| / 127.5: a number or a tensor of one element; None for one per layer, found by
        calibration.
    range_method: how calibration finds it: "minmax", "moving_average", "percentile" (99.99 %) or "mse".
    granularity: PerRow() or PerTensor(), of the weight.
    """

    scale: float | Tensor | None = None
    granularity: Granularity = PerRow()
    range_method: RangeMethod = "minmax"

    allowed: ClassVar[Allowed] = {"range_method": tuple(RANGES), "granularity": (PerTensor, PerRow)}

    def __post_init__(self) -> None:
        super().__post_init__()
        _static_scale(self)

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return Intx(8, self.granularity.block())

    def act(self) -> Spec:
        return Intx(8, (-1, -1))

    def act_scale(self) -> float | None:
        return None if self.scale is None else float(self.scale)

    def act_range(self) -> RangeMethod | None:
        return self.range_method if self.scale is None else None


@dataclass(frozen=True)
class TernaryWeightOnlyConfig(Config):
    """Weights of -1, 0 and 1 times the mean magnitude (BitNet b1.58, arXiv:2402.17764): 1.625 bits per element, or 2.

    A model that was not trained for it loses nearly all: take one that `ao.train.bitnet_training` or QAT trained.

    packing: "trits", five numbers in a byte, for in_features in multiples of 64, or "bits", two bits each, for any.
    granularity: PerTensor(), PerRow() or PerGroup(g).
    """

    packing: Literal["trits", "bits"] = "trits"
    granularity: Granularity = PerTensor()

    allowed: ClassVar[Allowed] = {"packing": ("trits", "bits"), "granularity": (PerTensor, PerRow, PerGroup, PerAxis)}

    def weight(self, shape: tuple[int, ...]) -> Ternary:
        return Ternary(self.granularity.block(), self.packing)


@dataclass(frozen=True)
class Int8DynamicActivationTernaryWeightConfig(TernaryWeightOnlyConfig):
    """BitNet b1.58: ternary weights and int8 activations, scaled anew per token, scale = max|row| / 127.

    Of a model that `ao.train.bitnet_training` trained it computes what the training did, bit for bit.
    """

    def act(self) -> Intx:
        return Intx(8, narrow=True)


@dataclass(frozen=True)
class FPXWeightOnlyConfig(Config):
    """Floats of `ebits` exponent and `mbits` mantissa bits with a scale per row (FP6-LLM, arXiv:2401.14112).

    1 + ebits + mbits bits per element. With a scale per row (2, 3) is more accurate than the usual (3, 2).

    Raises ValueError for what is no format of `FloatX`.
    """

    ebits: int
    mbits: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight(())

    def weight(self, shape: tuple[int, ...]) -> FloatX:
        return FloatX(self.ebits, self.mbits, (1, -1), "float32")


_ELEMENTS = {"e2m1": (2, 1), "e2m3": (2, 3), "e3m2": (3, 2), "e4m3": (4, 3), "e5m2": (5, 2)}
_ELEMENTS_OF = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float4_e2m1fn_x2: "e2m1",
    torch.int8: "int8",
}


def _mx(config: Config, name: str, block_size: int, rule: Any) -> FloatX | MXInt:
    """The MX format that parameter `name` of `config` stands for."""
    value = getattr(config, name)
    form = _ELEMENTS_OF.get(value, value)
    if form == "int8":
        return MXInt((1, block_size), rule)
    if form not in _ELEMENTS:
        shown = ", ".join(map(str, (*_ELEMENTS, "int8", *_ELEMENTS_OF)))
        raise ValueError(f"{type(config).__name__}: {name} must be one of {shown}, got {value!r}")
    exponent, mantissa = _ELEMENTS[form]
    return FloatX(exponent, mantissa, (1, block_size), "e8m0", rule)


@dataclass(frozen=True)
class MXFPWeightOnlyConfig(Config):
    """MX weights (OCP Microscaling Formats 1.0): blocks of a row share a power of two, bits + 8 / block_size bits per element.

    weight_dtype: "e2m1" (MXFP4), "e2m3" or "e3m2" (MXFP6), "e4m3" or "e5m2" (MXFP8), "int8" (MXINT8), or torch's
        float8 and float4 dtypes and int8.
    block_size: 32 in the specification.
    scale_rule: how the power of two is found; see `FloatX`.
    """

    weight_dtype: str | torch.dtype = "e2m1"
    block_size: int = 32
    scale_rule: Literal["floor", "ceil", "rceil", "even"] = "even"

    allowed: ClassVar[Allowed] = {"block_size": (int,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight(())

    def weight(self, shape: tuple[int, ...]) -> FloatX | MXInt:
        return _mx(self, "weight_dtype", self.block_size, self.scale_rule)


@dataclass(frozen=True)
class MXDynamicActivationMXWeightConfig(MXFPWeightOnlyConfig):
    """MX weights and MX activations, scaled anew at each call. Computed in floating point where the chip has no MX products.

    activation_dtype, weight_dtype: as in `MXFPWeightOnlyConfig`.
    """

    weight_dtype: str | torch.dtype = "e4m3"
    scale_rule: Literal["floor", "ceil", "rceil", "even"] = "rceil"
    activation_dtype: str | torch.dtype = "e4m3"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.act()

    def act(self) -> FloatX | MXInt:
        return _mx(self, "activation_dtype", self.block_size, self.scale_rule)


@dataclass(frozen=True)
class NVFP4WeightOnlyConfig(Config):
    """NVFP4 weights: e2m1 in blocks of 16 with e4m3 scales, and a float32 scale per tensor (arXiv:2509.25149): 4.5 bits.

    use_dynamic_per_tensor_scale: False leaves out the scale per tensor; weights up to 6 * 448 fit.
    four_over_six: let each block choose between two scales, the one with the smaller error; 0.8 dB better (arXiv:2512.02010).
    """

    use_dynamic_per_tensor_scale: bool = True
    four_over_six: bool = False

    def weight(self, shape: tuple[int, ...]) -> FloatX:
        if self.use_dynamic_per_tensor_scale:
            return replace(NVFP4, four_over_six=self.four_over_six)
        return replace(NVFP4, scale="e4m3", scale_spec=None, four_over_six=self.four_over_six)


@dataclass(frozen=True)
class NVFP4DynamicActivationNVFP4WeightConfig(NVFP4WeightOnlyConfig):
    """NVFP4 weights and activations, the latter scaled anew at each call. Computed in floating point where the chip has no
    NVFP4 products."""

    def act(self) -> FloatX:
        return self.weight(())
