"""Time the ways to run the Triton kernels whose constants are chosen by hand, and print which of them is the fastest.

    few        a few tokens and a weight in any format (slices_of_k.py, few_tokens.py; for one one_token.py, one_token_mma.py,
               or trits.py), against bfloat16: cuts, tiles and the number of parts of K, for every format, shape and number of
               tokens; `cut_for`, `_tile`, `tile_of` and `_gemv_constants` choose those
    attention  one token and a quantized cache (decode_attention.py), against the fastest of PyTorch's kernels over bfloat16:
               warps, programs, registers and loads; `TILE_OF_KIND` chooses those

First many processes compile everything, into Triton's cache, and run each way once, so that what fails is known by its reason.
Then one process times all ways of a case in turns, as CUDA graphs over copies that are together larger than the GPU's cache, and
compares each with float32 arithmetic on the decoded weight (in dB; less than 40 is wrong).
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_kv_cache
import measure
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import ao
from ao.dtypes import FP6, MXFP4, MXFP6, MXFP8, NF4, NVFP4, Intx, Ternary
from ao.matmul.kernels.launch import cdiv
from ao.matmul.kernels.reading import Reading, fields_of, reading_of

if TYPE_CHECKING:
    from ao.matmul.kernels.few_tokens import Tile

SPECS: dict[str, Any] = {
    "int2-g32j": Intx(2, (1, 32), signed=False, zero_point="joint"),
    "int3-g64": Intx(3, (1, 64)),
    "int4-g16": Intx(4, (1, 16)),
    "int4-g16j": Intx(4, (1, 16), signed=False, zero_point="joint"),
    "int4-g128": Intx(4, (1, 128)),
    "int4-g32j": Intx(4, (1, 32), signed=False, zero_point="joint"),
    "int6-g64": Intx(6, (1, 64)),
    "int8-g16": Intx(8, (1, 16)),
    "nf4": NF4,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "fp6": FP6,
    "mxfp6": MXFP6,
    "mxfp8": MXFP8,
    "ternary": Ternary(),
}
"""What differs in its decoding. The kernels take more formats; those of the same width are alike."""

TILES_OF_ONE = [
    (16, 1, 128, 8, 4, True), (16, 1, 128, 4, 4, True), (16, 1, 128, 4, 4, False), (16, 1, 128, 8, 1, True),
    (8, 2, 128, 8, 4, True), (8, 2, 128, 4, 4, False),
]  # fmt: skip
"""Warps, programs of a multiprocessor, registers, chunks of rows ahead, sets of x in registers of one_token_mma.py, and whether
slices are multiplied one after the other."""

CUTS = [(16, 2, 2, 1), (16, 2, 1, 1), (16, 1, 2, 1), (16, 1, 1, 1), (8, 2, 1, 2), (8, 1, 2, 2), (8, 1, 1, 2)]
"""Of slices_of_k.py."""

SHAPES = ["28672x4096", "4096x14336", "4096x4096"]
TOKENS = [1, 2, 4, 8, 16, 32, 64]
TILES = {
    "int4": ["4x3x168+", "4x4x128", "2x6x168+", "2x8x128", "4x2x255+", "8x1x255+"],
    "int8": ["2x4x255+", "2x6x168+", "2x8x128", "4x3x168+", "4x2x255+", "8x1x255+"],
    "float8": ["2x6x168+", "1x16x128", "1x12x168", "2x8x128", "4x2x255+", "8x1x255+"],
}
"""Of `bench_kv_cache.py --tiles`."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["few", "attention"], default=["few", "attention"])
    parser.add_argument("--formats", nargs="+", default=list(SPECS), choices=list(SPECS), metavar="F")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--as-it-is", action="store_true", help="few: time no other ways than those that are taken")
    parser.add_argument("--contexts", nargs="+", default=["1x32768", "1x131072"], metavar="BxL")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), metavar="P")
    parser.add_argument(
        "--seconds", type=float, default=270, metavar="S", help="start no case after that; default: 270"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def tiles(m: int) -> list[Tile]:
    """The tiles to try for m tokens, but for the number of parts of K."""
    from ao.matmul.kernels.few_tokens import Tile

    if m <= 16:
        return [Tile(False, 16, 32, 2), Tile(False, 16, 64, 2), Tile(True, 16, 64, 4, 2, programs=4)]
    if m <= 32:
        return [
            Tile(True, 32, 64, 4, 2, programs=4), Tile(True, 32, 128, 8, 2), Tile(True, 32, 128, 8, chunks=4, dots=1),
        ]  # fmt: skip
    long = [
        Tile(True, 64, 128, 8, 2), Tile(True, 64, 128, 8, 2, chunks=4, dots=2),
        Tile(True, 64, 128, 4, 2, chunks=4, dots=2, registers=255), Tile(True, 64, 128, 8, chunks=4, dots=1),
        Tile(True, 64, 128, 8, dots=1, registers=255, programs=1), Tile(True, 64, 64, 4, 2, registers=255),
    ]  # fmt: skip
    if m <= 64:
        return long
    return [
        long[0], Tile(True, 128, 128, 8, dots=1, registers=255, programs=1),
        Tile(True, 128, 128, 8, chunks=4, dots=1, registers=255, programs=1),
        Tile(True, 256, 128, 8, chunks=4, dots=1, registers=255, programs=1),
    ]  # fmt: skip


def ways(reading: Reading, m: int, splits: bool = True) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """How m tokens may meet a weight, by name, each a function of x and the fields. splits: in all numbers of parts of K."""
    from ao.matmul.kernels import few_tokens, one_token, one_token_mma, slices_of_k

    if reading.kind == "trits":
        yield from ways_of_trits(reading, m, splits)
        return
    if m == 1 and reading.for_one_token and not reading.in_integers:
        for one in TILES_OF_ONE:
            of_one = one_token_mma.Tile(*one)
            if reading.k <= 1024 * of_one.warps:  # x of 8 slices has room
                name = f"gemv {of_one.warps}w {of_one.programs}p {of_one.registers}r {of_one.ahead}a {of_one.kept}x"
                name += " apart" * of_one.apart
                yield name, lambda x, fields, tile=of_one: one_token_mma.gemv(x, reading, fields, tile)
    elif m <= 2 and reading.for_one_token:
        yield "gemv", lambda x, fields: one_token.gemv_each(x, reading, fields)
    if slices_of_k.takes(reading, m, half=False):
        for cut in CUTS:
            how = slices_of_k.Cut(*cut)
            name = f"slices {how.warps}w {how.slices}s {how.tiles}t {how.programs}p"
            yield name, lambda x, fields, how=how: slices_of_k.sliced(x, reading, [fields], how)[0]
        return
    for tile in tiles(m):
        name = f"{'wgmma' if tile.hopper else 'mma'} {tile.tokens}x{tile.rows} {tile.warps}w {tile.stages}s"
        if tile.hopper:
            name += f" {tile.chunks}c {tile.dots}d {tile.registers}r"
            each = {name: tile, f"{name} whole": tile._replace(cut=False)}
        else:
            programs = cdiv(reading.n, tile.rows) * cdiv(m, tile.tokens)
            most = max(1, cdiv(reading.k, few_tokens.STEP) // 2)
            parts = sorted({max(1, min(16, most, round(full / programs))) for full in (264, 528, 1056)} | {1})
            each = {f"{name} /{split}": tile._replace(split=split) for split in (parts if splits else (1, 2))}
        for way, each_tile in each.items():
            yield way, lambda x, fields, tile=each_tile: few_tokens.few_in_tiles(x, reading, [fields], tile)[0]


def ways_of_trits(reading: Reading, m: int, splits: bool) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """`ways` of those that trits.py has."""
    from ao.matmul.kernels import trits

    def by_tile(tile: trits.Tile) -> Callable[..., Tensor]:
        return lambda x, fields: trits.few(x, reading, fields, x.dtype, tile=tile)

    def by_words(most: int) -> Callable[..., Tensor]:
        return lambda x, fields: trits.gemv(x, reading, fields, x.dtype, most=most)

    if m == 1 and reading.for_one_token:
        for most in (13, 10, 7, 4):
            yield f"gemv {most}", by_words(most)
    tokens = max(16, min(64, 1 << (m - 1).bit_length()))
    for rows, warps, stages in ((64, 4, 3), (64, 4, 2), (128, 4, 2), (128, 8, 3), (128, 8, 2)):
        programs = cdiv(reading.n, rows) * cdiv(m, tokens)
        most = max(1, cdiv(reading.k * 13 // 64, 64) // 2)
        parts = sorted({max(1, min(8, most, round(full / programs))) for full in (264, 528, 1056)} | {1})
        for split in parts if splits else (1, 2):
            tile = trits.Tile(tokens, rows, warps, split, stages)
            yield f"trits {tokens}x{rows} {warps}w {stages}s /{split}", by_tile(tile)


def compile_few(name: str, k: int, m: int) -> list[str]:
    """Run every way of m tokens once, on a weight of few rows, of one token its own: what fails, by name and reason."""
    failed = []
    q = SPECS[name].quantize(torch.randn(256, k, device="cuda").bfloat16())
    read = reading_of(q)
    if read is None:
        return [f"{name}, K = {k}: no reading"]
    x = torch.randn(m, k, device="cuda").bfloat16()
    for way, run in ways(read[0], m, splits=False):
        if m == 1 and not way.startswith("gemv"):
            continue  # that of 8 tokens
        try:
            run(x, read[1])
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{name}, K = {k}, M = {m}, {way}: {str(error).strip().splitlines()[0][:120]}")
    return failed


def compile_as_it_is(name: str, shape: str, m: int) -> list[str]:
    """Run the way that m tokens take."""
    n, k = map(int, shape.split("x"))
    try:
        F.linear(
            torch.randn(m, k, device="cuda").bfloat16(),
            SPECS[name].quantize(torch.randn(n, k, device="cuda").bfloat16()),
        )
        torch.cuda.synchronize()
    except Exception as error:
        return [f"{name}, {shape}, M = {m}: {str(error).strip().splitlines()[0][:120]}"]
    return []


def compile_attention(name: str, tile: str) -> list[str]:
    try:
        heads, kv_heads, dim = map(int, bench_kv_cache.HEADS.split("x"))
        cache = bench_kv_cache.filled(name, 1, 4096, kv_heads, dim, 0, torch.device("cuda"))
        q = torch.randn(1, heads, 1, dim, device="cuda").bfloat16()
        bench_kv_cache.tiled(cache, q, tile)
        torch.cuda.synchronize()
    except Exception as error:
        return [f"{name} {tile}: {str(error).strip().splitlines()[0][:120]}"]
    return []


def compiled(args: argparse.Namespace) -> None:
    """Compile all that is asked for, in many processes."""
    jobs: list[Callable[[], list[str]]] = []
    if "few" in args.parts and args.as_it_is:
        jobs += [partial(compile_as_it_is, *each) for each in itertools.product(args.formats, args.shapes, args.tokens)]
    elif "few" in args.parts:
        once = sorted({max(8, m) for m in args.tokens} | {m for m in args.tokens if m == 1})
        depths = {int(shape.split("x")[1]) for shape in args.shapes}
        jobs += [partial(compile_few, name, k, m) for m in once for k in depths for name in args.formats]
    if "attention" in args.parts:
        jobs += [partial(compile_attention, name, tile) for name, each in TILES.items() for tile in each]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context) as pool:
        for done in as_completed([pool.submit(job) for job in jobs]):
            for line in done.result():
                print(f"fails: {line}", flush=True)


def decibels(expected: Tensor, out: Tensor) -> float:
    """Of the worst token."""
    return min(ao.compute_error(e, o).item() for e, o in zip(expected, out.float()))


def tune_few(args: argparse.Namespace, shape: str, end: float, rows: list[dict[str, Any]]) -> None:
    """All formats at one shape."""
    n, k = map(int, shape.split("x"))
    device = torch.device("cuda")
    cold = 4 * measure.cache_bytes(device)
    dense = torch.randn(n, k, device=device).bfloat16()
    inputs = {m: torch.randn(m, k, device=device).bfloat16() for m in args.tokens}

    def seconds(calls: dict[str, list[Callable[[], Tensor]]]) -> dict[str, float]:
        graphs = {name: measure.capture(each, None) for name, each in calls.items()}
        found = measure.replays_in_turns(graphs, 0.003)
        return {name: time / len(calls[name]) for name, time in found.items()}

    copies = [dense, *(dense.clone() for _ in range(math.ceil(cold / dense.nbytes)))]
    F.linear(inputs[args.tokens[0]], dense)  # cuBLAS starts, which it cannot while a graph records
    base = {m: seconds({"": [partial(F.linear, x, w) for w in copies]})[""] for m, x in inputs.items()}
    del copies
    body = [["bf16", *(f"{base[m] * 1e6:.1f} us" for m in args.tokens)]]
    for name in args.formats:
        if time.monotonic() > end:
            print(f"no time left for {shape} {name}")
            continue
        q = SPECS[name].quantize(dense)
        weight = q.dequantize().float()
        reading, first = reading_of(q) or (None, None)
        assert reading is not None and first is not None
        size = sum(t.nbytes for t in first if t is not None)
        weights = [q, *(q.clone() for _ in range(min(40, math.ceil(cold / size))))]
        fields = [fields_of(each) for each in weights]
        cells = [name]
        for m, x in inputs.items():
            calls: dict[str, list[Callable[[], Tensor]]] = {
                "as it is": [partial(F.linear, x, each) for each in weights]
            }
            expected = x.float() @ weight.t()
            error = decibels(expected, calls["as it is"][0]())
            wrong = [] if error > 40 else [f"as it is: {error:.0f} dB"]
            for way, run in () if args.as_it_is else ways(reading, m):
                try:
                    error = decibels(expected, run(x, first))
                except Exception:
                    continue  # said when it was compiled
                if not error > 40:
                    wrong.append(f"{way}: {error:.0f} dB")
                calls[way] = [partial(run, x, each) for each in fields]
            if wrong:
                print(f"WRONG: {shape} {name} M = {m}: {'; '.join(wrong)}", flush=True)
            found = seconds(calls)
            order = sorted(found, key=found.__getitem__)
            rows += [
                {"shape": shape, "format": name, "tokens": m, "way": w, "us": found[w] * 1e6, "bf16_us": base[m] * 1e6}
                for w in order
            ]
            best = order[0]
            cells.append(f"{base[m] / found['as it is']:.2f}x; {base[m] / found[best]:.2f}x {best}")
        body.append(cells)
    measure.show([shape, *(f"M = {m}" for m in args.tokens)], body, "times bf16: as it is; the fastest way")


def best_overall(rows: list[dict[str, Any]]) -> None:
    """For each shape and number of tokens, the ways that are nearest to the best of every format, on average."""
    body = []
    for shape, m in dict.fromkeys((r["shape"], r["tokens"]) for r in rows):
        here = [r for r in rows if (r["shape"], r["tokens"]) == (shape, m)]
        least = {f: min(r["us"] for r in here if r["format"] == f) for f in {r["format"] for r in here}}
        lost: dict[str, list[float]] = {}
        for r in here:
            lost.setdefault(r["way"], []).append(r["us"] / least[r["format"]])
        whole = {w: sum(each) / len(each) for w, each in lost.items() if len(each) == len(least)}
        order = sorted(whole, key=whole.__getitem__)[:3]
        body.append([shape, str(m), *(f"{w}: {whole[w]:.2f}x" for w in order), *["-"] * (3 - len(order))])
    measure.show(["shape", "M", "1", "2", "3"], body, "ways for all formats, and the time over the best of each format")


def tune_attention(args: argparse.Namespace, context: str, end: float, rows: list[dict[str, Any]]) -> None:
    """All caches at one context."""
    batch, length = map(int, context.split("x"))
    heads, kv_heads, dim = map(int, bench_kv_cache.HEADS.split("x"))
    device = torch.device("cuda")
    q = torch.randn(batch, heads, 1, dim, device="cuda").bfloat16()
    plain = 4 * batch * kv_heads * length * dim
    dense = [
        [torch.randn(batch, kv_heads, length, dim, device="cuda").bfloat16() for _ in range(2)]
        for _ in range(max(2, math.ceil(bench_kv_cache.COLD / plain)))
    ]
    calls: dict[str, list[Callable[[], object]]] = {}
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        for packed in (False, True):
            which = getattr(SDPBackend, backend)
            title = f"{backend.lower()} {packed}"
            calls[title] = [partial(bench_kv_cache.baseline, q, k, v, which, packed) for k, v in dense]
    found = bench_kv_cache.times(calls, device)
    calls = {}
    base = min(s for s in found.values() if isinstance(s, float))
    del dense
    body = [["bf16", f"{base * 1e6:.1f}", "1.00x"]]
    for name, each in TILES.items():
        if time.monotonic() > end:
            print(f"no time left for {context} {name}")
            continue
        size = bench_kv_cache.filled(name, 1, 1024, kv_heads, dim, 0, device).nbytes_packed * batch * length // 1024
        count = max(2, math.ceil(bench_kv_cache.COLD / size))
        caches = [bench_kv_cache.filled(name, batch, length, kv_heads, dim, i, device) for i in range(count)]
        calls = {name: [partial(c.attend, q) for c in caches]}
        for tile in each:
            calls[f"{name} {tile}"] = [partial(bench_kv_cache.tiled, c, q, tile) for c in caches]
        results = bench_kv_cache.times(calls, device)
        for way, seconds in results.items():
            if isinstance(seconds, str):
                print(f"fails: {context} {way}: {seconds}")
                continue
            rows.append({"context": context, "way": way, "us": seconds * 1e6, "bf16_us": base * 1e6})
            body.append([way, f"{seconds * 1e6:.1f}", f"{seconds / base:.2f}x"])
        calls.clear()
        del caches
    measure.show(
        [context, "us", "of bf16's time"], body, "a name alone is the cache as it is; WxPxR as of bench_kv_cache.py"
    )


def main() -> None:
    args = parse()
    start = time.monotonic()
    end = start + args.seconds
    compiled(args)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    few: list[dict[str, Any]] = []
    attention: list[dict[str, Any]] = []
    if "attention" in args.parts:
        for context in args.contexts:
            tune_attention(args, context, end, attention)
    if "few" in args.parts:
        for shape in args.shapes:
            if time.monotonic() < end:
                tune_few(args, shape, end, few)
        best_overall(few)
    if args.json:
        measure.write_json(args.json, {**measure.facts(torch.device("cuda")), "few": few, "attention": attention})
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    with torch.no_grad():
        main()
