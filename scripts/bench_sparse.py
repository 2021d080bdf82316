"""Time sparse linear layers beside dense ones of the same format and beside bfloat16, in one run.

    large   2:4 (bf16, int8 and float8 with their activations, int4) and dense at many numbers of tokens
    ways    on a GPU, each way that a 2:4 product can take by itself: what ao.matmul.sparse chooses by
    blocks  kept blocks at a share of zeros, one token and more
    train   a linear layer's forward and backward, dense and pruned at every step (SemiSparseLinear), compiled

On a GPU the calls of a case are recorded in one CUDA graph, over so many copies of the weight that none stays in the cache, and
its replays are timed; on a CPU single calls are timed, in turns. A case that fails is shown with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from tables import markdown
from torch import Tensor, nn

from ao.dtypes import BlockSparse, Float8, Intx, QTensor, Sparse24

INT4 = Intx(4, (1, 128), symmetric=True, scale_dtype="bfloat16")
FORMATS = {
    "bf16": (None, Sparse24()),
    "int8 dynamic": (Intx(8, act=Intx(8)), Sparse24(Intx(8), act=Intx(8))),
    "float8 dynamic": (Float8(act=Float8()), Sparse24(Float8(), act=Float8())),
    "int4": (INT4, Sparse24(INT4)),
    "int8": (Intx(8), Sparse24(Intx(8))),
}
SHAPES = ["28672x4096", "4096x14336", "8192x8192"]
TOKENS = [1, 4, 16, 64, 128, 256, 512, 1024, 4096]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", default=["large", "blocks", "train"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--threads", type=int, help="on a CPU")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def timed(calls: list[Callable[[], Any]], device: str) -> float:
    """Microseconds of a call: of all of them in one CUDA graph, or the median of single ones on a CPU."""
    for call in calls:
        call()
    if device == "cpu":
        times = []
        for _ in range(max(3, 10 // len(calls))):
            for call in calls:
                now = time.perf_counter()
                call()
                times.append(time.perf_counter() - now)
        return statistics.median(times) * 1e6
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def copies(w: Tensor, device: str) -> list[Tensor]:
    """As many for every format of a shape, so that in none of them all are in the cache; they share no memory."""
    least = w.numel() * 3 / 8  # bytes of int4 in 2:4
    count = 1 if device == "cpu" else max(2, min(16, math.ceil(3 * measure.cache_bytes(torch.device(device)) / least)))
    return [w] + [w.clone() for _ in range(count - 1)]


def row(name: str, shape: str, m: int, run: Callable[[], float], rows: list[dict[str, Any]], **more: Any) -> None:
    """One case, shown at once."""
    found: dict[str, Any] = {"format": name, "shape": shape, "tokens": m, **more}
    try:
        with torch.no_grad():
            found["us"] = round(run(), 1)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    rows.append(found)
    print(" ".join(f"{v}" for v in found.values()), flush=True)
    gc.collect()


def large(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """2:4 and dense."""
    dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        w = Sparse24(prune=True).quantize(torch.randn(n, k, device=args.device, dtype=dtype) * 0.02).dequantize()
        for name in args.formats:
            for label, spec in zip(("dense", "2:4"), FORMATS[name]):
                made = copies(w if spec is None else spec.quantize(w), args.device)
                size = (made[0].nbytes_packed if isinstance(made[0], QTensor) else made[0].nbytes) * 8 / w.numel()
                for m in args.tokens:
                    x = torch.randn(m, k, device=args.device, dtype=dtype)

                    def run(made: list[Tensor] = made, x: Tensor = x) -> float:
                        return timed([lambda q=q: F.linear(x, q) for q in made], args.device)  # type: ignore[misc]

                    row(f"{name} {label}", shape, m, run, rows, bits=round(size, 3))
                del made


def ways(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """In registers, one token after another or on the tensor cores; with the zeros beside; and on the sparse units."""
    from ao.matmul import sparse
    from ao.matmul.kernels import two_of_four

    def in_turn(x: Tensor, q: Any) -> Tensor:
        return two_of_four.gemv(x, q.places, *sparse._reading(q))  # type: ignore[misc]

    def in_registers(x: Tensor, q: Any) -> Tensor:
        return two_of_four.few(x, q.places, *sparse._reading(q))  # type: ignore[misc]

    def beside(x: Tensor, q: Any) -> Tensor:
        form: Any = sparse._unfolded(q)
        return F.linear(x, form)

    def on_units(x: Tensor, q: Any) -> Any:
        return sparse._compressed_product(x, q, q.spec.operand(q))

    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        w = (
            Sparse24(prune=True)
            .quantize(torch.randn(n, k, device=args.device, dtype=torch.bfloat16) * 0.02)
            .dequantize()
        )
        for name in args.formats:
            made = copies(FORMATS[name][1].quantize(w), args.device)
            for way in (in_turn, in_registers, beside, on_units):
                for m in args.tokens:
                    if (way is in_turn and m > 4) or (way is in_registers and m > 256) or (way is on_units and m < 64):
                        continue
                    read = sparse._reading(made[0])  # type: ignore[arg-type]
                    if way is in_turn and not (read is not None and two_of_four.for_one_token(*read)):
                        continue
                    x = torch.randn(m, k, device=args.device, dtype=torch.bfloat16)

                    def run(way: Any = way, made: list[Tensor] = made, x: Tensor = x) -> float:
                        return timed([lambda q=q: way(x, q) for q in made], args.device)  # type: ignore[misc]

                    row(f"{name} {way.__name__}", shape, m, run, rows)
            del made


def blocks(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Kept blocks."""
    dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
    for shape in args.shapes[:2]:
        n, k = map(int, shape.split("x"))
        w = torch.randn(n, k, device=args.device, dtype=dtype)
        cases: list[tuple[str, Any, float]] = [("bf16 dense", None, 0.0)]
        for zeros in (0.8, 0.9):
            cases += [(f"blocks {values or 'bf16'}", BlockSparse(64, values), zeros) for values in (None, Intx(8))]
        for name, spec, zeros in cases:
            q = w
            if spec is not None:
                keep = torch.rand(n // 64, k // 64, device=args.device) >= zeros
                q = spec.quantize(torch.where(keep.repeat_interleave(64, 0).repeat_interleave(64, 1), w, 0))
            made = copies(q, args.device)
            for m in [m for m in args.tokens if m in (1, 16, 256, 1024)]:
                x = torch.randn(m, k, device=args.device, dtype=dtype)

                def run(made: list[Tensor] = made, x: Tensor = x) -> float:
                    return timed([lambda q=q: F.linear(x, q) for q in made], args.device)  # type: ignore[misc]

                row(name, shape, m, run, rows, zeros=zeros)


def train(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Forward and backward of the two layers of a ViT-L MLP."""
    from ao.sparsity import SemiSparseLinear

    dtype, tokens = torch.bfloat16, 13008
    if args.device == "cpu":
        tokens, dtype = 256, torch.float32
    for out, features in ((4096, 1024), (1024, 4096)):
        for name in ("dense", "2:4"):

            def run(name: str = name, out: int = out, features: int = features) -> float:
                dense = nn.Linear(features, out, device=args.device, dtype=dtype)
                layer: Any = SemiSparseLinear.from_dense(dense) if name == "2:4" else dense
                layer = torch.compile(layer) if args.device != "cpu" else layer
                x = torch.randn(tokens, features, device=args.device, dtype=dtype, requires_grad=True)
                grad = torch.randn(tokens, out, device=args.device, dtype=dtype)

                def step() -> None:
                    layer(x).backward(grad)

                with torch.enable_grad():
                    for _ in range(3):
                        step()
                    if args.device == "cpu":
                        return timed([step], "cpu")
                    times = []
                    for _ in range(20):
                        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                        torch.cuda._sleep(8_000_000)  # the host runs ahead
                        start.record()
                        step()
                        end.record()
                        end.synchronize()
                        times.append(start.elapsed_time(end) * 1000)
                    return statistics.median(times)

            row(f"train {name}", f"{out}x{features}", tokens, run, rows)


def pieces(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """What a step of SemiSparseLinear is made of."""
    from ao.matmul import pruned_both, semi_sparse_product, sparse

    tokens = 13008
    for out, features in ((4096, 1024), (1024, 4096)):
        w = torch.randn(out, features, device=args.device, dtype=torch.bfloat16)
        x = torch.randn(tokens, features, device=args.device, dtype=torch.bfloat16)
        pruned, turned = pruned_both(w, tokens)
        grad = torch.randn(tokens, out, device=args.device, dtype=torch.bfloat16)
        cases: dict[str, Callable[[], Any]] = {
            "prune": lambda w=w: pruned_both(w, tokens),  # type: ignore[misc]
            "forward": lambda x=x, p=pruned, n=out: semi_sparse_product(x, p, n),  # type: ignore[misc]
            "input gradient": lambda g=grad, t=turned, n=features: semi_sparse_product(g, t, n),  # type: ignore[misc]
            "dense forward": lambda x=x, w=w: x @ w.t(),  # type: ignore[misc]
            "dense input gradient": lambda g=grad, w=w: g @ w,  # type: ignore[misc]
            "weight gradient": lambda g=grad, x=x: g.t() @ x,  # type: ignore[misc]
        }
        for name, call in cases.items():
            row(name, f"{out}x{features}", tokens, lambda call=call: timed([call] * 5, args.device), rows)  # type: ignore[misc]
        print(pruned.shape, turned.shape, sparse._ALGORITHMS, flush=True)


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    facts = measure.facts(torch.device(args.device))
    print(facts, flush=True)
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        {"large": large, "ways": ways, "blocks": blocks, "train": train, "pieces": pieces}[part](args, rows)
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """A table per shape: microseconds by format and tokens."""
    for shape in dict.fromkeys(r["shape"] for r in rows):
        here = [r for r in rows if r["shape"] == shape]
        tokens = sorted({r["tokens"] for r in here})
        lines = []
        for name in dict.fromkeys((r["format"], r.get("zeros")) for r in here):
            cells = {r["tokens"]: r.get("us", "-") for r in here if (r["format"], r.get("zeros")) == name}
            lines.append(
                [name[0] if not name[1] else f"{name[0]}, {name[1]:.0%} zeros", *(cells.get(m, "") for m in tokens)]
            )
        print(f"\n{shape}, microseconds\n")
        print(markdown(["format", *map(str, tokens)], [[str(c) for c in line] for line in lines]))


if __name__ == "__main__":
    main()
