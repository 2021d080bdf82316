"""torchao.dtypes._nf4tensor_api: NF4 weights by `quantize_`."""

from .nf4tensor import NF4WeightOnlyConfig, nf4_weight_only

__all__ = ["NF4WeightOnlyConfig", "nf4_weight_only"]
