"""Measure the optimizers: time, bytes and memory of a step, beside torch.optim and other libraries in the same run.

    step       a Llama shape, all optimizers in turns on the same parameters and gradients: time of a step, its share of the
               time that a copy of as many bytes takes, state bytes, and the first step, which compiles
    tiny       thousands of parameters of 64 to 2,048 elements, beside foreach
    offload    training steps of a Llama model with AdamW on the device, with CPUOffloadOptimizer, and with
               offload_gradients=True: peak memory, time, and from a profile how much of what is copied and stepped
               on the host runs beside the kernels

Several modes may be named. Each writes its results to --json FILE when it is done, under its name, beside what is there; one
that fails leaves the file alone, and the others run. scripts/optim_page.py makes the tables of docs/optimizers.md of them.

    .venv/bin/python scripts/bench_optim.py step tiny offload --peers --json docs/measured/optim-cuda.json
    .venv/bin/python scripts/bench_optim.py step tiny --threads 1 --json docs/measured/optim-cpu.json
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import llama
import llama_training
import measure
import torch
from optim_page import cells
from torch import Tensor, nn

from ao import optim
from ao.quant.report import progress

SHAPES = {**llama.SHAPES, "llama-20m": llama.LlamaConfig(512, 4, 8, 4, 64, 2048, 8192, tied=True)}

Make = Callable[..., torch.optim.Optimizer]


def _peer(module: str, name: str) -> Make:
    return lambda params, **more: getattr(importlib.import_module(module), name)(params, **more)


OURS: dict[str, Make] = {
    "AdamW8bit": optim.AdamW8bit,
    "AdamW4bit": optim.AdamW4bit,
    "AdamWFp8": optim.AdamWFp8,
    "AdamW": partial(optim.AdamW, bf16_stochastic_round=True),
    "Lion8bit": optim.Lion8bit,
}
TORCH: dict[str, Make] = {
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
    "AdamW foreach": partial(torch.optim.AdamW, foreach=True),
}
PEERS: dict[str, dict[str, Make]] = {
    "bitsandbytes": {"AdamW8bit": _peer("bitsandbytes.optim", "AdamW8bit")},
    "torchao": {name: _peer("torchao.optim", name) for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_optim.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modes", nargs="+", choices=list(MODES), metavar="MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--threads", type=int, help="on a CPU; default: PyTorch's")
    parser.add_argument("--cold", action="store_true", help="start with an empty cache of compiled kernels")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: one of 1e9 parameters, on a CPU of 2e7")
    parser.add_argument("--layers", type=int, help="default: those of the shape; offload: 4")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], help="default: bfloat16, on a CPU both")
    parser.add_argument(
        "--optim", nargs="+", metavar="NAME", choices=list(OURS), help=f"of {', '.join(OURS)}; the peers', too"
    )
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="other libraries; without a name all of them")
    parser.add_argument("--rounds", type=int, help="turns of every optimizer; default 15, on a CPU 9")
    parser.add_argument("--count", type=int, default=2000, help="tiny: how many parameters; default 2000")
    parser.add_argument("--sequence", type=int, help="offload: tokens of a sequence; default 2048, on a CPU 32")
    parser.add_argument("--batch", type=int, default=4, help="offload: sequences of a backward pass; default 4")
    parser.add_argument("--accumulate", nargs="+", type=int, default=[1, 8], help="offload: backward passes of a step")
    parser.add_argument("--steps", type=int, default=3, help="offload: steps that are timed; default 3")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="offload: write the profile as a Chrome trace")
    args = parser.parse_args(argv)
    gpu = args.device != "cpu"
    args.dtype = args.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    args.rounds = args.rounds or (15 if gpu else 9)
    args.sequence = args.sequence or (2048 if gpu else 32)
    args.peers = [] if args.peers is None else args.peers or list(PEERS)
    return args


# A step.


@dataclass
class Subject:
    """What takes its turn: an optimizer of a library."""

    optimizer: str
    library: str
    dtype: str
    make: Make
    made: torch.optim.Optimizer | None = None
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    failed: str = ""

    def step(self) -> None:
        assert self.made is not None
        self.made.step()

    def fail(self, error: Exception) -> None:
        """Be out of the game, and give the memory back."""
        self.failed = reason(error)
        self.made = None


def reason(error: Exception) -> str:
    """Why something does not run, in a line."""
    return (
        "not installed"
        if isinstance(error, ModuleNotFoundError)
        else f"{type(error).__name__}: {error}".splitlines()[0][:120]
    )


def subjects_of(args: argparse.Namespace, dtype: str, ours: Iterable[str]) -> list[Subject]:
    chosen = [Subject(name, "ao", dtype, OURS[name]) for name in args.optim or ours]
    chosen += [Subject(name, "torch", dtype, make) for name, make in TORCH.items()]
    theirs = [(lib, name) for lib in args.peers for name in PEERS[lib] if name in (args.optim or PEERS[lib])]
    return chosen + [Subject(name, lib, dtype, PEERS[lib][name]) for lib, name in theirs]


def take_turns(subjects: Sequence[Subject], params: Sequence[Tensor], device: torch.device, rounds: int) -> None:
    """Time steps of all subjects on the same parameters, in turns.

    On a GPU by events, with the device kept busy until the whole step is queued, as in training, where the host runs ahead.
    The time of a step on an idle device, host and all, is taken apart.
    """
    for subject in progress(subjects, "first steps"):
        try:
            measure.synchronize(device)
            start = time.perf_counter()
            subject.made = subject.make(list(params), lr=1e-6)
            subject.step()
            measure.synchronize(device)
            subject.first_seconds = time.perf_counter() - start
            subject.step()
        except Exception as error:
            subject.fail(error)
            gc.collect()
    turns = [(True, min(rounds, 5)), (False, rounds)] if device.type == "cuda" else [(True, rounds)]
    for alone, count in turns:
        for _ in range(count):
            for subject in subjects:
                if subject.made is not None:
                    try:
                        _timed(subject, device, alone)
                    except Exception as error:
                        subject.fail(error)
        measure.synchronize(device)
    for subject in subjects:
        subject.seconds = [a.elapsed_time(b) / 1e3 for a, b in subject.events] or subject.alone


def _timed(subject: Subject, device: torch.device, alone: bool) -> None:
    if alone:
        measure.synchronize(device)
        start = measure.clock(device)()
        subject.step()
        measure.synchronize(device)
        subject.alone.append(measure.clock(device)() - start)
    else:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2e9 * 1.5 * max(subject.alone)))  # cycles, of which there are at most 2e9 in a second
        begin.record()
        subject.step()
        end.record()
        subject.events.append((begin, end))


def report(subjects: Sequence[Subject], params: Sequence[Tensor], copy: float) -> list[dict[str, Any]]:
    """A row of each subject.

    moved_bytes: parameters and states read and written, gradients read. once_bytes: the gradients written, too. floor,
    floor_once: the time that a copy takes for as many, as a share of the time of the step.
    """
    weights = sum(p.nbytes for p in params)
    grads = sum(p.grad.nbytes for p in params if p.grad is not None)
    rows = []
    for s in subjects:
        row: dict[str, Any] = {"optimizer": s.optimizer, "library": s.library, "dtype": s.dtype}
        if s.failed or s.made is None:
            rows.append({**row, "failed": s.failed})
            continue
        seconds, states = statistics.median(s.seconds), state_bytes(s.made)
        moved = 2 * weights + grads + 2 * states
        rows.append(
            {
                **row,
                "parameters": sum(p.numel() for p in params),
                "tensors": len(params),
                "seconds": seconds,
                "alone_seconds": statistics.median(s.alone),
                "first_seconds": s.first_seconds,
                "state_bytes": states,
                "moved_bytes": moved,
                "once_bytes": moved + grads,
                "floor": moved / copy / seconds,
                "floor_once": (moved + grads) / copy / seconds,
            }
        )
    for kind in ("fused", "foreach"):
        base = next((r["seconds"] for r in rows if r["optimizer"] == f"AdamW {kind}" and "failed" not in r), None)
        for row in rows:
            if base and "failed" not in row:
                row[f"of_{kind}"] = row["seconds"] / base
    return rows


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all states, counts of steps aside, whatever tensors they are made of."""
    leaves: dict[int, int] = {}

    def add(t: Any) -> None:
        if hasattr(t, "__tensor_flatten__"):
            for name in t.__tensor_flatten__()[0]:
                add(getattr(t, name))
        elif isinstance(t, Tensor) and t.numel():
            leaves[t.data_ptr()] = t.nbytes  # tables may be shared

    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step":
                add(value)
    return sum(leaves.values())


def copy_rate(device: torch.device, mib: int | None = None) -> float:
    """Bytes per second of a copy, read and written."""
    gpu = device.type != "cpu"
    source = torch.ones((mib or (1024 if gpu else 256)) * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure.least_seconds(partial(target.copy_, source), device, 20 if gpu else 5)


def config_of(args: argparse.Namespace, gpu: str, cpu: str, layers: int | None = None) -> llama.LlamaConfig:
    config = SHAPES[args.shape or (gpu if args.device != "cpu" else cpu)]
    return replace(config, layers=min(args.layers or layers or config.layers, config.layers))


def with_grads(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    made = list(params)
    for p in made:
        p.grad = torch.randn_like(p).mul_(1e-3)
    return made


def step(args: argparse.Namespace) -> dict[str, Any]:
    """All optimizers on a Llama shape."""
    device = torch.device(args.device)
    config = config_of(args, "llama-3.2-1b", "llama-20m")
    make = partial(llama_training.make, config, device)
    return compared("step", args, lambda dtype: make(dtype).parameters(), OURS)


def tiny(args: argparse.Namespace) -> dict[str, Any]:
    """All optimizers on many small parameters."""

    def params(dtype: torch.dtype) -> Iterable[nn.Parameter]:
        sizes = [64, 128, 256, 384, 512, 768, 1024, 2048]
        for i in range(args.count):
            yield nn.Parameter(torch.randn(sizes[i % len(sizes)], device=args.device).to(dtype))

    return compared("tiny", args, params, ["AdamW8bit", "AdamW4bit", "AdamW"])


def compared(
    mode: str, args: argparse.Namespace, make: Callable[[torch.dtype], Iterable[nn.Parameter]], ours: Iterable[str]
) -> dict[str, Any]:
    device = torch.device(args.device)
    copy = copy_rate(device)
    measure.start_compiler(device)
    rows: list[dict[str, Any]] = []
    for dtype in args.dtype:
        params = with_grads(make(getattr(torch, dtype)))
        subjects = subjects_of(args, dtype, ours)
        take_turns(subjects, params, device, args.rounds)
        rows += report(subjects, params, copy)
        del params, subjects
        gc.collect()
    return {"copy": copy, "rows": rows}


# Offload.

VARIANTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "none": lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
    "CPUOffloadOptimizer": lambda params: optim.CPUOffloadOptimizer(params, torch.optim.AdamW, lr=1e-5),
    "offload_gradients=True": lambda params: optim.CPUOffloadOptimizer(
        params, torch.optim.AdamW, lr=1e-5, offload_gradients=True
    ),
}


def offload(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps of a model of bfloat16 weights, activations recomputed."""
    rows: list[dict[str, Any]] = []
    for name in VARIANTS:
        try:
            rows += one_offload(args, name)
        except Exception as error:
            rows.append({"variant": name, "failed": reason(error)})
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()
    base = {row["accumulate"]: row["seconds"] for row in rows if row["variant"] == "none" and "failed" not in row}
    for row in rows:
        if "failed" not in row and row["accumulate"] in base:
            row["of_none"] = row["seconds"] / base[row["accumulate"]]
    return {"rows": rows}


def one_offload(args: argparse.Namespace, variant: str) -> list[dict[str, Any]]:
    device = torch.device(args.device)
    config = config_of(args, "llama-2-7b", "tiny", layers=4)
    net = llama_training.make(config, device, torch.bfloat16, checkpointed=True)
    optimizer = VARIANTS[variant](net.parameters())
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(config.vocab, (args.batch, args.sequence + 1), device=device, generator=generator)

    def train(accumulate: int) -> Tensor:
        for _ in range(accumulate):
            loss = net(ids)
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    rows = []
    for accumulate in args.accumulate:
        train(accumulate)
        measure.synchronize(device)
        measure.reset_peak(device)
        seconds, losses = [], []
        for _ in progress(range(args.steps), f"{variant}, {accumulate} passes"):
            start = time.perf_counter()
            losses.append(train(accumulate))
            measure.synchronize(device)
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "variant": variant,
                "accumulate": accumulate,
                "tokens": args.batch * args.sequence,
                "layers": config.layers,
                "parameters": sum(p.numel() for p in net.parameters()),
                "peak_bytes": measure.used_bytes(device, peak=True),
                "seconds": statistics.median(seconds),
                "losses": [loss.item() for loss in losses],
            }
        )
        if variant != "none":
            try:
                rows[-1] |= profile(args, partial(train, accumulate), f"{variant}-{accumulate}")
            except Exception as error:  # a profiler that cannot see the device
                rows[-1]["profile_failed"] = reason(error)
    return rows


def profile(args: argparse.Namespace, call: Callable[[], object], name: str) -> dict[str, float]:
    """What ran beside what in one call."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    device = torch.device(args.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profiler(activities=activities) as prof:
        call()
        measure.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        text = path.read_text()
    if args.trace:
        path = args.trace.with_name(f"{args.trace.stem}-{name.replace('=', '-')}{args.trace.suffix or '.json'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return overlaps(json.loads(text)["traceEvents"])


Spans = list[tuple[float, float]]


def overlaps(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """From the events of a trace: seconds of kernels, of copies between host and device and of steps on the host, each
    counted once where several run; and which share of the copies and steps ran beside the others."""
    kinds: dict[str, Spans] = {"kernels": [], "copies": [], "steps": []}
    for event in events:
        name, kind = str(event.get("name", "")), str(event.get("cat", ""))
        if event.get("ph") != "X":
            continue
        if kind == "kernel":
            key = "kernels"
        elif kind == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name):
            key = "copies"
        elif kind in ("user_annotation", "cpu_op") and name.startswith("Optimizer.step#") and "Offload" not in name:
            key = "steps"
        else:
            continue
        start = float(event["ts"]) / 1e6
        kinds[key].append((start, start + float(event["dur"]) / 1e6))
    merged = {key: union(spans) for key, spans in kinds.items()}
    found = {f"{key}_seconds": length(spans) for key, spans in merged.items()}
    kernels, copies, steps = merged["kernels"], merged["copies"], merged["steps"]
    if copies and kernels:
        found["copies_beside_kernels"] = length(both(copies, kernels)) / length(copies)
        found["copies_hidden"] = length(both(copies, union([*kernels, *steps]))) / length(copies)
    if steps and kernels:
        found["steps_beside_kernels"] = length(both(steps, kernels)) / length(steps)
    return found


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same time in spans that do not meet."""
    made: Spans = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], end))
        else:
            made.append((start, end))
    return made


def both(a: Spans, b: Spans) -> Spans:
    """The time that is in both of two unions."""
    made, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            made.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return made


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


# All.

MODES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"step": step, "tiny": tiny, "offload": offload}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the modes; 1 if one failed."""
    args = parse(argv)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        if args.cold:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
        for mode in args.modes:
            try:
                found = MODES[mode](args)
            except Exception:
                traceback.print_exc()
                failures += 1
                continue
            measure.show(*cells(mode, found["rows"]), title=mode)
            if args.json:
                data = json.loads(args.json.read_text()) if args.json.exists() else {}
                measure.write_json(args.json, {**data, mode: {"facts": measure.facts(device), **found}})
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
