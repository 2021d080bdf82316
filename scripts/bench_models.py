"""Whole models, from eager float32 to as fast as they go.

    .venv/bin/python scripts/bench_models.py --models sam-vit-h vit-l --json FILE

Per model and batch a row for each rung: float32 (as PyTorch comes, without TF32 in products) and bf16 in eager mode, bf16
compiled, each format compiled, 2:4 sparsity or blocks of zeros (the weights pruned by magnitude first, which says how fast it is,
not how good), and autoquant with its choices. A rung such as `torchao:int8-dynamic` has layers of another library, if it is
installed, in the place of those of ours (see peers.py). Layers whose shapes a format does not take stay as they are. In our rungs
SAM's attention adds its relative positions by our kernel. Columns:

    ms             the median call, or the median token of a model that decodes by `generate` with a static cache
    of float32     how many times faster than eager float32, and of bf16, compiled
    GB             the most memory that a call needs, weights and all, but not what it took to build and to quantize, nor what
                   CUDA graphs hold
    first s        the first call, with what it compiles; for autoquant with what it measures
    dB             signal to noise of the output against that of bf16

Weights are random, of one seed; `--models flux --model DIR` takes those of a folder. Every rung runs in a process of its own,
since compiling is most of the time and takes one core: `--at-once N` lets N of them, of any of the models, build, compile and
make their first calls side by side, and then times one after the other, while the others wait. A first call beside others says
little, so that `first s` is then left out, but for autoquant, which always runs alone. They must fit in the memory of the
device. Each row is in the file of --json as soon as it is known.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import formats
import measure
import torch
from bench_generate_hf import Times
from bench_linear import reason
from eval_lm import format_of
from peers import PEERS
from tables import markdown
from torch import Tensor, nn
from whole_models import MODELS, pretrained_model, random_model

import ao
from ao.quant import SpecConfig, finalize_autoquant

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
    "block-sparse": "BlockSparseWeightConfig(blocksize=64)",
}
BLOCK, BLOCKS_OF_ZEROS = 64, 0.8
NEW_TOKENS = 32
WARM = 1.5
"""Seconds of calls on a GPU before those that are timed: one that rested is faster at first than it stays."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_models.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Rungs: {', '.join((*RUNGS[:3], 'autoquant', *SPARSE))}, a library and a format, such as torchao:int8 "
        f"({', '.join(PEERS)}), and every format:\n{formats.help_text()}",
    )
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), metavar="M",
        help=f"{', '.join(MODELS)}; vit-l:64 is that one at batch 64 alone",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, metavar="DIR",
        help="the weights of the one model of --models, as its library saves them, in place of random ones; inputs stay random",
    )  # fmt: skip
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), metavar="R", help="in this order")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="default: those of the model")
    parser.add_argument("--layers", type=int, metavar="L", help="only so many blocks")
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="so many rungs get ready side by side; default: 1"
    )
    parser.add_argument(
        "--patience", type=float, default=1800, metavar="S",
        help="leave a rung out that is not ready after so many seconds; default: 1800",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("default", "reduce-overhead"), default="default", metavar="MODE",
        help="of torch.compile: reduce-overhead, by CUDA graphs, leaves the time of the host out, which for small models or a "
        "slow host is more than that of the GPU",
    )  # fmt: skip
    parser.add_argument("--calls", type=int, default=20, metavar="N", help="of which the median counts; default: 20")
    parser.add_argument("--min-sqnr", type=float, default=30.0, metavar="DB", help="of autoquant; default: 30")
    parser.add_argument("--small", action="store_true", help="a few narrow layers, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-ups here (.svg, .png)")
    args = parser.parse_args(argv)
    named = [model.partition(":") for model in args.models]
    for name, colon, batch in named:
        if name not in MODELS or (colon and not batch.isdecimal()):
            parser.error(
                f"--models: no model {name + colon + batch!r}; there are {', '.join(MODELS)}, and vit-l:64 is of batch 64"
            )
    args.models = list(dict.fromkeys(name for name, *_ in named))
    args.batches = [
        (name, b)
        for name, colon, batch in named
        for b in ([int(batch)] if colon else args.batch or MODELS[name].batches)
    ]
    if args.model is not None and (len(args.models) != 1 or not (args.model / "config.json").is_file()):
        parser.error(
            f"--model: one model of --models and a folder with its config.json, got {args.models}, {args.model}"
        )
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.at_once < 1:
        parser.error(f"--at-once must be 1 or more, got {args.at_once}")
    known = {*RUNGS[:3], "autoquant", *SPARSE}
    try:
        for rung in args.rungs:
            library, colon, name = rung.partition(":")
            if rung not in known:
                format_of(name if colon and library in PEERS else rung)
    except ValueError as error:
        parser.error(str(error))
    return args


class Rung:
    """One model in one form at one batch size, as ready as it gets: built, quantized, compiled, and called twice.

    The output of `bf16` is in `folder` once that rung is ready, for the others to be held against.
    """

    def __init__(self, name: str, rung: str, batch: int, folder: Path, args: argparse.Namespace) -> None:
        self.case, self.rung, self.batch, self.args = MODELS[name], rung, batch, args
        self.device = torch.device(args.device)
        self.dtype = torch.float32 if rung == "float32" else torch.bfloat16
        self.compiles = rung not in ("float32", "bf16")
        self.reference = folder / f"{name}-{batch}.pt"
        self.facts: dict[str, Any] = {}
        if self.case.decodes:
            import_module("ao.integrations.transformers")  # whose `generate` does not wait for the GPU
        with self.device:
            self.module: Any = (
                random_model(self.case, args.small, args.layers, self.dtype)
                if args.model is None
                else pretrained_model(self.case, str(args.model), self.dtype)
            )
        self.module.eval().requires_grad_(False)
        library, _, layers = rung.partition(":")
        peer = library in PEERS
        if rung not in RUNGS[:3] and not peer:
            self.case.fuse(self.module)
        if peer:
            self._replace(library, layers)
        elif self.compiles and rung not in ("compiled", "autoquant"):
            self._quantize()
        if self.compiles and not self.case.decodes:
            for part in self.case.compiled(self.module):
                part.compile(mode=args.mode, dynamic=False)
        self.inputs = self._inputs()
        self.first_s = self._autoquant() if rung == "autoquant" else 0.0
        self.first_s += self.seconds(self.call)
        self.call()
        if rung == "bf16":
            torch.save(self.output(), self.reference)
        measure.synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the neighbours

    def _quantize(self) -> None:
        """Quantize the layers whose shapes the format takes; the others stay as they are."""
        keep = chosen = self.case.quantized
        if self.rung == "block-sparse":
            keep = linear_layers(BLOCK, chosen)
            ao.sparsity.prune_(self.module, "magnitude", sparsity=BLOCKS_OF_ZEROS, filter_fn=keep, block=BLOCK)
        elif self.rung in SPARSE:
            keep = linear_layers(16, chosen)
            ao.sparsity.prune_(self.module, "magnitude", sparsity="2:4", filter_fn=keep)
        config = format_of(SPARSE.get(self.rung, self.rung))
        config = SpecConfig(config) if isinstance(config, ao.Spec) else config
        report = ao.quantize_(self.module, dataclasses.replace(config, unsupported="skip"), keep)
        if not report.rows:
            raise ValueError(f"no layer of this model has a shape that {self.rung} takes")
        self.facts["layers"] = len(report.rows)

    def _replace(self, library: str, name: str) -> None:
        """Put another library's layers in the place of those that its formats take; the others stay as they are."""
        chosen = linear_layers(16, self.case.quantized)
        layers = [fqn for fqn, module in self.module.named_modules() if chosen(module, fqn)]
        for fqn in layers:
            layer = self.module.get_submodule(fqn)
            made = PEERS[library](layer.weight.detach(), name)
            if made is None:
                raise ValueError(f"{library} has no {name}")
            made = made[0] if isinstance(made, nn.Sequential) else made
            made.bias = layer.bias
            self.module.set_submodule(fqn, made)
        self.facts["layers"] = len(layers)

    def _autoquant(self) -> float:
        """Choose the formats by measuring. Returns the seconds that it took."""
        candidates: Any = "all" if self.device.type == "cuda" else "int4"
        # The first forward of `generate` takes the prompt; the tokens after it are what counts.
        self.module = ao.autoquant(
            self.module,
            candidates=candidates,
            min_sqnr=self.args.min_sqnr,
            error_on_unseen=False,
            manual=self.case.decodes,
        )
        took = self.seconds(self.call)
        if self.case.decodes:
            took += self.seconds(lambda: finalize_autoquant(self.module))
        self.facts["note"] = str(self.module.autoquant_report)
        return took

    def _inputs(self) -> dict[str, Any]:
        torch.manual_seed(1)
        with self.device:
            made = self.case.inputs(self.module, self.batch, self.args.small)
        return {name: self._cast(value) for name, value in made.items()}

    def _cast(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._cast(inner) for name, inner in value.items()}
        return value.to(self.dtype) if value.is_floating_point() else value

    def output(self) -> Tensor:
        """What the model computes."""
        out = self.forward()
        first = out if isinstance(out, Tensor) else next(iter(out.values())) if hasattr(out, "values") else out[0]
        return first.clone()

    def call(self) -> None:
        if self.case.decodes:
            self.generate()
        else:
            self.forward()

    def forward(self) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # what was computed before may be overwritten
        with torch.no_grad():
            return self.module(**self.inputs)

    def generate(self) -> float:
        """Some tokens. Returns the seconds between two of them, the median: without what a call of generate begins with."""
        # That of Whisper itself is for hours of speech, and takes no streamer.
        generate: Any = import_module("transformers").GenerationMixin.generate
        inputs, times = dict(self.inputs), Times()
        if "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            generate(
                self.module,
                **inputs,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                streamer=times,
                **({"cache_implementation": "static"} if self.compiles else {}),
            )
        return times.step()

    def seconds(self, function: Callable[[], object]) -> float:
        measure.synchronize(self.device)
        start = time.perf_counter()
        function()
        measure.synchronize(self.device)
        return time.perf_counter() - start

    def median(self, function: Callable[[], object], repeats: int) -> float:
        """Seconds, after one call that does not count."""
        function()
        return statistics.median(self.seconds(function) for _ in range(repeats))

    def row(self) -> dict[str, Any]:
        """The numbers. Nothing else may run on the device meanwhile."""
        measure.reset_peak(self.device)
        start = time.perf_counter()
        while self.device.type == "cuda" and time.perf_counter() - start < WARM:
            self.seconds(self.call)
        if self.case.decodes:
            self.call()
            seconds = statistics.median(self.generate() for _ in range(max(3, self.args.calls // 4)))
        else:
            seconds = self.median(self.call, self.args.calls)
        peak = measure.used_bytes(self.device, peak=True)
        row = {"batch": self.batch, "rung": self.rung, "ms": seconds * 1e3, "bytes": peak, **self.facts}
        if self.args.at_once == 1 or self.rung == "autoquant":
            row["first_s"] = self.first_s
        if self.rung not in ("bf16", *SPARSE) and self.reference.exists():
            of_bf16 = torch.load(self.reference, map_location=self.device)
            row["sqnr_db"] = float(ao.compute_error(of_bf16.float(), self.output().float()))
        return row


def linear_layers(multiple: int, chosen: Callable[[nn.Module, str], bool] | None) -> Callable[[nn.Module, str], bool]:
    """A filter: linear layers, of those that are `chosen`, whose inputs and outputs are so many, or a multiple. No experts, which
    are never pruned."""

    def keep(module: nn.Module, name: str) -> bool:
        fits = isinstance(module, nn.Linear) and all(n % multiple == 0 for n in module.weight.shape)
        return fits and (chosen is None or chosen(module, name))

    return keep


def serve(connection: Connection, name: str, rung: str, batch: int, folder: Path, args: argparse.Namespace) -> None:
    """A rung in this process: get ready and say so; wait to be asked; send the row. Or the reason why there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever interrupts the script ends this process too
    if args.at_once > 1:
        import torch._inductor.config as inductor

        inductor.compile_threads = max(1, min(inductor.compile_threads, (os.cpu_count() or 1) // args.at_once))
    torch._dynamo.config.recompile_limit = 64  # the blocks of a UNet have more shapes than PyTorch compiles by itself
    torch.backends.cudnn.benchmark = True  # else cuDNN takes a kernel without tensor cores for SAM's convolutions
    try:
        made = Rung(name, rung, batch, folder, args)
        connection.send("ready")
        connection.recv()
        connection.send(made.row())
    except (EOFError, BrokenPipeError):
        return  # the script is gone
    except Exception as error:
        traceback.print_exc()
        connection.send(reason(error))


class Process:
    """A rung of a model in a process of its own."""

    def __init__(self, name: str, rung: str, batch: int, folder: Path, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.rung, self.batch = name, rung, batch
        self.connection, its = context.Pipe()
        self.process = context.Process(target=serve, args=(its, name, rung, batch, folder, args))
        self.process.start()
        self.began = time.monotonic()
        its.close()

    def answer(self, patience: float = float("inf")) -> Any:
        """The next message. Raises RuntimeError where it says that the rung failed, where none came in `patience` seconds since
        the process began, and where the process has died."""
        try:
            while not self.connection.poll(0.5):
                if time.monotonic() - self.began > patience:
                    raise RuntimeError(f"it was not ready after {patience:g} s (--patience)")
                if not self.process.is_alive() and not self.connection.poll():
                    raise EOFError
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from None
        if isinstance(message, str) and message != "ready":
            raise RuntimeError(message)
        return message

    def end(self, patience: float = 0) -> None:
        """End it, which frees its memory. patience: seconds for it to do so by itself, as it does once its row is sent."""
        self.connection.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()


def rows_of(folder: Path, args: argparse.Namespace) -> Generator[tuple[str, str, int, dict[str, Any] | str]]:
    """Model, rung, batch size, and the row or the reason why there is none, each as soon as it is known."""
    # The others are held against bf16. Autoquant measures by itself, so that nothing may run beside it.
    order = sorted(args.rungs, key=lambda rung: rung != "bf16")
    units = [(name, rung, batch) for name, batch in args.batches for rung in order]
    together = [unit for unit in units if unit[1] != "autoquant"]
    groups = [together[i : i + args.at_once] for i in range(0, len(together), args.at_once)]
    groups += [[unit] for unit in units if unit[1] == "autoquant"]
    for group in groups:
        with contextlib.ExitStack() as ends:
            processes = []
            for name, rung, batch in group:
                processes.append(Process(name, rung, batch, folder, args))
                ends.callback(processes[-1].end)
            ready = []
            for each in processes:
                try:
                    each.answer(args.patience)
                    ready.append(each)
                except RuntimeError as error:
                    each.end()  # nothing runs beside what is timed
                    yield each.name, each.rung, each.batch, str(error)
            for each in ready:
                try:
                    each.connection.send("go")
                    yield each.name, each.rung, each.batch, each.answer()
                except (RuntimeError, OSError) as error:
                    yield each.name, each.rung, each.batch, str(error)
                each.end(patience=10)


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
                f"{row['bytes'] / 1e9:.2f}",
                *(f"{row[key]:.1f}" if key in row else "-" for key in ("first_s", "sqnr_db")),
            ]
            for row in rows
        ],
    )  # fmt: skip


def draw(models: dict[str, dict[str, Any]], path: Path) -> None:
    """How many times as fast as bf16, compiled, each rung is, a panel per model, batch size and run. Needs matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ao", "font.size": 9})
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    panels: dict[tuple[str, int, int], dict[str, float]] = {}
    for name, model in models.items():
        for row in sorted(model["rows"], key=lambda row: (row["batch"], row["rung"] != "float32")):
            panels.setdefault((name, row["batch"], row.get("run", 0)), {})[row["rung"]] = row["ms"]
    panels = {of: {rung: ms["compiled"] / t for rung, t in ms.items()} for of, ms in panels.items() if "compiled" in ms}
    colors = {rung: f"C{i % 10}" for i, rung in enumerate(dict.fromkeys(r for bars in panels.values() for r in bars))}
    columns = min(3, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    tallest = max((len(bars) for bars in panels.values()), default=1)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.6 * columns, (0.24 * tallest + 0.7) * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((name, batch, _), bars) in zip(axes.flat, panels.items()):
        drawn = axis.barh(list(bars), list(bars.values()), color=[colors[rung] for rung in bars])
        axis.bar_label(drawn, [f"{speed:.2f}" for speed in bars.values()], padding=2)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(f"{name}, batch {batch}")
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(bars.values()))
    figure.supxlabel("speed, bf16 compiled = 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    pyplot.close(figure)


def save(path: Path, data: dict[str, Any]) -> None:
    """Write it as a whole or not at all: whoever cuts the run off keeps what was there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    runs: dict[str, dict[str, Any]] = {
        name: {"unit": MODELS[name].unit, "rows": [], "errors": {}} for name in args.models
    }
    data = {"runs": [{**measure.facts(torch.device(args.device)), "at_once": args.at_once}], "models": runs}
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(rows_of(Path(folder), args)) as found:
            for name, rung, batch, row in found:
                if isinstance(row, str):
                    runs[name]["errors"][f"{rung}, batch {batch}"] = row
                else:
                    runs[name]["rows"].append(row)
                said = row if isinstance(row, str) else f"{row['ms']:.2f} ms"
                print(f"{name}, batch {batch}, {rung}: {said}", file=sys.stderr, flush=True)
                if args.json is not None:
                    save(args.json, data)
    except KeyboardInterrupt:
        return 130
    finally:
        for name, run in runs.items():
            print(tables(name, run["rows"], args), flush=True)
        if args.plot is not None:
            draw(runs, args.plot)
    return 0 if any(run["rows"] for run in runs.values()) else 1


def tables(name: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """The ladders of one model, a table for each batch size, the rungs as they were asked for."""
    rows = sorted(rows, key=lambda row: args.rungs.index(row["rung"]))
    return "\n".join(
        f"\n{name}, batch {batch}: {MODELS[name].unit}\n\n{table(rows, batch)}"
        for batch in sorted({row["batch"] for row in rows})
    )


def interruptible() -> None:
    """Stop as by Ctrl-C at SIGINT, which a shell has ignored for what it starts in the background, and at SIGTERM."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)


if __name__ == "__main__":
    interruptible()
    sys.exit(main())
