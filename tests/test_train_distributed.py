"""Low-precision training on several ranks: every kind of weight under FSDP2, HSDP, tensor parallelism and both at once, with
activation checkpointing, compilation, and checkpoints that go on at another number of ranks.

Gloo on a CPU. One spawn of four ranks, one of two, and checks that share them; a check compares with the same model in a single
process. All ranks have the same data, so that averaged gradients are those of a single process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ao.dtypes import NF4, Float8, Intx, QTensor
from ao.quant import compute_error
from ao.train import (
    PRECISIONS,
    BitNetTrainingConfig,
    Float8ColwiseParallel,
    Float8LinearConfig,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
    convert_to_float8_training,
    convert_to_low_precision_training,
    convert_to_precision,
    convert_to_qlora,
    precompute_bitnet_scale_for_fsdp,
    precompute_float8_dynamic_scale_for_fsdp,
)
from ao.train.gather import CastOnGather

D, H = 64, 128
WHOLE = Float8(block=(-1, -1))
FROZEN = [Intx(8), Intx(4, (1, 32)), Float8(), WHOLE, NF4, Intx(8, act=Intx(8))]
TRAINED = [Intx(8), Intx(4, (1, 32)), Float8(), NF4, Intx(8, narrow=True, rounding="stochastic")]
GATHERED = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
BLOCKWISE = Float8LinearConfig.from_recipe_name("blockwise")


class Model(nn.Sequential):
    """Dynamo compiles the frames of users, not those of torch.nn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return Model(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D, bias=False))


def quantized(spec, trained: bool, seed: int = 0) -> nn.Sequential:
    model = plain(seed)
    for i in (0, 2):
        model[i].weight = nn.Parameter(spec.quantize(model[i].weight.detach()), requires_grad=trained)
    return model


def data(seed: int = 0, shape=(16, D)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shard(model: nn.Sequential, mesh) -> nn.Sequential:
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    return model


def tensor_parallel(model: nn.Sequential, mesh) -> nn.Sequential:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def two_dimensional(model: nn.Sequential, mesh) -> nn.Sequential:
    return shard(tensor_parallel(model, mesh["tp"]), mesh["dp"])


def full(p) -> torch.Tensor:
    p = p.full_tensor() if isinstance(p, DTensor) else p
    p = p.detach()
    return p.dequantize() if isinstance(p, QTensor) else p


def run_steps(
    model: nn.Module, steps: int = 2, apply: Callable = lambda m, x: m(x), after: Callable = lambda m: None
) -> list:
    """Outputs and input gradients of a few steps; parameters are trained if they can be."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2) if trained else None
    found = []
    for i in range(steps):
        x = data(i).requires_grad_()
        out = apply(model, x)
        F.mse_loss(out, data(i + 10)).backward()
        found += [out.detach(), x.grad]
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
            after(model)
    return found


def check_like_single(single: nn.Module, other: nn.Module, least: float, steps: int = 2, **kwargs) -> None:
    """Steps of a sharded model against those of the same one in this process, and the weights after them."""
    for a, b in zip(run_steps(single, steps), run_steps(other, steps, **kwargs), strict=True):
        assert compute_error(a, b) > least, compute_error(a, b)
    for (name, a), (_, b) in zip(single.named_parameters(), other.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad
        assert compute_error(full(a), full(b)) > least, (name, compute_error(full(a), full(b)))


def agreement(spec, trained: bool) -> float:
    """In dB: exact but for the order of sums; a code on an edge, or one that was rounded stochastically, may fall either way."""
    if spec.act is not None or getattr(spec, "rounding", "") == "stochastic":
        return 20
    return 15 if trained and getattr(spec, "bits", 8) == 4 else 22 if trained else 90


# Weights that are quantized.


def check_weights(mesh, parallelize, devices: int) -> None:
    for trained, specs in ((False, FROZEN), (True, TRAINED)):
        for spec in specs:
            try:
                model = parallelize(quantized(spec, trained), mesh)
                local = model[0].weight.to_local()
                assert isinstance(local, QTensor) and local.shape[0] == H // devices
                assert isinstance(local.scale, QTensor) == (spec == NF4)  # double quantization stays
                check_like_single(quantized(spec, trained), model, agreement(spec, trained))
                assert isinstance(model[0].weight.to_local(), QTensor)
            except Exception as error:
                raise AssertionError(f"{parallelize.__name__}, trained={trained}, {spec}") from error


def check_compiled_and_checkpointed(mesh) -> None:
    for make in (
        lambda: quantized(Intx(8), True),
        lambda: quantized(NF4, False),
        lambda: convert_to_float8_training(plain(), config=GATHERED),
        lambda: convert_to_qlora(plain(), rank=4),
    ):
        single, model = make(), make()
        model.compile(backend="aot_eager", fullgraph=True)
        fully_shard(model, mesh=mesh)
        check_like_single(single, model, 22, apply=lambda m, x: checkpoint(m, x, use_reentrant=False))


def check_replicas_agree(mesh) -> None:
    """Weights that are rounded stochastically are the same on all replicas, whatever the state of their generators."""
    torch.manual_seed(dist.get_rank())
    model = quantized(Intx(8, narrow=True, rounding="stochastic"), True)
    shard(model, mesh)
    torch.manual_seed(dist.get_rank())
    run_steps(model)
    for p in model.parameters():
        mine = p.to_local().qdata
        theirs = [torch.empty_like(mine) for _ in range(mesh.size(0))]
        dist.all_gather(theirs, mine, group=mesh.get_group(0))
        assert all(torch.equal(mine, other) for other in theirs)


# Products in low precision, and gathers.


def check_precisions(mesh, parallelize) -> None:
    """Every precision under a parallelism that PyTorch brings: as in a single process, or nearly so where a shard of a weight
    has scales of its own."""
    for name in PRECISIONS:
        if name in ("float8-blockwise", "mxfp4", "nvfp4"):
            continue  # blocks of 128 do not fit shards of this size; the others are rounded at random
        exact = name in ("bf16", "float8-rowwise") or (parallelize is shard and name != "int8-weight-only")
        after = precompute_bitnet_scale_for_fsdp if name == "bitnet" and parallelize is shard else lambda m: None
        single, model = (convert_to_precision(plain(), name) for _ in range(2))
        try:
            check_like_single(single, parallelize(model, mesh), 90 if exact else 13, after=after)
        except Exception as error:
            raise AssertionError(f"{parallelize.__name__}, {name}") from error


class Counter:
    """Bytes and calls of the collectives that FSDP2 and the scales use."""

    def __enter__(self):
        self.gathered = self.reductions = 0
        self.gather, self.reduce = dist.all_gather_into_tensor, dist.all_reduce

        def gather(output, *args, **kwargs):
            self.gathered += output.nbytes
            return self.gather(output, *args, **kwargs)

        def reduce(*args, **kwargs):
            self.reductions += 1
            return self.reduce(*args, **kwargs)

        dist.all_gather_into_tensor, dist.all_reduce = gather, reduce
        return self

    def __exit__(self, *args):
        dist.all_gather_into_tensor, dist.all_reduce = self.gather, self.reduce


class Reciprocals(TorchDispatchMode):
    """How many are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.reciprocal.default
        return func(*args, **(kwargs or {}))


def check_gathers(mesh) -> None:
    """Half the bytes of bfloat16, scales and their reciprocals at once for all weights, and the numbers of a single process."""
    gathered = {}
    x = data().to(torch.bfloat16)
    for name, config, precompute in (
        ("bf16", None, None),
        ("float8", GATHERED, precompute_float8_dynamic_scale_for_fsdp),
        ("bitnet", BitNetTrainingConfig(), precompute_bitnet_scale_for_fsdp),
    ):
        single = plain().to(torch.bfloat16)
        if config is not None:
            convert_to_low_precision_training(single, config)
        model = shard(copy.deepcopy(single), mesh)
        if precompute is not None:
            assert all(isinstance(p.to_local(), CastOnGather) for p in model.parameters())
            with Counter() as counter, Reciprocals() as reciprocals:
                precompute(model)
            assert counter.reductions == reciprocals.count == 1
        with Counter() as counter, Reciprocals() as reciprocals, torch.no_grad():
            out = model(x)
        assert reciprocals.count == (0 if config is None else 2)  # of the inputs of two layers
        gathered[name] = counter.gathered
        assert counter.reductions == 0 and compute_error(single(x), out) > (25 if name == "bitnet" else 100)
    assert gathered["float8"] * 2 == gathered["bf16"] and gathered["bitnet"] * 8 == gathered["bf16"]


def check_float8_gather_trains(mesh, parallelize=shard, devices: int = 2) -> None:
    """With and without computing scales ahead, the weights are those of a single process; a scale is never used too late."""
    for after in (precompute_float8_dynamic_scale_for_fsdp, lambda m: None):
        single = convert_to_float8_training(plain(), config=GATHERED)
        model = parallelize(convert_to_float8_training(plain(), config=GATHERED), mesh)
        local = model[0].weight.to_local()
        assert isinstance(local, CastOnGather) and len(local) == H // devices
        check_like_single(single, model, 60 if parallelize is shard else 13, steps=3, after=after)
        state = model.state_dict()["0.weight"]
        assert isinstance(state, DTensor) and type(state.to_local()) is torch.Tensor  # a checkpoint like any other
        assert torch.equal(state.full_tensor(), full(model[0].weight))


def check_float8_tensor_parallel(mesh, rank: int) -> None:
    """Sequence parallelism with communication in float8, against PyTorch's own styles, which communicate in float32."""
    x, grad = data(0, (2, 32, D)), data(1, (2, 32, D))
    part = lambda t: t.chunk(2, 1)[rank].contiguous()  # noqa: E731
    found = {}
    for name in ("torch", "float8", "prepared"):
        col, row = (
            (ColwiseParallel, RowwiseParallel) if name == "torch" else (Float8ColwiseParallel, Float8RowwiseParallel)
        )
        first = col() if name == "prepared" else col(input_layouts=Shard(1))
        model = nn.ModuleDict({"ffn": convert_to_float8_training(plain())})
        plan = {"ffn.0": first, "ffn.2": row(output_layouts=Shard(1))}
        if name == "prepared":
            plan["ffn"] = PrepareFloat8ModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        parallelize_module(model, mesh, plan)
        local = part(x).requires_grad_()
        out = model["ffn"](local)
        out.backward(part(grad))
        found[name] = [out.detach(), local.grad, *(full(p.grad) for p in model.parameters())]
    for name in ("float8", "prepared"):
        assert all(compute_error(a, b) > 18 for a, b in zip(found["torch"], found[name], strict=True))
    with pytest.raises(ValueError, match="Float8ColwiseParallel: Linear does not train in float8"):
        parallelize_module(plain(), mesh, {"0": Float8ColwiseParallel()})
    rowwise = convert_to_precision(plain(), "float8-rowwise")
    with pytest.raises(ValueError, match="communicates in float8 with one scale, which the recipe"):
        parallelize_module(rowwise, mesh, {"2": Float8RowwiseParallel()})


def check_refusals(mesh) -> None:
    """On every rank alike, before anything is sent: none of these leaves another rank waiting."""
    uneven = nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 33, bias=False))
    bad = convert_to_low_precision_training(copy.deepcopy(uneven), BitNetTrainingConfig())
    with pytest.raises(ValueError, match="does not divide over 2 ranks"):
        shard(bad, mesh)(data(0, (4, 32)))
    whole = quantized(WHOLE, True)
    with pytest.raises(ValueError, match="spans dim 0, and each rank would choose its own"):
        shard(whole, mesh)(data())
    sharded = shard(plain(), mesh)
    with pytest.raises(ValueError, match="0 is a FSDPLinear; convert the model before fully_shard"):
        convert_to_float8_training(sharded)
    parallel = tensor_parallel(plain(), mesh)
    with pytest.raises(ValueError, match="0: the weight is a DTensor already; convert the model before it is sharded"):
        convert_to_float8_training(parallel, config=GATHERED)
    with pytest.raises(ValueError, match="no weight of this module is sharded and cast before it is gathered"):
        precompute_float8_dynamic_scale_for_fsdp(sharded)
    dist.barrier()


# Checkpoints.


CHECKPOINTS = {
    "int8": lambda seed: quantized(Intx(8), True, seed),
    "int4": lambda seed: quantized(Intx(4, (1, 32)), False, seed),
    "nf4": lambda seed: convert_to_qlora(quantized(NF4, False, seed), rank=4),
    "float8": lambda seed: convert_to_float8_training(plain(seed), config=GATHERED),
}


def expected(name: str) -> dict[str, torch.Tensor]:
    return {key: full(t) for key, t in CHECKPOINTS[name](0).state_dict().items() if "lora" not in key}


def save_checkpoints(mesh, parallelize, folder: str) -> None:
    for name, make in CHECKPOINTS.items():
        dcp.save(parallelize(make(0), mesh).state_dict(), checkpoint_id=f"{folder}/{name}-{parallelize.__name__}")


def load_checkpoints(model_of: Callable, folder: str, saved_by: list[str], **kwargs) -> None:
    for name, make in CHECKPOINTS.items():
        for style in saved_by:
            model = model_of(make(1))
            state = model.state_dict()
            dcp.load(state, checkpoint_id=f"{folder}/{name}-{style}", **kwargs)
            model.load_state_dict(state)
            for key, value in expected(name).items():
                assert torch.equal(full(model.state_dict()[key]), value), (name, style, key)


# Processes.


def four(rank: int, folder: str) -> None:
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    check_weights(hybrid, shard, 2)
    check_replicas_agree(hybrid)
    check_float8_gather_trains(hybrid)
    check_weights(both, two_dimensional, 4)
    check_float8_gather_trains(both, two_dimensional, 4)
    check_precisions(both, two_dimensional)
    flat = init_device_mesh("cpu", (4,))
    save_checkpoints(flat, shard, folder)
    save_checkpoints(both, two_dimensional, folder)


def two(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    check_weights(mesh, shard, 2)
    check_weights(mesh, tensor_parallel, 2)
    check_compiled_and_checkpointed(mesh)
    check_precisions(mesh, shard)
    check_precisions(mesh, tensor_parallel)
    check_gathers(mesh)
    check_float8_gather_trains(mesh)
    check_float8_tensor_parallel(mesh, rank)
    check_refusals(mesh)
    load_checkpoints(lambda m: shard(m, mesh), folder, ["shard", "two_dimensional"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_four_ranks_then_two_then_one(tmp_path):
    folder = str(tmp_path)
    spawn(four, 4, folder)
    spawn(two, 2, folder)
    load_checkpoints(lambda m: m, folder, ["shard", "two_dimensional"], no_dist=True)
