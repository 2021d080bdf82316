"""Fill in the tables of docs/sparsity.md from docs/measured/sparse-h200.json, which scripts/bench_sparse.py writes.

.venv/bin/python scripts/sparsity_page.py          rewrite what stands between `<!-- table: NAME -->` and `<!-- end -->`
.venv/bin/python scripts/sparsity_page.py --check  exit with an error if that would change anything
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tables import ROOT, fill, markdown

MEASURED = ROOT / "docs" / "measured" / "sparse-h200.json"
PAGE = ROOT / "docs" / "sparsity.md"


def _table(rows: list[dict[str, Any]], shape: str, base: str) -> str:
    """Microseconds by format and number of tokens, and in parentheses how many times faster than `base` that is."""
    tokens = sorted({row["tokens"] for row in rows})
    times = {(row["format"], row.get("zeros", 0), row["tokens"]): row["us"] for row in rows if "us" in row}

    def cell(name: str, zeros: float, m: int) -> str:
        us = times.get((name, zeros, m))
        if us is None:
            return "-"
        return f"{us:.1f}" if name == base else f"{us:.1f} ({times[base, 0, m] / us:.2f})"

    body = []
    for name, zeros in dict.fromkeys((row["format"], row.get("zeros", 0)) for row in rows):
        label = name.replace("Intx(bits=8)", "int8")
        body.append([f"{label}, {zeros:.0%} zeros" if zeros else label, *(cell(name, zeros, m) for m in tokens)])
    return markdown([f"{shape.replace('x', ' x ')}, tokens", *map(str, tokens)], body)


def speed(data: dict[str, Any], part: str) -> str:
    """The tables of one part: `large`, `blocks` or `train`."""
    blocks = [row for row in data["rows"] if "zeros" in row]
    train = [row for row in data["rows"] if row["format"].startswith("train")]
    rows = {"blocks": blocks, "train": train, "large": [r for r in data["rows"] if r not in blocks and r not in train]}[
        part
    ]
    base = "train dense" if part == "train" else "bf16 dense"
    tables = [_table([r for r in rows if r["shape"] == s], s, base) for s in dict.fromkeys(r["shape"] for r in rows)]
    facts = data["facts"]
    where = f"{facts['device']}, torch {facts['torch']}, {facts['date']}: `{facts['command']}`"
    return "\n\n".join([*tables, where])


def write(page: Path, measured: Path, check: bool = False) -> None:
    """Fill in `page`."""
    data = json.loads(measured.read_text())
    fill(page, {part: lambda part=part: speed(data, part) for part in ("large", "blocks", "train")}, check)  # type: ignore[misc]


if __name__ == "__main__":
    write(PAGE, MEASURED, check="--check" in sys.argv[1:])
