"""From a folder to the first token: `from_pretrained` in one format after the other, and where the host spends the time.

The folder holds random weights of a known shape, which are written first, so that the operating system has read them before.
Each format loads in turns, in this process, and the median of the turns counts: seconds of from_pretrained, those of the CPU
that it takes, and seconds to the first token. On a CPU, bf16 is not read before the first token: transformers maps the file.
`sequential` is bf16 read by one thread, as transformers reads whatever is quantized while it loads.

    .venv/bin/python scripts/bench_load.py --shape llama-3.1-8b --layers 8 --formats bf16 sequential int4-g128 --profile
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_generate_hf
import measure
import torch
from llama import SHAPES
from tables import markdown

SEQUENTIAL = "sequential"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_load.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="DIR", help="a local folder that from_pretrained reads")
    source.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape")
    parser.add_argument("--layers", type=int, metavar="L", help="only so many blocks, of a --shape")
    parser.add_argument("--formats", nargs="+", default=["bf16", SEQUENTIAL, "int4-g128"], metavar="F")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every format; default 3")
    parser.add_argument("--profile", action="store_true", help="print what the host does while the last format loads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save there")
    return parser.parse_args(argv)


@torch.no_grad()
def load(folder: Path, name: str, device: str) -> tuple[float, float, float]:
    """Seconds of from_pretrained, of the CPU meanwhile, and to the first token."""
    from transformers import AutoModelForCausalLM

    config = None if name == SEQUENTIAL else bench_generate_hf.config_of(name)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1" if name == SEQUENTIAL else "0"
    where = torch.device(device)
    measure.synchronize(where)
    start, cpu = time.perf_counter(), time.process_time()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=device, quantization_config=config
    )
    measure.synchronize(where)
    loaded, cpu = time.perf_counter() - start, time.process_time() - cpu
    model(torch.zeros(1, 1, dtype=torch.int64, device=where)).logits.argmax().item()
    seconds = time.perf_counter() - start
    del model
    gc.collect()
    return loaded, cpu, seconds


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in args.formats}
    with tempfile.TemporaryDirectory() as parent:
        folder = bench_generate_hf.folder_of(args, Path(parent))
        os.sync()  # as files are that were not written a moment ago: what is on the disk can be given back
        for _ in range(args.rounds):
            for name in args.formats:
                found[name].append(load(folder, name, args.device))
        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(load, folder, args.formats[-1], args.device)
            pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(25)
    kinds = ("load_seconds", "cpu_seconds", "seconds")
    rows: list[dict[str, Any]] = [
        {"format": name, **dict(zip(kinds, map(statistics.median, zip(*each))))} for name, each in found.items()
    ]
    base = rows[0]["seconds"]
    lines = [[r["format"], *(f"{r[kind]:.2f}" for kind in kinds), f"{r['seconds'] / base:.2f}x"] for r in rows]
    print(markdown(["format", "load s", "of them CPU s", "to first token s", f"of {rows[0]['format']}"], lines))
    if args.json:
        args.json.write_text(json.dumps({**measure.facts(torch.device(args.device)), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
