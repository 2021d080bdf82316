"""Make the tables of docs/long-context.md from docs/measured/kv-lm.json (eval_lm.py --kv-cache ... --divergence),
kv-texts-*.json (same_texts.py), kv-cuda.json and kv-cpu.json (bench_kv_cache.py), and long-context-h200.json (generate.py).

    .venv/bin/python scripts/long_context.py          rewrite them
    .venv/bin/python scripts/long_context.py --check  exit with an error if that would change anything
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from tables import ROOT, fill, markdown

from ao.quant.kv_cache import KVCache

PAGE = ROOT / "docs" / "long-context.md"
MEASURED = ROOT / "docs" / "measured"


def accuracy(folder: Path = MEASURED) -> str:
    """Perplexity and divergence of each cache."""
    data = json.loads((folder / "kv-lm.json").read_text())
    run = data["runs"][0]
    rows = [["as computed", "32", f"{run['perplexity']:.3f}", "0"]]
    for r in data["rows"]:
        name = r["format"].removeprefix("KV cache ")
        rows.append([f"`{name}`", f"{r['bits']:.2f}", f"{r['perplexity']:.3f}", f"{r['divergence']:.5f}"])
    head = ["cache", "bits per number", "perplexity", "KL per token"]
    where = f"{run['tokens']:,} tokens of Python, {run['device']}, {run['dtype']}, torch {run['torch']}"
    return f"{markdown(head, rows)}\n\n{where}: `{run['command']}`."


def texts(folder: Path = MEASURED) -> str:
    """Tokens of greedy texts that stay the same."""
    found = [json.loads((folder / f"kv-texts-{dtype}.json").read_text()) for dtype in ("float32", "bfloat16")]
    rows = []
    for data in found:
        for r in data["rows"]:
            name = r["cache"] if " " in r["cache"] else f"`{r['cache']}`"
            rows.append([data["dtype"], name, f"{r['first']:.1%}", f"{r['all']:.1%}"])
    head = ["computed in", "beside `sdpa` and its own cache", "first 8 tokens", f"{found[0]['new']} tokens"]
    commands = " and ".join(f"`{data['command']}`" for data in found)
    return f"{markdown(head, rows)}\n\n{found[0]['prompts']} texts: {commands}."


def memory() -> str:
    """Bytes of the cache of the shape of Llama-3.1-8B: 32 layers, 8 key heads of 128."""
    lengths = [8192, 32768, 131072]
    rows = [["bfloat16", *(f"{2 * 32 * 8 * 128 * 2 * n / 1e9:.2f}" for n in lengths)]]
    for name in ("int8", "float8", "int4", "kivi4", "kivi2"):
        sizes = [32 * KVCache(name, 1, 8, n, 128, device="meta").nbytes_packed / 1e9 for n in lengths]
        rows.append([f"`{name}`", *(f"{size:.2f}" for size in sizes)])
    return markdown(["GB", *(f"{n:,} tokens" for n in lengths)], rows)


def speed(folder: Path = MEASURED, device: str = "cuda") -> str:
    """Microseconds of the attention of one token."""
    path = folder / f"kv-{device}.json"
    if not path.exists():
        return "Not measured."
    data = json.loads(path.read_text())
    contexts = list(dict.fromkeys(r["context"] for r in data["rows"]))
    names = list(dict.fromkeys(r["cache"] for r in data["rows"]))
    found = {(r["cache"], r["context"]): r for r in data["rows"]}
    rows = []
    for name in names:
        cells = [found.get((name, c)) for c in contexts]
        rows.append([name, *("-" if r is None else f"{r['seconds'] * 1e6:.0f} ({r['of_bf16']:.2f}x)" for r in cells)])
    head = ["microseconds", *(c.replace("x", " x ") for c in contexts)]
    return f"{markdown(head, rows)}\n\n{data['device']}, torch {data['torch']}: `{data['command']}`."


def whole(folder: Path = MEASURED) -> str:
    """A model that reads a long prompt and goes on, with each cache."""
    runs = json.loads((folder / "long-context-h200.json").read_text())["runs"]
    rows = []
    for run in runs:
        r = run["rows"][0]
        cells = [f"{r[name] / 1e9:.2f}" for name in ("model_bytes", "cache_bytes", "peak_bytes")]
        rates = [f"{r['decode_tokens_per_s']:.1f}", f"{r['prefill_tokens_per_s']:,.0f}"]
        rows.append([f"`{run['settings']['kv_cache']}`", *cells, *rates])
    head = ["cache", "weights, GB", "cache, GB", "peak, GB", "new tokens/s", "tokens of the prompt/s"]
    last = runs[-1]
    what = f"{last['settings']['prompt_length']:,} tokens of prompt, {last['settings']['new_tokens']} new"
    return f"{markdown(head, rows)}\n\n{what}; {last['device']}, torch {last['torch']}: `{last['command']}`."


if __name__ == "__main__":
    tables = {"accuracy": accuracy, "texts": texts, "memory": memory, "speed": speed, "whole": whole}
    tables["speed-cpu"] = partial(speed, device="cpu")
    fill(PAGE, tables, "--check" in sys.argv[1:])
