"""Every dtype under FSDP2 and DTensor on two gloo ranks: the packed fields move, the values do not change."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cases import CASES, SHAPE, weight
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ao.dtypes import Float8, Intx, QTensor
from ao.dtypes.sharding import _all_gather
from ao.quant import compute_error

N, K = SHAPE
WORLD = 2


def layer(spec, shape=SHAPE) -> nn.Linear:
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight = nn.Parameter(spec.quantize(weight(shape)), requires_grad=False)
    return linear


def check_dtensor(spec, mesh, rank):
    q = spec.quantize(weight())
    for placement in (Shard(0), Shard(1), Replicate()):
        sharded = distribute_tensor(q, mesh, [placement])
        assert isinstance(sharded, DTensor) and isinstance(sharded.to_local(), QTensor)
        local = q.dequantize() if placement.is_replicate() else q.dequantize().chunk(WORLD, placement.dim)[rank]
        assert torch.equal(sharded.to_local().dequantize(), local)
        whole = sharded.full_tensor()
        assert isinstance(whole, QTensor) and torch.equal(whole.dequantize(), q.dequantize())


def check_tensor_parallel(spec, mesh, rank):
    model = nn.Sequential(layer(spec), nn.ReLU(), layer(spec, (K, N)))
    x = weight((4, K), 1)
    expected = model(x)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert model[0].weight.to_local().shape == (N // WORLD, K) and model[2].weight.to_local().shape == (K, N // WORLD)
    # A shard of the activation has scales of its own, finer ones, so that only the rest agrees to rounding.
    assert compute_error(expected, model(x)) > (100 if spec.act is None else 25)


def check_fsdp(spec, mesh, rank):
    model = nn.Sequential(layer(spec), nn.ReLU(), layer(spec, (K, N)))
    x = weight((4, K), 1)
    expected = model(x)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    local = model[0].weight.to_local()
    assert isinstance(local, QTensor) and local.shape == (N // WORLD, K)
    sharded = model.state_dict()["0.weight"]
    assert torch.equal(sharded.full_tensor().dequantize(), weight_of(spec).dequantize())
    x.requires_grad_()
    model(x).sum().backward()  # an adapter below would get its gradient through the gathered weights
    assert x.grad.abs().sum() > 0


def weight_of(spec):
    return spec.quantize(weight())


def check_training(mesh, rank):
    """A trained int8 weight under FSDP2: the sharded step equals the single-process one."""
    torch.manual_seed(0)
    single, sharded = nn.Linear(64, 32), nn.Linear(64, 32)
    sharded.load_state_dict(single.state_dict())
    for module in (single, sharded):
        module.weight = nn.Parameter(Intx(8).quantize(module.weight.detach()))
    fully_shard(sharded, mesh=mesh)
    x, y = weight((8, 64), 1), weight((8, 32), 2)
    for module in (single, sharded):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(3):
            F.mse_loss(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert compute_error(single.weight.dequantize(), sharded.weight.full_tensor().dequantize()) > 60


def check_refusals(mesh, rank):
    """Uneven shards are refused, and on every rank alike."""
    model = nn.Sequential(layer(Intx(8), (33, 64)))
    fully_shard(model[0], mesh=mesh)
    with pytest.raises(ValueError, match="does not divide over 2 ranks"):
        model(weight((2, 64)))


def run(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for case in CASES:
        for check in (check_dtensor, check_tensor_parallel, check_fsdp):
            try:
                check(case.spec, mesh, rank)
            except Exception as error:
                raise AssertionError(f"{check.__name__} failed for {case}") from error
    check_training(mesh, rank)
    check_refusals(mesh, rank)
    dist.destroy_process_group()


def test_two_ranks():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run, (port,), nprocs=WORLD)


def test_one_gather_at_a_time(monkeypatch):
    """Two at once can corrupt the memory of a gloo group: see ao/dtypes/sharding.py."""
    ran = []

    def gather(t, group_size, group_name):
        ran.append("gather")
        return t.repeat(group_size, *[1] * (t.dim() - 1))

    def wait(t):
        ran.append("wait")
        return t

    ops = torch.ops._c10d_functional
    monkeypatch.setattr(ops, "all_gather_into_tensor", SimpleNamespace(default=gather))
    monkeypatch.setattr(ops, "wait_tensor", SimpleNamespace(default=wait))
    q = Intx(4, (1, 32), symmetric=False).quantize(weight())
    whole = _all_gather(q, WORLD, "group")
    assert ran == ["gather", "wait"] * 3
    assert torch.equal(whole.dequantize(), q.dequantize().repeat(WORLD, 1))


def gpu_run(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cuda", (WORLD,))
    for spec in (Intx(8), Intx(4, (1, 32)), Float8(act=Float8())):
        model = nn.Sequential(layer(spec), nn.ReLU(), layer(spec, (K, N))).cuda()
        x = weight((4, K), 1).cuda()
        expected = model(x)
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        assert torch.equal(model(x), expected)
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(gpu_run, (port,), nprocs=WORLD)
