"""Measure how fast weights are quantized on a CPU: by PyTorch's operators, and by the C++ that is compiled for much data.

The two take turns on one weight. A rate counts the weight once and what is stored once, and is given as a share of what a copy
moves. With one thread, times are those of the thread, whoever else runs on the machine.

    .venv/bin/python scripts/bench_quantize.py --threads 1
    ATEN_CPU_CAPABILITY=avx2 .venv/bin/python scripts/bench_quantize.py --threads 1 --formats int4-g128 nf4
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import measure
import torch
from torch import Tensor

from ao.dtypes import MXFP4, NF4, Float8, Intx, QTensor, Spec, cpp_codes

FORMATS: dict[str, Spec] = {
    "int8": Intx(8),
    "int4-g128": Intx(4, (1, 128), zero_point="joint"),
    "int4-g32": Intx(4, (1, 32), symmetric=True),
    "uint3-g64": Intx(3, (1, 64), signed=False),
    "nf4": NF4,
    "float8": Float8(),
    "mxfp4": MXFP4,
}


def stored_bytes(q: QTensor) -> int:
    """Of all fields."""
    fields = [f for f in q.fields().values() if f is not None]
    return sum(stored_bytes(f) if isinstance(f, QTensor) else f.nbytes for f in fields)


def turns(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each of the calls, which take turns."""
    clock = measure.clock(torch.device("cpu"))
    seconds: list[list[float]] = [[] for _ in calls]
    for i in range(rounds + 1):  # the first does not count
        for call, mine in zip(calls, seconds):
            start = clock()
            call()
            if i:
                mine.append(clock() - start)
    return [statistics.median(mine) for mine in seconds]


def by_pytorch(spec: Spec, x: Tensor) -> QTensor:
    """As where no compiler has been asked."""
    kept, cpp_codes._coders = cpp_codes._coders, {}
    worth, cpp_codes.WORTH = cpp_codes.WORTH, sys.maxsize
    try:
        return spec.quantize(x)
    finally:
        cpp_codes._coders, cpp_codes.WORTH = kept, worth


def compiled(spec: Spec, x: Tensor) -> bool:
    """Have the C++ of a format compiled; whether there is any."""
    coder = cpp_codes.coder(spec, x, spec.grid(x.shape))
    if coder is None:
        return False
    worth, cpp_codes.WORTH = cpp_codes.WORTH, 0
    coder.ready(x)
    cpp_codes.WORTH = worth
    if coder.thread is not None:
        coder.thread.join()
    return coder.library is not None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("N", "K"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    source = torch.ones(2**26 if args.shape[0] >= 1024 else 2**20)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / turns([lambda: target.copy_(source)], args.rounds)[0]
    rows = []
    for dtype in args.dtype:
        x = (torch.randn(args.shape) * 0.02).to(getattr(torch, dtype))
        for name in args.formats:
            spec = FORMATS[name]
            if not compiled(spec, x):
                raise RuntimeError(f"{spec} was not compiled for {args.shape}; is there a C++ compiler?")
            before, after = turns([partial(by_pytorch, spec, x), partial(spec.quantize, x)], args.rounds)
            moved = x.nbytes + stored_bytes(spec.quantize(x))
            rows.append(
                {
                    "format": name,
                    "dtype": dtype,
                    "before": before,
                    "after": after,
                    "moved": moved,
                    "elements": x.numel(),
                }
            )
    header = ["format", "weight", "ns per element, PyTorch", "C++", "of a copy, PyTorch", "C++"]
    table = [
        [
            r["format"],
            r["dtype"],
            *(f"{1e9 * r[k] / r['elements']:.2f}" for k in ("before", "after")),
            *(f"{r['moved'] / r[k] / copy:.0%}" for k in ("before", "after")),
        ]
        for r in rows
    ]
    measure.show(header, table, title=f"quantize, copy {copy / 1e9:.1f} GB/s")
    if args.json:
        measure.write_json(args.json, {"facts": measure.facts(torch.device("cpu")), "copy": copy, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
