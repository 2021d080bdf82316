"""safetensors: what its own functions, imported before our module, and their callers make of quantized tensors."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import CASES, weight
from safetensors.torch import (
    load_file,
    load_model,
    save,
    save_file,
    save_model,
)  # before our module, as most scripts do
from torch import nn

import ao
import ao.integrations.safetensors


class Net(nn.Module):
    """A quantized layer, one that is tied to it, and a plain one."""

    def __init__(self, spec):
        super().__init__()
        self.first, self.second, self.plain = (nn.Linear(256, 128) for _ in range(3))
        self.first.weight = nn.Parameter(spec.quantize(weight()), requires_grad=False)
        self.second.weight = self.first.weight


def zeroed(spec):
    net = Net(spec)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    return net


def same(a, b):
    return all(torch.equal(p, b.state_dict()[name]) for name, p in a.state_dict().items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_save_file_and_save_model(case, tmp_path):
    net = Net(case.spec)
    save_file(net.state_dict(), tmp_path / "file.safetensors", metadata={"format": "pt", "mine": "kept"})
    save_model(net, tmp_path / "model.safetensors")
    ao.save(net, tmp_path / "ao.safetensors")
    (tmp_path / "bytes.safetensors").write_bytes(save(net.state_dict()))
    expected = load_file(tmp_path / "ao.safetensors")
    for name in ("file", "model", "bytes"):
        path = tmp_path / f"{name}.safetensors"
        assert load_file(path).keys() == expected.keys()
        again = zeroed(case.spec)
        again.load_state_dict(ao.load(path), assign=True)
        assert same(net, again) and again.first.weight.spec == case.spec, name
        again = zeroed(case.spec)
        assert load_model(again, path) == ([], []) and same(net, again) and again.second.weight is again.first.weight


def test_the_rest_is_as_before(tmp_path):
    plain = nn.Linear(4, 4)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    assert torch.equal(load_file(tmp_path / "plain.safetensors")["weight"], plain.weight)
    save_model(plain, tmp_path / "plain.safetensors")
    assert load_model(nn.Linear(4, 4), tmp_path / "plain.safetensors") == (set(), [])
    with pytest.raises(RuntimeError, match="share memory"):
        save_file({"a": plain.weight, "b": plain.weight}, tmp_path / "tied.safetensors")
    assert list(inspect.signature(save_file).parameters) == ["tensors", "filename", "metadata"]
    net = Net(ao.Intx(8))
    save_model(net, tmp_path / "net.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(nn.Sequential(nn.Linear(4, 4)), tmp_path / "net.safetensors")


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_accelerate(size, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    net = Net(ao.NF4)
    accelerate.Accelerator().save_model(net, tmp_path, max_shard_size=size)
    assert len(list(tmp_path.iterdir())) == (1 if size == "1GB" else 3)
    again = zeroed(ao.NF4)
    found = again.load_state_dict(ao.load(tmp_path), strict=False)
    assert same(net, again) and not found.unexpected_keys


def test_huggingface_hub(tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    net = Net(ao.Intx(4, (1, 32)))
    net.second.weight = net.plain.weight  # it finds plain tensors that are tied
    hub.save_torch_model(net, tmp_path)
    again = Net(ao.Intx(4, (1, 32)))
    again.second.weight = again.plain.weight
    again.load_state_dict(ao.load(tmp_path), strict=False)
    assert same(net, again)
