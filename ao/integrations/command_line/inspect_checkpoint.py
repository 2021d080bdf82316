"""`ao inspect`: what is in a checkpoint, tensor by tensor, read from the headers and the scales alone."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .arguments import before_the_work
from .format_names import by_place
from .safetensors_header import Stored, read_header, weight_files
from .tables import print_grouped, print_json, print_table

NAME = "inspect"
HELP = "list the tensors of a checkpoint: format, shape, bytes, range of the scales"
DETAILS = """Reads the headers of safetensors files and the scales of quantized tensors, never the weights, so that it
takes a moment for a checkpoint of any size. A folder is read by its index. Of one that another library has
quantized, one weight of each form is read.

examples:
  ao inspect model.safetensors
  ao inspect Llama-3.1-8B-int4 --match '*.layers.0.*'
  ao inspect Llama-3.1-8B-int4 --sort bytes --json"""


@dataclass(frozen=True)
class Row:
    """One tensor. bits: stored bits per element. scale: smallest and largest of its scales, where it has some."""

    name: str
    format: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    bits: float
    scale: tuple[float, float] | None
    file: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a .safetensors file, or a folder that has some")
    parser.add_argument("--match", metavar="GLOB", help="only tensors whose name matches, like '*.mlp.*'")
    parser.add_argument("--sort", choices=["name", "bytes"], help="default: the order of the file")
    parser.add_argument("--summary", action="store_true", help="only the totals of each format")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    with before_the_work():
        if not args.path.exists():
            raise FileNotFoundError(f"there is no file or folder {args.path}")
        weight_files(args.path)
    rows = [row for row in inspect(args.path) if args.match is None or fnmatch.fnmatchcase(row.name, args.match)]
    if not rows and args.match is not None:
        raise ValueError(f"no tensor of {args.path} matches {args.match!r}; leave out --match to see all names")
    if args.sort == "name":
        rows.sort(key=lambda row: row.name)
    elif args.sort == "bytes":
        rows.sort(key=lambda row: -row.bytes)
    if args.json:
        print_json({"tensors": [] if args.summary else [asdict(row) for row in rows], "formats": totals(rows)})
        return 0
    if not args.summary:
        print_grouped(
            1,
            ["name", "format", "shape", "dtype", "bytes", "bits", "scale, from .. to"],
            [
                [
                    row.name,
                    row.format,
                    " x ".join(map(str, row.shape)) or "scalar",
                    row.dtype,
                    f"{row.bytes:,}",
                    f"{row.bits:.2f}",
                    f"{row.scale[0]:.2g} .. {row.scale[1]:.2g}" if row.scale else "",
                ]
                for row in rows
            ],
            right=(4, 5),
        )
        print()
    lines = [
        [name, str(t["tensors"]), f"{t['elements']:,}", f"{t['bytes']:,}", f"{t['bits']:.2f}"]
        for name, t in totals(rows).items()
    ]
    print_table(["format", "tensors", "elements", "bytes", "bits per element"], lines, right=(1, 2, 3, 4))
    return 0


def inspect(path: Path) -> list[Row]:
    """The tensors of a file or folder, in order. Raises FileNotFoundError, and ValueError for damaged files."""
    stored: dict[str, tuple[Path, Stored]] = {}
    entries: dict[str, Any] = {}
    for file in weight_files(path):
        metadata, tensors = read_header(file)
        stored.update({name: (file, t) for name, t in tensors.items()})
        try:
            # Files that transformers has cut describe the tensors of all of them.
            entries.update(json.loads(metadata["ao"])["tensors"] if "ao" in metadata else {})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} has a damaged header; save it again") from error
    rows = []
    with contextlib.ExitStack() as opened:
        maps: dict[Path, mmap.mmap] = {}
        for name, entry in entries.items():
            if entry is None:
                continue
            if "same_as" in entry:
                rows.append(Row(name, f"tied to {entry['same_as']}", (), "", 0, 0.0, None, ""))
                continue
            stored.pop(name, None)  # an empty tensor that keeps other loaders out
            try:
                leaves = {leaf: stored.pop(leaf) for leaf in _leaves(name, entry)}
                size, shape = sum(t.stop - t.start for _, t in leaves.values()), tuple(entry["shape"])
                label, dtype = by_place("format_syntax").spec_label(entry["spec"]), entry["dtype"]
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: {name!r} lacks a field that its header describes ({error})") from error
            limits = None
            if f"{name}.scale" in leaves:
                file, scale = leaves[f"{name}.scale"]
                if file not in maps:
                    data = opened.enter_context(file.open("rb"))
                    maps[file] = opened.enter_context(mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ))
                limits = _range(maps[file], scale)
            bits = 8 * size / max(math.prod(shape), 1)
            rows.append(Row(name, label, shape, dtype, size, bits, limits, next(iter(leaves.values()))[0].name))
    if path.is_dir() and not entries:
        rows += _foreign(path, stored)
    for name, (file, t) in stored.items():
        dtype = _DTYPES.get(t.dtype, t.dtype.lower())
        size = t.stop - t.start
        rows.append(Row(name, dtype, t.shape, dtype, size, 8 * size / max(math.prod(t.shape), 1), None, file.name))
    return rows


def _foreign(path: Path, stored: dict[str, tuple[Path, Stored]]) -> list[Row]:
    """What another library has quantized: a row for each weight, whose tensors are taken out of `stored`.

    One weight of each form is read: the layers of a model are much alike.
    """
    told = path / "config.json"
    text = told.read_text(encoding="utf-8") if told.is_file() else ""
    beside = any((path / file).is_file() for file in ("hf_quant_config.json", "quanto_qmap.json"))
    if not (text and (beside or '"quantization_config"' in text or '"compression_config"' in text)):
        return []
    import torch

    from ao.integrations.foreign.checkpoint import ForeignCheckpoint, quantization_config
    from ao.integrations.stored_tensors import StoredTensors

    config = quantization_config(path)
    if not config or config.get("quant_method") == "ao":
        return []
    forms: dict[Any, tuple[str, tuple[int, ...], str]] = {}
    rows = []
    with StoredTensors(weight_files(path)) as tensors:
        try:
            checkpoint = ForeignCheckpoint.of(config, tensors)
        except ValueError:  # a method that is not read: its tensors are listed as they are
            return []
        for parameter in checkpoint.parameters:
            names = checkpoint.stored_names(parameter)
            parts = [stored[name] for name in names]
            form = tuple((name.removeprefix(parameter[:-6]), t.dtype, t.shape) for name, (_, t) in zip(names, parts))
            if form not in forms:
                try:
                    made = checkpoint.make(parameter, tensors.get, torch.bfloat16)
                except ValueError:  # a shape that only the model knows
                    continue
                spec = getattr(made, "spec", None)
                label = (
                    f"{config['quant_method']}: {by_place('format_syntax').spec_label(spec.to_dict())}"
                    if spec
                    else config["quant_method"]
                )
                forms[form] = label, tuple(made.shape), str(made.dtype).removeprefix("torch.")
            label, shape, dtype = forms[form]
            size = sum(t.stop - t.start for _, t in parts)
            bits = 8 * size / max(math.prod(shape), 1)
            rows.append(Row(parameter, label, shape, dtype, size, bits, None, parts[0][0].name))
            for name in names:
                del stored[name]
        for name in checkpoint.ignored:
            stored.pop(name, None)
    return rows


def totals(rows: list[Row]) -> dict[str, dict[str, float]]:
    """tensors, elements, bytes and bits per element, by format, and under "total"."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name in (row.format, "total"):
            entry = found.setdefault(name, {"tensors": 0, "elements": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["elements"] += math.prod(row.shape)
            entry["bytes"] += row.bytes
    found["total"] = found.pop("total", {"tensors": 0, "elements": 0, "bytes": 0})
    for entry in found.values():
        entry["bits"] = 8 * entry["bytes"] / max(entry["elements"], 1)
    return found


def _leaves(name: str, entry: Mapping[str, Any] | None) -> Iterator[str]:
    """The stored names of a tensor."""
    if entry is None:
        yield name
    else:
        for field, inner in entry["fields"].items():
            yield from _leaves(f"{name}.{field}", inner)


_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def _range(data: mmap.mmap, t: Stored) -> tuple[float, float] | None:
    """The smallest and the largest number of a stored tensor of float32, float16 or bfloat16; None for other dtypes."""
    if t.dtype not in ("F32", "F16", "BF16") or t.stop == t.start:
        return None
    try:
        import numpy
    except ImportError:
        raw = data[t.start : t.stop]
        if t.dtype == "BF16":  # the upper half of a float32
            wide = bytearray(2 * len(raw))
            wide[2::4], wide[3::4] = raw[::2], raw[1::2]
            raw = bytes(wide)
        values = struct.unpack(f"<{len(raw) // (2 if t.dtype == 'F16' else 4)}{'e' if t.dtype == 'F16' else 'f'}", raw)
        return min(values), max(values)
    if t.dtype == "BF16":
        halves = numpy.frombuffer(data, numpy.uint16, (t.stop - t.start) // 2, t.start)
        array = (halves.astype(numpy.uint32) << 16).view(numpy.float32)
    else:
        kind = numpy.float32 if t.dtype == "F32" else numpy.float16
        array = numpy.frombuffer(data, kind, (t.stop - t.start) // kind().itemsize, t.start)
    return float(array.min()), float(array.max())
