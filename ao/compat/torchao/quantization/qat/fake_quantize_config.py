"""torchao.quantization.qat.fake_quantize_config: how one tensor is rounded while a model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ao import Float8, Intx, Spec

from ..granularity import Granularity, PerAxis, PerGroup, PerRow, PerTensor, PerToken
from ..quant_primitives import MappingType, TorchAODType, ZeroPointDomain, as_dtype
from ..specs import FLOAT8, block_of, mapped

__all__ = [
    "FakeQuantizeConfig",
    "FakeQuantizeConfigBase",
    "Float8FakeQuantizeConfig",
    "Int4WeightFakeQuantizeConfig",
    "IntxFakeQuantizeConfig",
]


class FakeQuantizeConfigBase:
    """What rounds a weight or an activation."""

    is_dynamic: bool
    range_learning: bool

    def spec(self, activation: bool = False) -> Spec:
        """The Spec that it stands for."""
        raise NotImplementedError


@dataclass
class Float8FakeQuantizeConfig(FakeQuantizeConfigBase):
    """float8. hp_value_lb, hp_value_ub: accepted and without effect."""

    dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity = PerRow()
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None
    is_dynamic = True
    range_learning = False

    def spec(self, activation: bool = False) -> Spec:
        """`Float8`."""
        return Float8(FLOAT8[self.dtype], block_of(self.granularity))


@dataclass
class Int4WeightFakeQuantizeConfig(FakeQuantizeConfigBase):
    """int4 weights in groups: with zero points beside a bfloat16 activation, without beside a float8 one."""

    group_size: int = 128
    activation_dtype: torch.dtype = torch.float8_e4m3fn
    is_dynamic = True
    range_learning = False

    def spec(self, activation: bool = False) -> Spec:
        """`Intx(4)`."""
        if self.activation_dtype in FLOAT8:
            return Intx(4, (1, self.group_size), symmetric=True)
        return Intx(4, (1, self.group_size), signed=False, symmetric=False)


_NAMES = {"per_token": PerToken(), "per_channel": PerAxis(0)}


class IntxFakeQuantizeConfig(FakeQuantizeConfigBase):
    """Integers of 1 to 8 bits: `IntxFakeQuantizeConfig(torch.int4, group_size=32)`.

    dtype: torch.int1 to torch.int8, torch.uint1 to torch.uint8.
    granularity: "per_token", "per_channel", "per_group" (with group_size), PerToken(), PerAxis(0), PerRow() or PerGroup(g);
        PerTensor() with is_dynamic=False, for activations that are calibrated before training, also of torch.int16.
    mapping_type, or is_symmetric: symmetric by default.
    scale_precision: of the scales of a weight; those of an activation are float32. zero_point_precision, eps: accepted and
        without effect.
    is_dynamic: False keeps the qparams of the first batch. range_learning: they are trained.

    Raises ValueError for settings that contradict each other.
    """

    def __init__(
        self,
        dtype: torch.dtype | TorchAODType,
        granularity: Granularity | str | None = None,
        mapping_type: MappingType | None = None,
        scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
        zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
        is_dynamic: bool = True,
        range_learning: bool = False,
        eps: float | None = None,
        *,
        group_size: int | None = None,
        is_symmetric: bool | None = None,
    ) -> None:
        if zero_point_domain is None:
            raise ValueError("IntxFakeQuantizeConfig: use zero_point_domain=ZeroPointDomain.NONE for None")
        self.dtype = dtype
        fixed = isinstance(granularity, PerTensor) and not is_dynamic and not range_learning
        self.granularity: Granularity = PerTensor() if fixed else _granularity(granularity, group_size)
        self.mapping_type = _mapping(mapping_type, is_symmetric)
        self.scale_precision, self.zero_point_precision = scale_precision, zero_point_precision
        self.zero_point_domain = zero_point_domain
        self.is_dynamic, self.range_learning, self.eps = is_dynamic, range_learning, eps
        name = str(as_dtype(dtype)).removeprefix("torch.")
        if name.removeprefix("u").removeprefix("int") not in "12345678" and not (fixed and name == "int16"):
            raise ValueError(
                f"Unsupported dtype {dtype}: IntxFakeQuantizeConfig takes torch.int1 to int8 and torch.uint1 to uint8"
            )
        if is_dynamic and range_learning:
            raise ValueError(
                "IntxFakeQuantizeConfig: range_learning=True is not compatible with is_dynamic=True; give is_dynamic=False"
            )

    @property
    def group_size(self) -> int:
        """Of a PerGroup. Raises ValueError for another granularity."""
        if not isinstance(self.granularity, PerGroup):
            raise ValueError(f"IntxFakeQuantizeConfig: {self.granularity} has no group_size")
        return self.granularity.group_size

    @property
    def is_symmetric(self) -> bool:
        """Whether there is no zero point."""
        return self.mapping_type is not MappingType.ASYMMETRIC

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "group_size":
            super().__setattr__("granularity", PerGroup(value))
        elif name == "is_symmetric":
            super().__setattr__("mapping_type", _mapping(None, value))
        else:
            super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntxFakeQuantizeConfig) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"

    def spec(self, activation: bool = False) -> Spec:
        """`Intx`."""
        name = str(as_dtype(self.dtype)).removeprefix("torch.")
        floating = self.zero_point_domain is ZeroPointDomain.FLOAT and not self.is_symmetric
        return Intx(
            int(name.removeprefix("u").removeprefix("int")),
            block_of(self.granularity),
            signed=name.startswith("int"),
            zero_point="float" if floating else "int",
            scale_dtype="float32" if activation else str(self.scale_precision).removeprefix("torch."),
            **mapped(self.mapping_type),
        )


FakeQuantizeConfig = IntxFakeQuantizeConfig


def _granularity(granularity: Granularity | str | None, group_size: int | None) -> Granularity:
    if granularity == "per_group" or granularity is None:
        if group_size is None:
            raise ValueError("IntxFakeQuantizeConfig: give a granularity, or group_size for one scale per group")
        return PerGroup(group_size)
    if group_size is not None and not (isinstance(granularity, PerGroup) and granularity.group_size == group_size):
        raise ValueError(f"IntxFakeQuantizeConfig: give group_size or granularity={granularity!r}, not both")
    if isinstance(granularity, str):
        if granularity not in _NAMES:
            raise ValueError(
                f"IntxFakeQuantizeConfig: granularity must be per_token, per_channel or per_group, got {granularity!r}"
            )
        return _NAMES[granularity]
    if isinstance(granularity, PerAxis) and granularity.axis != 0:
        raise ValueError(f"IntxFakeQuantizeConfig: PerAxis(0) is the only axis, got {granularity}")
    if not isinstance(granularity, (PerToken, PerAxis, PerGroup, PerRow)):
        raise ValueError(f"IntxFakeQuantizeConfig: granularity={granularity!r} is not one of training")
    return granularity


def _mapping(mapping_type: MappingType | None, is_symmetric: bool | None) -> MappingType:
    if mapping_type is not None and is_symmetric is not None:
        raise ValueError("IntxFakeQuantizeConfig: give mapping_type or is_symmetric, not both")
    if is_symmetric is not None:
        return MappingType.SYMMETRIC if is_symmetric else MappingType.ASYMMETRIC
    if mapping_type is None:
        return MappingType.SYMMETRIC
    if not isinstance(mapping_type, MappingType):
        raise ValueError(f"IntxFakeQuantizeConfig: mapping_type must be a MappingType, got {mapping_type!r}")
    return mapping_type
