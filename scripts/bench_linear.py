"""Time linear layers: every format at every number of tokens M on the layers of Llama-3.1-8B, beside bfloat16.

A layer is an `nn.Linear` whose weight was quantized by `ao.quantize_`, called through plain `torch.compile`, or as it is.
Weights are cold: calls go round so many copies that none is left in the cache. On a GPU the calls of a case are recorded in
one CUDA graph and its replays are timed by events; on a CPU single calls are timed. All formats (and other libraries, --peers)
take turns at the same M, and medians are reported:

    us        microseconds per call
    of floor  the larger of two times, over the measured one: bytes (packed weight, input and output) over the bandwidth
              of a copy or a sum, and 2 M N K operations over the rate of a large product; both measured in the same run
    of bf16   how many times faster than the bfloat16 layer

A case that fails is recorded with its reason. The results are saved after every shape; --resume goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import formats
import measure
import peers
import torch
from demo import Progress
from performance import draw, read
from torch import Tensor, nn

import ao

SHAPES = ["4096x4096", "6144x4096", "28672x4096", "4096x14336", "128256x4096"]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
CPU_SHAPES = ["4096x4096", "6144x4096", "4096x14336"]
CPU_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
LEAST_CALLS = 40
"""Calls in a CUDA graph of short calls, so that the gap between two replays does not count."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_linear.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{formats.help_text()}\n\npeers: {', '.join(peers.PEERS)}",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--threads", type=int, metavar="T", help="threads on a CPU; default: PyTorch's")
    parser.add_argument("--formats", nargs="+", metavar="F", help="default: all; bf16 is always there")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="default: 1 to 4096, on a CPU to 256")
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="out x in; default: five, on a CPU three of them")
    parser.add_argument(
        "--peers", nargs="*", default=[], metavar="P", help="libraries to compare with, where installed"
    )
    parser.add_argument(
        "--mode",
        default="default",
        choices=["default", "max-autotune-no-cudagraphs", "eager"],
        help="of torch.compile, or without it",
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="at most, for the copies of one weight")
    parser.add_argument(
        "--check", action="store_true", help="compare outputs with the float32 product of decoded weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save here, after every shape")
    parser.add_argument("--resume", action="store_true", help="measure what FILE does not have yet, and add it there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-up over M here (.svg, .png)")
    args = parser.parse_args(argv)
    cpu = torch.device(args.device).type == "cpu"
    args.formats = [f for f in args.formats or formats.FORMATS if f != "bf16"]
    args.tokens = args.tokens or (CPU_TOKENS if cpu else TOKENS)
    args.shapes = args.shapes or (CPU_SHAPES if cpu else SHAPES)
    try:
        for name in args.formats:
            formats.config_of(name)
        for shape in args.shapes:
            sides(shape)
    except ValueError as error:
        parser.error(str(error))
    unknown = [name for name in args.peers if name not in peers.PEERS]
    if unknown:
        parser.error(f"unknown peer {', '.join(unknown)}; the peers are {', '.join(peers.PEERS)}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.resume and args.json is None:
        parser.error("--resume needs --json FILE, the file to go on with")
    return args


def sides(shape: str) -> tuple[int, int]:
    """N and K of "NxK"."""
    n, _, k = shape.partition("x")
    if not (n.isdigit() and k.isdigit()):
        raise ValueError(f"a shape must be like 4096x14336, got {shape!r}")
    return int(n), int(k)


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """What gets compiled."""
    return layer(x)


@dataclass
class Subject:
    """A layer under test: one format of one library, with copies of its weight.

    weight: the plain one that it was made from. weight_bytes: of one copy. failed: M, or None for all -> why.
    """

    format: str
    library: str
    weight_bytes: int
    copies: list[nn.Module]
    call: Callable[..., Tensor]
    runs: dict[int, Callable[[], object]] = field(default_factory=dict)
    graphs: dict[int, tuple[torch.cuda.CUDAGraph | measure.Calls, int]] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    compiled: int = 0
    compile_s: float = 0.0


class Bench:
    """Measures one shape after the other.

    cold: how many bytes of copies take turns. Weights that leave a GPU's cache first (a hint of their loads) leave part of it
    to those that came before; at three times the cache that still shows.
    """

    def __init__(self, args: argparse.Namespace, ceiling: dict[str, float]) -> None:
        self.args, self.ceiling = args, ceiling
        self.device = torch.device(args.device)
        self.cold = (12 if self.device.type == "cuda" else 3) * measure.cache_bytes(self.device)
        self.cap = args.memory * 1e9 if args.memory else 0.25 * measure.free_bytes(self.device)

    def shape(self, shape: str, names: Iterable[str], progress: Progress) -> list[dict[str, Any]]:
        """All rows of one shape: bf16, then the formats `names`, each with its peers."""
        n, k = sides(shape)
        torch.manual_seed(0)
        weight = torch.randn(n, k, device=self.device, dtype=torch.bfloat16)
        inputs = {m: torch.randn(m, k, device=self.device, dtype=torch.bfloat16) for m in self.args.tokens}
        subjects, rows = [], []
        for name in ("bf16", *names):
            libraries = ["ao"] if name in formats.PLAIN else ["ao", *self.args.peers]
            for library in libraries:
                restored: AbstractContextManager[None] = nullcontext() if library == "ao" else peers.settings_restored()
                label = name if library == "ao" else f"{name} of {library}"
                start = time.perf_counter()
                with progress.during(f"{shape} {label}: compile"), restored:
                    try:
                        subject = self.build(weight, name, library)
                    except Exception as error:
                        rows += [row(shape, m, name, library, failed=reason(error)) for m in self.args.tokens]
                        progress.done(f"{shape} {label}: does not run: {reason(error)}")
                        continue
                    if subject is None:
                        rows += [row(shape, m, name, library, failed="no such format", absent=True) for m in inputs]
                        progress.done(f"{shape} {label}: no such format")
                        continue
                    self.prepare(subject, inputs, weight)
                subjects.append(subject)
                note = f"{subject.compiled} graphs in {subject.compile_s:.1f} s"
                bad = f"; fails at M = {', '.join(map(str, subject.failed))}" if subject.failed else ""
                progress.done(f"{shape} {label}: {note}, {time.perf_counter() - start:.1f} s in all{bad}")
        with progress.during(f"{shape}: measure"):
            for m in self.args.tokens:
                rows += self.in_turns(shape, m, subjects)
        progress.done(f"{shape}: measured")
        subjects.clear()
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return rows

    def build(self, weight: Tensor, name: str, library: str) -> Subject | None:
        """The layer, quantized and copied; None where the library has no such format."""
        n, k = weight.shape
        layer: nn.Module | None
        if library != "ao":
            before = measure.used_bytes(self.device)
            layer = peers.PEERS[library](weight, name)
            if layer is None:
                return None
            size = max(measure.used_bytes(self.device) - before, weight.nbytes // 4)
            call: Callable[..., Tensor] = apply
            if self.args.mode != "eager":
                call = torch.compile(measure.own_code(apply, f"{library}_{name}"))
        else:
            layer = nn.Linear(k, n, bias=False, device="meta")
            dtype = formats.PLAIN.get(name, weight.dtype)
            layer.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
            config = formats.config_of(name)
            if config is not None:
                ao.quantize_(layer, config)
            size = ao.get_model_size_in_bytes(layer)
            mode = None if self.args.mode == "default" else self.args.mode
            call = apply
            if mode != "eager":
                call = torch.compile(measure.own_code(apply, name), fullgraph=True, mode=mode)
        wanted = math.ceil(self.cold / max(size, 1))
        count = max(1, min(max(wanted, 2), int(self.cap // max(size, 1))))
        copies = [layer, *(another(layer, weight, name, library) for _ in range(count - 1))]
        return Subject(name, library, size, copies, call)

    @torch.no_grad()
    def prepare(self, subject: Subject, inputs: dict[int, Tensor], weight: Tensor) -> None:
        """Run each M once, which compiles; compare; on a GPU record the graphs."""
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        reference = self.reference(subject, weight) if self.args.check else None
        plain = formats.PLAIN.get(subject.format)
        for m, x in inputs.items():
            x = x if plain is None else x.to(plain)
            try:
                graphs, start = measure.graphs_compiled(), time.perf_counter()
                try:
                    out = subject.call(subject.copies[0], x)
                except Exception:
                    if subject.library == "ao":
                        raise
                    subject.call = apply  # another library's layer that does not compile still runs
                    out = subject.call(subject.copies[0], x)
                measure.synchronize(self.device)
                if measure.graphs_compiled() > graphs:
                    subject.compile_s += time.perf_counter() - start
                    subject.compiled += measure.graphs_compiled() - graphs
                if reference is not None:
                    subject.errors[m] = relative_error(out, x, reference)
                del out
                self.record(subject, m, x, pool)
            except Exception as error:
                subject.failed[m] = reason(error)

    def record(self, subject: Subject, m: int, x: Tensor, pool: Any) -> None:
        """Make the runs of one M: a CUDA graph of a pass over all copies, or a call that goes on to the next copy."""
        call, copies = subject.call, subject.copies
        if pool is None:
            turn = iter(range(10**9))
            subject.runs[m] = lambda: call(copies[next(turn) % len(copies)], x)
            return
        start = time.perf_counter()
        call(copies[-1], x)
        measure.synchronize(self.device)
        short = time.perf_counter() - start < 5e-4
        passes = math.ceil(LEAST_CALLS / len(copies)) if short else 1
        calls = [partial(call, layer, x) for layer in copies * passes]
        graph: torch.cuda.CUDAGraph | measure.Calls
        try:
            graph = measure.capture(calls, pool)
        except Exception:
            if subject.library == "ao":
                raise
            graph = measure.Calls(calls)  # another library's layer may do what a graph cannot hold
        subject.graphs[m] = (graph, len(calls))

    @torch.no_grad()
    def in_turns(self, shape: str, m: int, subjects: list[Subject]) -> list[dict[str, Any]]:
        """The rows of one M."""
        times: dict[tuple[str, str], float] = {}
        if self.device.type == "cuda":
            graphs = {(s.format, s.library): s.graphs[m] for s in subjects if m in s.graphs}
            try:
                found = measure.replays_in_turns({key: graph for key, (graph, _) in graphs.items()})
            except Exception as error:
                for s in subjects:
                    s.failed.setdefault(m, reason(error))
                found = {}
            times = {key: seconds / graphs[key][1] for key, seconds in found.items()}
        else:
            times = measure.calls_in_turns(
                {(s.format, s.library): s.runs[m] for s in subjects if m in s.runs}, self.device, least=3
            )
        rows = []
        for s in subjects:
            seconds = times.get((s.format, s.library))
            if seconds is None:
                rows.append(row(shape, m, s.format, s.library, failed=s.failed.get(m, "not measured")))
                continue
            base = times.get(("bf16", "ao"))
            more: dict[str, Any] = {
                "us": seconds * 1e6,
                "bf16_us": base and base * 1e6,
                "copies": len(s.copies),
                "graphs": s.compiled,
                "compile_s": round(s.compile_s, 2),
            }
            if s.library == "ao":
                more |= {"floor_us": self.floor(shape, m, s) * 1e6, "weight_bytes": s.weight_bytes}
            if m in s.graphs and isinstance(s.graphs[m][0], measure.Calls):
                more["captured"] = False
            if m in s.errors:
                more["error"] = s.errors[m]
            rows.append(row(shape, m, s.format, s.library, **more))
        return rows

    def floor(self, shape: str, m: int, subject: Subject) -> float:
        """Seconds below which no product of this size and format can be."""
        n, k = sides(shape)
        element = formats.PLAIN.get(subject.format, torch.bfloat16).itemsize
        moved = subject.weight_bytes + element * m * (n + k)
        rate = self.ceiling["float"]
        weight = getattr(subject.copies[0], "weight", None)
        if isinstance(weight, ao.QTensor) and weight.spec.act is not None:
            unit = "float8" if isinstance(weight.spec.act, ao.Float8) else "int8"
            rate = self.ceiling.get(unit, rate)
        return max(moved / measure.bandwidth(self.ceiling), 2 * m * n * k / rate)

    def reference(self, subject: Subject, weight: Tensor) -> Tensor:
        """(N, K) float32: what our weight decodes to; for other libraries, the weight before quantization."""
        own: Any = subject.copies[0].weight if subject.library == "ao" else weight
        return own.to(torch.float32).dequantize() if isinstance(own, ao.QTensor) else own.float()


def another(layer: nn.Module, weight: Tensor, name: str, library: str) -> nn.Module:
    """The same layer in other memory. Some libraries' layers cannot be copied, and are quantized again."""
    try:
        return copy.deepcopy(layer)
    except Exception:
        if library == "ao":
            raise
    made = peers.PEERS[library](weight, name)
    assert made is not None
    return made


def relative_error(out: Tensor, x: Tensor, weight: Tensor) -> float:
    """|out - x @ weight.T| / |x @ weight.T|. x: (M, K), weight: (N, K) float32."""
    exact = x.float() @ weight.t()
    return float((out.float() - exact).norm() / exact.norm())


def row(shape: str, tokens: int, name: str, library: str, **more: Any) -> dict[str, Any]:
    """One result."""
    return {"shape": shape, "tokens": tokens, "format": name, "library": library, **more}


def reason(error: Exception) -> str:
    """The kind of an error and its first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def key(r: dict[str, Any]) -> tuple[Any, ...]:
    return r["shape"], r["tokens"], r["format"], r["library"]


def missing(args: argparse.Namespace, shape: str, rows: Iterable[dict[str, Any]]) -> list[str]:
    """The formats that lack a row of this shape, at any M or library that is asked for."""
    done = {key(r) for r in rows if "us" in r}
    failed = {key(r) for r in rows if r["library"] != "ao"}  # not tried again
    wanted = {
        name: [(shape, m, name, "ao") for m in args.tokens]
        + [(shape, m, name, peer) for m in args.tokens for peer in args.peers if name not in formats.PLAIN]
        for name in args.formats
    }
    return [name for name, keys in wanted.items() if any(k not in done and k not in failed for k in keys)]


def show(rows: list[dict[str, Any]], shape: str) -> None:
    """Print the rows of one shape, with a column for every peer: how many times faster ours is."""
    libraries = list(dict.fromkeys(r["library"] for r in rows if r["library"] != "ao"))
    found = {key(r): r for r in rows}
    checked = any("error" in r for r in rows)
    head = ["M", "format", "us", "of floor", "of bf16", *(["error"] if checked else []), *libraries]
    body = []
    for r in rows:
        if r["library"] != "ao":
            continue
        cells = [str(r["tokens"]), r["format"]]
        if "us" in r:
            cells += [f"{r['us']:.1f}", f"{r['floor_us'] / r['us']:.0%}"]
            cells.append(f"{r['bf16_us'] / r['us']:.2f}x" if r.get("bf16_us") else "-")
        else:
            cells += [r["failed"][:60], "-", "-"]
        if checked:
            cells.append(f"{r['error']:.1e}" if "error" in r else "-")
        for library in libraries:
            other = found.get((shape, r["tokens"], r["format"], library), {})
            both = "us" in other and "us" in r
            fails = "failed" in other and "absent" not in other
            cells.append(f"{other['us'] / r['us']:.2f}x" if both else "does not run" if fails else "-")
        body.append(cells)
    measure.show(head, body, f"{shape} (N x K)")


def main(args: argparse.Namespace) -> None:
    """Measure, save, print, draw."""
    device = torch.device(args.device)
    if device.type == "cpu" and args.threads:
        torch.set_num_threads(args.threads)
    gone = [name for name in args.peers if peers.version(name) is None]
    args.peers = [name for name in args.peers if name not in gone]
    data = read(args.json) if args.resume and args.json.exists() else {"runs": [], "rows": []}
    names = {shape: missing(args, shape, data["rows"]) for shape in args.shapes}
    facts = measure.facts(device)
    others = {r["device"] for r in data["runs"]} - {facts["device"]}
    if others:
        raise SystemExit(f"error: {args.json} holds numbers of {others.pop()}, and this is {facts['device']}")
    left = [shape for shape, each in names.items() if each or not args.resume]
    steps = 1 + sum(2 + len(names[s]) + sum(f not in formats.PLAIN for f in names[s]) * len(args.peers) for s in left)
    progress = Progress(steps)
    with progress.during("ceilings of the machine"):
        measure.start_compiler(device)
        ceiling = measure.ceilings(device)
    scale = {"copy": (1e9, "GB/s copy"), "read": (1e9, "GB/s sum"), "float": (1e12, "T/s float")}
    scale |= {"int8": (1e12, "T/s int8"), "float8": (1e12, "T/s float8")}
    limits = ", ".join(f"{value / scale[name][0]:.3g} {scale[name][1]}" for name, value in ceiling.items())
    progress.done(f"{facts['device']}, torch {facts['torch']}: {limits}")
    if gone:
        print(f"not installed: {', '.join(gone)}")
    versions = {name: peers.version(name) for name in args.peers}
    data["runs"].append({**facts, "mode": args.mode, "ceilings": ceiling, "peers": versions})
    bench = Bench(args, ceiling)
    for shape in left:
        rows = [{**r, "run": len(data["runs"]) - 1} for r in bench.shape(shape, names[shape], progress)]
        fresh = {key(r) for r in rows}
        data["rows"] = [r for r in data["rows"] if key(r) not in fresh] + rows
        if args.json:
            measure.write_json(args.json, data)
        show(rows, shape)
    if args.plot:
        draw(data, args.plot)
        print(f"\ndrawn: {args.plot}")


if __name__ == "__main__":
    main(parse())
