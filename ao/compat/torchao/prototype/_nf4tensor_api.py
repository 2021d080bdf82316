"""torchao.prototype._nf4tensor_api."""

from ..dtypes.nf4tensor import NF4WeightOnlyConfig, nf4_weight_only

__all__ = ["NF4WeightOnlyConfig", "nf4_weight_only"]
