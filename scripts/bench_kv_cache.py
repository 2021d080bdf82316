"""Time the attention of one token to a long context: PyTorch's kernels over bfloat16, and ours over a quantized cache.

The shape is that of Llama-3.1-8B: 32 query and 8 key heads of 128. Every time is that of calls over so many caches that together
they take 256 MB, more than the own cache of most devices; on a GPU the calls are one CUDA graph. Of bandwidth: the bytes of the
cache over the time, over the bandwidth of a copy or a sum in the same run.

    scripts/bench_kv_cache.py --device cpu --threads 1 --heads 32x8x64 --contexts 1x8192     a model of 1B on a CPU
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ao.quant.kv_cache import KVCache

HEADS = "32x8x128"
CONTEXTS = ["1x32768", "1x131072", "8x16384"]
COLD = 2**28
"""Bytes that the caches of one graph take together, at least."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="of a CPU; default: what PyTorch takes")
    parser.add_argument(
        "--heads", default=HEADS, metavar="HxKxD", help=f"of queries, of keys, numbers; default: {HEADS}"
    )
    parser.add_argument("--contexts", nargs="+", default=CONTEXTS, metavar="BxL", help=f"default: {' '.join(CONTEXTS)}")
    parser.add_argument("--caches", nargs="+", default=["int8", "float8", "int4"], metavar="NAME")
    parser.add_argument("--queries", type=int, default=1, metavar="T", help="tokens of a step; default: 1")
    parser.add_argument(
        "--tiles",
        nargs="+",
        default=[],
        metavar="WxPxR[+]",
        help="try W warps, P programs a multiprocessor, and R registers; +: load ahead",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def baseline(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None, packed: bool) -> Tensor:
    """PyTorch's attention. packed: the heads that share keys are rows, as for one token they may be."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        if packed:
            b, h, t, d = q.shape
            return F.scaled_dot_product_attention(q.view(b, k.shape[1], -1, d), k, v).view(b, h, t, d)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def times(calls: dict[str, list[Callable[[], object]]], device: torch.device) -> dict[str, float | str]:
    """Seconds of one call of each, or what fails."""
    runs, found = {}, {}
    for name, each in calls.items():
        try:
            for call in each:
                call()
            measure.synchronize(device)
            runs[name] = measure.capture(each, None) if device.type == "cuda" else measure.Calls(each)
        except Exception as error:
            found[name] = str(error).splitlines()[0][:90]
    if device.type == "cuda":
        seconds = measure.replays_in_turns(runs, 0.1) if runs else {}
    else:
        seconds = measure.calls_in_turns({name: run.replay for name, run in runs.items()}, device, 20, 9)
    return found | {name: s / len(calls[name]) for name, s in seconds.items()}


def filled(name: str, batch: int, length: int, heads: int, dim: int, seed: int, device: torch.device) -> KVCache:
    """A cache that is full, of normal numbers."""
    g = torch.Generator(device).manual_seed(seed)
    cache = KVCache(name, batch, heads, length, dim, device=device)
    for start in range(0, length, 16384):
        n = min(16384, length - start)
        k, v = (torch.randn(batch, heads, n, dim, device=device, generator=g).bfloat16() for _ in range(2))
        cache.update(k, v, check=False)
    return cache


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    heads, kv_heads, dim = map(int, args.heads.split("x"))
    ceiling = measure.ceilings(device)
    top = measure.bandwidth(ceiling)
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if device.type == "cuda" else [None]
    rows: list[dict[str, Any]] = []
    for context in args.contexts:
        batch, length = map(int, context.split("x"))
        plain = 2 * batch * kv_heads * length * dim * 2
        q = torch.randn(batch, heads, args.queries, dim, device=device).bfloat16()
        count = max(1, math.ceil(COLD / plain))
        dense = [
            [torch.randn(batch, kv_heads, length, dim, device=device).bfloat16() for _ in range(2)]
            for _ in range(count)
        ]
        calls: dict[str, list[Callable[[], object]]] = {}
        for backend, packed in itertools.product(backends, (False, True)):
            if args.queries == 1 or not packed:
                kernel = "" if backend is None else f" {backend.name.partition('_')[0].lower()}"
                calls[f"bf16{kernel}{' packed' if packed else ''}"] = [
                    partial(baseline, q, k, v, backend, packed) for k, v in dense
                ]
        found = times(calls, device)
        best = min((s for s in found.values() if isinstance(s, float)), default=math.nan)
        del calls, dense
        torch.cuda.empty_cache()
        sizes = dict.fromkeys(found, plain)
        for name in args.caches:
            size = filled(name, 1, 1024, kv_heads, dim, 0, device).nbytes_packed * batch * length // 1024
            caches = [
                filled(name, batch, length, kv_heads, dim, i, device) for i in range(max(1, math.ceil(COLD / size)))
            ]
            calls = {name: [partial(c.attend, q) for c in caches]}
            for tile in args.tiles:
                calls[f"{name} {tile}"] = [partial(tiled, c, q, tile) for c in caches]
            found |= times(calls, device)
            sizes |= dict.fromkeys(calls, size)
            del calls, caches
            torch.cuda.empty_cache()
        for name, s in found.items():
            if isinstance(s, str):
                print(f"{context} {name}: {s}")
                continue
            rows.append(
                {
                    "context": context, "cache": name, "seconds": s, "of_bf16": s / best, "bytes": sizes[name],
                    "of_bandwidth": sizes[name] / s / top,
                }
            )  # fmt: skip
    body = [
        [r["context"], r["cache"], f"{r['seconds'] * 1e6:.1f}", f"{r['of_bf16']:.2f}x", f"{r['of_bandwidth']:.0%}"]
        for r in rows
    ]
    tokens = f"{args.queries} token{'s' * (args.queries > 1)}"
    title = f"{measure.device_name(device)}, {top / 1e9:,.0f} GB/s, heads {args.heads}, {tokens}"
    measure.show(["context", "cache", "us", "of bf16", "of bandwidth"], body, title)
    if args.json:
        measure.write_json(
            args.json,
            {**measure.facts(device), "ceilings": ceiling, "heads": args.heads, "queries": args.queries, "rows": rows},
        )


def tiled(cache: KVCache, q: Tensor, tile: str) -> Tensor:
    """The kernel alone, with another tile. A rotation is left out."""
    from ao.matmul.attention_kinds import code_kind
    from ao.matmul.kernels.decode_attention import Tile, decode

    warps, programs, *registers = map(int, tile.rstrip("+").split("x"))
    k, v = (a.spec.operand(a) for a in (cache.keys, cache.values))
    kind = code_kind(k, q.shape[3])
    assert k is not None and v is not None and kind is not None
    how = Tile(warps, programs, tile.endswith("+"), next(iter(registers), None))
    return decode(
        q, k.codes, k.scale, k.zero_point, v.codes, v.scale, v.zero_point, kind, kind, 0, cache.length,
        cache.length, None, None, q.shape[3] ** -0.5, None, None, how,
    )[0]  # fmt: skip


if __name__ == "__main__":
    main()
