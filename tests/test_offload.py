"""CPUOffloadOptimizer: the same numbers as without, in every kind of training loop."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from ao.optim import AdamW8bit, CPUOffloadOptimizer


def model(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.LayerNorm(80), nn.GELU(), nn.Linear(80, 64)).to(device, dtype)


def data(step, device="cpu", dtype=torch.float32):
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(device, dtype)


def loss_of(net, step):
    p = next(net.parameters())
    return net(data(step, p.device, p.dtype)).float().square().mean()


def train(net, optimizer, steps=4, clip=None, scheduler=None, micro=1, start=0):
    for step in range(start, start + steps):
        for i in range(micro):
            (loss_of(net, step * micro + i) / micro).backward()
        if clip is not None:
            clip(net, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def torch_clip(net, optimizer):
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)


def own_clip(net, optimizer):
    if isinstance(optimizer, CPUOffloadOptimizer):
        optimizer.clip_grad_norm_(0.05)
    else:
        torch_clip(net, optimizer)


def assert_equal(a, b, exactly=True):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        if exactly:
            assert torch.equal(p, q), name
        else:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_memory_is_freed(device):
    """With the optimizer and the model, whose hooks know each other; and a model survives its optimizer."""
    net = model(device)
    optimizer = CPUOffloadOptimizer(net.parameters(), lr=1e-2)
    train(net, optimizer, 1)
    on_host, weight = (weakref.ref(t) for t in (optimizer._offloaded[net[0].weight].copy, net[0].weight))
    del optimizer
    gc.collect()
    assert on_host() is None
    loss_of(net, 0).backward()
    assert net[0].weight.grad is not None
    optimizer = CPUOffloadOptimizer(net.parameters(), lr=1e-2, offload_gradients=True)
    net.zero_grad()
    train(net, optimizer, 1)
    del net, optimizer
    gc.collect()
    assert weight() is None


CLASSES = [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
    (AdamW8bit, {"lr": 1e-2, "block_size": 64, "compile": False}),
]


@pytest.mark.parametrize("gradients", [False, True], ids=["keep", "offload"])
@pytest.mark.parametrize("cls, settings", CLASSES, ids=lambda c: getattr(c, "__name__", ""))
def test_the_same_numbers(cls, settings, gradients, device):
    """Accumulation, clipping and a scheduler at once."""
    plain, offloaded = model(device), model(device)
    a = cls(plain.parameters(), **settings)
    b = CPUOffloadOptimizer(offloaded.parameters(), cls, offload_gradients=gradients, **settings)
    for net, optimizer in ((plain, a), (offloaded, b)):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
        train(net, optimizer, 5, own_clip if gradients else torch_clip, scheduler, micro=2)
    assert b.param_groups[0]["lr"] == pytest.approx(a.param_groups[0]["lr"])
    if device == "cuda" and cls is AdamW8bit:
        # One steps on the GPU, the other on the CPU: a last bit apart, now and then a state rounds to the next code.
        for p, q in zip(plain.parameters(), offloaded.parameters()):
            off = (p - q).abs()
            assert (off > 1e-6 + 1e-5 * p.abs()).float().mean() < 0.01 and off.max() < settings["lr"]
    else:
        assert_equal(plain, offloaded, exactly=False)
    if gradients:
        loss_of(offloaded, 0).backward()
        assert offloaded[0].weight.grad is None and offloaded[0].bias.grad is not None  # the small one stays


def test_where_things_are(device):
    net = model(device)
    optimizer = CPUOffloadOptimizer(net.named_parameters(), lr=1e-2)
    train(net, optimizer, 1)
    state = optimizer.state[net[0].weight]
    assert state["exp_avg"].device.type == "cpu" and state["exp_avg"].shape == net[0].weight.shape
    assert optimizer.state[net[0].bias]["exp_avg"].device == net[0].bias.device
    assert net[0].weight.device.type == device
    if device == "cuda":
        assert optimizer._offloaded[net[0].weight].copy.is_pinned()


def test_groups_of_their_own_settings(device):
    plain, offloaded = model(device), model(device)

    def groups(net):
        return [{"params": net[0].parameters(), "lr": 1e-3}, {"params": net[3].parameters(), "weight_decay": 0.5}]

    a = torch.optim.AdamW(groups(plain), lr=1e-2)
    b = CPUOffloadOptimizer(groups(offloaded), lr=1e-2)
    train(plain, a, 2)
    train(offloaded, b, 2)
    for net, optimizer in ((plain, a), (offloaded, b)):
        optimizer.add_param_group({"params": net[1].parameters(), "lr": 3e-2})
        optimizer.param_groups[0]["lr"] = 5e-3
        train(net, optimizer, 2, start=2)
    assert_equal(plain, offloaded, exactly=False)


def test_frozen_and_unfrozen(device):
    plain, offloaded = model(device), model(device)
    for net in (plain, offloaded):
        net[0].requires_grad_(False)
    a, b = torch.optim.AdamW(plain.parameters(), lr=1e-2), CPUOffloadOptimizer(offloaded.parameters(), lr=1e-2)
    for net, optimizer in ((plain, a), (offloaded, b)):
        train(net, optimizer, 2)
        net[0].requires_grad_(True)
        train(net, optimizer, 3, start=2)
    assert_equal(plain, offloaded, exactly=False)


def test_new_weights_are_noticed(device):
    plain, offloaded = model(device), model(device)
    a, b = torch.optim.AdamW(plain.parameters(), lr=1e-2), CPUOffloadOptimizer(offloaded.parameters(), lr=1e-2)
    other = {k: v * 2 for k, v in model(device).state_dict().items()}
    for net, optimizer in ((plain, a), (offloaded, b)):
        train(net, optimizer, 2)
        net.load_state_dict(other)
        train(net, optimizer, 1, start=2)
        with torch.no_grad():
            net[3].weight.mul_(0.5)
        train(net, optimizer, 1, start=3)
    assert_equal(plain, offloaded, exactly=False)


@pytest.mark.parametrize("named", [False, True])
def test_state_dict_resumes_bit_for_bit(named, device, tmp_path):
    def make(net):
        return CPUOffloadOptimizer(net.named_parameters() if named else net.parameters(), lr=1e-2, weight_decay=0.1)

    whole = model(device)
    optimizer = make(whole)
    train(whole, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 3e-3
    saved = copy.deepcopy({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    assert ("0.weight" if named else "0") in saved["optimizer"]["state"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(whole, optimizer, 2, start=2)
    again = model(device)
    resumed = make(again)
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    assert resumed.param_groups[0]["lr"] == 3e-3
    train(again, resumed, 2, start=2)
    assert_equal(whole, again)


def test_a_state_dict_that_does_not_fit_changes_nothing():
    net = model()
    optimizer = CPUOffloadOptimizer(net.named_parameters(), lr=1e-2)
    train(net, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    other = CPUOffloadOptimizer(net[0].named_parameters(), lr=1.0)
    with pytest.raises(ValueError, match="the parameters differ, such as"):
        optimizer.load_state_dict(other.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"]["3.weight"]["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"'exp_avg' of '3.weight' has shape \(3, 3\), the parameter \(64, 80\)"):
        optimizer.load_state_dict(wrong)
    for key, state in before["state"].items():
        for name, t in state.items():
            assert torch.equal(optimizer.state_dict()["state"][key][name], t)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_closure_and_missing_gradients(device):
    net = model(device)
    optimizer = CPUOffloadOptimizer(net.parameters(), lr=1e-2)
    before = copy.deepcopy(net)
    optimizer.step()
    assert_equal(net, before)
    assert optimizer.step(lambda: 7) == 7
    loss_of(net, 0).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(net, before)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(100, 64, sparse=True)
    optimizer = CPUOffloadOptimizer(table.parameters(), lr=1e-2)
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="no sparse gradients"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_grad_scaler():
    plain, offloaded = model("cuda"), model("cuda")
    a, b = torch.optim.AdamW(plain.parameters(), lr=1e-2), CPUOffloadOptimizer(offloaded.parameters(), lr=1e-2)
    for net, optimizer in ((plain, a), (offloaded, b)):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        for step in range(4):
            scaler.scale(loss_of(net, step) * (float("inf") if step == 1 else 1.0)).backward()
            scaler.unscale_(optimizer)
            torch_clip(net, optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_equal(plain, offloaded, exactly=False)
