"""Names for the ways to train, for a `--precision` of a script."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .bitnet import BitNetTrainingConfig
from .convert import convert_to_low_precision_training
from .float8_config import Float8LinearConfig
from .int8 import Int8MixedPrecisionTrainingConfig, Int8WeightOnlyQuantizedTrainingConfig
from .small_floats import MXFP4TrainingConfig, MXFP8TrainingConfig, NVFP4TrainingConfig
from .training_config import LayerConfig

PRECISIONS: dict[str, LayerConfig | None] = {
    "bf16": None,
    "float8-tensorwise": Float8LinearConfig.from_recipe_name("tensorwise"),
    "float8-rowwise": Float8LinearConfig.from_recipe_name("rowwise"),
    "float8-rowwise-gw-hp": Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"),
    "float8-blockwise": Float8LinearConfig.from_recipe_name("blockwise"),
    "int8-mixed": Int8MixedPrecisionTrainingConfig(),
    "int8-mixed-stochastic": Int8MixedPrecisionTrainingConfig(rounding="stochastic"),
    "int8-weight-only": Int8WeightOnlyQuantizedTrainingConfig(),
    "bitnet": BitNetTrainingConfig(),
    "mxfp8": MXFP8TrainingConfig(),
    "mxfp4": MXFP4TrainingConfig(),
    "nvfp4": NVFP4TrainingConfig(),
}
"""Name -> config; bf16 is the model as it is."""


def convert_to_precision(
    module: nn.Module, precision: str, *, module_filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Let the linear layers of a model train as one of `PRECISIONS` says, in place; the model is returned.

    Raises ValueError for another name, and what `convert_to_low_precision_training` raises.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    config = PRECISIONS[precision]
    if config is None:
        return module
    return convert_to_low_precision_training(module, config, module_filter_fn=module_filter_fn)
