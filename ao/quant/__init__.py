"""How to choose number formats for a model: `quantize_` and its configs, and `autoquant`, which measures."""

from .autoquant import autoquant, finalize_autoquant
from .autoquant_report import AutoquantReport
from .benchmark import benchmark_model
from .candidates import (
    ALL_AUTOQUANT_CLASS_LIST,
    DEFAULT_AUTOQUANT_CLASS_LIST,
    DEFAULT_INT4_AUTOQUANT_CLASS_LIST,
    OTHER_AUTOQUANT_CLASS_LIST,
)
from .configs import (
    Config,
    Float8DynamicActivationFloat8WeightConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    GemliteUIntXWeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    ModuleFqnToConfig,
    NF4WeightOnlyConfig,
    UIntXWeightOnlyConfig,
    config_from_dict,
    config_to_dict,
)
from .granularity import (
    Granularity,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    ZeroPointDomain,
)
from .plan import load_plan, save_plan
from .quantize import dequantize_, is_linear, quantize_
from .report import Report, compute_error, get_model_size_in_bytes

__all__ = [
    "ALL_AUTOQUANT_CLASS_LIST",
    "DEFAULT_AUTOQUANT_CLASS_LIST",
    "DEFAULT_INT4_AUTOQUANT_CLASS_LIST",
    "OTHER_AUTOQUANT_CLASS_LIST",
    "AutoquantReport",
    "Config",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8StaticActivationFloat8WeightConfig",
    "Float8WeightOnlyConfig",
    "FqnToConfig",
    "GemliteUIntXWeightOnlyConfig",
    "Granularity",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
    "MappingType",
    "ModuleFqnToConfig",
    "NF4WeightOnlyConfig",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "Report",
    "UIntXWeightOnlyConfig",
    "ZeroPointDomain",
    "autoquant",
    "benchmark_model",
    "compute_error",
    "config_from_dict",
    "config_to_dict",
    "dequantize_",
    "finalize_autoquant",
    "get_model_size_in_bytes",
    "is_linear",
    "load_plan",
    "quantize_",
    "save_plan",
]
