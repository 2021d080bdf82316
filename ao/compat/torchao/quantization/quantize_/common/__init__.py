"""torchao.quantization.quantize_.common: settings that every format shares. They choose kernels, which `ao` does by itself."""

from enum import Enum
from typing import Any

from ....kinds import Kind

__all__ = ["KernelPreference", "PackingFormat", "QuantizationStep", "SupportsActivationPreScaling"]


class KernelPreference(str, Enum):
    """Accepted and without effect."""

    AUTO = "auto"
    TORCH = "torch"
    MSLK = "mslk"
    FBGEMM = "fbgemm"
    EMULATED = "emulated"
    TRITON = "triton"


class PackingFormat(str, Enum):
    """Accepted and without effect: `ao` has one packing per format."""

    PLAIN = "plain"
    OPAQUE = "opaque"
    PRESHUFFLED = "preshuffled"
    UNPACKED_TO_INT8 = "unpacked_to_int8"
    PLAIN_INT32 = "plain_int32"
    TILE_PACKED_TO_4D = "tile_packed_to_4d"


class QuantizationStep(str, Enum):
    """The steps of an algorithm that needs to see data."""

    PREPARE = "prepare"
    CONVERT = "convert"
    PREPARE_FOR_LOADING = "prepare_for_loading"
    PREPARE_FOR_SMOOTHQUANT_SMOOTHING_FACTOR = "prepare_for_smoothquant_smoothing_factor"
    PREPARE_FOR_SMOOTHQUANT_ACTIVATION_SCALES = "prepare_for_smoothquant_activation_scales"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"step: {value!r} is not one of {', '.join(each.value for each in cls)}")


class SupportsActivationPreScaling(metaclass=Kind):
    """A weight whose input may be multiplied beforehand: any of `ao`. After AWQ and SmoothQuant it has an `act_pre_scale`."""

    @staticmethod
    def holds(instance: Any) -> bool:
        """Whether an object has `pre_scale`."""
        return hasattr(instance, "pre_scale")
