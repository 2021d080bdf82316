"""What a Hugging Face config says of a format: a config of `ao`, a Spec, a name, or the dict that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dtypes import Spec
from ..quant import Config, config_from_dict
from ..quant.config import ModelConfig
from ..quant.read_format import read_format

AUTOQUANT = "autoquant"
AS_STORED = "as_stored"
"""As another library has quantized the checkpoint."""


def read_quant_type(quant_type: Any, kwargs: dict[str, Any], who: str) -> Config | Spec | str:
    """The config that `quant_type` stands for, "autoquant" or "as_stored".

    quant_type: a config, also one of ao.compat, a Spec, a dict of `config_to_dict`, "autoquant", "as_stored", or a name that
        `read_format` knows ("int8", "int4_weight_only", "int4-g128+hqq").
    kwargs: parameters of a config that is given by name. Of "autoquant" they are the arguments.

    Raises TypeError for what is none of these and ValueError for a name that is not known.
    """
    if isinstance(quant_type, str):
        return quant_type if quant_type in (AUTOQUANT, AS_STORED) else read_format(quant_type, kwargs, who)
    if kwargs:
        raise TypeError(f"{who}: {sorted(kwargs)} are for a quant_type given by name; set them in the config itself")
    if isinstance(quant_type, Mapping):
        return config_from_dict(quant_type)
    if hasattr(quant_type, "to_ao") and not isinstance(quant_type, type):
        quant_type = quant_type.to_ao()  # of ao.compat
    if not isinstance(quant_type, (Config, Spec)):
        raise TypeError(
            f"{who}: quant_type must be a config such as ao.Int4WeightOnlyConfig(), a Spec such as ao.Intx(bits=4), or a name "
            f"such as 'int4_weight_only', got {quant_type!r}"
            + ("; call it first" if isinstance(quant_type, type) else "")
        )
    if isinstance(quant_type, ModelConfig):
        raise TypeError(
            f"{who}: {type(quant_type).__name__} is about training, not about how to load; call ao.quantize_(model, config) "
            "after loading"
        )
    return quant_type
