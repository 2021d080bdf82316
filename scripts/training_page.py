"""Fill in the tables of docs/training.md from docs/measured/training.json, which scripts/bench_training.py writes.

.venv/bin/python scripts/training_page.py          rewrite what stands between `<!-- table: NAME -->` and `<!-- end -->`
.venv/bin/python scripts/training_page.py --check  exit with an error if that would change anything
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tables import ROOT, fill, markdown

MEASURED = ROOT / "docs" / "measured" / "training.json"
PAGE = ROOT / "docs" / "training.md"


def _label(row: dict[str, Any]) -> str:
    return row["precision"] if row.get("library", "ao") == "ao" else f"{row['precision']} of {row['library']}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"


Column = tuple[str, Callable[[dict[str, Any]], str]]
PRECISION: Column = ("precision", _label)
SPEED: Column = ("speed of bf16", lambda r: f"{r['speed']:.2f}x")
PEAK: Column = ("peak GB", lambda r: _gb(r["peak_bytes"]))
RATE: Column = ("tokens/s", lambda r: f"{r['tokens'] * r.get('ranks', 1) / r['seconds']:.0f}")

TABLES: dict[str, list[Column]] = {
    "linear": [
        PRECISION,
        ("tokens x in x out", lambda r: r["size"]),
        ("ms", lambda r: f"{1e3 * r['seconds']:.2f}"),
        ("TFLOP/s", lambda r: f"{r['flops'] / r['seconds'] / 1e12:.0f}"),
        SPEED,
    ],
    "model": [PRECISION, ("layers", lambda r: str(r["layers"])), RATE, SPEED, PEAK],
    "parallel": [
        PRECISION,
        ("ranks", lambda r: str(r["ranks"])),
        RATE,
        SPEED,
        ("GB gathered a step", lambda r: _gb(r["gathered_bytes"])),
        ("last loss", lambda r: f"{r['losses'][-1]:.4f}"),
    ],
    "qlora": [
        ("model", lambda r: r["shape"]),
        ("layers", lambda r: str(r["layers"])),
        ("base GB", lambda r: _gb(r["base_bytes"])),
        PEAK,
        RATE,
        ("loss", lambda r: f"{r['loss_before_merge']:.4f}"),
        ("after the merge", lambda r: f"{r['loss_after_merge']:.4f}"),
    ],
    "loss": [
        PRECISION,
        ("steps", lambda r: str(r["steps"])),
        ("loss", lambda r: f"{r['loss']:.4f}"),
        ("of bf16", lambda r: f"{r['of_bf16']:.4f}"),
    ],
}


def cells(mode: str, rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table. A precision that failed says why."""
    columns = TABLES[mode]
    body = [
        [_label(r), r["failed"], *[""] * (len(columns) - 2)] if "failed" in r else [cell(r) for _, cell in columns]
        for r in rows
    ]
    return [head for head, _ in columns], body


def page_table(mode: str) -> str:
    """A table of docs/training.md, from what was measured."""
    data = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    if mode not in data:
        return f"Not measured yet: `scripts/bench_training.py {mode} --json docs/measured/training.json`."
    facts = data[mode]["facts"]
    table = markdown(*cells(mode, data[mode]["rows"]))
    return f"{table}\n\nOn {facts['device']}, torch {facts['torch']}: `{facts['command']}`."


if __name__ == "__main__":
    fill(PAGE, {mode: partial(page_table, mode) for mode in TABLES}, check="--check" in sys.argv[1:])
