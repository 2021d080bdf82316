"""What to train for: `QATConfig`, and the names that users of other libraries know."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...dtypes import Intx, Spec
from ..algorithms.recipe import Recipe, RoundToNearest
from ..calibration.sequential import Batch
from ..choice import Filter
from ..config import VALUES, Config, ModelConfig
from ..granularity import Granularity, MappingType, PerAxis, PerGroup, PerRow, PerToken, ZeroPointDomain
from ..read_format import read_format
from ..report import Report
from .convert import convert, unprepare
from .prepare import Adapter, prepare

_NAMED = {"per_token": PerToken(), "per_channel": PerAxis(0), "per_row": PerRow()}


@dataclass(frozen=True)
class IntxFakeQuantizeConfig:
    """Integers, for a weight or an activation: `IntxFakeQuantizeConfig(torch.int4, group_size=32)`.

    dtype: torch.int1 to torch.int8, torch.uint1 to torch.uint8.
    granularity: "per_token", "per_channel", "per_group" (with group_size), or PerToken(), PerAxis(0), PerRow(), PerGroup(g).
    mapping_type: SYMMETRIC by default; or is_symmetric=True or False.
    scale_precision: torch.float32, torch.bfloat16 or torch.float16.
    zero_point_domain: INT, or FLOAT for a fraction.
    is_dynamic: False for an activation with one scale, which is calibrated and then trained.
    range_learning: train scale and zero point of a weight along with it.
    group_size: elements of a row that share a scale: PerGroup(group_size).

    Raises ValueError for settings that contradict each other.
    """

    dtype: torch.dtype
    granularity: Granularity | str | None = None
    mapping_type: MappingType | None = None
    scale_precision: torch.dtype = torch.float32
    zero_point_precision: torch.dtype = torch.int32
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT
    is_dynamic: bool = True
    range_learning: bool = False
    eps: float | None = None
    group_size: int | None = None
    is_symmetric: bool | None = None

    def __post_init__(self) -> None:
        self.spec()

    @property
    def chosen(self) -> Granularity:
        """The granularity, from whichever parameter says it."""
        if isinstance(self.granularity, str) and self.granularity != "per_group":
            if self.granularity not in _NAMED:
                raise ValueError(
                    f"FakeQuantizeConfig: granularity must be one of {', '.join(_NAMED)}, per_group or a Granularity, "
                    f"got {self.granularity!r}"
                )
            return self._not_grouped(_NAMED[self.granularity])
        if isinstance(self.granularity, Granularity):
            return self._not_grouped(self.granularity)
        if self.group_size is None:
            raise ValueError("FakeQuantizeConfig: give a granularity, or group_size for one scale per group")
        return PerGroup(self.group_size)

    def _not_grouped(self, granularity: Granularity) -> Granularity:
        if self.group_size not in (None, getattr(granularity, "group_size", None)):
            raise ValueError(f"FakeQuantizeConfig: give group_size or granularity={granularity}, not both")
        return granularity

    def spec(self) -> Intx:
        """The Spec that this stands for."""
        name = str(self.dtype).removeprefix("torch.")
        bits = name.removeprefix("uint").removeprefix("int")
        if not bits.isdigit() or not 1 <= int(bits) <= 8:
            raise ValueError(
                f"FakeQuantizeConfig: dtype must be torch.int1 to int8 or uint1 to uint8, got {self.dtype}"
            )
        mapping = MappingType.SYMMETRIC if self.mapping_type is None else self.mapping_type
        symmetric = mapping is not MappingType.ASYMMETRIC
        if self.is_symmetric is not None:
            if self.mapping_type is not None and self.is_symmetric != symmetric:
                raise ValueError("FakeQuantizeConfig: mapping_type and is_symmetric contradict each other")
            symmetric = self.is_symmetric
        if self.scale_precision not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"FakeQuantizeConfig: scale_precision must be float32, bfloat16 or float16, got {self.scale_precision}"
            )
        return Intx(
            int(bits),
            (-1, -1) if not self.is_dynamic and isinstance(self.chosen, PerToken) else self.chosen.block(),
            signed=name.startswith("int"),
            symmetric=symmetric,
            clip=mapping is not MappingType.SYMMETRIC_NO_CLIPPING_ERR,
            zero_point="float" if self.zero_point_domain is ZeroPointDomain.FLOAT and not symmetric else "int",
            scale_dtype=str(self.scale_precision).removeprefix("torch."),
        )


FakeQuantizeConfig = IntxFakeQuantizeConfig
VALUES[IntxFakeQuantizeConfig.__name__] = IntxFakeQuantizeConfig

Part = IntxFakeQuantizeConfig | Spec
"""How to fake-quantize a weight or an activation."""


@dataclass(frozen=True)
class QATConfig(ModelConfig):
    """Quantization-aware training: `quantize_(m, QATConfig(c, step="prepare"))`, train, `quantize_(m, QATConfig(c,
    step="convert"))`.

    base_config: what the model is to become: a config, a Spec, the name of a format, or rules by name (`FqnToConfig`).
        Its `algorithm` says where training starts: "rtn", "hqq", or "gptq" with `quantize_(..., calibration_data=)`, whose
        codes and qparams it takes over. The qparams are then trained along.
    activation_config, weight_config: a `FakeQuantizeConfig` or a Spec each, in place of base_config.
    step: "prepare", or "convert" (which may leave the configs out: the layers know what they were prepared for).
    range_learning: train scales and zero points of the weights too (LSQ); None does so where they come from an algorithm.
    lora_rank: train adapters of this rank, W + lora_alpha / lora_rank * B A, and leave W as it is: no gradients of W are kept,
        and the optimizer has states for the adapters only. Convert quantizes the sum. None trains W.
    lora_alpha: of the adapters.

    Linear and embedding layers can be prepared (`filter_fn` chooses, as always). Prepare before `torch.compile` and before
    `fully_shard`. `disable_fake_quantize(model)` until training has settled, then `enable_fake_quantize(model)`, is a delayed
    start.

    Raises ValueError for settings that contradict each other.
    """

    base_config: Config | Spec | str | None = None
    activation_config: Part | None = None
    weight_config: Part | None = None
    step: Literal["prepare", "convert"] = "prepare"
    range_learning: bool | None = None
    lora_rank: int | None = None
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        custom = self.activation_config is not None or self.weight_config is not None
        if self.step not in ("prepare", "convert"):
            raise ValueError(f"QATConfig: step must be 'prepare' or 'convert', got {self.step!r}")
        if isinstance(self.base_config, str):
            object.__setattr__(self, "base_config", read_format(self.base_config, who="QATConfig"))
        if isinstance(self.base_config, (IntxFakeQuantizeConfig, QATConfig)):
            raise ValueError(
                f"QATConfig: base_config is a config for quantize_, such as Int4WeightOnlyConfig(), got {self.base_config}; "
                "a FakeQuantizeConfig is given as weight_config or activation_config"
            )
        if self.base_config is not None and custom:
            raise ValueError("QATConfig: give base_config, or activation_config and weight_config, not both")
        if self.step == "prepare" and self.base_config is None and self.weight_config is None:
            raise ValueError("QATConfig: step='prepare' needs base_config or weight_config")
        if self.step == "convert" and custom:
            raise ValueError(
                "QATConfig: step='convert' takes base_config or nothing: the layers know what they were prepared for"
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"QATConfig: lora_rank must be positive, got {self.lora_rank}")
        for name, part in (("activation_config", self.activation_config), ("weight_config", self.weight_config)):
            if part is not None and not isinstance(part, (IntxFakeQuantizeConfig, Spec)):
                raise ValueError(f"QATConfig: {name} must be a FakeQuantizeConfig or a Spec, got {part!r}")
        if isinstance(self.weight_config, IntxFakeQuantizeConfig) and not self.weight_config.is_dynamic:
            raise ValueError(
                "QATConfig: is_dynamic=False is for activations; range_learning=True trains a weight's scales"
            )

    @functools.cached_property
    def recipe(self) -> Recipe:
        base = self.base_config
        return base.recipe if isinstance(base, Config) else super().recipe

    def apply(self, model: nn.Module, filter_fn: Filter | None, batches: Sequence[Batch] | None) -> Report:
        base: Any = self.base_config  # a name was read in __post_init__
        if self.step == "convert":
            return convert(model, base, filter_fn)
        learning = self.range_learning
        if base is None:
            assert self.weight_config is not None
            if isinstance(self.weight_config, IntxFakeQuantizeConfig):
                learning = self.weight_config.range_learning if learning is None else learning
            base = _Parts(_spec(self.weight_config), self.activation_config, algorithm=self.algorithm)
        if learning is None:
            learning = isinstance(base, Config) and base.recipe != RoundToNearest()
        adapter = None if self.lora_rank is None else Adapter(self.lora_rank, self.lora_alpha)
        return prepare(model, base, filter_fn, batches, learning, adapter)


def _spec(part: Part) -> Spec:
    return part.spec() if isinstance(part, IntxFakeQuantizeConfig) else part


@dataclass(frozen=True)
class _Parts(Config):
    """A weight's Spec and how its activation is quantized, as one config."""

    spec: Spec
    activation: Part | None

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return self.spec

    def act(self) -> Spec | None:
        return None if self.activation is None else _spec(self.activation)

    def act_range(self) -> Any:
        part = self.activation
        return "minmax" if isinstance(part, IntxFakeQuantizeConfig) and not part.is_dynamic else None


def IntXQuantizationAwareTrainingConfig(
    activation_config: Part | None = None, weight_config: Part | None = None
) -> QATConfig:
    """`QATConfig(activation_config=..., weight_config=..., step="prepare")` by another name."""
    return QATConfig(activation_config=activation_config, weight_config=weight_config, step="prepare")


@dataclass(frozen=True)
class FromIntXQuantizationAwareTrainingConfig(ModelConfig):
    """Turn prepared layers back into plain ones with the weights that were trained, for a config to follow:

        quantize_(model, FromIntXQuantizationAwareTrainingConfig())
        quantize_(model, Int8DynamicActivationInt4WeightConfig(group_size=32))

    Raises ValueError for a layer whose qparams were trained, which that config could not know; use
    `QATConfig(step="convert")` there.
    """

    def apply(self, model: nn.Module, filter_fn: Filter | None, batches: Sequence[Batch] | None) -> Report:
        return unprepare(model, filter_fn)
