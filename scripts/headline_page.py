"""Fill in the tables of docs/headline.md, and that of the README, from docs/measured/models-h200.json.

That file holds what scripts/bench_models.py wrote.

.venv/bin/python scripts/headline_page.py                 rewrite what stands between `<!-- table: NAME -->` and `<!-- end -->`
.venv/bin/python scripts/headline_page.py --add FILE ...  take runs of bench_models.py in, in place of ladders of the same rungs
.venv/bin/python scripts/headline_page.py --check         exit with an error if the tables would change
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from bench_models import draw, table
from measure import write_json
from tables import ROOT, fill, markdown

MEASURED = ROOT / "docs" / "measured" / "models-h200.json"
PAGE = ROOT / "docs" / "headline.md"


def by_ladder(rows: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The rows of each batch size and run, by batch size and then as they were taken in; float32 leads."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["batch"], row["run"], row["rung"] != "float32")):
        found.setdefault((row["batch"], row["run"]), []).append(row)
    return found


def add(data: dict[str, Any], run: dict[str, Any]) -> None:
    """Take the models of one run in: each row knows the run that it is of. A ladder whose rungs it has all is replaced."""
    data["runs"].append(run["runs"][0])
    for name, model in run["models"].items():
        rows = [{**row, "run": len(data["runs"]) - 1} for row in model["rows"]]
        before = data["models"].get(name, {"rows": []})["rows"]
        kept = [
            old
            for ladder in by_ladder(before).values()
            if not {(row["batch"], row["rung"]) for row in ladder} <= {(row["batch"], row["rung"]) for row in rows}
            for old in ladder
        ]
        data["models"][name] = {**model, "rows": kept + rows}
    rows = [row for model in data["models"].values() for row in model["rows"]]
    used = sorted({row["run"] for row in rows})
    data["runs"] = [data["runs"][i] for i in used]
    for row in rows:
        row["run"] = used.index(row["run"])


def ladders(data: dict[str, Any]) -> str:
    """A table per model, batch size and run."""
    parts = []
    for name, model in data["models"].items():
        for (batch, number), rows in by_ladder(model["rows"]).items():
            parts.append(f"**{name}, batch {batch}**: {model['unit']}\n\n{table(rows, batch)}")
            run = data["runs"][number]
            command = run["command"].split(" --json")[0]
            parts.append(f"{run['device']}, torch {run['torch']}, triton {run['triton']}, {run['date']}: `{command}`")
    return "\n\n".join(parts)


README_ROWS = (
    ("sam-vit-h", 8, "int8-dynamic"),
    ("vit-l", 64, "int8-dynamic"),
    ("whisper-encoder", 16, "int8-dynamic"),
    ("flux", 1, "int8-dynamic"),
    ("sdxl", 2, "int8-dynamic"),
    ("llama-decode", 1, "int4-g128"),
    ("mixtral-decode", 1, "int4-g128"),
)
"""The models of the README with their batch sizes, each in the form that is fastest."""


def summary(data: dict[str, Any]) -> str:
    """A row per model of the README."""
    body = []
    for name, batch, rung in README_ROWS:
        model = data["models"].get(name)
        if model is None:
            continue
        ladders = [
            {row["rung"]: row["ms"] for row in rows}
            for (of, _), rows in by_ladder(model["rows"]).items()
            if of == batch
        ]
        ms = next(ladder for ladder in reversed(ladders) if rung in ladder)
        eager = "float32" if "float32" in ms else "bf16"
        unit = f"{model['unit']}, batch {batch}"
        body.append(
            [
                unit,
                rung,
                f"{ms[rung]:.1f}",
                f"{ms['compiled'] / ms[rung]:.2f}x",
                f"{ms[eager] / ms[rung]:.1f}x ({eager})",
            ]
        )
    return markdown(["what", "in", "ms", "speed of bfloat16, compiled", "of eager mode"], body)


def write(page: Path, data: dict[str, Any], check: bool = False) -> None:
    """Fill in `page`, and draw its plot beside it where matplotlib is installed."""
    plot = page.with_suffix(".svg")
    if not check and importlib.util.find_spec("matplotlib"):
        draw(data["models"], plot)
    picture = f"![speed of whole models, bf16 compiled = 1]({plot.name})" if plot.exists() else "No plot was drawn."
    fill(page, {"plot": lambda: picture, "models": lambda: ladders(data)}, check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    data = json.loads(MEASURED.read_text())
    for path in args.add:
        add(data, json.loads(path.read_text()))
    if args.add:
        write_json(MEASURED, data)
    write(PAGE, data, args.check)
    fill(ROOT / "README.md", {"models": lambda: summary(data)}, args.check)


if __name__ == "__main__":
    main()
