"""`ao formats`, and the formats as the command line and the scripts know them. The list is that of ao/quant/format_names.py."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .tables import print_json, print_table

NAME = "formats"
HELP = "list the number formats and what they cost"
DETAILS = """Wherever a format is asked for, give one of these names, or any expression such as
  'Int4WeightOnlyConfig(group_size=64)'   a config of ao
  'Intx(bits=3, block=(1, 64))'           a Spec

A recipe may follow: int4-g128+gptq. quantize_(model, "int4-g128") and AoConfig("int4-g128") take the same names.

bits: what an element of a 4096 x 4096 weight takes, scales included."""


def by_place(module: str) -> Any:
    """A module of ao/quant, loaded by its place: its package imports torch."""
    name = f"ao_{module}"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "quant" / f"{module}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


_names = by_place("format_names")
_syntax = by_place("format_syntax")

FORMATS: dict[str, Any] = _names.FORMATS
RECIPES: tuple[str, ...] = _names.RECIPES
WITHOUT_DATA: tuple[str, ...] = _names.WITHOUT_DATA
PLAIN: tuple[str, ...] = _names.PLAIN
check_recipe = _syntax.check_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.json:
        print_json({name: asdict(form) for name, form in FORMATS.items()})
    else:
        rows = [[name, f"{form.bits:.2f}", form.expression, form.use] for name, form in FORMATS.items()]
        print_table(["name", "bits", "the same as", "for"], rows, right=(1,))
    return 0


def check_format(name: str, recipe: str | None = None) -> bool:
    """Whether the format called `name` needs texts to calibrate on. Raises ValueError for what is none, and names the parameter
    that is wrong. It imports nothing.

    recipe: which takes the place of that of the format.
    """
    head, own = _names.split_recipe(name)
    recipe = recipe or own or None
    known = [*PLAIN, *FORMATS, *_names.ALIASES]
    expression = head if "(" in head else _names.ALIASES.get(head.lower(), head)
    expression = FORMATS[expression.lower()].expression if expression.lower() in FORMATS else expression
    configs = {_plain(each): f"{each}()" for each in _syntax.config_names()}
    expression = configs.get(_plain(expression), expression)
    if head not in PLAIN and "(" not in expression and expression not in _syntax.named_specs():
        near = difflib.get_close_matches(head, known, n=2)
        raise ValueError(
            f"unknown format {name!r}{', and near to ' + ' and '.join(near) if near else ''}: give one of "
            f"{', '.join([*PLAIN, *FORMATS])}, or an expression such as 'Int4WeightOnlyConfig(group_size=64)'"
        )
    try:
        if recipe is not None:
            check_recipe(recipe)
        if head in PLAIN:
            return False
        _syntax.check_expression(expression)
    except ValueError as error:
        raise ValueError(f"format {name!r}: {error}") from None
    return bool(_syntax.needs_data(expression, WITHOUT_DATA, recipe))


def check_plan(path: Path, recipe: str | None = None) -> bool:
    """`check_format` of all configs of a plan. Raises ValueError for a file that holds none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError(f"it holds {type(table).__name__}")
        calibrates = False
        for name, config in table.items():
            try:
                calibrates |= config is not None and _syntax.dict_needs_data(config, WITHOUT_DATA, recipe)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    except ValueError as error:
        raise ValueError(
            f"--plan {path} holds no plan (a JSON object of layer name -> config or null): {error}"
        ) from None
    if all(config is None for config in table.values()):
        raise ValueError(f"--plan {path} leaves every layer as it is; there is nothing to quantize")
    return calibrates


def _plain(name: str) -> str:
    return name.lower().replace("_", "").removesuffix("config")


def config_of(name: str) -> Any:
    """The config or Spec called `name`; None for what is not quantized. Raises ValueError for a name that is not known."""
    check_format(name)
    from ao.quant.read_format import read_format

    return None if name in PLAIN else read_format(name, who="ao")


def configs_of(names: Iterable[str], option: str = "--configs") -> dict[str, Any]:
    """`config_of` of several names, by which models are quantized as they load: a config that calibrates is refused. Nothing is
    imported before all names are known to be good."""
    names = list(names)
    for name in names:
        if check_option(option, name):
            raise ValueError(
                f"{option} {name!r} needs texts to calibrate on; run `ao quantize MODEL_DIR OUT_DIR --config {name!r} "
                "--data FILE`, and give its OUT_DIR"
            )
    return {name: config_of(name) for name in names}


def check_option(option: str, name: str, recipe: str | None = None) -> bool:
    """`check_format` of what an option was given; an error names the option."""
    try:
        return check_format(name, recipe)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def help_text() -> str:
    """The formats, one a line, for the end of a script's --help."""
    width = max(map(len, FORMATS))
    lines = [f"  {name:{width}}  {form.expression}" for name, form in FORMATS.items()]
    return "\n".join(["formats, beside bf16 and float32, and any such expression:", *lines])
