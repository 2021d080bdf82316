"""Fill in the tables of docs/optimizers.md from what was measured, and draw its plot.

    .venv/bin/python scripts/optim_page.py          rewrite what stands between `<!-- table: NAME -->` and `<!-- end -->`
    .venv/bin/python scripts/optim_page.py --check  exit with an error if that would change anything

scripts/bench_optim.py writes docs/measured/optim-cuda.json and optim-cpu.json, scripts/train_lm.py --json optim-loss.json.
The plot, docs/optim-loss.svg, is drawn where matplotlib is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import ROOT, fill, markdown
from torch import nn

from ao import optim

MEASURED = ROOT / "docs" / "measured"
PAGE = ROOT / "docs" / "optimizers.md"
PLOT = ROOT / "docs" / "optim-loss.svg"

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _label(row: Row) -> str:
    return row["optimizer"] if row["library"] == "ao" else f"{row['optimizer']} of {row['library']}"


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.2f}x" if row.get(name) else ""


def _share(name: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[name]:.0f} %" if row.get(name) is not None else ""


def _ms(name: str) -> Callable[[Row], str]:
    return lambda row: f"{1e3 * row[name]:.2f}" if row.get(name) else ""


def _gb(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name] / 1e9:.2f}"


WHO: list[Column] = [("optimizer", _label), ("weights", lambda row: row["dtype"])]
STATES: Column = ("state bytes per parameter", lambda row: f"{row['state_bytes'] / row['parameters']:.3f}")
ALONE: Column = (
    "ms, host and all",
    lambda row: f"{1e3 * row['alone_seconds']:.2f}" if row["alone_seconds"] != row["seconds"] else "",
)
FIRST: Column = ("first step, s", lambda row: f"{row['first_seconds']:.1f}")

TABLES: dict[str, list[Column]] = {
    "step": [
        *WHO,
        STATES,
        ("ms", _ms("seconds")),
        ("time of fused", _ratio("of_fused")),
        ("of the byte floor", _share("floor")),
        ("grads written too", _share("floor_once")),
        ALONE,
        FIRST,
    ],
    "tiny": [
        *WHO,
        ("ms", _ms("seconds")),
        ("time of foreach", _ratio("of_foreach")),
        ("time of fused", _ratio("of_fused")),
        ALONE,
        FIRST,
    ],
    "offload": [
        ("optimizer", lambda row: row["variant"]),
        ("backward passes a step", lambda row: str(row["accumulate"])),
        ("peak GB", _gb("peak_bytes")),
        ("s per step", lambda row: f"{row['seconds']:.3f}"),
        ("time of none", _ratio("of_none")),
        ("copies beside kernels", _share("copies_beside_kernels")),
        ("copies beside anything", _share("copies_hidden")),
        ("CPU steps beside kernels", _share("steps_beside_kernels")),
    ],
    "loss": [
        ("run", lambda row: row["run"]),
        ("steps", lambda row: str(row["settings"]["steps"])),
        ("loss at the end", lambda row: f"{row['loss']:.4f}"),
        ("of float32 states", lambda row: f"{100 * row['change']:+.2f} %" if row.get("change") is not None else ""),
        ("held out", lambda row: f"{row['held_out']:.4f}"),
        ("state bytes per parameter", lambda row: f"{row['state_bytes'] / row['parameters']:.2f}"),
        ("ms per step", lambda row: f"{row['ms_per_step']:.1f}"),
    ],
}


def cells(mode: str, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table, without columns that no row has. What failed says why."""
    columns = [each for each in TABLES[mode] if any("failed" not in row and each[1](row) for row in rows)]
    columns = columns if len(columns) > 1 else TABLES[mode]
    body = [
        [columns[0][1](row), row["failed"], *[""] * (len(columns) - 2)]
        if "failed" in row
        else [cell(row) for _, cell in columns]
        for row in rows
    ]
    return [head for head, _ in columns], body


def measured_table(mode: str, file: str, command: str, measured: Path = MEASURED) -> str:
    """A table of the page and its origin."""
    path = measured / file
    data = json.loads(path.read_text()) if path.exists() else {}
    if mode not in data:
        return f"Not measured yet: `{command} --json docs/measured/{file}`."
    facts, rows = data[mode]["facts"], data[mode]["rows"]
    words = [f"On {facts['device']}, torch {facts['torch']}", *_about(mode, data[mode])]
    return f"{markdown(*cells(mode, rows))}\n\n{'; '.join(words)}: `{facts['command']}`."


def _about(mode: str, data: dict[str, Any]) -> list[str]:
    row: Row = next((row for row in data["rows"] if "failed" not in row), {})
    if mode == "offload":
        return [f"{row['parameters'] / 1e6:,.0f}M parameters, {row['tokens']} tokens a backward pass"] if row else []
    if mode == "loss":
        return [f"{row['parameters'] / 1e6:.1f}M parameters"] if row else []
    return [f"{row.get('parameters', 0) / 1e6:,.1f}M parameters", f"copy {data['copy'] / 1e9:,.0f} GB/s"]


PAGE_TABLES: dict[str, tuple[str, str, str]] = {
    "step-cuda": ("step", "optim-step-h200.json", "scripts/bench_optim.py step"),
    "step-peers-cuda": ("step", "optim-cuda.json", "scripts/bench_optim.py step --peers"),
    "step-cpu": ("step", "optim-cpu.json", "scripts/bench_optim.py step --threads 1"),
    "tiny-cuda": ("tiny", "optim-cuda.json", "scripts/bench_optim.py tiny"),
    "tiny-cpu": ("tiny", "optim-cpu.json", "scripts/bench_optim.py tiny --threads 1"),
    "offload-cuda": ("offload", "optim-cuda.json", "scripts/bench_optim.py offload"),
    "loss": ("loss", "optim-loss.json", "scripts/train_lm.py --optim adamw adamw8bit adamw4bit adamwfp8"),
}
"""The tables of the page: mode, file, and the command that measures it."""


STATES_OF: list[tuple[type[optim.LowBitOptimizer], str, str]] = [
    (optim.AdamW, "float32", "float32"),
    (optim.AdamW8bit, "signed dynamic tree map, 8 bits", "unsigned dynamic tree map, 8 bits"),
    (optim.AdamWFp8, "float8 e4m3", "float8 e4m3"),
    (optim.AdamW4bit, "signed dynamic tree map, 4 bits", "1, 2, ..., 16 sixteenths, 4 bits"),
    (optim.Lion8bit, "signed dynamic tree map, 8 bits", ""),
    (optim.SGD8bit, "signed dynamic tree map, 8 bits", ""),
    (optim.RMSprop8bit, "", "unsigned dynamic tree map, 8 bits"),
    (optim.Adagrad8bit, "", "unsigned dynamic tree map, 8 bits"),
    (optim.AdEMAMix8bit, "signed dynamic tree map, 8 bits, twice", "unsigned dynamic tree map, 8 bits"),
    (optim.LAMB8bit, "signed dynamic tree map, 8 bits", "unsigned dynamic tree map, 8 bits"),
    (optim.LARS8bit, "signed dynamic tree map, 8 bits", ""),
]


def states() -> str:
    """What each optimizer stores, measured on a parameter of 1024 x 1024."""
    rows = []
    for cls, first, second in STATES_OF:
        p = nn.Parameter(torch.zeros(1024, 1024))
        p.grad = torch.zeros_like(p)
        made: Any = cls
        optimizer = made([p], compile=False)
        optimizer.step()
        size = str(cls.block_size) if cls.formats else ""
        rows.append([f"`{cls.__name__}`", first, second, size, f"{optimizer.state_nbytes / p.numel():.3f}"])
    head = ["optimizer", "first moment or momentum", "second moment", "`block_size`", "state bytes per parameter"]
    return markdown(head, rows)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Smoothed loss over steps of all runs, and below how far each is from the first. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "ao"  # the same file for the same numbers
    figure, (above, below) = plt.subplots(2, figsize=(8, 6), sharex=True, height_ratios=[3, 2])
    base: list[float] = []
    for row in rows:
        smooth, mean = [], row["losses"][0]
        every = row.get("every", 1)
        for loss in row["losses"]:
            mean += min(0.02 * every, 1.0) * (loss - mean)
            smooth.append(mean)
        steps = [every * (i + 1) for i in range(len(smooth))]
        base = base or smooth
        above.plot(steps, smooth, label=row["run"], linewidth=1.2)
        below.plot(steps, [100 * (a / b - 1) for a, b in zip(smooth, base)], linewidth=1.2)
    above.set_ylabel("loss, nats per byte")
    above.legend()
    below.set_ylabel(f"% above {rows[0]['run']}")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def plot() -> str:
    """The picture of the page."""
    if PLOT.exists():
        return f"![Loss curves of one model trained with each optimizer]({PLOT.name})"
    return "No plot yet: `scripts/optim_page.py` draws it from docs/measured/optim-loss.json where matplotlib is installed."


def main(check: bool) -> None:
    losses = MEASURED / "optim-loss.json"
    if not check and losses.exists() and importlib.util.find_spec("matplotlib"):
        draw(json.loads(losses.read_text())["loss"]["rows"], PLOT)
    tables: dict[str, Callable[[], str]] = {name: partial(measured_table, *what) for name, what in PAGE_TABLES.items()}
    fill(PAGE, {"states": states, **tables, "plot": plot}, check)


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
