"""torchao.prototype.quant_logger: the ranges of parameters and activations."""

from .quant_logger import *  # noqa: F403
from .quant_logger import __all__  # noqa: F401
