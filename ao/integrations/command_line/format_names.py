"""`ao formats`, and the formats as the command line and the scripts know them. The list is that of ao/quant/format_names.py."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import sys
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


def _list() -> Any:
    """The module of the names, loaded by its place: its package imports torch."""
    name = "ao_format_names"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "quant" / "format_names.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


FORMATS: dict[str, Any] = _list().FORMATS
RECIPES: tuple[str, ...] = _list().RECIPES
PLAIN: tuple[str, ...] = _list().PLAIN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.json:
        print_json({name: asdict(form) for name, form in FORMATS.items()})
    else:
        rows = [[name, f"{form.bits:.2f}", form.expression, form.use] for name, form in FORMATS.items()]
        print_table(["name", "bits", "the same as", "for"], rows, right=(1,))
    return 0


def check_format(name: str) -> None:
    """Raise ValueError for what can be no format, without importing what knows all of them."""
    head = _list().split_recipe(name)[0]
    presets = Path(__file__).resolve().parents[2] / "quant" / "presets.py"
    configs = re.findall(r"^class (\w+)Config\(", presets.read_text(encoding="utf-8"), re.MULTILINE)
    known = [*PLAIN, *FORMATS, *_list().ALIASES]
    plain = head.lower().replace("_", "").removesuffix("config")
    if "(" in head or head.lower() in known or plain in map(str.lower, configs) or head in ("NF4", "NVFP4", "FP6"):
        return
    if re.fullmatch(r"MXFP[468]", head):
        return
    near = difflib.get_close_matches(head, known, n=2)
    raise ValueError(
        f"unknown format {name!r}{', and near to ' + ' and '.join(near) if near else ''}: give one of "
        f"{', '.join([*PLAIN, *FORMATS])}, or an expression such as 'Int4WeightOnlyConfig(group_size=64)'"
    )


def config_of(name: str) -> Any:
    """The config or Spec called `name`; None for what is not quantized. Raises ValueError for a name that is not known."""
    check_format(name)
    from ao.quant.read_format import read_format

    return None if name in PLAIN else read_format(name, who="ao")


def help_text() -> str:
    """The formats, one a line, for the end of a script's --help."""
    width = max(map(len, FORMATS))
    lines = [f"  {name:{width}}  {form.expression}" for name, form in FORMATS.items()]
    return "\n".join(["formats, beside bf16 and float32, and any such expression:", *lines])
