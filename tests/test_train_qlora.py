"""QLoRA: adapters over a packed base, what a step keeps, and the merge."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from llama_block import FeedForward, block
from torch import nn

import ao
from ao.dtypes import NF4, Intx, QTensor
from ao.quant import compute_error
from ao.train import LoRALinear, convert_to_qlora, merge_qlora


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained(**kwargs) -> nn.Module:
    model = convert_to_qlora(block(), rank=4, **kwargs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for i in range(20):
        x = data(4, 16, 128, seed=i)
        F.mse_loss(model(x), x.flip(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_conversion():
    plain = block()
    model = convert_to_qlora(copy.deepcopy(plain), rank=4, alpha=8, module_filter_fn=lambda m, name: name != "1.down")
    layer = model[1].gate
    assert isinstance(layer, LoRALinear) and type(model[1].down) is nn.Linear
    assert layer.weight.spec == NF4 and not layer.weight.requires_grad
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{side}" for name, m in model.named_modules() if isinstance(m, LoRALinear) for side in "AB"
    }
    assert layer.scaling == 2.0 and "rank=4, alpha=8" in repr(layer)
    x = data(1, 16, 128)
    quantized = copy.deepcopy(plain)
    ao.quantize_(quantized, NF4, lambda m, name: isinstance(m, nn.Linear) and name != "1.down")
    assert torch.equal(model(x), quantized(x))  # the adapter starts at zero
    state = model.state_dict()
    again = convert_to_qlora(block(), rank=4, alpha=8, module_filter_fn=lambda m, name: name != "1.down")
    again.load_state_dict(state)
    assert torch.equal(again(x), model(x))


def test_errors():
    model = block()
    with pytest.raises(ValueError, match="rank must be at least 1"):
        convert_to_qlora(model, rank=0)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1.5"):
        convert_to_qlora(model, dropout=1.5)
    with pytest.raises(ValueError, match="no layer to convert"):
        convert_to_qlora(model, module_filter_fn=lambda m, name: False)
    with pytest.raises(ValueError, match="0.q: .*dim 1 of shape .* is not a multiple of its block 100"):
        convert_to_qlora(model, base=Intx(4, (1, 100)))
    assert all(type(m) is not LoRALinear for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="the model has no LoRALinear"):
        merge_qlora(model)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_keeps_the_packed_base_only(compiled):
    """Backward decodes the base again: what is saved beside parameters is activations."""
    model = convert_to_qlora(FeedForward(128, 256).to(torch.bfloat16), rank=4)

    def plain(t):
        return [p for f in t.fields().values() for p in plain(f)] if isinstance(t, QTensor) else [t]

    own = {t.untyped_storage().data_ptr() for p in model.parameters() for t in plain(p)}
    kept = {}

    def pack(t):
        for field in plain(t):
            if field.untyped_storage().data_ptr() not in own:
                kept[field.untyped_storage().data_ptr()] = field.untyped_storage().nbytes()
        return t

    if compiled:
        model.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    x = data(1, 4, 128, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    out.sum().backward()
    assert x.grad is not None and model.gate.lora_B.grad is not None
    assert sum(kept.values()) < 128 * 256  # half of one dense weight, with room for activations of 4 tokens


def test_merge_keeps_the_delta():
    """Merged outputs are those of the adapter, up to rounding the sum to NF4 again."""
    model, x = trained(), data(2, 16, 128, seed=99)
    with torch.no_grad():
        expected, base = model(x), block_without_adapters(model)(x)
        exact = merge_qlora(copy.deepcopy(model), dtype=torch.float32)
        assert type(exact[1].gate.weight) is nn.Parameter and compute_error(expected, exact(x)) > 80
        # What rounding to NF4 does to weights that were never rounded before is the yardstick.
        rounded = copy.deepcopy(exact)
        ao.quantize_(rounded, NF4)
        merged = merge_qlora(model)
    assert all(type(m) is not LoRALinear for m in merged.modules())
    assert merged[1].gate.weight.spec == NF4 and "1.gate.lora_A" not in merged.state_dict()
    assert torch.equal(merged(x), rounded(x))
    assert compute_error(expected, merged(x)) > compute_error(expected, base) + 3


def block_without_adapters(model: nn.Module) -> nn.Module:
    bare = copy.deepcopy(model)
    for m in bare.modules():
        if isinstance(m, LoRALinear):
            m.lora_B.detach().zero_()
    return bare


def test_other_bases():
    """An 8-bit base, a base that was quantized before, and none at all: plain LoRA."""
    x = data(1, 16, 128)
    for base in (Intx(8), None):
        model = convert_to_qlora(block(), base=base)
        model(x).sum().backward()
        assert model[1].gate.lora_B.grad is not None
        merge_qlora(model)
        assert isinstance(model[1].gate.weight, QTensor) == (base is not None)
    quantized = block()
    ao.quantize_(quantized, ao.Int4WeightOnlyConfig(group_size=32))
    spec = quantized[1].gate.weight.spec
    assert convert_to_qlora(quantized)[1].gate.weight.spec == spec


def test_dropout_in_training_only():
    model = convert_to_qlora(nn.Linear(64, 64), rank=4, dropout=0.5)
    model.lora_B.data.normal_()
    x = data(4, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_graph_gets_the_fields_of_the_base():
    """No tensor subclass is among the inputs of a graph, and the gradients are those of eager mode."""
    model = convert_to_qlora(nn.Sequential(nn.Linear(64, 64)), rank=4)
    nn.init.normal_(model[0].lora_B)
    x, seen = torch.randn(3, 64), []

    def backend(graph, inputs):
        seen.extend(type(t) for t in inputs)
        return graph

    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert seen and not any(issubclass(t, QTensor) for t in seen)
    torch.testing.assert_close(out, model(x))
    found, expected = (torch.autograd.grad(y.sum(), model[0].lora_A) for y in (out, model(x)))
    torch.testing.assert_close(found, expected)
