"""torchao.dtypes.floatx: layouts of floats."""

from ..utils import CutlassSemiSparseLayout, Float8Layout, FloatxTensorCoreLayout

__all__ = ["CutlassSemiSparseLayout", "Float8Layout", "FloatxTensorCoreLayout"]
