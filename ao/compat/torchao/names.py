"""`table`: every name of torchao that is here, and what it is in `ao`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any, NamedTuple

from .core.config import Translated

ROOMS = ("ao", "ao.dtypes", "ao.optim", "ao.train", "ao.quant.qat", "ao.sparsity")
"""Where a name of `ao` is looked for, the first before the others."""

EQUIVALENTS = {
    "AWQConfig": "ao.AWQ",
    "AffineQuantizedMinMaxObserver": "ao.calibrate",
    "AffineQuantizedTensor": "ao.QTensor",
    "BitNetTrainingLinearWeight": "ao.train.BitNetTrainingConfig",
    "FakeQuantizeConfig": "ao.quant.qat.IntxFakeQuantizeConfig",
    "FakeQuantizedEmbedding": "ao.quant.qat.FakeQuantizedEmbedding",
    "FakeQuantizedLinear": "ao.quant.qat.FakeQuantizedLinear",
    "Float8Linear": "ao.train.LowPrecisionLinear",
    "Float8LinearConfig": "ao.train.Float8LinearConfig",
    "Float8Tensor": "ao.dtypes.Float8Tensor",
    "Float8TrainingTensor": "ao.dtypes.Float8Tensor",
    "Float8StaticActivationFloat8WeightConfig": "ao.Float8StaticActivationFloat8WeightConfig",
    "FqnToConfig": "ao.FqnToConfig",
    "FromIntXQuantizationAwareTrainingConfig": "ao.quant.qat.FromIntXQuantizationAwareTrainingConfig",
    "GPTQConfig": "ao.GPTQ",
    "Int4WeightOnlyGPTQQuantizer": "ao.GPTQ",
    "Int8DynActInt4WeightQuantizer": "ao.Int8DynamicActivationInt4WeightConfig",
    "Int8DynActInt4WeightQATQuantizer": "ao.quant.qat.QATConfig",
    "Int4WeightOnlyQATQuantizer": "ao.quant.qat.QATConfig",
    "Int8DynamicActivationIntxWeightConfig": "ao.SpecConfig",
    "Int8StaticActivationInt8WeightConfig": "ao.Int8StaticActivationInt8WeightConfig",
    "Int8Tensor": "ao.dtypes.IntxTensor",
    "Int4Tensor": "ao.dtypes.IntxTensor",
    "IntXQuantizationAwareTrainingConfig": "ao.quant.qat.IntXQuantizationAwareTrainingConfig",
    "IntxFakeQuantizeConfig": "ao.quant.qat.IntxFakeQuantizeConfig",
    "IntxUnpackedToInt8Tensor": "ao.dtypes.IntxTensor",
    "LinearActivationQuantizedTensor": "ao.QTensor",
    "ModuleFqnToConfig": "ao.FqnToConfig",
    "NF4Tensor": "ao.dtypes.NF4Tensor",
    "NF4WeightOnlyConfig": "ao.NF4WeightOnlyConfig",
    "OptimState4bit": "ao.dtypes.FlatTensor",
    "OptimState8bit": "ao.dtypes.FlatTensor",
    "OptimStateFp8": "ao.dtypes.FlatTensor",
    "QATConfig": "ao.quant.qat.QATConfig",
    "SmoothQuantConfig": "ao.SmoothQuant",
    "TorchAOBaseTensor": "ao.QTensor",
    "_auto_filter_for_recipe": "ao.train.auto_module_filter",
    "apply_spinquant": "ao.rotate_",
    "WandaSparsifier": "ao.sparsity.Wanda",
    "apply_fake_sparsity": "ao.sparsity.prune_",
    "autoquant": "ao.autoquant",
    "convert_to_float8_training": "ao.train.convert_to_float8_training",
    "flatten_tensor_state_dict": "ao.save",
    "int8_mixed_precision_training": "ao.train.int8_mixed_precision_training",
    "quantize_": "ao.quantize_",
    "sparsify_": "ao.sparsity.sparsify_",
    "to_affine_quantized_intx": "ao.Intx",
    "to_affine_quantized_floatx": "ao.Float8",
    "to_nf4": "ao.dtypes.to_nf4",
    "unflatten_tensor_state_dict": "ao.load",
}
"""What a name that is translated comes down to, where it is not the translation of a config."""


class Entry(NamedTuple):
    """What a foreign name is here.

    here: the name of `ao` that it is, or comes down to; its own place in this package where there is none.
    same: whether it is that very object. note: what it does, in a sentence.
    """

    here: str
    same: bool
    note: str


@functools.cache
def table() -> dict[str, Entry]:
    """Foreign dotted name -> `Entry`, in the order of the modules. Imports all of them."""
    root = importlib.import_module(__package__ or "")
    known: dict[int, str] = {}
    for room in reversed(ROOMS):
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) or callable(value):
                known[id(value)] = f"{room}.{name}"
    own = ("names", "kinds", "recording", "specs", "states", "static", "layers", "mm_config")
    found: dict[str, Entry] = {}
    modules = [m.name for m in pkgutil.walk_packages(root.__path__, f"{root.__name__}.")]
    for path in [root.__name__, *sorted(modules)]:
        if path.rpartition(".")[2] in own:
            continue
        module = importlib.import_module(path)
        for name in getattr(module, "__all__", []):
            if name != "NAMES":
                found[f"torchao{path.removeprefix(root.__name__)}.{name}"] = _entry(module, name, known)
    return found


def _entry(module: Any, name: str, known: dict[int, str]) -> Entry:
    value = getattr(module, name)
    if id(value) in known:
        return Entry(known[id(value)], True, "")
    doc = inspect.getdoc(value) if isinstance(value, type) or callable(value) else None
    note = (doc or "").split("\n\n")[0].replace("\n", " ").strip()
    here = f"{module.__name__}.{name}"
    cls = value.__name__ if isinstance(value, type) else name
    if cls in EQUIVALENTS:
        here = EQUIVALENTS[cls]
    elif isinstance(value, type) and issubclass(value, Translated):
        here = _target(value) or here
    return Entry(here, False, note)


def _target(cls: Any) -> str | None:
    """The config or Spec of `ao` that a translated one gives."""
    try:
        ours = cls().to_ao()
    except (NotImplementedError, TypeError):
        return None
    return f"ao.{type(ours).__name__}"
