"""`Float8LinearConfig`: the recipes of float8 training, and each of their choices.

Formats and the role of each: arXiv:2209.05433 (e4m3 for activations and weights, e5m2 for gradients). Blocks of 1 x 128 and
128 x 128: arXiv:2412.19437, section 3.3.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from enum import Enum

import torch

from ao.dtypes import Float8, Spec

from .recipe import Gemm, Recipe
from .training_config import TrainingConfig

_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


class ScalingType(Enum):
    """DYNAMIC: the scale comes from the tensor at hand. DISABLED: the tensor stays in floating point."""

    DYNAMIC = "dynamic"
    DISABLED = "disabled"


class ScalingGranularity(Enum):
    """What shares a scale: the TENSOR; a row along the sum of the product (AXISWISE); 128 of such a row; 128 x 128."""

    TENSORWISE = "tensorwise"
    AXISWISE = "axiswise"
    BLOCKWISE_1X128 = "blockwise_1x128"
    BLOCKWISE_128X128 = "blockwise_128x128"


_BLOCKS: dict[ScalingGranularity, tuple[int, int]] = {
    ScalingGranularity.TENSORWISE: (-1, -1),
    ScalingGranularity.AXISWISE: (1, -1),
    ScalingGranularity.BLOCKWISE_1X128: (1, 128),
    ScalingGranularity.BLOCKWISE_128X128: (128, 128),
}


class Float8LinearRecipeName(str, Enum):
    """The names that `Float8LinearConfig.from_recipe_name` knows."""

    TENSORWISE = "tensorwise"
    ROWWISE = "rowwise"
    ROWWISE_WITH_GW_HP = "rowwise_with_gw_hp"
    BLOCKWISE = "blockwise"


@dataclass(frozen=True)
class CastConfig:
    """How one operand of one product is cast.

    target_dtype: torch.float8_e4m3fn or torch.float8_e5m2; None is e4m3 for inputs and weights, e5m2 for gradients.
    """

    scaling_type: ScalingType = ScalingType.DYNAMIC
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    target_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.target_dtype is not None and self.target_dtype not in _FORMATS:
            raise ValueError(
                f"CastConfig: target_dtype must be torch.float8_e4m3fn or torch.float8_e5m2, got {self.target_dtype}"
            )

    @property
    def short(self) -> str:
        """One word for messages."""
        return "disabled" if self.scaling_type is ScalingType.DISABLED else self.scaling_granularity.value


@dataclass(frozen=True)
class Float8GemmConfig:
    """How one product is computed. use_fast_accum: keep fewer bits of the running sum, which is faster."""

    use_fast_accum: bool = False


@dataclass(frozen=True)
class Float8LinearConfig(TrainingConfig):
    """Float8 for the three products of a linear layer, `out = input @ weight.T`, `grad_input = grad_output @ weight` and
    `grad_weight = grad_output.T @ input`.

    cast_config_input, cast_config_weight, cast_config_grad_output: how each is cast for the first product that it is in.
    cast_config_input_for_grad_weight, cast_config_weight_for_grad_input, cast_config_grad_output_for_grad_weight: for the
        second; None is the same. Both operands of a product are cast, or neither.
    gemm_config_output, gemm_config_grad_input, gemm_config_grad_weight: fast accumulation, in forward only by default.
    enable_fsdp_float8_all_gather: under FSDP2, cast weights before they are gathered, which moves half the bytes. Needs one
        scale for the weight (tensorwise) or squares (blockwise), since both products take the gathered codes.
    pad_inner_dim: fill up dims that are no multiples of 16, in place of refusing them.
    emulate: multiply float8 numbers in floating point. Where the chip has no float8, this is done without being asked.
    round_scales_to_power_of_2: scales that are powers of two.

    Raises ValueError for choices that no product can have.
    """

    cast_config_input: CastConfig = CastConfig()
    cast_config_input_for_grad_weight: CastConfig | None = None
    cast_config_weight: CastConfig = CastConfig()
    cast_config_weight_for_grad_input: CastConfig | None = None
    cast_config_grad_output: CastConfig = CastConfig()
    cast_config_grad_output_for_grad_weight: CastConfig | None = None
    gemm_config_output: Float8GemmConfig = Float8GemmConfig(use_fast_accum=True)
    gemm_config_grad_input: Float8GemmConfig = Float8GemmConfig()
    gemm_config_grad_weight: Float8GemmConfig = Float8GemmConfig()
    enable_fsdp_float8_all_gather: bool = False
    pad_inner_dim: bool = False
    emulate: bool = False
    round_scales_to_power_of_2: bool = False

    def __post_init__(self) -> None:
        e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
        for tensor, second, default in (
            ("input", "grad_weight", e4m3), ("weight", "grad_input", e4m3), ("grad_output", "grad_weight", e5m2)
        ):  # fmt: skip
            first, other = f"cast_config_{tensor}", f"cast_config_{tensor}_for_{second}"
            for name in (first, other):
                cast = getattr(self, name) or getattr(self, first)
                if cast.target_dtype is None:
                    cast = dataclasses.replace(cast, target_dtype=default)
                object.__setattr__(self, name, cast)
        for product, (one, two) in self._casts().items():
            if (one.scaling_type is ScalingType.DISABLED) != (two.scaling_type is ScalingType.DISABLED):
                raise ValueError(
                    f"Float8LinearConfig: the two operands of {product} must both be cast or both be disabled, got "
                    f"{one.short} and {two.short}"
                )
            if one.scaling_type is not ScalingType.DISABLED and one.target_dtype == two.target_dtype == e5m2:
                raise ValueError(
                    f"Float8LinearConfig: no chip multiplies e5m2 by e5m2, as {product} would; make one e4m3"
                )
        weight, again = self.cast_config_weight, self.cast_config_weight_for_grad_input
        square = (ScalingGranularity.TENSORWISE, ScalingGranularity.BLOCKWISE_128X128)
        if self.enable_fsdp_float8_all_gather and not (
            weight == again and weight.scaling_type is ScalingType.DYNAMIC and weight.scaling_granularity in square
        ):
            raise ValueError(
                "Float8LinearConfig: enable_fsdp_float8_all_gather needs weights that are cast in the same way for both of "
                f"their products, tensorwise or in squares, got {weight.short} and {again.short if again else None}"
            )

    @staticmethod
    def from_recipe_name(recipe_name: str | Float8LinearRecipeName) -> Float8LinearConfig:
        """A recipe by name.

        "tensorwise": one scale per tensor: the fastest. e4m3, and e5m2 for gradients.
        "rowwise": one scale per row of each product, powers of two, all e4m3: more accurate.
        "rowwise_with_gw_hp": rowwise, with grad_weight in high precision and one scale for the weight in grad_input: the most
            accurate.
        "blockwise": 1 x 128 for inputs and gradients, 128 x 128 for weights, powers of two, all e4m3.

        Raises ValueError for another name.
        """
        known = [name.value for name in Float8LinearRecipeName]
        name = recipe_name.value if isinstance(recipe_name, Float8LinearRecipeName) else recipe_name
        if name not in known:
            raise ValueError(f"unknown recipe {recipe_name!r}; the recipes are {', '.join(known)}")
        if name == "tensorwise":
            return Float8LinearConfig()

        def cast(granularity: ScalingGranularity) -> CastConfig:
            return CastConfig(scaling_granularity=granularity, target_dtype=torch.float8_e4m3fn)

        row, tensor = cast(ScalingGranularity.AXISWISE), cast(ScalingGranularity.TENSORWISE)
        if name == "rowwise":
            return Float8LinearConfig(row, None, row, None, row, None, round_scales_to_power_of_2=True)
        if name == "rowwise_with_gw_hp":
            off = CastConfig(scaling_type=ScalingType.DISABLED)
            return Float8LinearConfig(row, off, row, tensor, row, off, round_scales_to_power_of_2=True)
        part, square = cast(ScalingGranularity.BLOCKWISE_1X128), cast(ScalingGranularity.BLOCKWISE_128X128)
        return Float8LinearConfig(part, None, square, None, part, None, round_scales_to_power_of_2=True)

    def _casts(self) -> dict[str, tuple[CastConfig, CastConfig]]:
        """The casts of (a, b) of each product a @ b.T."""
        grad, grad_again = self.cast_config_grad_output, self.cast_config_grad_output_for_grad_weight
        weight_again, input_again = self.cast_config_weight_for_grad_input, self.cast_config_input_for_grad_weight
        assert grad_again and weight_again and input_again
        return {
            "output": (self.cast_config_input, self.cast_config_weight),
            "grad_input": (grad, weight_again),
            "grad_weight": (grad_again, input_again),
        }

    def _spec(self, cast: CastConfig) -> Spec | None:
        if cast.scaling_type is ScalingType.DISABLED:
            return None
        assert cast.target_dtype is not None
        return Float8(_FORMATS[cast.target_dtype], _BLOCKS[cast.scaling_granularity], self.round_scales_to_power_of_2)  # type: ignore[arg-type]

    def recipe(self) -> Recipe:
        """The recipe of the layers."""
        return _recipe(self)


@functools.cache
def _recipe(config: Float8LinearConfig) -> Recipe:
    fast = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    output, grad_input, grad_weight = (
        Gemm(config._spec(a), config._spec(b), gemm.use_fast_accum)
        for (a, b), gemm in zip(config._casts().values(), fast)
    )
    gather = output.b if config.enable_fsdp_float8_all_gather else None
    return Recipe(output, grad_input, grad_weight, gather, config.emulate, config.pad_inner_dim)
