"""torchao.quantization: from a model to a quantized one."""

from __future__ import annotations

from typing import Any

from ..kernel import (
    int_scaled_matmul,
    safe_int_mm,
)
from .autoquant import (
    ALL_AUTOQUANT_CLASS_LIST,
    DEFAULT_AUTOQUANT_CLASS_LIST,
    DEFAULT_FLOAT_AUTOQUANT_CLASS_LIST,
    DEFAULT_INT4_AUTOQUANT_CLASS_LIST,
    DEFAULT_SPARSE_AUTOQUANT_CLASS_LIST,
    GEMLITE_INT4_AUTOQUANT_CLASS_LIST,
    OTHER_AUTOQUANT_CLASS_LIST,
    autoquant,
)
from .GPTQ import (
    Int4WeightOnlyGPTQQuantizer,
    Int4WeightOnlyQuantizer,
    Int8DynActInt4WeightGPTQQuantizer,
    Int8DynActInt4WeightLinear,
    Int8DynActInt4WeightQuantizer,
)
from .granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
)
from .linear_activation_quantized_tensor import (
    LinearActivationQuantizedTensor,
    to_linear_activation_quantized,
)
from .linear_activation_scale import (
    to_weight_tensor_with_linear_activation_scale_metadata,
)
from .mm_config import Float8MMConfig
from .observer import (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedObserverBase,
)
from .qat.api import (
    from_intx_quantization_aware_training,
    intx_quantization_aware_training,
)
from .quant_api import (
    AOPerModuleConfig,
    Float8DynamicActivationFloat8SemiSparseWeightConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FPXWeightOnlyConfig,
    FqnToConfig,
    GemliteUIntXWeightOnlyConfig,
    Int4DynamicActivationInt4WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    ModuleFqnToConfig,
    UIntXWeightOnlyConfig,
    float8_dynamic_activation_float8_weight,
    float8_static_activation_float8_weight,
    float8_weight_only,
    fpx_weight_only,
    fqn_matches_fqn_config,
    gemlite_uintx_weight_only,
    int4_dynamic_activation_int4_weight,
    int4_weight_only,
    int8_dynamic_activation_int4_weight,
    int8_dynamic_activation_int8_semi_sparse_weight,
    int8_dynamic_activation_int8_weight,
    int8_weight_only,
    quantize_,
    swap_conv2d_1x1_to_linear,
    uintx_weight_only,
)
from .quant_primitives import (
    MappingType,
    TorchAODType,
    ZeroPointDomain,
    choose_qparams_affine,
    choose_qparams_affine_floatx,
    choose_qparams_affine_with_min_max,
    choose_qparams_and_quantize_affine_hqq,
    dequantize_affine,
    dequantize_affine_floatx,
    fake_quantize_affine,
    fake_quantize_affine_cachemask,
    quantize_affine,
    quantize_affine_floatx,
)
from .quantize_.workflows import (
    Float8Tensor,
    Int4PlainInt32Tensor,
    Int4PreshuffledTensor,
    Int4Tensor,
    Int4TilePackedTo4dTensor,
    Int8Tensor,
    IntxOpaqueTensor,
    IntxUnpackedToInt8Tensor,
)
from .smoothquant import (
    SmoothFakeDynamicallyQuantizedLinear,
    SmoothFakeDynQuantMixin,
    get_scale,
    set_smooth_fq_attribute,
    smooth_fq_linear_to_inference,
    swap_linear_with_smooth_fq_linear,
)
from .subclass import (
    Int4WeightOnlyQuantizedLinearWeight,
    Int8DynamicallyQuantizedLinearWeight,
    Int8WeightOnlyQuantizedLinearWeight,
)
from .transform_module import (
    register_quantize_module_handler,
)
from .unified import (
    Quantizer,
    TwoStepQuantizer,
)
from .utils import (
    compute_error,
)
from .weight_only import (
    WeightOnlyInt8QuantLinear,
)


def __getattr__(name: str) -> Any:
    """What `dtypes` has, which imports from here."""
    if name in ("NF4Tensor", "to_nf4"):
        from ..dtypes import nf4tensor

        return getattr(nf4tensor, name)
    if name in ("qat", "observer"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ALL_AUTOQUANT_CLASS_LIST",
    "DEFAULT_AUTOQUANT_CLASS_LIST",
    "DEFAULT_FLOAT_AUTOQUANT_CLASS_LIST",
    "DEFAULT_INT4_AUTOQUANT_CLASS_LIST",
    "DEFAULT_SPARSE_AUTOQUANT_CLASS_LIST",
    "GEMLITE_INT4_AUTOQUANT_CLASS_LIST",
    "OTHER_AUTOQUANT_CLASS_LIST",
    "AOPerModuleConfig",
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedObserverBase",
    "FPXWeightOnlyConfig",
    "Float8DynamicActivationFloat8SemiSparseWeightConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8DynamicActivationInt4WeightConfig",
    "Float8MMConfig",
    "Float8StaticActivationFloat8WeightConfig",
    "Float8Tensor",
    "Float8WeightOnlyConfig",
    "FqnToConfig",
    "GemliteUIntXWeightOnlyConfig",
    "Granularity",
    "Int4DynamicActivationInt4WeightConfig",
    "Int4PlainInt32Tensor",
    "Int4PreshuffledTensor",
    "Int4Tensor",
    "Int4TilePackedTo4dTensor",
    "Int4WeightOnlyConfig",
    "Int4WeightOnlyGPTQQuantizer",
    "Int4WeightOnlyQuantizedLinearWeight",
    "Int4WeightOnlyQuantizer",
    "Int8DynActInt4WeightGPTQQuantizer",
    "Int8DynActInt4WeightLinear",
    "Int8DynActInt4WeightQuantizer",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int8DynamicallyQuantizedLinearWeight",
    "Int8StaticActivationInt8WeightConfig",
    "Int8Tensor",
    "Int8WeightOnlyConfig",
    "Int8WeightOnlyQuantizedLinearWeight",
    "IntxOpaqueTensor",
    "IntxUnpackedToInt8Tensor",
    "IntxWeightOnlyConfig",
    "LinearActivationQuantizedTensor",
    "MappingType",
    "ModuleFqnToConfig",
    "NF4Tensor",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "Quantizer",
    "SmoothFakeDynQuantMixin",
    "SmoothFakeDynamicallyQuantizedLinear",
    "TorchAODType",
    "TwoStepQuantizer",
    "UIntXWeightOnlyConfig",
    "WeightOnlyInt8QuantLinear",
    "ZeroPointDomain",
    "autoquant",
    "choose_qparams_affine",
    "choose_qparams_affine_floatx",
    "choose_qparams_affine_with_min_max",
    "choose_qparams_and_quantize_affine_hqq",
    "compute_error",
    "dequantize_affine",
    "dequantize_affine_floatx",
    "fake_quantize_affine",
    "fake_quantize_affine_cachemask",
    "float8_dynamic_activation_float8_weight",
    "float8_static_activation_float8_weight",
    "float8_weight_only",
    "fpx_weight_only",
    "fqn_matches_fqn_config",
    "from_intx_quantization_aware_training",
    "gemlite_uintx_weight_only",
    "get_scale",
    "int4_dynamic_activation_int4_weight",
    "int4_weight_only",
    "int8_dynamic_activation_int4_weight",
    "int8_dynamic_activation_int8_semi_sparse_weight",
    "int8_dynamic_activation_int8_weight",
    "int8_weight_only",
    "int_scaled_matmul",
    "intx_quantization_aware_training",
    "quantize_",
    "quantize_affine",
    "quantize_affine_floatx",
    "register_quantize_module_handler",
    "safe_int_mm",
    "set_smooth_fq_attribute",
    "smooth_fq_linear_to_inference",
    "swap_conv2d_1x1_to_linear",
    "swap_linear_with_smooth_fq_linear",
    "to_linear_activation_quantized",
    "to_nf4",
    "to_weight_tensor_with_linear_activation_scale_metadata",
    "uintx_weight_only",
]
