"""How to choose number formats for a model: `quantize_` and its configs, and `autoquant`, which measures."""

from .affine import (
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    int_scaled_matmul,
    quantize_affine,
)
from .algorithms.awq import AWQ
from .algorithms.bias_correction import BiasCorrection
from .algorithms.clip import Clip
from .algorithms.gptq import GPTQ
from .algorithms.hqq import HQQ
from .algorithms.pruning import Magnitude, Sparsity, Wanda
from .algorithms.recipe import Recipe, RoundToNearest
from .algorithms.rotation import RotationPlan, rotate_, rotation_plan
from .algorithms.smoothquant import SmoothQuant
from .algorithms.sparsegpt import SparseGPT
from .autoquant.candidates import (
    ALL_AUTOQUANT_CLASS_LIST,
    DEFAULT_AUTOQUANT_CLASS_LIST,
    DEFAULT_INT4_AUTOQUANT_CLASS_LIST,
    OTHER_AUTOQUANT_CLASS_LIST,
)
from .autoquant.report import AutoquantReport
from .autoquant.saved_plan import load_plan, save_plan
from .autoquant.session import autoquant, finalize_autoquant
from .benchmark import benchmark_model
from .calibration.calibrate import calibrate
from .calibration.statistics import Statistics
from .config import Config, SpecConfig, config_from_dict, config_to_dict
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
from .presets import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FPXWeightOnlyConfig,
    GemliteUIntXWeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationTernaryWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    MXFPWeightOnlyConfig,
    NF4WeightOnlyConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
    TernaryWeightOnlyConfig,
    UIntXWeightOnlyConfig,
)
from .quantize import dequantize_, is_linear, quantize_
from .report import Report, compute_error, get_model_size_in_bytes
from .rules import FqnToConfig, ModuleFqnToConfig
from .sensitivity import Sensitivity, sensitivity
from .sparse_presets import BlockSparseWeightConfig, SemiSparseWeightConfig

__all__: list[str] = [
    "ALL_AUTOQUANT_CLASS_LIST",
    "AWQ",
    "DEFAULT_AUTOQUANT_CLASS_LIST",
    "DEFAULT_INT4_AUTOQUANT_CLASS_LIST",
    "GPTQ",
    "HQQ",
    "OTHER_AUTOQUANT_CLASS_LIST",
    "AutoquantReport",
    "BiasCorrection",
    "BlockSparseWeightConfig",
    "Clip",
    "Config",
    "FPXWeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8StaticActivationFloat8WeightConfig",
    "Float8WeightOnlyConfig",
    "FqnToConfig",
    "GemliteUIntXWeightOnlyConfig",
    "Granularity",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationTernaryWeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
    "MXDynamicActivationMXWeightConfig",
    "MXFPWeightOnlyConfig",
    "Magnitude",
    "MappingType",
    "ModuleFqnToConfig",
    "NF4WeightOnlyConfig",
    "NVFP4DynamicActivationNVFP4WeightConfig",
    "NVFP4WeightOnlyConfig",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "Recipe",
    "Report",
    "RotationPlan",
    "RoundToNearest",
    "SemiSparseWeightConfig",
    "Sensitivity",
    "SmoothQuant",
    "SparseGPT",
    "Sparsity",
    "SpecConfig",
    "Statistics",
    "TernaryWeightOnlyConfig",
    "UIntXWeightOnlyConfig",
    "Wanda",
    "ZeroPointDomain",
    "autoquant",
    "benchmark_model",
    "calibrate",
    "choose_qparams_affine",
    "compute_error",
    "config_from_dict",
    "config_to_dict",
    "dequantize_",
    "dequantize_affine",
    "fake_quantize_affine",
    "finalize_autoquant",
    "get_model_size_in_bytes",
    "int_scaled_matmul",
    "is_linear",
    "load_plan",
    "quantize_",
    "quantize_affine",
    "rotate_",
    "rotation_plan",
    "save_plan",
    "sensitivity",
]
