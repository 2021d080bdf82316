"""optimum.quanto.tensor: tensors, formats and how scales are found."""

from ..optimizers import (
    AbsmaxOptimizer,
    AffineOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    Optimizer,
    SymmetricOptimizer,
    absmax_scale,
)
from ..qtype import qfloat8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2, qint2, qint4, qint8, qtype, qtypes
from ..tensors import (
    ActivationQBytesTensor,
    QBitsTensor,
    QBytesTensor,
    QTensor,
    WeightQBitsTensor,
    WeightQBytesTensor,
    quantize_activation,
    quantize_weight,
)

__all__ = [
    "AbsmaxOptimizer",
    "ActivationQBytesTensor",
    "AffineOptimizer",
    "HqqOptimizer",
    "MaxOptimizer",
    "Optimizer",
    "QBitsTensor",
    "QBytesTensor",
    "QTensor",
    "SymmetricOptimizer",
    "WeightQBitsTensor",
    "WeightQBytesTensor",
    "absmax_scale",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qint2",
    "qint4",
    "qint8",
    "qtype",
    "qtypes",
    "quantize_activation",
    "quantize_weight",
]
