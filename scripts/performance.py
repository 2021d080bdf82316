"""Fill in docs/performance.md, its targets, tables and plots, from the numbers that the benchmarks saved.

    .venv/bin/python scripts/performance.py          rewrite what stands between `<!-- table: NAME -->` and `<!-- end -->`
    .venv/bin/python scripts/performance.py --check  exit with an error if that would change anything

scripts/bench_linear.py writes docs/measured/linear-cuda.json and linear-cpu.json, and linear-h200.json for a second card;
scripts/generate.py generate-cuda.json and generate-cpu.json; scripts/bench_generate_hf.py generate-hf-cpu.json and
generate-hf-h200.json. What was not measured is said to be missing; the text between the tables is left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import ROOT, fill, markdown

MEASURED = ROOT / "docs" / "measured"
PAGE = ROOT / "docs" / "performance.md"
LARGE = ("28672x4096", "4096x14336", "128256x4096")
"""The shapes on which a dynamic format has to pay."""

Row = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """The numbers in a file, or none where it is missing. Raises ValueError for a file of another kind."""
    if not path.exists():
        return {"runs": [], "rows": []}
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or not isinstance(data.get("runs"), list):
        raise ValueError(
            f"{path} holds no numbers of a benchmark; give the --json file of bench_linear.py or generate.py"
        )
    return data


class Linear:
    """The rows of bench_linear.py, by shape, tokens, format and library. Of several runs of a case the first counts."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.runs: list[dict[str, Any]] = data["runs"]
        self.rows: dict[tuple[str, int, str, str], Row] = {}
        self._of_run: dict[tuple[str, int, str, int], Row] = {}
        for r in data["rows"]:
            self.rows.setdefault((r["shape"], r["tokens"], r["format"], r["library"]), r)
            if r["library"] == "ao":
                self._of_run[r["shape"], r["tokens"], r["format"], r.get("run", 0)] = r
        self.shapes = list(dict.fromkeys(r["shape"] for r in data["rows"]))
        self.tokens = sorted({r["tokens"] for r in data["rows"]})
        self.formats = list(dict.fromkeys(r["format"] for r in data["rows"] if r["library"] == "ao"))
        self.peers = list(dict.fromkeys(r["library"] for r in data["rows"] if r["library"] != "ao"))

    def get(self, shape: str, tokens: int, name: str, library: str = "ao") -> Row:
        return self.rows.get((shape, tokens, name, library), {})

    def speed(self, shape: str, tokens: int, name: str) -> float | None:
        """How many times faster than bf16: 0 where it fails, None where it was not measured."""
        r = self.get(shape, tokens, name)
        return 0.0 if "failed" in r else r["bf16_us"] / r["us"] if r.get("bf16_us") else None

    def over(self, shape: str, tokens: int, name: str, peer: str) -> float | None:
        """How many times faster than the peer, in the same run where both are there; None where either does not run."""
        theirs = self.get(shape, tokens, name, peer)
        ours = self._of_run.get((shape, tokens, name, theirs.get("run", 0))) or self.get(shape, tokens, name)
        return theirs["us"] / ours["us"] if "us" in ours and "us" in theirs else None

    def origin(self) -> str:
        """What the numbers were measured with."""
        used = [self.runs[i] for i in sorted({r.get("run", 0) for r in self.rows.values()})]
        return origin(used)


def origin(runs: Iterable[Mapping[str, Any]]) -> str:
    """Machine, versions, date and command of each run that differs."""
    lines = []
    for run in runs:
        versions = f"torch {run['torch']}" + (f", triton {run['triton']}" if run.get("triton") else "")
        peers = ", ".join(f"{name} {version}" for name, version in run.get("peers", {}).items())
        line = f"{run['device']}, {versions}, {run['date']}" + (f"; {peers}" if peers else "")
        if "ceilings" in run:
            c = run["ceilings"]
            line += f"; copy {c['copy'] / 1e9:,.0f} GB/s, sum {c['read'] / 1e9:,.0f} GB/s"
            line += "".join(f", {name} {c[name] / 1e12:.3g} T/s" for name in ("float", "int8", "float8") if name in c)
        lines.append(f"{line}: `{run['command']}`")
    return "\n\n".join(dict.fromkeys(lines))


# Targets.

Values = Iterable[tuple["float | None", str]]


@dataclass(frozen=True)
class Target:
    """A number to reach: the worst of `values` must be at least, or at most, `bound`. Each value says where it was found."""

    text: str
    bound: float
    values: Callable[[], Values]
    least: bool = True
    unit: str = "x"

    def cells(self) -> list[str]:
        """What is asked, what was measured, and by how much it is met or missed."""
        asked = f"{'at least' if self.least else 'at most'} {self.bound:g}{self.unit}"
        values = list(self.values())
        known = [(value, where) for value, where in values if value is not None]
        if not known:
            return [self.text, asked, "not measured", "-"]
        worst, where = (min if self.least else max)(known, key=lambda pair: pair[0])
        measured = f"{worst:.2f}{self.unit}" if 0 < worst < math.inf else "does not run"
        measured += f" ({where})" if where else ""
        if len(known) < len(values):
            measured += f"; {len(values) - len(known)} of {len(values)} cases not measured"
        met = worst >= self.bound if self.least else worst <= self.bound
        gap = worst / self.bound - 1
        side = "above" if gap > 0 else "below"
        size = f", {abs(gap):.0%} {side}" if 0 < worst < math.inf else ""
        return [self.text, asked, measured, ("met" if met else "**missed**") + size]


def targets(folder: Path) -> str:
    """The table of targets."""
    gpu, second, cpu = (Linear(read(folder / f"linear-{kind}.json")) for kind in ("cuda", "h200", "cpu"))
    gpus, cpus = [gpu, *([second] if second.rows else [])], [cpu]
    runs = [run for run in read(folder / "generate-cuda.json")["runs"] if is_8b(run)]
    decode = sorted((run for run in runs if bf16_speed(run)), key=bf16_speed)[-1:]  # beside the fastest bf16 of all
    shapes = gpu.shapes or ["all shapes"]

    def speed(chips: list[Linear], name: str, shapes: Iterable[str], tokens: Iterable[int]) -> Callable[[], Values]:
        return lambda: [
            (chip.speed(s, m, name), f"M={m}, {s}" + (f", {chip.runs[0]['device']}" if len(chips) > 1 else ""))
            for chip in chips
            for s in shapes
            for m in tokens
        ]

    def time(chips: list[Linear], name: str, shapes: Iterable[str], tokens: Iterable[int]) -> Callable[[], Values]:
        def values() -> Values:
            for value, where in speed(chips, name, shapes, tokens)():
                yield (None if value is None else 1 / value if value else math.inf), where

        return values

    def over(peer: str) -> Callable[[], Values]:
        def values() -> Values:
            ratios = (
                (gpu.over(s, m, f, peer), f"{f}, M={m}, {s}")
                for s in gpu.shapes
                for m in gpu.tokens
                for f in gpu.formats
            )
            return [pair for pair in ratios if pair[0] is not None]

        return values

    def generated(column: str, name: str) -> Callable[[], Values]:
        return lambda: [
            (against_bf16(run, name, column), f"{run['settings']['how']}, {run['device']}") for run in decode
        ]

    def quantized(value: Callable[[Row], float | None]) -> Callable[[], Values]:
        return lambda: [(value(r), r["format"]) for run in runs for r in run["rows"] if r.get("quantize_s")]

    def compiled(runs: Iterable[Mapping[str, Any]]) -> Callable[[], Values]:
        rows = [(run, r["format"]) for run in runs for r in run["rows"] if r["format"] != "bf16"]
        return lambda: [
            (against_bf16(run, name, "compile_s"), f"{name}, {run['settings']['how']}") for run, name in rows
        ]

    some, many = [m for m in gpu.tokens if 2 <= m <= 64], [m for m in gpu.tokens if m >= 128]
    most = [m for m in gpu.tokens if m >= 1024]
    square, cpu_many = ["4096x4096"], [m for m in cpu.tokens if m >= 16]
    listed = [
        Target(
            "GPU, M=1, int4 g128, the two large MLP shapes, speed of bf16",
            2.5,
            speed(gpus, "int4-g128", LARGE[:2], [1]),
        ),
        Target("GPU, M=1, int8, speed of bf16", 1.7, speed(gpus, "int8", shapes, [1])),
        Target("GPU, M=1, float8, speed of bf16", 1.7, speed(gpus, "float8", shapes, [1])),
        *(
            Target(f"GPU, 2 <= M <= 64, {f}, time of bf16", 1.0, time(gpus, f, shapes, some), least=False)
            for f in ("int4-g128", "int8", "float8")
        ),
        *(
            Target(f"GPU, M >= 128, {f}, time of bf16", 1.1, time(gpus, f, shapes, many), least=False)
            for f in ("int4-g128", "int8", "float8")
        ),
        *(
            Target(f"GPU, M >= 1024, {f}, the large shapes, speed of bf16", 1.4, speed(gpus, f, LARGE, most))
            for f in ("int8-dynamic", "float8-dynamic")
        ),
        *(
            Target(f"GPU, any M, speed of {peer} at the same format", 1.0, over(peer))
            for peer in ("torchao", "gemlite", "bitsandbytes")
        ),
        Target(
            "GPU, decode of the 8B shape, batch 1, int8, speed of bf16", 1.6, generated("decode_tokens_per_s", "int8")
        ),
        Target(
            "GPU, decode of the 8B shape, batch 1, int4 g128, speed of bf16",
            2.3,
            generated("decode_tokens_per_s", "int4-g128"),
        ),
        Target("GPU, quantize the 8B shape", 15, quantized(lambda r: r["quantize_s"]), least=False, unit=" s"),
        Target(
            "GPU, extra memory to quantize it, in largest layers",
            1,
            quantized(lambda r: r["quantize_extra_bytes"] and r["quantize_extra_bytes"] / r["largest_layer_bytes"]),
            least=False,
            unit="",
        ),
        Target("GPU, compile time of bf16's, the 8B shape", 1.3, compiled(runs), least=False),
        Target("CPU, M=1, int8, speed of bf16", 1.7, speed(cpus, "int8", square, [1])),
        Target("CPU, M=1, int4 g128, speed of bf16", 2.2, speed(cpus, "int4-g128", square, [1])),
        Target("CPU, M=16, int8, time of bf16", 1.0, time(cpus, "int8", square, [16]), least=False),
        Target("CPU, M=16, int4 g128, time of bf16", 1.3, time(cpus, "int4-g128", square, [16]), least=False),
        *(
            Target(f"CPU, M=256, {f}, time of bf16", 1.1, time(cpus, f, square, [256]), least=False)
            for f in ("int8", "int4-g128")
        ),
        Target("CPU, M >= 16, int8-dynamic, speed of bf16", 1.2, speed(cpus, "int8-dynamic", square, cpu_many or [16])),
        Target(
            "CPU, compile time of bf16's, a 1B shape",
            1.3,
            compiled(read(folder / "generate-cpu.json")["runs"]),
            least=False,
        ),
    ]
    return markdown(["target", "asked", "worst measured", "verdict"], [target.cells() for target in listed])


def is_8b(run: Mapping[str, Any]) -> bool:
    """Whether a run of generate.py is the whole 8B shape at batch 1."""
    settings = run["settings"]
    return settings["model"] == "llama-3.1-8b" and settings["layers"] == 32 and settings["batch"] == 1


def bf16_speed(run: Mapping[str, Any]) -> float:
    """Tokens per second of bf16 in a run of generate.py, 0 where it was not measured."""
    return next((r.get("decode_tokens_per_s", 0.0) for r in run["rows"] if r["format"] == "bf16"), 0.0)


def against_bf16(run: Mapping[str, Any], name: str, column: str) -> float | None:
    """A column of a format over that of bf16, in one run of generate.py."""
    rows = {r["format"]: r for r in run["rows"]}
    ours, base = rows.get(name, {}).get(column), rows.get("bf16", {}).get(column)
    return ours / base if ours and base else None


# Tables.


def is_loss(speed: float) -> bool:
    """Whether a ratio, as it is printed, is below one."""
    return round(speed, 2) < 1


def times(speed: float) -> str:
    """A ratio, in bold if it is a loss."""
    return f"**{speed:.2f}x**" if is_loss(speed) else f"{speed:.2f}x"


def duration(us: float) -> str:
    """Microseconds, or milliseconds."""
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def summary(data: Linear) -> str:
    """One line per format: how often it is faster and slower than bf16, and where it is best and worst."""
    if not data.rows:
        return "Not measured yet."
    rows = []
    for name in data.formats:
        cases = [(data.speed(s, m, name), f"M={m}, {s}") for s in data.shapes for m in data.tokens]
        known = [(value, where) for value, where in cases if value is not None]
        if name == "bf16" or not known:
            continue
        best, worst = max(known), min(known)
        first = [
            r["floor_us"] / r["us"] for s in data.shapes for r in [data.get(s, data.tokens[0], name)] if "floor_us" in r
        ]
        errors = [
            r["error"] for r in data.rows.values() if r["format"] == name and "error" in r and r["library"] == "ao"
        ]
        slower = sum(is_loss(value) for value, _ in known)
        rows.append(
            [
                name,
                f"{len(known) - slower} of {len(known)}",
                f"{slower} of {len(known)}",
                f"{best[0]:.2f}x ({best[1]})",
                f"{worst[0]:.2f}x ({worst[1]})" if worst[0] else f"does not run ({worst[1]})",
                f"{statistics.median(first):.0%}" if first else "-",
                f"{max(errors):.1e}" if errors else "-",
            ]
        )
    head = ["format", "as fast or faster", "slower", "best", "worst", f"of floor, M={data.tokens[0]}", "largest error"]
    return markdown(head, rows)


def linear(data: Linear, plot: str) -> str:
    """A table per shape: bf16's microseconds, and for each format the speed of bf16 and the fraction of the floor."""
    if not data.rows:
        return "Not measured yet."
    parts = [f"![speed of bf16 over M]({plot})"] if plot else []
    for shape in data.shapes:
        head = [f"{shape}, M =", *map(str, data.tokens)]
        rows = []
        for name in data.formats:
            cells = []
            for m in data.tokens:
                r = data.get(shape, m, name)
                if "us" not in r:
                    cells.append("fails" if r else "-")
                else:
                    speed = None if name == "bf16" else data.speed(shape, m, name)
                    cells.append(f"{times(speed) if speed else duration(r['us'])}, {r['floor_us'] / r['us']:.0%}")
            rows.append([name, *cells])
        parts.append(markdown(head, rows))
    reasons = failures(data, "ao")
    return "\n\n".join([*parts, *([reasons] if reasons else []), data.origin()])


def peers(data: Linear) -> str:
    """A table per peer and format: how many times faster ours is."""
    if not data.peers:
        return "Not measured yet."
    parts = []
    for peer in data.peers:
        rows = []
        tokens = sorted({m for (_, m, _, library), r in data.rows.items() if library == peer and "us" in r})
        for name in data.formats:
            for shape in data.shapes:
                ratios = [data.over(shape, m, name, peer) for m in tokens]
                if any(ratios):
                    cells = [times(r) if r else "-" for r in ratios]
                    rows.append([f"{name}, {shape}", *cells])
        if rows:
            parts.append(markdown([f"{peer}, M =", *map(str, tokens)], rows))
        plain = dict.fromkeys(
            f for (_, _, f, whose), r in data.rows.items() if whose == peer and not r.get("captured", True)
        )
        if plain:
            parts.append(f"No CUDA graph could hold {', '.join(plain)} of {peer}: plain calls, Python included.")
        reasons = failures(data, peer)
        parts += [reasons] if reasons else []
    return "\n\n".join([*parts, data.origin()])


def failures(data: Linear, library: str) -> str:
    """What does not run, and why."""
    found: dict[str, list[str]] = {}
    for (shape, tokens, name, whose), r in data.rows.items():
        if whose == library and "failed" in r and not r.get("absent"):
            found.setdefault(f"{name}: {r['failed']}", []).append(f"M={tokens}, {shape}")
    who = "" if library == "ao" else f" of {library}"
    lines = [
        f"- `{what}` at {where[0]}" + (f" and {len(where) - 1} more" if len(where) > 1 else "")
        for what, where in found.items()
    ]
    return "\n".join([f"What does not run{who}:", "", *lines]) if lines else ""


def generate(data: Mapping[str, Any]) -> str:
    """A table per run of generate.py."""
    parts = []
    for run in data["runs"]:
        s = run["settings"]
        if not s["new_tokens"]:
            continue
        rows = []
        for r in run["rows"]:
            if "failed" in r:
                rows.append([r["format"], f"fails: {r['failed']}", *["-"] * 7])
                continue
            speed = against_bf16(run, r["format"], "decode_tokens_per_s")
            rows.append(
                [
                    r["format"],
                    f"{r['model_bytes'] / 1e9:.2f}",
                    f"{r['decode_tokens_per_s']:.1f}",
                    times(speed) if speed else "-",
                    f"{r['bandwidth_fraction']:.0%}",
                    f"{r['prefill_tokens_per_s']:,.0f}",
                    f"{r['prefill_ms']:.1f}",
                    f"{r['peak_bytes'] / 1e9:.2f}" if r.get("peak_bytes") else "-",
                    f"{r['compile_s']:.1f}",
                ]
            )
        head = [f"{s['model']}, {s['layers']} layers, batch {s['batch']}", "model GB", "decode tok/s", "of bf16"]
        head += ["of bandwidth", "prefill tok/s", "prefill ms", "peak GB", "compile s"]
        how = f"{s['prompt_length']} tokens of prompt, {s['new_tokens']} new; {s['how']}; median of {s['repeats']}"
        parts += [markdown(head, rows), f"{how}. {origin([run])}"]
    return "\n\n".join(parts) or "Not measured yet."


def generate_hf(data: Mapping[str, Any]) -> str:
    """A table per mode of bench_generate_hf.py."""
    from bench_generate_hf import table  # which imports this file

    if not data["rows"]:
        return "Not measured yet."
    parts = []
    for mode in dict.fromkeys(row["mode"] for row in data["rows"]):
        parts.append(f"`generate`, {mode}; in parentheses: times bfloat16's\n\n{table(data['rows'], mode)}")
    (run,) = data["runs"]
    facts = f"{run['device']}, torch {run['torch']}, transformers {run['transformers']}, {run['date']}"
    return "\n\n".join([*parts, f"{facts}: `{run['command']}`"])


def few(path: Path) -> str:
    """How many times faster than bf16 each format is for one token and a few, on a GPU, from what tune_kernels.py wrote."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text())
    taken = [r for r in data["few"] if r["way"] == "as it is"]
    tokens = sorted({r["tokens"] for r in taken})
    parts = []
    for shape in dict.fromkeys(r["shape"] for r in taken):
        rows = [r for r in taken if r["shape"] == shape]
        body = []
        for name in dict.fromkeys(r["format"] for r in rows):
            each = {r["tokens"]: r for r in rows if r["format"] == name}
            body.append([name, *(times(each[m]["bf16_us"] / each[m]["us"]) for m in tokens)])
        base = {r["tokens"]: r["bf16_us"] for r in rows}
        body.append(["bf16, microseconds", *(f"{base[m]:.1f}" for m in tokens)])
        parts.append(markdown([f"{shape.replace('x', ' x ')}, tokens", *map(str, tokens)], body))
    where = f"{data['device']}, torch {data['torch']}, triton {data['triton']}, {data['date']}: `{data['command']}`"
    tables = "\n\n".join(parts)
    return (
        f"{tables}\n\nTimes bfloat16's speed, of the way taken (g16, g32, g64, g128: groups of so many; j: zero points in the "
        f"scales). {where}"
    )


def quantizing(folder: Path) -> str:
    """How fast `quantize_` is, from the runs of generate.py."""
    rows = []
    runs = [run for kind in ("cuda", "cpu") for run in read(folder / f"generate-{kind}.json")["runs"]]
    for run in runs:
        s = run["settings"]
        for r in run["rows"]:
            if not r.get("quantize_s"):
                continue
            extra = r["quantize_extra_bytes"]
            compiled = against_bf16(run, r["format"], "compile_s")
            rows.append(
                [
                    f"{s['model']}, {s['layers']} layers, {r['format']}, {run['device']}",
                    f"{r['quantize_s']:.2f}",
                    f"{r['quantize_bytes'] / r['quantize_s'] / 1e9:.1f}",
                    f"{r['quantize_bytes'] / r['quantize_s'] / max(run['ceilings']['copy'], run['ceilings']['read']):.0%}",
                    f"{extra / r['largest_layer_bytes']:.2f}" if extra is not None else "-",
                    f"{compiled:.2f}x" if compiled else "-",
                    s["how"],
                ]
            )
    if not rows:
        return "Not measured yet."
    head = [
        "model, format, device",
        "s",
        "GB/s",
        "of bandwidth",
        "extra memory, in largest layers",
        "compile time of bf16's",
        "compiled",
    ]
    return markdown(head, rows)


# Plot.


def draw(data: Mapping[str, Any], path: Path) -> None:
    """The speed of bf16 over M, a panel per shape, a line per format. Raises ImportError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("drawing needs matplotlib: pip install matplotlib")
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ao", "font.size": 9})
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    table = Linear(data)
    columns = min(3, len(table.shapes))
    lines = -(-len(table.shapes) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.6 * columns + 1, 2.9 * lines), squeeze=False, sharex=True, layout="constrained"
    )
    for axis in axes.flat[len(table.shapes) :]:
        axis.remove()
    for axis, shape in zip(axes.flat, table.shapes):
        axis.axhline(1, color="black", linewidth=1)
        for i, name in enumerate(f for f in table.formats if f != "bf16"):
            points = [(m, v) for m in table.tokens if (v := table.speed(shape, m, name))]
            if points:
                axis.plot(*zip(*points), marker=".", linewidth=1.2, color=f"C{i % 10}", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(table.tokens, [str(m) for m in table.tokens], rotation=60)
        axis.set_title(f"{shape} (N x K)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_xlabel("M, tokens")
    axes[0][0].set_ylabel("speed, bf16 = 1")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    pyplot.close(figure)


def write(page: Path, folder: Path, check: bool = False) -> None:
    """Fill in `page` from the files in `folder`, and draw the plots beside it where matplotlib is installed."""
    plots = {}
    data = {kind: read(folder / f"linear-{kind}.json") for kind in ("cuda", "h200", "cpu")}
    for kind, each in data.items():
        plot = page.parent / f"linear-{kind}.svg"
        if each["rows"] and not check and importlib.util.find_spec("matplotlib"):
            draw(each, plot)
        plots[kind] = plot.name if plot.exists() else ""
    gpu, cpu = Linear(data["cuda"]), Linear(data["cpu"])
    fill(
        page,
        {
            "targets": lambda: targets(folder),
            "summary-cuda": lambda: summary(gpu),
            "linear-cuda": lambda: linear(gpu, plots["cuda"]),
            "few-h200": lambda: few(folder / "few-h200.json"),
            "linear-h200": lambda: linear(Linear(data["h200"]), plots["h200"]),
            "peers-cuda": lambda: peers(gpu),
            "generate-cuda": lambda: generate(read(folder / "generate-cuda.json")),
            "quantize": lambda: quantizing(folder),
            "summary-cpu": lambda: summary(cpu),
            "linear-cpu": lambda: linear(cpu, plots["cpu"]),
            "linear-cpu-eager": lambda: linear(Linear(read(folder / "linear-cpu-eager.json")), ""),
            "peers-cpu": lambda: peers(cpu),
            "generate-cpu": lambda: generate(read(folder / "generate-cpu.json")),
            "generate-hf-h200": lambda: generate_hf(read(folder / "generate-hf-h200.json")),
            "generate-hf-cpu": lambda: generate_hf(read(folder / "generate-hf-cpu.json")),
        },
        check,
    )


if __name__ == "__main__":
    write(PAGE, MEASURED, check="--check" in sys.argv[1:])
