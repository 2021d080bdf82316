"""Fill in docs/accuracy.md, its targets, tables and plot, and the table of the README, from the numbers that were measured.

    .venv/bin/python scripts/accuracy.py          rewrite what stands between `<!-- table: NAME -->` and `<!-- end -->`
    .venv/bin/python scripts/accuracy.py --check  exit with an error if that would change anything

eval_lm.py writes docs/measured/accuracy-lm.json, accuracy-unseen.json (the part of the text that is in no training data) and
accuracy-steps.json (what each step of GPTQ is worth), qat_lm.py accuracy-qat.json (as it trained) and, with --load,
accuracy-qat-unseen.json (judged by the unseen part), accuracy_peers.py accuracy-peers.json. What was not measured is said to be
missing; the text between the tables is left alone.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_lm import plot
from tables import ROOT, fill, markdown

MEASURED = ROOT / "docs" / "measured"
PAGE = ROOT / "docs" / "accuracy.md"
README = ROOT / "README.md"

Row = dict[str, Any]


class Numbers:
    """The rows of a file, by format and recipe."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
        self.runs: list[dict[str, Any]] = data["runs"]
        self.rows: list[Row] = data["rows"]
        self.by_name = {(row["format"], row["recipe"]): row for row in self.rows}
        self.formats = list(dict.fromkeys(row["format"] for row in self.rows))
        self.recipes = list(dict.fromkeys(row["recipe"] for row in self.rows))

    def get(self, name: str, recipe: str) -> Row | None:
        row = self.by_name.get((name, recipe))
        return None if row is None or "failed" in row else row

    def base(self, row: Row) -> float:
        """The original's perplexity on the same text."""
        return float(self.runs[row["run"]]["perplexity"])

    def closed(self, name: str, recipe: str, nearest: Numbers | None = None) -> float | None:
        """How much of the distance from round-to-nearest to the original is won back."""
        row, worst = self.get(name, recipe), (nearest or self).get(name, "rtn")
        if row is None or worst is None:
            return None
        return (worst["perplexity"] - row["perplexity"]) / (worst["perplexity"] - self.base(row))

    def ratio(self, name: str, recipe: str) -> float | None:
        """Perplexity over that of the original."""
        row = self.get(name, recipe)
        return None if row is None else row["perplexity"] / self.base(row)

    def origin(self) -> str:
        """What the numbers were measured with."""
        lines = []
        for run in self.runs:
            others = "".join(f", {name} {version}" for name, version in run.get("peers", {}).items())
            text = f"original {run['perplexity']:.3f} in {run['dtype']} over {run['tokens']:,} tokens"
            lines.append(f"{text}; {run['device']}, torch {run['torch']}{others}, {run['date']}: `{run['command']}`")
        return "\n\n".join(dict.fromkeys(lines)) or "Not measured."


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


@dataclass(frozen=True)
class Target:
    """A number to reach. value: of the recipes on one text; with "closed" it must be at least `bound`, else at most."""

    format: str
    recipes: tuple[str, ...]
    bound: float
    closed: bool = True

    def value(self, data: Numbers, nearest: Numbers) -> float | None:
        """The best of the recipes."""
        if self.closed:
            found = [data.closed(self.format, recipe, nearest) for recipe in self.recipes]
        else:
            found = [data.ratio(self.format, recipe) for recipe in self.recipes]
        known = [value for value in found if value is not None]
        return (max if self.closed else min)(known) if known else None

    def shown(self, value: float | None) -> str:
        """A value, in bold where it misses."""
        if value is None:
            return "not measured"
        text = percent(value) if self.closed else f"{value:.2f}x"
        return text if (value >= self.bound if self.closed else value <= self.bound) else f"**{text}**"

    def asked(self) -> str:
        return f"{self.bound:.0%} closed" if self.closed else f"at most {self.bound:.2f}x the original"


CALIBRATED = ("gptq", "rotation+gptq", "awq+gptq")
TRAINED = ("qat from gptq",)
TARGETS = [
    Target("int4-g32", ("hqq",), 0.2),
    Target("int3-g32", ("hqq",), 0.3),
    Target("int4-g32", ("gptq",), 0.5),
    Target("int3-g32", ("gptq",), 0.5),
    Target("int3-g32", CALIBRATED, 0.6),
    Target("int2-g32", CALIBRATED, 1.73, closed=False),
    Target("int4-g128", TRAINED, 0.8),
    Target("int3-g32", TRAINED, 0.8),
    Target("int8-int4", TRAINED, 0.7),
    Target("int2-g32", TRAINED, 1.255, closed=False),
]


def targets(folder: Path) -> str:
    """What was asked of each recipe, and what it does."""
    lm, unseen, judged = (Numbers(folder / f"accuracy-{n}.json") for n in ("lm", "unseen", "qat-unseen"))
    rows = []
    for target in TARGETS:
        pairs = [(judged, unseen)] if target.recipes == TRAINED else [(lm, lm), (unseen, unseen)]
        name = "best of gptq, with rotation, with awq" if target.recipes == CALIBRATED else target.recipes[0]
        shown = [target.shown(target.value(*pair)) for pair in pairs]
        rows.append([name, target.format, target.asked(), *([""] * (2 - len(shown))), *shown])
    return markdown(["recipe", "format", "asked", "on all the text", "on the unseen part"], rows)


def results(data: Numbers) -> str:
    """Every format by every recipe."""
    rows = []
    for name in data.formats:
        for recipe in data.recipes:
            row = data.get(name, recipe)
            if row is None:
                continue
            closed = "" if recipe == "rtn" else percent(data.closed(name, recipe))
            kl = "-" if row.get("divergence") is None else f"{row['divergence']:.4f}"
            took = "" if recipe == "rtn" else f"{row['cpu_seconds']:.0f}"
            rows.append([name, recipe, f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", closed, kl, took])
    table = markdown(["format", "recipe", "bits", "perplexity", "closed", "divergence", "CPU seconds"], rows)
    return f"{table}\n\n{data.origin()}"


def trained(qat: Numbers, judged: Numbers, unseen: Numbers) -> str:
    """Quantization-aware training: what it took, and what came of it on the unseen part, else on all the text."""
    rows = []
    for row in [*judged.rows, *(row for row in qat.rows if (row["format"], row["recipe"]) not in judged.by_name)]:
        closed, recipe = percent(judged.closed(row["format"], row["recipe"], unseen)), row["recipe"]
        if (row["format"], row["recipe"]) not in judged.by_name:
            worst, recipe = row.get("rounded"), f"{recipe}, on all the text"
            closed = percent(worst and (worst - row["perplexity"]) / (worst - qat.base(row)))
        size = [f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", closed, f"{row['divergence']:.4f}"]
        took = qat.get(row["format"], row["recipe"])
        spent = ["-", "-"] if took is None else [f"{took['tokens'] / 1e6:.2f}M", f"{took['cpu_seconds'] / 60:.0f}"]
        rows.append([row["format"], recipe, *size, *spent])
    head = ["format", "recipe", "bits", "perplexity", "closed", "divergence", "tokens", "CPU minutes"]
    return f"{markdown(head, rows)}\n\n{judged.origin()}\n\nTrained by:\n\n{qat.origin()}"


def beside(peers: Numbers, lm: Numbers) -> str:
    """Other libraries' implementations, each beside ours of the same recipe."""
    rows = []
    for name in peers.formats:
        for recipe in ("hqq", "gptq"):
            ours = lm.get(name, recipe)
            if ours is not None:
                kl = "-" if ours.get("divergence") is None else f"{ours['divergence']:.4f}"
                rows.append([name, f"ao, {recipe}", f"{ours['bits']:.2f}", f"{ours['perplexity']:.2f}", kl])
            for row in peers.rows:
                if row["format"] == name and recipe in row["recipe"].lower():
                    if "failed" in row:
                        rows.append([name, row["recipe"], "-", f"does not run: {row['failed']}", "-"])
                        continue
                    kl = "-" if row.get("divergence") is None else f"{row['divergence']:.4f}"
                    rows.append([name, row["recipe"], f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", kl])
    return f"{markdown(['format', 'implementation', 'bits', 'perplexity', 'divergence'], rows)}\n\n{peers.origin()}"


def summary(lm: Numbers, qat: Numbers) -> str:
    """The table of the README: perplexity by format and recipe."""
    recipes = [r for r in ("rtn", "hqq", "gptq") if r in lm.recipes]
    rows = []
    for name in ("int4-g128", "int4-g32", "int3-g32", "int2-g32"):
        cells = [lm.get(name, recipe) for recipe in recipes] + [qat.get(name, "qat from gptq")]
        if any(cells):
            rows.append([name, *("-" if cell is None else f"{cell['perplexity']:.2f}" for cell in cells)])
    head = {"rtn": "round to nearest", "hqq": "HQQ", "gptq": "GPTQ"}
    table = markdown(["format", *(head[r] for r in recipes), "trained"], rows)
    if not lm.runs:
        return f"{table}\n\nNot measured."
    return f"{table}\n\nPerplexity of a language model of 16M parameters; {lm.runs[0]['perplexity']:.2f} in bfloat16."


def write(page: Path, readme: Path, folder: Path, check: bool = False) -> None:
    """Fill in the page and the README from the files in `folder`, and draw the plot where matplotlib is installed."""
    lm, unseen, steps, qat, judged, peers = (
        Numbers(folder / f"accuracy-{name}.json") for name in ("lm", "unseen", "steps", "qat", "qat-unseen", "peers")
    )
    picture = page.parent / "accuracy.svg"
    if lm.rows and not check and importlib.util.find_spec("matplotlib"):
        plot([row for row in lm.rows if row["recipe"] in ("rtn", "hqq", "gptq")], lm.base(lm.rows[0]), picture)
    fill(
        page,
        {
            "targets": lambda: targets(folder),
            "plot": lambda: f"![size against perplexity]({picture.name})" if picture.exists() else "No plot was drawn.",
            "recipes": lambda: results(lm),
            "unseen": lambda: results(unseen),
            "steps": lambda: results(steps),
            "qat": lambda: trained(qat, judged, unseen),
            "peers": lambda: beside(peers, lm),
        },
        check,
    )
    fill(readme, {"accuracy": lambda: summary(unseen, judged)}, check)


if __name__ == "__main__":
    write(PAGE, README, MEASURED, check="--check" in sys.argv[1:])
