"""The formats that the benchmarks know by name, and what each one passes to `ao.quantize_`."""

from __future__ import annotations

import torch

import ao

PLAIN = {"bf16": torch.bfloat16, "float32": torch.float32}
"""Names of what is not quantized."""

FORMATS = {
    "int8": "Int8WeightOnlyConfig()",
    "int4-g128": "Int4WeightOnlyConfig(group_size=128)",
    "int4-g32": "Int4WeightOnlyConfig(group_size=32)",
    "float8": "Float8WeightOnlyConfig()",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig()",
    "float8-dynamic": "Float8DynamicActivationFloat8WeightConfig()",
    "int8-int4": "Int8DynamicActivationInt4WeightConfig()",
    "nf4": "NF4",
    "int6": "IntxWeightOnlyConfig(weight_dtype=torch.int6, granularity=PerGroup(128))",
    "uint5": "UIntXWeightOnlyConfig(torch.uint5, group_size=128)",
    "int3": "Intx(bits=3, block=(1, 128))",
    "int2": "Intx(bits=2, block=(1, 128))",
}
"""Name -> an expression over the public names of `ao`, and `torch`."""


def config_of(name: str) -> ao.Config | ao.Spec | None:
    """The config called `name`, or that the expression `name` makes; None for what is not quantized.

    Raises ValueError for what is neither.
    """
    if name in PLAIN:
        return None
    try:
        config = eval(
            FORMATS.get(name, name), {"torch": torch, **{public: getattr(ao, public) for public in ao.__all__}}
        )
    except (SyntaxError, NameError) as error:
        raise ValueError(
            f"unknown format {name!r}: give one of {', '.join([*PLAIN, *FORMATS])}, or an expression such as "
            f"'Int4WeightOnlyConfig(group_size=64)' ({error})"
        ) from None
    if not isinstance(config, (ao.Config, ao.Spec)):
        raise ValueError(f"the format {name!r} makes {config!r}, which is no config and no Spec")
    return config


def help_text() -> str:
    """The formats, one a line, for the end of a script's --help."""
    width = max(map(len, FORMATS))
    lines = [f"  {name:{width}}  {text}" for name, text in FORMATS.items()]
    return "\n".join(["formats, beside bf16 and float32, and any such expression:", *lines])
