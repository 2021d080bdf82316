"""Fill in the tables of README.md from measured data.

    .venv/bin/python scripts/tables.py          rewrite what stands between `<!-- table: NAME -->` and `<!-- end -->`
    .venv/bin/python scripts/tables.py --check  exit with an error if that would change anything

`demo` comes from docs/measured/demo.json, which `scripts/demo --json docs/measured/demo.json` writes; `speed` and `decode`
from what bench_linear.py and generate.py wrote beside it (docs/performance.md has the whole of that); `formats` is computed
here, on a normal weight.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ao import NF4, Float8, Intx, Spec, compute_error

ROOT = Path(__file__).resolve().parent.parent

FORMATS: list[tuple[str, Spec]] = [
    ("`Intx(bits=8)`", Intx(8)),
    ("`Intx(bits=8, block=(1, 128))`", Intx(8, (1, 128))),
    ("`Float8()`", Float8()),
    ('`Float8("e5m2")`', Float8("e5m2")),
    *((f"`Intx(bits={bits}, block=(1, 128))`", Intx(bits, (1, 128))) for bits in (7, 6, 5)),
    ("`Intx(bits=4, block=(1, 32))`", Intx(4, (1, 32))),
    ("`Intx(bits=4, block=(1, 128))`", Intx(4, (1, 128))),
    ("`NF4`", NF4),
    *((f"`Intx(bits={bits}, block=(1, 128))`", Intx(bits, (1, 128))) for bits in (3, 2)),
]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """An aligned table, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [
        " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in (head, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def formats() -> str:
    """What each format stores per element, and what it loses: a normal weight of 4096 x 4096, round to nearest."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, spec in FORMATS:
        q = spec.quantize(weight)
        bits = 8 * q.nbytes_packed / q.numel()
        rows.append([name, f"{bits:.2f}", f"{bits / 16:.3f}", f"{compute_error(weight, q.dequantize()):.1f}"])
    return markdown(["format", "bits per element", "of bfloat16", "signal to noise, dB"], rows)


def demo() -> str:
    """The table of scripts/demo."""
    data = json.loads((ROOT / "docs" / "measured" / "demo.json").read_text())
    base = next(row for row in data["rows"] if row["format"] == "bfloat16")
    columns = list(base["latency_ms"])
    rows = [
        [
            row["format"],
            f"{row['linear_bytes'] / 1e6:.2f}",
            f"{row['linear_bytes'] / base['linear_bytes']:.3f}",
            f"{row['quality']:.4f}",
            *(f"{row['latency_ms'][c]:.1f} ({base['latency_ms'][c] / row['latency_ms'][c]:.2f}x)" for c in columns),
        ]
        for row in data["rows"]
    ]
    table = markdown(["format", "weights MB", "of bfloat16", data["measure"], *(f"{c}, ms" for c in columns)], rows)
    where = f"on a {data['device']}, torch {data['torch']}, medians of {data['rounds']} rounds"
    return (
        f"{table}\n\n{data['model']} {where}: one sentence and a batch of them, eager and compiled, and in parentheses "
        "the speed of bfloat16 in the same column."
    )


SPEED_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


def speed() -> str:
    """How many times faster than bfloat16 a layer of 28672 x 4096 is, by format and tokens."""
    data = json.loads((ROOT / "docs" / "measured" / "linear-cuda.json").read_text())
    rows = [
        row
        for row in data["rows"]
        if row["shape"] == "28672x4096" and row["library"] == "ao" and row.get("run", 0) == 0
    ]
    names = [name for name in dict.fromkeys(row["format"] for row in rows) if name != "bf16"]
    times = {(row["format"], row["tokens"]): row for row in rows}

    def cell(name: str, tokens: int) -> str:
        row = times[name, tokens]
        return f"{row['bf16_us'] / row['us']:.2f}x"

    table = markdown(
        ["tokens", *(str(m) for m in SPEED_TOKENS)],
        [[name, *(cell(name, m) for m in SPEED_TOKENS)] for name in names]
        + [["bf16, microseconds", *(f"{times['bf16', m]['us']:.0f}" for m in SPEED_TOKENS)]],
    )
    run = data["runs"][0]
    where = f"an {run['device']}, torch {run['torch']}, `torch.compile` without flags"
    return f"{table}\n\nOne linear layer of 28672 x 4096 on {where}."


def decode() -> str:
    """Tokens per second of the 8B shape."""
    run = json.loads((ROOT / "docs" / "measured" / "generate-cuda.json").read_text())["runs"][0]
    base = next(row for row in run["rows"] if row["format"] == "bf16")["decode_tokens_per_s"]
    rows = [
        [
            row["format"],
            f"{row['model_bytes'] / 1e9:.1f}",
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s'] / base:.2f}x",
        ]
        for row in run["rows"]
    ]
    table = markdown(["format", "model GB", "tokens/s", "speed of bf16"], rows)
    return f"{table}\n\nDecoding with random weights of the shape of Llama-3.1-8B, batch 1, on an {run['device']}."


def fill(page: Path, tables: Mapping[str, Callable[[], str]], check: bool) -> None:
    """Make every table of `page` anew, and leave the text between them alone. check: end the program if that changes it."""
    old = text = page.read_text()
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"error: {page.name} has no '<!-- table: {name} -->' ... '<!-- end -->'")
        table = make()
        text = pattern.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text)  # type: ignore[misc]
    if not check:
        page.write_text(text)
    elif text != old:
        sys.exit(f"error: the tables of {page.name} are stale; run scripts/{Path(sys.argv[0]).name}")


if __name__ == "__main__":
    fill(
        ROOT / "README.md",
        {"speed": speed, "decode": decode, "demo": demo, "formats": formats},
        check="--check" in sys.argv[1:],
    )
