"""Measure low-precision training: speed, memory and loss, beside bfloat16 in the same run.

    linear      forward and backward of one layer, compiled: --sizes MxKxN
    model       steps of a Llama model of random weights: tokens/s, peak memory. All precisions share one set of parameters and
                take turns; the model is cut to the layers that fit
    parallel    the same under torchrun and FSDP2, with and without a gather in float8: tokens/s, bytes gathered, losses
    qlora       adapters over an NF4 base: memory of the base and of a step; the merged model against the adapters
    loss        a small model of bytes, trained on the sources of Python's library: the loss after --steps, on any device

Precisions are those of ao.train.PRECISIONS. --peers adds another library's where it is installed and has them. Results go to
--json FILE, each mode under its name, and later runs of other modes are added; scripts/training_page.py makes tables of them.

    .venv/bin/python scripts/bench_training.py linear --json docs/measured/training.json
    torchrun --nproc-per-node 2 scripts/bench_training.py parallel --layers 8
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import llama
import llama_training
import measure
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training_page import cells

from ao.optim import AdamW8bit
from ao.quant.report import progress
from ao.train import (
    PRECISIONS,
    Float8LinearConfig,
    convert_to_float8_training,
    convert_to_precision,
    convert_to_qlora,
    merge_qlora,
    precompute_float8_dynamic_scale_for_fsdp,
)

SHARED = [name for name in PRECISIONS if name not in ("int8-weight-only", "bitnet")]
"""Precisions whose parameters are those of the plain model."""

GATHER = "float8-tensorwise-gather"
TORCHAO = {
    "float8-tensorwise": "tensorwise",
    "float8-rowwise": "rowwise",
    "float8-rowwise-gw-hp": "rowwise_with_gw_hp",
}
"""What torchao calls them."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    common.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    common.add_argument(
        "--precisions", nargs="+", metavar="P", help=f"of {', '.join(PRECISIONS)}; bf16 is always there"
    )
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--rounds", type=int, default=7, help="turns of every precision; default 7")
    timed.add_argument("--peers", nargs="*", default=[], choices=["torchao"], help="where installed")
    timed.add_argument("--mode", dest="compile_mode", default="default", help="of torch.compile")
    shaped = argparse.ArgumentParser(add_help=False)
    shaped.add_argument("--shape", default="llama-3.1-8b", choices=list(llama.SHAPES))
    shaped.add_argument("--layers", type=int, help="default: as many as fit, at most those of the shape")
    shaped.add_argument("--sequence", type=int, default=8192, help="tokens of a sequence; default 8192")
    shaped.add_argument("--batch", type=int, default=1, help="sequences of a step; default 1")
    shaped.add_argument("--checkpoint", action="store_true", help="recompute each block in backward")
    shaped.add_argument("--head", action="store_true", help="also convert the output head")
    shaped.add_argument("--optimizer", default="adamw", choices=["adamw", "adamw8bit"])

    linear = modes.add_parser("linear", parents=[common, timed], help="one layer")
    linear.add_argument("--sizes", nargs="+", default=["8192x8192x8192"], metavar="MxKxN", help="tokens x in x out")
    model = modes.add_parser("model", parents=[common, timed, shaped], help="a model on one device")
    model.add_argument("--steps", type=int, default=3, help="steps of a turn; default 3")
    parallel = modes.add_parser("parallel", parents=[common, shaped], help="FSDP2, under torchrun")
    parallel.add_argument("--steps", type=int, default=20, help="steps of each precision; default 20")
    qlora = modes.add_parser("qlora", parents=[common, shaped], help="adapters over a packed base")
    qlora.add_argument("--rank", type=int, default=16)
    qlora.add_argument("--steps", type=int, default=3)
    loss = modes.add_parser("loss", parents=[common], help="a small model, trained")
    loss.add_argument("--steps", type=int, default=1000)
    loss.add_argument("--dim", type=int, default=256)
    loss.add_argument("--layers", type=int, default=4)
    loss.add_argument("--sequence", type=int, default=128)
    loss.add_argument("--batch", type=int, default=8)
    args = parser.parse_args(argv)
    unknown = [p for p in getattr(args, "precisions", None) or [] if p not in (*PRECISIONS, GATHER)]
    if unknown:
        parser.error(f"unknown precision {unknown[0]!r}; choose from {', '.join((*PRECISIONS, GATHER))}")
    for size in getattr(args, "sizes", []):
        if len(size.split("x")) != 3 or not all(n.isdigit() for n in size.split("x")):
            parser.error(f"a size must be like 8192x4096x14336, got {size!r}")
    return args


def chosen(args: argparse.Namespace, usual: Sequence[str]) -> list[str]:
    """bf16, then the precisions that were asked for."""
    return list(dict.fromkeys(["bf16", *(args.precisions or usual)]))


def convert(module: nn.Module, name: str, library: str, keep: Callable[[nn.Module, str], bool]) -> nn.Module:
    """`module` trained in a precision, by ao or by another library."""
    if name == "bf16":
        return module
    if library == "torchao":
        peer = importlib.import_module("torchao.float8")
        config = peer.Float8LinearConfig.from_recipe_name(TORCHAO[name])
        return peer.convert_to_float8_training(module, config=config, module_filter_fn=keep)
    if name == GATHER:
        config = replace(Float8LinearConfig.from_recipe_name("tensorwise"), enable_fsdp_float8_all_gather=True)
        return convert_to_float8_training(module, config=config, module_filter_fn=keep)
    return convert_to_precision(module, name, module_filter_fn=keep)


def libraries(name: str, peers: Sequence[str]) -> list[str]:
    return ["ao", *(peer for peer in peers if name in TORCHAO)]


@dataclass
class Subject:
    """What takes its turn: a precision of a library."""

    name: str
    library: str
    call: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    failed: str = ""

    @property
    def label(self) -> str:
        return self.name if self.library == "ao" else f"{self.name} of {self.library}"


def take_turns(subjects: Sequence[Subject], device: torch.device, rounds: int, calls: int) -> None:
    """Time `calls` calls of each subject in every round, after one that compiles and one that warms up."""
    for subject in subjects:
        try:
            subject.call()
            subject.call()
        except Exception as error:
            subject.failed = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    for _ in progress(range(rounds), "rounds"):
        for subject in subjects:
            if subject.failed:
                continue
            measure.synchronize(device)
            measure.reset_peak(device)
            start = time.perf_counter()
            for _ in range(calls):
                subject.call()
            measure.synchronize(device)
            subject.seconds.append((time.perf_counter() - start) / calls)
            subject.peak = max(subject.peak, measure.used_bytes(device, peak=True))


def report(subjects: Sequence[Subject], **more: Any) -> list[dict[str, Any]]:
    """A row of each subject, relative to bf16."""
    base = statistics.median(subjects[0].seconds)
    rows = []
    for s in subjects:
        row = {"precision": s.name, "library": s.library, **more}
        if s.failed:
            rows.append({**row, "failed": s.failed})
            continue
        seconds = statistics.median(s.seconds)
        rows.append({**row, "seconds": seconds, "speed": base / seconds, "peak_bytes": s.peak})
    return rows


def all_linears(module: nn.Module, name: str) -> bool:
    return True


def linear(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward of one layer."""
    rows = []
    for size in args.sizes:
        rows += one_linear(args, size)
        show("linear", [r for r in rows if r["size"] == size])
    return rows


def one_linear(args: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    device = torch.device(args.device)
    m, k, n = map(int, size.split("x"))
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(n, k, device=device, dtype=torch.bfloat16) * k**-0.5)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(m, n, device=device, dtype=torch.bfloat16)

    def step(apply: Callable[..., Tensor], layer: nn.Module) -> None:
        apply(layer, x).backward(grad)
        x.grad = weight.grad = None

    subjects = []
    for name in chosen(args, SHARED):
        for library in libraries(name, args.peers):
            layer: nn.Module = nn.Linear(k, n, bias=False, device="meta")
            layer.weight = weight
            layer = convert(layer, name, library, lambda module, name: True)
            apply = measure.own_code(_apply, f"{library}_{name}_{size}")
            apply = torch.compile(apply, mode=args.compile_mode, dynamic=False)
            subjects.append(Subject(name, library, partial(step, apply, layer)))
    take_turns(subjects, device, args.rounds, 10 if device.type == "cuda" else 1)
    return report(subjects, size=size, flops=6 * m * k * n)


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


# A model.


def config_of(
    args: argparse.Namespace, device: torch.device, bytes_per_parameter: float = 8.0, share: int = 1
) -> llama.LlamaConfig:
    """The shape, cut to the layers that fit: parameters, gradients and optimizer at `bytes_per_parameter`, split over `share`
    ranks, and the activations of a layer in bfloat16, or only its input with checkpointing."""
    config = llama.SHAPES[args.shape]
    if args.layers:
        return replace(config, layers=args.layers)
    tokens = args.batch * args.sequence
    layer = config.dim * (
        2 * config.heads * config.head_dim + 2 * config.kv_heads * config.head_dim + 3 * config.hidden
    )
    wide = 4 * config.dim + (config.heads + 2 * config.kv_heads) * config.head_dim + 4 * config.hidden
    each = layer * bytes_per_parameter / share + tokens * (2 * config.dim if args.checkpoint else 2 * wide)
    fixed = 2 * config.vocab * config.dim * bytes_per_parameter / share + tokens * config.vocab * 8
    free = 0.9 * measure.free_bytes(device) - fixed
    return replace(config, layers=max(1, min(config.layers, int(free / each))))


def optimizer_of(args: argparse.Namespace, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    if args.optimizer == "adamw8bit":
        return AdamW8bit(parameters, lr=1e-5)
    return torch.optim.AdamW(parameters, lr=1e-5, fused=args.device != "cpu")


def tokens_of(args: argparse.Namespace, vocab: int, device: torch.device, step: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(step)
    return torch.randint(vocab, (args.batch, args.sequence + 1), device=device, generator=generator)


def keep_of(args: argparse.Namespace) -> Callable[[nn.Module, str], bool]:
    """Which layers are converted: all but the head."""
    return lambda module, name: args.head or name != "head"


def model(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training steps of a model on one device."""
    device = torch.device(args.device)
    config = config_of(args, device, 6.0 if args.optimizer == "adamw8bit" else 8.0)
    base = llama_training.make(config, device, torch.bfloat16, args.checkpoint)
    optimizer = optimizer_of(args, base.parameters())
    ids = tokens_of(args, config.vocab, device)
    subjects = []
    for name in chosen(args, SHARED):
        if name not in SHARED:
            sys.exit(f"error: {name} has weights of its own, and cannot take turns with others here")
        for library in libraries(name, args.peers):
            # The same parameters in other modules.
            variant = copy.deepcopy(base, {id(p): p for p in base.parameters()})
            converted = convert(variant, name, library, keep_of(args))
            assert isinstance(converted, llama_training.Llama)
            llama_training.compiled(converted, f"{library}_{name}")

            def step(net: nn.Module = converted) -> Tensor:
                loss = net(ids)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            subjects.append(Subject(name, library, step))
    take_turns(subjects, device, args.rounds, args.steps)
    tokens = args.batch * args.sequence
    rows = report(
        subjects, shape=args.shape, layers=config.layers, tokens=tokens, checkpoint=args.checkpoint, head=args.head
    )
    show("model", rows)
    return rows


# Several devices.


def parallel(args: argparse.Namespace) -> list[dict[str, Any]]:
    """FSDP2 under torchrun: every rank trains on the same tokens, so that the losses are those of one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    cuda = args.device != "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda" if cuda else "cpu")
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world)
    mesh = init_device_mesh(device.type, (world,))
    config = config_of(args, device, share=world)
    rows = []
    for name in chosen(args, ["float8-tensorwise", GATHER, "float8-rowwise"]):
        net = convert(llama_training.make(config, device, torch.bfloat16, args.checkpoint), name, "ao", keep_of(args))
        assert isinstance(net, llama_training.Llama)
        llama_training.compiled(net, name)
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
        losses, seconds = [], []
        with Gathered() as gathered:
            for i in range(args.steps):
                measure.synchronize(device)
                start = time.perf_counter()
                loss = net(tokens_of(args, config.vocab, device, i))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if name == GATHER:
                    precompute_float8_dynamic_scale_for_fsdp(net)
                measure.synchronize(device)
                seconds.append(time.perf_counter() - start)
                losses.append(loss.item())
        tokens = args.batch * args.sequence
        rows.append(
            {
                "precision": name, "ranks": world, "layers": config.layers, "shape": args.shape, "tokens": tokens,
                "seconds": statistics.median(seconds[len(seconds) // 3 :]), "losses": losses,
                "gathered_bytes": gathered.bytes // args.steps, "peak_bytes": measure.used_bytes(device, peak=True),
            }
        )  # fmt: skip
        del net, optimizer
    for row in rows:
        row["speed"] = rows[0]["seconds"] / row["seconds"]
    dist.destroy_process_group()
    if rank == 0:
        show("parallel", rows)
    return rows if rank == 0 else []


class Gathered:
    """Counts the bytes of all-gathers."""

    def __enter__(self) -> Gathered:
        self.bytes, self.gather = 0, dist.all_gather_into_tensor

        def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += output.nbytes
            return self.gather(output, *args, **kwargs)

        dist.all_gather_into_tensor = counted  # type: ignore[assignment]
        return self

    def __exit__(self, *args: object) -> None:
        dist.all_gather_into_tensor = self.gather


# QLoRA.


def qlora(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory of a packed base and of training over it, and what a merge loses."""
    device = torch.device(args.device)
    config = llama.SHAPES[args.shape]
    config = replace(config, layers=args.layers or config.layers)
    with torch.device("meta"):
        net = llama_training.Llama(config, checkpointed=True).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for module in progress(list(net.modules()), "layers"):
        # One layer at a time: no more than one is ever there in bfloat16.
        made = {name: torch.empty_like(p, device=device) for name, p in module._parameters.items() if p is not None}
        for name, t in made.items():
            nn.init.normal_(t, std=0.02, generator=generator) if t.dim() > 1 else nn.init.ones_(t)
            module._parameters[name] = nn.Parameter(t, requires_grad=False)
        if isinstance(module, nn.Linear) and module is not net.head:
            convert_to_qlora(module, rank=args.rank)
    if config.tied:
        net.head.weight = net.embed.weight
    base_bytes = measure.used_bytes(device)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    llama_training.compiled(net, "qlora")
    measure.reset_peak(device)
    losses, seconds = [], []
    for _ in progress(range(args.steps), "steps"):
        start = time.perf_counter()
        loss = net(tokens_of(args, config.vocab, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    peak = measure.used_bytes(device, peak=True)
    ids = tokens_of(args, config.vocab, device)
    with torch.no_grad():
        before = float(net(ids))
        merge_qlora(net)
        after = float(net(ids))
    row = {
        "shape": args.shape, "layers": config.layers, "rank": args.rank, "tokens": args.batch * args.sequence,
        "base_bytes": base_bytes, "peak_bytes": peak, "seconds": min(seconds), "losses": losses, "loss_before_merge": before,
        "loss_after_merge": after, "trained": sum(p.numel() for p in trained),
    }  # fmt: skip
    show("qlora", [row])
    return [row]


# A loss curve.


def corpus() -> Tensor:
    """The sources of Python's library, as bytes: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def loss(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The mean loss of the last tenth of a short training, by precision, on the same batches."""
    device = torch.device(args.device)
    text = corpus()
    config = llama.LlamaConfig(args.dim, args.layers, args.dim // 64, args.dim // 64, 64, 3 * args.dim, 256)
    rows: list[dict[str, Any]] = []
    for name in chosen(args, list(PRECISIONS)[1:]):
        net = llama_training.make(config, device, torch.float32)
        convert(net, name, "ao", lambda module, fqn: fqn != "head")
        if device.type == "cuda":
            llama_training.compiled(net, name)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warm_and_cosine, steps=args.steps))
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in progress(range(args.steps), name):
            starts = torch.randint(len(text) - args.sequence - 1, (args.batch,), generator=generator)
            ids = torch.stack([text[i : i + args.sequence + 1] for i in starts.tolist()]).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                value = net(ids)
            value.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(value.item())
        last = statistics.fmean(losses[-max(args.steps // 10, 1) :])
        rows.append(
            {
                "precision": name,
                "steps": args.steps,
                "loss": last,
                "of_bf16": last / (rows[0]["loss"] if rows else last),
            }
        )
        show("loss", rows)
    return rows


def _warm_and_cosine(step: int, steps: int) -> float:
    warm = max(steps // 20, 1)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def show(mode: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table."""
    measure.show(*cells(mode, rows))


def save(path: Path, mode: str, rows: list[dict[str, Any]], device: torch.device) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    measure.write_json(path, {**data, mode: {"facts": measure.facts(device), "rows": rows}})


MODES = {"linear": linear, "model": model, "parallel": parallel, "qlora": qlora, "loss": loss}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    rows = MODES[args.mode](args)
    if args.json and rows:
        save(args.json, args.mode, rows, torch.device(args.device))


if __name__ == "__main__":
    main()
