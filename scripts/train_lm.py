"""Train a small Llama-architecture language model on the Python standard library of this machine, byte by byte.

    scripts/train_lm.py --optim adamw adamw8bit adamw4bit adamwfp8 --out out/optim --plot out/optim.svg

trains one run per optimizer, all on the same batches from the same weights, and prints what they come to: the loss of the
last steps, the loss on held-out files, bytes of state per parameter, peak memory, time. Each run has a folder in --out, with
its log and its last checkpoint. A run that was killed goes on from there when the same command is given again, and comes to
the same numbers, bit for bit on a CPU. Under torchrun the model and the optimizer are sharded with FSDP2.

--sparse has all linear layers but the head compute with 2:4 weights: pruned at every step along rows and columns
(SemiSparseLinear), or with "fake" along rows alone, with a decay of what is pruned (SR-STE).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from llama import Llama, LlamaConfig
from lm_text import STDLIB, texts_of
from optim_page import draw
from torch import Tensor, nn

from ao import is_linear, optim
from ao.sparsity import SemiSparseLinear, fake_sparsify_, swap_linear_with_semi_sparse_linear
from ao.train import PRECISIONS, convert_to_precision

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": optim.AdamW8bit,
    "adamw4bit": optim.AdamW4bit,
    "adamwfp8": optim.AdamWFp8,
    "adamw-sr": lambda params, **more: optim.AdamW(params, bf16_stochastic_round=True, **more),
    "adam8bit": optim.Adam8bit,
    "lion8bit": optim.Lion8bit,
    "sgd": lambda params, **more: torch.optim.SGD(params, momentum=0.9, **more),
    "sgd8bit": optim.SGD8bit,
}
LAST = 50
"""The steps whose mean loss is the final one: a single batch says little."""
EVERY = 5
"""The steps that are one point of the curves in --json."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/train_lm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optim", nargs="+", default=["adamw8bit"], choices=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=list(PRECISIONS), metavar="NAME")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument(
        "--sparse", nargs="?", const="masks", choices=["masks", "fake"], help="2:4 weights; default: masks"
    )
    parser.add_argument("--offload", action="store_true", help="states and steps on the host (CPUOffloadOptimizer)")
    parser.add_argument("--lr", type=float, default=2e-3, help="at its peak; default: 2e-3")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="of the norm of the gradient; default: 1")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--batch", type=int, default=8, help="windows per step, over all ranks")
    parser.add_argument("--length", type=int, default=256, help="bytes of a window")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="on a CPU; default: PyTorch's")
    parser.add_argument("--compile", action="store_true", help="the model")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("out/train_lm"), help="default: out/train_lm")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of the same names that are there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="loss curves of all runs in --out (.svg, .png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what scripts/optim_page.py shows")
    args = parser.parse_args(argv)
    if args.dim % (2 * args.heads):
        parser.error("--dim must be a multiple of 2 * --heads")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


@dataclass
class Ranks:
    """The processes of torchrun, or this one alone."""

    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    count: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))

    def start(self, device: str) -> torch.device:
        if self.count == 1:
            return torch.device(device)
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        if device != "cuda":
            return torch.device(device)
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def mean(self, t: Tensor) -> Tensor:
        if self.count > 1:
            torch.distributed.all_reduce(t)
            t /= self.count
        return t


class Corpus:
    """The bytes of the standard library; one file in twenty is held out."""

    def __init__(self, length: int, batch: int, seed: int) -> None:
        texts = [text.encode() + b"\0" for text in texts_of([STDLIB])]
        self.train = self._bytes([t for i, t in enumerate(texts) if i % 20])
        self.held_out = self._bytes([t for i, t in enumerate(texts) if i % 20 == 0])
        self.length, self.batch, self.seed = length, batch, seed

    @staticmethod
    def _bytes(texts: list[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)

    def at(self, step: int) -> Tensor:
        """The batch of a step, (batch, length + 1): a function of the seed and the step alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - self.length - 1, (self.batch,), generator=generator)
        return self.train[starts[:, None] + torch.arange(self.length + 1)].long()

    def windows(self, most: int = 64) -> Tensor:
        """Held-out windows, (n, length + 1), evenly spaced."""
        starts = torch.linspace(0, len(self.held_out) - self.length - 1, most).long()
        return self.held_out[starts[:, None] + torch.arange(self.length + 1)].long()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss over the windows, in nats per byte."""
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    logits = model(ids[:, :-1], positions)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class Run:
    """One training run with its folder."""

    def __init__(self, args: argparse.Namespace, name: str, precision: str, ranks: Ranks, device: torch.device) -> None:
        self.args, self.ranks, self.device = args, ranks, device
        self.name = name if precision == "bf16" else f"{name}-{precision}"
        self.name += f"-sparse-{args.sparse}" if args.sparse else ""
        self.name += "-offload" if args.offload else ""
        self.folder = args.out / self.name
        kept = ("lr", "weight_decay", "clip", "steps", "warmup", "batch", "length", "dim", "layers", "heads", "seed")
        self.settings = {key: getattr(args, key) for key in (*kept, "dtype", "offload")}
        self.settings |= {"optim": name, "precision": precision, "ranks": ranks.count}
        self.settings |= {"sparse": args.sparse} if args.sparse else {}
        torch.manual_seed(args.seed)
        hidden = (args.dim * 8 // 3 + 31) // 32 * 32
        config = LlamaConfig(args.dim, args.layers, args.heads, args.heads, args.dim // args.heads, hidden, 256)
        self.model = Llama(config).to(getattr(torch, args.dtype))
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.model.to(device)
        self.model.make_rotary(args.length)
        head = self.model.head
        convert_to_precision(self.model, precision, module_filter_fn=lambda module, _: module is not head)
        sparse = {n: SemiSparseLinear for n, m in self.model.named_modules() if is_linear(m, n) and m is not head}
        if args.sparse == "masks":
            swap_linear_with_semi_sparse_linear(self.model, sparse)
        elif args.sparse == "fake":
            fake_sparsify_(self.model, lambda _, name: name in sparse)
        if ranks.count > 1:
            from torch.distributed.fsdp import fully_shard

            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        settings = {"lr": args.lr, "weight_decay": args.weight_decay}
        if args.offload:
            cls: Any = OPTIMIZERS[name]
            self.optimizer: Any = optim.CPUOffloadOptimizer(self.model.named_parameters(), cls, **settings)
        else:
            self.optimizer = OPTIMIZERS[name](self.model.parameters(), **settings)
        self.forward: Any = torch.compile(self.model) if args.compile else self.model
        self.losses: list[float] = []
        self.seconds: list[float] = []

    # Checkpoints.

    def save(self) -> None:
        """Write a checkpoint; the one before is there until this one is whole."""
        step = len(self.losses)
        folder = self.folder / f"step-{step:06}"
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        path = folder / f"rank-{self.ranks.rank}.pt"
        torch.save(state, path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        self.ranks.wait()
        if self.ranks.rank == 0:
            measure.write_json(self.folder / "latest.json", {"step": step, "settings": self.settings})
            for old in self.folder.glob("step-*"):
                if old != folder:
                    shutil.rmtree(old)
        self.ranks.wait()

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one. Raises SystemExit for one of other settings."""
        latest = self.folder / "latest.json"
        if self.args.fresh and self.ranks.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.ranks.wait()
        if not latest.exists():
            return
        found = json.loads(latest.read_text())
        if found["settings"] != self.settings:
            odd = [k for k, v in self.settings.items() if found["settings"].get(k) != v]
            raise SystemExit(
                f"error: {self.folder} has a run with another {', '.join(odd)}; give --fresh or another --out"
            )
        path = self.folder / f"step-{found['step']:06}" / f"rank-{self.ranks.rank}.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.losses, self.seconds = state["losses"], state["seconds"]

    # Training.

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.args.warmup:
            return self.args.lr * (step + 1) / self.args.warmup
        done = (step - self.args.warmup) / max(1, self.args.steps - self.args.warmup)
        return self.args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def train(self, corpus: Corpus) -> None:
        self.resume()
        measure.reset_peak(self.device)
        share = self.args.batch // self.ranks.count
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        bar = progress_bar(self.name, self.args.steps, len(self.losses), self.ranks.rank == 0)
        for step in range(len(self.losses), self.args.steps):
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            loss = loss_of(self.forward, corpus.at(step)[mine].to(self.device))
            loss.backward()
            if self.args.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(self.ranks.mean(loss.detach()).item())
            self.seconds.append(time.perf_counter() - start)
            bar(self.losses[-1])
            if len(self.losses) % self.args.checkpoint_every == 0 or len(self.losses) == self.args.steps:
                self.save()
        bar(None)

    @torch.no_grad()
    def row(self, corpus: Corpus) -> dict[str, Any]:
        """What the run comes to."""
        held_out = [loss_of(self.model, ids.to(self.device)).item() for ids in corpus.windows().split(8)]
        return {
            "run": self.name,
            "parameters": self.parameters,
            "loss": statistics.mean(self.losses[-LAST:]),
            "held_out": statistics.mean(held_out),
            "state_bytes": state_bytes(self.optimizer),
            "peak_bytes": measure.used_bytes(self.device, peak=True),
            "ms_per_step": 1e3 * statistics.median(self.seconds),
            "settings": self.settings,
            "losses": [round(loss, 5) for loss in self.losses],
        }


def state_bytes(optimizer: Any) -> int:
    """Bytes of the states of this rank, steps aside."""
    total = getattr(optimizer, "state_nbytes", None)
    if total is not None:
        return int(total)
    seen: dict[int, int] = {}
    for state in optimizer.state.values():
        for t in state.values():
            if isinstance(t, Tensor):
                mine: Any = t.to_local() if hasattr(t, "to_local") else t
                seen[id(t)] = mine.nbytes_packed if hasattr(mine, "nbytes_packed") else mine.nbytes
    return sum(seen.values())


def progress_bar(name: str, steps: int, done: int, shown: bool) -> Callable[[float | None], None]:
    """A function that takes the loss of every step: a bar on a terminal that has tqdm, else a line for every tenth."""
    if shown and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm  # type: ignore[import-untyped]

        bar = tqdm(total=steps, initial=done, desc=name)

        def advance(loss: float | None) -> None:
            if loss is None:
                bar.close()
            else:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

        return advance
    count, start = done, time.perf_counter()

    def line(loss: float | None) -> None:
        nonlocal count
        if loss is not None:
            count += 1
            if shown and (count % max(1, steps // 10) == 0 or count == steps):
                print(f"{name}: step {count}/{steps}, loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)

    return line


def show(rows: list[dict[str, Any]]) -> None:
    """The table of all runs."""
    base = next((row for row in rows if row["settings"]["optim"] == "adamw"), None)
    lines = []
    for row in rows:
        change = "" if base is None or row is base else f" ({100 * (row['loss'] / base['loss'] - 1):+.2f}%)"
        lines.append(
            [
                row["run"],
                f"{row['loss']:.4f}{change}",
                f"{row['held_out']:.4f}",
                f"{row['state_bytes'] / row['parameters'] * row['settings']['ranks']:.2f}",
                f"{row['peak_bytes'] / 1e6:,.0f}",
                f"{row['ms_per_step']:.1f}",
            ]
        )
    head = ["run", f"loss, last {LAST} steps", "held out", "state bytes per parameter", "peak MB", "ms per step"]
    measure.show(head, lines)


def summary(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What scripts/optim_page.py shows: losses as means of `EVERY` steps, and how far a run is from that of "adamw"."""
    base = next((row for row in rows if row["settings"]["optim"] == "adamw"), None)
    made = []
    for row in rows:
        losses = [round(statistics.mean(row["losses"][i : i + EVERY]), 4) for i in range(0, len(row["losses"]), EVERY)]
        change = None if base is None or row is base else row["loss"] / base["loss"] - 1
        made.append({**row, "change": change, "every": EVERY, "losses": losses})
    return {"facts": measure.facts(device), "rows": made}


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every run, print the table, draw. Returns the rows of this command."""
    ranks = Ranks()
    device = ranks.start(args.device)
    if args.batch % ranks.count:
        raise SystemExit(f"error: --batch {args.batch} must be a multiple of the {ranks.count} ranks")
    if device.type == "cpu" and args.threads:
        torch.set_num_threads(args.threads)
    corpus = Corpus(args.length, args.batch, args.seed)
    rows = []
    for precision in args.precision:
        for name in args.optim:
            run = Run(args, name, precision, ranks, device)
            run.train(corpus)
            rows.append(run.row(corpus))
            if ranks.rank == 0:
                measure.write_json(run.folder / "log.json", {**measure.facts(device), **rows[-1]})
            del run
            gc.collect()
            if args.compile:
                torch._dynamo.reset()  # else the next model counts as a recompilation of this one
    if ranks.rank == 0:
        show(rows)
        if args.json:
            data = json.loads(args.json.read_text()) if args.json.exists() else {}
            measure.write_json(args.json, {**data, "loss": summary(rows, device)})
        if args.plot:
            draw([json.loads(path.read_text()) for path in sorted(args.out.glob("*/log.json"))], args.plot)
    if ranks.count > 1:
        torch.distributed.destroy_process_group()
    return rows


if __name__ == "__main__":
    main(parse())
