"""Every dtype under FSDP2, DTensor and data parallelism on two gloo ranks: packed fields move, values do not change."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import CASES, SHAPE, weight
from ranks import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ao.dtypes import NF4, Float8, Intx, QTensor
from ao.dtypes.sharding import _all_gather
from ao.quant import compute_error
from ao.train import convert_to_low_precision_training, int8_weight_only_quantized_training

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


def run(rank: int) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for case in CASES:
        for check in (check_dtensor, check_tensor_parallel, check_fsdp):
            try:
                check(case.spec, mesh, rank)
            except Exception as error:
                raise AssertionError(f"{check.__name__} failed for {case}") from error
    check_training(mesh, rank)
    check_refusals(mesh, rank)


def test_two_ranks():
    spawn(run, WORLD)


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


def gpu_run(rank: int) -> None:
    mesh = init_device_mesh("cuda", (WORLD,))
    for spec in (Intx(8), Intx(4, (1, 32)), Float8(act=Float8())):
        model = nn.Sequential(layer(spec), nn.ReLU(), layer(spec, (K, N))).cuda()
        x = weight((4, K), 1).cuda()
        expected = model(x)
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        assert torch.equal(model(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus():
    spawn(gpu_run, WORLD, backend="nccl")


# DistributedDataParallel, FullyShardedDataParallel and plain collectives.

FLATTENED = [
    Intx(8),
    Intx(4, (1, 32)),
    Intx(6, (16, 32)),
    NF4,
    Float8(act=Float8()),
]
"""Also one that has no flat form: its blocks span rows."""


class Adapted(nn.Module):
    """Frozen quantized layers, one of rows that end within a packed chunk, with an adapter beside them."""

    def __init__(self, spec, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base, self.a, self.b = nn.Linear(64, 48), nn.Linear(64, 4, bias=False), nn.Linear(4, 48, bias=False)
        self.base.weight = nn.Parameter(spec.quantize(self.base.weight.detach()), requires_grad=False)
        self.odd = nn.Linear(48, 16, bias=False)
        self.odd.weight = nn.Parameter(Intx(4).quantize(self.odd.weight.detach()), requires_grad=False)
        self.base.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return self.norm(self.odd(self.base(x) + self.b(self.a(x))))


def steps(model: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Three steps; the trained parameters after them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for x in inputs:
        model(x).square().sum(-1).sub(1).square().mean().backward()
        assert all(p.requires_grad or p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trained]


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), (_, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert type(p) is type(q) and torch.equal(p, q), name


def inputs_of(rank: int) -> list[torch.Tensor]:
    return [weight((8, 64), 10 * i + rank) for i in range(3)]


def check_ddp(spec, rank):
    """Rank 0's codes are everybody's, bit for bit; only adapters get gradients, averaged over the ranks."""
    model = DistributedDataParallel(Adapted(spec, seed=rank))
    same(model.module, Adapted(spec))
    # The statistics of batch norm are those of a rank: in evaluation mode two ranks are one process with both batches.
    single = Adapted(spec).eval()
    expected = steps(single, [torch.cat(both) for both in zip(inputs_of(0), inputs_of(1))])
    for a, b in zip(expected, steps(model.eval(), inputs_of(rank)), strict=True):
        assert compute_error(a, b) > 80
    assert torch.equal(model.module.base.weight, single.base.weight)
    model = DistributedDataParallel(Adapted(spec), init_sync=False)
    for a, b in zip(expected, steps(model.eval(), inputs_of(rank)), strict=True):
        assert compute_error(a, b) > 80
    names = [name for name, p in model.module.named_parameters() if isinstance(p, QTensor)]
    ignored = Adapted(spec)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignored, names)
    steps(DistributedDataParallel(ignored).eval(), inputs_of(rank))


def check_fsdp1(spec, rank):
    """Refused, in a message that names two ways, both of which work; nothing has changed by then."""
    for use_orig_params in (True, False):
        wrap = functools.partial(
            FullyShardedDataParallel, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        refused = Adapted(spec)
        # Several parameters, for which PyTorch has a refusal of its own in the old form, and one alone.
        for part in (refused, refused.odd) if use_orig_params else (refused.odd,):
            with pytest.raises(NotImplementedError, match="fully_shard.*ignored_states"):
                wrap(part)
        same(refused, Adapted(spec))
        refused(weight((2, 64)))
        model = Adapted(spec)
        frozen = [p for p in model.parameters() if isinstance(p, QTensor) or not p.requires_grad]
        base = model.base.weight
        wrapped = wrap(model, ignored_states=frozen).eval()
        steps(wrapped, inputs_of(rank))
        assert wrapped.module.base.weight is base
        single = Adapted(spec).eval()
        steps(single, [torch.cat(both) for both in zip(inputs_of(0), inputs_of(1))])
        assert compute_error(single(weight((4, 64))), wrapped(weight((4, 64)))) > 80


def check_trained(rank):
    """Weights that stay int8, with rounding that is the same on every rank."""

    def model(seed):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        return convert_to_low_precision_training(made, int8_weight_only_quantized_training())

    single, wrapped = model(0), DistributedDataParallel(model(rank))
    steps(single, [torch.cat(both) for both in zip(inputs_of(0), inputs_of(1))])
    steps(wrapped, inputs_of(rank))
    assert compute_error(single[0].weight.dequantize(), wrapped.module[0].weight.dequantize()) > 25
    codes = wrapped.module[0].weight.qdata
    others = [torch.empty_like(codes) for _ in range(WORLD)]
    dist.all_gather(others, codes)
    assert torch.equal(*others)


def check_broadcast(spec, rank):
    q = spec.quantize(weight(seed=rank))
    dist.broadcast(q, 0)
    assert torch.equal(q, spec.quantize(weight()))


def run_data_parallel(rank: int) -> None:
    for spec in FLATTENED:
        for check in (check_ddp, check_fsdp1, check_broadcast):
            try:
                check(spec, rank)
            except Exception as error:
                raise AssertionError(f"{check.__name__} failed for {spec}") from error
    check_trained(rank)


def test_data_parallel():
    spawn(run_data_parallel, WORLD)


def test_a_vector_of_parameters():
    """Codes have no common form, and values in one would not be the model's."""
    model = Adapted(Intx(8))
    with pytest.raises(NotImplementedError, match=r"cannot cat .*call .dequantize\(\) on each first"):
        torch.nn.utils.parameters_to_vector(model.base.parameters())
    before = model.base.weight.clone()
    with pytest.raises(TypeError, match="cannot assign a plain tensor to the data of Intx"):
        size = sum(p.numel() for p in model.parameters())
        torch.nn.utils.vector_to_parameters(torch.zeros(size), model.parameters())
    assert torch.equal(model.base.weight, before)
