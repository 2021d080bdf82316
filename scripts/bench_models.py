"""Whole models, from eager float32 to as fast as they go.

    .venv/bin/python scripts/bench_models.py --models sam-vit-h vit-l --json FILE

Per model and batch a row for each rung: float32 and bf16 in eager mode, bf16 compiled, each format compiled, 2:4 sparsity (the
weights pruned by magnitude first, which says how fast it is, not how good), and autoquant with its choices. Columns:

    ms             the median call, or the median token of a model that decodes by `generate` with a static cache
    of float32     how many times faster than eager float32, and of bf16, compiled
    GB             the most memory that a call needs, weights and all
    first s        the first call, with what it compiles; for autoquant with what it measures
    dB             signal to noise of the output against that of bf16

Weights are random, of one seed. Every rung runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import formats
import measure
import torch
from bench_linear import reason
from eval_lm import format_of
from tables import markdown
from torch import Tensor
from whole_models import MODELS, random_model

import ao

RUNGS = (
    "float32",
    "bf16",
    "compiled",
    "int8",
    "int8-dynamic",
    "float8-dynamic",
    "int4-g128",
    "2:4 int8-dynamic",
    "autoquant",
)
SPARSE = {
    "2:4": "SemiSparseWeightConfig()",
    "2:4 int8-dynamic": "Int8DynamicActivationInt8WeightConfig(layout=SemiSparseLayout())",
    "2:4 float8-dynamic": "Float8DynamicActivationFloat8WeightConfig(layout=SemiSparseLayout())",
}
NEW_TOKENS = 32


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_models.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Rungs: {', '.join((*RUNGS[:3], 'autoquant', *SPARSE))}, and every format:\n{formats.help_text()}",
    )
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="M", help=", ".join(MODELS)
    )
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), metavar="R", help="in this order")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="default: those of the model")
    parser.add_argument("--layers", type=int, metavar="L", help="only so many blocks")
    parser.add_argument("--calls", type=int, default=20, metavar="N", help="of which the median counts; default: 20")
    parser.add_argument("--min-sqnr", type=float, default=30.0, metavar="DB", help="of autoquant; default: 30")
    parser.add_argument("--small", action="store_true", help="a few narrow layers, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save there")
    args = parser.parse_args(argv)
    known = {*RUNGS[:3], "autoquant", *SPARSE}
    try:
        for rung in args.rungs:
            if rung not in known:
                format_of(rung)
    except ValueError as error:
        parser.error(str(error))
    return args


class Rung:
    """One model in one form."""

    def __init__(self, name: str, rung: str, args: argparse.Namespace) -> None:
        self.case, self.rung, self.args, self.device = MODELS[name], rung, args, torch.device(args.device)
        dtype = torch.float32 if rung == "float32" else torch.bfloat16
        with self.device:
            self.module: Any = random_model(self.case, args.small, args.layers).to(dtype).eval().requires_grad_(False)
        self.dtype = dtype
        self.compiles = rung not in ("float32", "bf16")
        self.note = ""
        if rung in SPARSE:
            ao.sparsity.prune_(self.module, "magnitude", sparsity="2:4")
            ao.quantize_(self.module, format_of(SPARSE[rung]))
        elif self.compiles and rung not in ("compiled", "autoquant"):
            ao.quantize_(self.module, format_of(rung))
        if self.compiles and not self.case.decodes:
            self.module.compile()

    def inputs(self, batch: int) -> dict[str, Any]:
        torch.manual_seed(1)
        with self.device:
            made = self.case.inputs(self.module, batch, self.args.small)
        return {name: self._cast(value) for name, value in made.items()}

    def _cast(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._cast(inner) for name, inner in value.items()}
        return value.to(self.dtype) if value.is_floating_point() else value

    def output(self, inputs: dict[str, Any]) -> Tensor:
        """What the model computes, float32."""
        with torch.no_grad():
            out = self.module(**inputs)
        first = out if isinstance(out, Tensor) else next(iter(out.values())) if hasattr(out, "values") else out[0]
        return first.float()

    def call(self, inputs: dict[str, Any]) -> None:
        if self.case.decodes:
            self.generate(inputs, NEW_TOKENS)
        else:
            with torch.no_grad():
                self.module(**inputs)

    def generate(self, inputs: dict[str, Any], new: int) -> None:
        more = {"cache_implementation": "static"} if self.compiles else {}
        with torch.no_grad():
            self.module.generate(
                **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, **more,
            )  # fmt: skip

    def seconds(self, function: Callable[[], object]) -> float:
        measure.synchronize(self.device)
        start = time.perf_counter()
        function()
        measure.synchronize(self.device)
        return time.perf_counter() - start

    def row(self, batch: int) -> tuple[dict[str, Any], Tensor]:
        """The numbers of one batch size, and the output."""
        inputs = self.inputs(batch)
        first = 0.0
        if self.rung == "autoquant":
            candidates: Any = "all" if self.device.type == "cuda" else "int4"
            self.module = ao.autoquant(
                self.module, candidates=candidates, min_sqnr=self.args.min_sqnr, error_on_unseen=False
            )
            first = self.seconds(lambda: self.call(inputs))
            self.note = str(self.module.autoquant_report)
        first += self.seconds(lambda: self.call(inputs))
        self.call(inputs)
        measure.reset_peak(self.device)
        if self.case.decodes:
            repeats = max(3, self.args.calls // 4)
            many = statistics.median(self.seconds(lambda: self.call(inputs)) for _ in range(repeats))
            one = statistics.median(self.seconds(lambda: self.generate(inputs, 1)) for _ in range(repeats))
            time_of_one = (many - one) / (NEW_TOKENS - 1)
        else:
            time_of_one = statistics.median(self.seconds(lambda: self.call(inputs)) for _ in range(self.args.calls))
        return {
            "batch": batch, "rung": self.rung, "ms": time_of_one * 1e3, "first_s": first,
            "bytes": measure.used_bytes(self.device, peak=True), "note": self.note,
        }, self.output(inputs)  # fmt: skip


def rows_of(name: str, rung: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a rung, measured in this process. The output of `bf16` stays in `folder`, for the others."""
    rows = []
    made = Rung(name, rung, args)
    for batch in args.batch or MODELS[name].batches:
        row, out = made.row(batch)
        kept = folder / f"{name}-{batch}.pt"
        if rung == "bf16":
            torch.save(out.cpu(), kept)
        elif kept.exists() and rung not in SPARSE:
            row["sqnr_db"] = float(ao.compute_error(torch.load(kept), out.cpu()))
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], batch: int) -> str:
    """The ladder of one model at one batch size."""
    rows = [row for row in rows if row["batch"] == batch]
    base = {rung: next((row["ms"] for row in rows if row["rung"] == rung), None) for rung in ("float32", "compiled")}

    def times(ms: float, of: float | None) -> str:
        return "-" if of is None else f"{of / ms:.2f}"

    return markdown(
        ["rung", "ms", "of float32", "of bf16, compiled", "GB", "first s", "dB"],
        [
            [
                row["rung"], f"{row['ms']:.2f}", times(row["ms"], base["float32"]), times(row["ms"], base["compiled"]),
                f"{row['bytes'] / 1e9:.2f}", f"{row['first_s']:.1f}", f"{row['sqnr_db']:.1f}" if "sqnr_db" in row else "-",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    runs: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            rows: list[dict[str, Any]] = []
            errors: dict[str, str] = {}
            for rung in args.rungs:
                with ProcessPoolExecutor(1, context) as pool:
                    try:
                        rows += pool.submit(rows_of, name, rung, Path(folder), args).result()
                    except Exception as error:
                        errors[rung] = reason(error)
                        print(f"{name}, {rung}: {errors[rung]}", file=sys.stderr)
            for batch in sorted({row["batch"] for row in rows}):
                print(f"\n{name}, batch {batch}: {MODELS[name].unit}\n\n{table(rows, batch)}", flush=True)
            runs[name] = {"unit": MODELS[name].unit, "rows": rows, "errors": errors}
            if args.json is not None:  # after each model: a long run may be cut off
                data = {"runs": [measure.facts(torch.device(args.device))], "models": runs}
                args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if any(run["rows"] for run in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
