"""The low-bit optimizers on sharded parameters, on two gloo ranks: as in a single process, up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import spawn
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ao.dtypes import FlatTensor
from ao.optim import AdamW, AdamW4bit, AdamW8bit, AdamWFp8, LAMB8bit, LowBitOptimizer

WORLD = 2
CLASSES = (AdamW, AdamW8bit, AdamW4bit, AdamWFp8, LAMB8bit)


def model(device: str, width: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)).to(device)


def sharded(device: str, mesh, width: int = 128) -> nn.Sequential:
    m = model(device, width)
    for part in (m[0], m[2], m):
        fully_shard(part, mesh=mesh)
    return m


def train(m: nn.Module, optimizer: LowBitOptimizer, steps: int, device: str, start: int = 0) -> None:
    """Every rank has the same data, so that the averaged gradient is that of a single process."""
    for i in range(start, start + steps):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(i)).to(device)
        (m(x) - x.roll(1, 1)).square().mean().backward()
        nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def full(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def distance(a: nn.Module, b: nn.Module) -> float:
    return max((full(p) - full(q)).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def check_fsdp(cls, mesh, device):
    """A rank's shard holds whole blocks, so that the states are those of a single process."""
    single, m = model(device), sharded(device, mesh)
    a, b = cls(single.parameters(), lr=1e-2, compile=False), cls(m.parameters(), lr=1e-2, compile=False)
    train(single, a, 5, device), train(m, b, 5, device)
    # Codes that sit on the edge between two values may fall to either side.
    assert distance(single, m) < (1e-5 if cls is AdamW else 2e-3)
    for p in m.parameters():
        state = b.state[p]["exp_avg"]
        assert isinstance(state, DTensor) and state.shape == p.shape and state.placements == p.placements
    weight = b.state[m[0].weight]["exp_avg"]
    if cls is not AdamW:
        assert isinstance(weight.to_local(), FlatTensor) and isinstance(weight.full_tensor(), FlatTensor)
        ours, theirs = weight.full_tensor().dequantize(), a.state[single[0].weight]["exp_avg"].dequantize()
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def check_uneven(cls, mesh, device):
    """Shards of different sizes, and one that is not quantized beside one that is."""
    single, m = model(device, 129), sharded(device, mesh, 129)
    a, b = cls(single.parameters(), lr=1e-2, compile=False), cls(m.parameters(), lr=1e-2, compile=False)
    train(single, a, 3, device), train(m, b, 3, device)
    assert distance(single, m) < (1e-5 if cls is AdamW else 2e-2)


def check_tensor_parallel(cls, mesh, device):
    single, m = model(device, 256), model(device, 256)
    parallelize_module(m, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    a, b = cls(single.parameters(), lr=1e-2, compile=False), cls(m.parameters(), lr=1e-2, compile=False)
    for o, n in ((a, single), (b, m)):
        for i in range(3):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(i)).to(device)
            n(x).square().mean().backward()
            o.step()
            o.zero_grad()
    assert distance(single, m) < (1e-5 if cls is AdamW else 2e-2)


def check_checkpoint(cls, mesh, device, folder):
    """Saved and loaded by distributed checkpoint, training goes on bit for bit."""
    straight = sharded(device, mesh)
    optimizer = cls(straight.parameters(), lr=1e-2, compile=False)
    train(straight, optimizer, 2, device)
    path = f"{folder}/{cls.__name__}"
    dcp.save(
        {"model": straight.state_dict(), "optimizer": get_optimizer_state_dict(straight, optimizer)},
        checkpoint_id=path,
    )
    resumed = sharded(device, mesh)
    other = cls(resumed.parameters(), lr=1e-2, compile=False)
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
    dcp.load(state, checkpoint_id=path)
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    for m, o in ((straight, optimizer), (resumed, other)):
        train(m, o, 2, device, start=2)
    assert distance(straight, resumed) == 0


def check_from_single(cls, mesh, device):
    """A state dict of one process loads into shards, and torch's form of it is whole."""
    single, m = model(device), sharded(device, mesh)
    a, b = cls(single.parameters(), lr=1e-2, compile=False), cls(m.parameters(), lr=1e-2, compile=False)
    train(single, a, 2, device), train(m, b, 2, device)
    b.load_state_dict(a.state_dict())
    for p, q in zip(single.parameters(), m.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            ours, theirs = b.state[q][name], a.state[p][name]
            assert isinstance(ours, DTensor) and b.state[q]["step"] == 2
            assert torch.equal(values(full(ours)), values(theirs))


def values(t):
    return t.dequantize() if isinstance(t, FlatTensor) else t


def run(rank: int, device: str, folder: str) -> None:
    mesh = init_device_mesh(device, (WORLD,))
    for cls in CLASSES:
        for check in (check_fsdp, check_uneven, check_tensor_parallel, check_from_single):
            try:
                check(cls, mesh, device)
            except Exception as error:
                raise AssertionError(f"{check.__name__} failed for {cls.__name__}") from error
        check_checkpoint(cls, mesh, device, folder)


def test_two_ranks(tmp_path):
    spawn(run, WORLD, "cpu", str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus(tmp_path):
    spawn(run, WORLD, "cuda", str(tmp_path), backend="nccl")
