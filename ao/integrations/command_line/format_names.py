"""The names under which the command line and the scripts know number formats, and `ao formats`, which lists them."""

from __future__ import annotations

import argparse
import ast
from dataclasses import asdict, dataclass
from typing import Any

from .tables import print_json, print_table

NAME = "formats"
HELP = "list the number formats and what they cost"
DETAILS = """Wherever a format is asked for, give one of these names, or any expression such as
  'Int4WeightOnlyConfig(group_size=64)'   a config of ao
  'Intx(bits=3, block=(1, 64))'           a Spec

bits: what an element of a 4096 x 4096 weight takes, scales included."""


@dataclass(frozen=True)
class Format:
    """expression: over the public names of `ao`, and `torch`. bits: per element of a 4096 x 4096 weight."""

    expression: str
    bits: float
    use: str


FORMATS = {
    "int8": Format("Int8WeightOnlyConfig()", 8.01, "half of bfloat16, next to no loss"),
    "int4-g128": Format("Int4WeightOnlyConfig(group_size=128)", 4.19, "the usual choice for decoding"),
    "int4-g32": Format("Int4WeightOnlyConfig(group_size=32)", 4.75, "4 bits, with less loss"),
    "float8": Format("Float8WeightOnlyConfig()", 8.01, "weights with a wide range"),
    "int8-dynamic": Format("Int8DynamicActivationInt8WeightConfig()", 8.01, "faster prefill and large batches"),
    "float8-dynamic": Format(
        "Float8DynamicActivationFloat8WeightConfig()", 8.0, "the same on chips with float8 (Hopper, Ada)"
    ),
    "int8-int4": Format("Int8DynamicActivationInt4WeightConfig()", 5.0, "8-bit activations, 4-bit weights (8da4w)"),
    "nf4": Format("NF4", 4.14, "frozen weights under adapters (QLoRA)"),
    "int6": Format("IntxWeightOnlyConfig(weight_dtype=torch.int6, granularity=PerGroup(128))", 6.25, ""),
    "uint5": Format("UIntXWeightOnlyConfig(torch.uint5, group_size=128)", 5.19, ""),
    "int3": Format("Intx(bits=3, block=(1, 128))", 3.31, "needs a recipe such as gptq"),
    "int2": Format("Intx(bits=2, block=(1, 128))", 2.31, "needs a recipe and training"),
}

RECIPES = ("rtn", "clip", "hqq", "gptq", "awq", "smoothquant", "bias_correction")
"""Names of recipes, which may be joined by "+"."""

PLAIN = ("bf16", "float32")
"""Names of what is not quantized."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.json:
        print_json({name: asdict(form) for name, form in FORMATS.items()})
    else:
        rows = [[name, f"{form.bits:.2f}", form.expression, form.use] for name, form in FORMATS.items()]
        print_table(["name", "bits", "the same as", "for"], rows, right=(1,))
    return 0


def config_of(name: str) -> Any:
    """The config or Spec called `name`, or that the expression `name` makes; None for what is not quantized.

    An expression may call the public names of `ao`, name dtypes of torch, and have literals as arguments; nothing else is
    evaluated. Raises ValueError for another one, and for a name that is not known.
    """
    import ao

    if name in PLAIN:
        return None
    try:
        tree = ast.parse(FORMATS[name].expression if name in FORMATS else name, mode="eval")
        config = _value(tree.body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(
            f"unknown format {name!r}: give one of {', '.join([*PLAIN, *FORMATS])}, or an expression such as "
            f"'Int4WeightOnlyConfig(group_size=64)' ({error})"
        ) from None
    if not isinstance(config, (ao.Config, ao.Spec)):
        raise ValueError(f"the format {name!r} makes {config!r}, which is no config and no Spec")
    return config


def _value(node: ast.expr) -> Any:
    import torch

    import ao

    if isinstance(node, ast.Call):
        function = _value(node.func)
        if not isinstance(function, type):
            raise ValueError(f"{ast.unparse(node.func)} cannot be called here")
        keywords = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        return function(*map(_value, node.args), **keywords)
    if isinstance(node, ast.Name):
        if node.id not in ao.__all__:
            raise ValueError(f"ao has no {node.id}")
        return getattr(ao, node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = torch if node.value.id == "torch" else _value(node.value)
        value = getattr(owner, node.attr, None)
        if value is None:
            raise ValueError(f"there is no {ast.unparse(node)}")
        return value
    if isinstance(node, ast.Tuple):
        return tuple(map(_value, node.elts))
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(k): _value(v) for k, v in zip(node.keys, node.values) if k is not None}
    return ast.literal_eval(node)


def help_text() -> str:
    """The formats, one a line, for the end of a script's --help."""
    width = max(map(len, FORMATS))
    lines = [f"  {name:{width}}  {form.expression}" for name, form in FORMATS.items()]
    return "\n".join(["formats, beside bf16 and float32, and any such expression:", *lines])
