"""Attention with decomposed relative positions: transformers' layers with ours in their place, and the kernels."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionSdpaAttention

import ao
import ao.integrations.transformers_positions as positions
from ao.integrations.transformers import fuse_relative_positions
from ao.matmul import relative_attention, takes_relative_attention
from ao.matmul.relative_positions import halves


def formula(qkv, table_h, table_w, heads, height, width, scale):
    """What `relative_attention` says that it computes, in float32, by the mask of all pairs."""
    b, tokens, features = qkv.shape
    q, k, v = qkv.float().view(b, tokens, 3, heads, features // (3 * heads)).permute(2, 0, 3, 1, 4)
    y, x = (i.flatten() for i in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    bias = 0
    for table, at, size in ((table_h, y, height), (table_w, x, width)):
        positions = table.float()[(at[:, None] - torch.arange(size) + size - 1).to(qkv.device)]
        bias = bias + torch.einsum("bhqd,qsd->bhqs", q, positions)[..., at.to(qkv.device)]
    return (((q @ k.mT) * scale + bias).softmax(-1) @ v).transpose(1, 2).reshape(b, tokens, -1)


def encoder(use_rel_pos=True, attention="sdpa", **more):
    """A small image encoder with a block of windows and one without, and relative positions that say something."""
    config = SamVisionConfig(
        hidden_size=64, num_attention_heads=2, mlp_dim=32, num_hidden_layers=2, image_size=96, window_size=4,
        output_channels=16, global_attn_indexes=[1], use_rel_pos=use_rel_pos, attn_implementation=attention, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SamVisionEncoder(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:  # transformers leaves them close to zero
                p.normal_(0, 0.3 if "rel_pos" in name else p[0].numel() ** -0.5)
    return model


def output(model, image):
    return model(image).last_hidden_state


@pytest.fixture
def by_formula(monkeypatch):
    """The kernel's place is taken by the formula, on a CPU and in float32; gives the calls."""
    calls = []

    def attend(qkv, *more):
        calls.append(more[2:])
        return formula(qkv, *more).to(qkv.dtype)

    monkeypatch.setattr(positions, "takes_relative_attention", lambda *_: True)
    monkeypatch.setattr(positions, "relative_attention", attend)
    return calls


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_compute_what_they_did(by_formula, attention):
    model, image = encoder(attention=attention), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        plain = output(model, image)
        assert fuse_relative_positions(model) == 2 and not by_formula
        assert plain.std() > 0.5
        torch.testing.assert_close(output(model, image), plain, atol=1e-5, rtol=1e-4)
    assert [call[:3] for call in by_formula] == [(2, 4, 4), (2, 6, 6)]


def test_a_size_that_the_positions_are_not_of(by_formula):
    """They are interpolated as the model does it; height and width differ."""
    layer, x = encoder().layers[1].attn, torch.randn(2, 5, 9, 64)
    with torch.no_grad():
        plain = layer(x)[0]
        fuse_relative_positions(layer)
        torch.testing.assert_close(layer(x)[0], plain, atol=1e-5, rtol=1e-4)
    assert by_formula[0][:3] == (2, 5, 9)


def test_it_is_what_it_was_where_there_is_no_kernel():
    """On a CPU, bit for bit, compiled too; the state dict, `isinstance`, copies and files are as before."""
    model, image = encoder(), torch.randn(1, 3, 96, 96)
    plain, state = output(model, image), {name: t.clone() for name, t in model.state_dict().items()}
    shown = repr(model)
    assert fuse_relative_positions(model) == fuse_relative_positions(model) == 2
    assert torch.equal(output(model, image), plain) and repr(model) == shown
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        layer = other.layers[0].attn
        assert isinstance(layer, SamVisionSdpaAttention) and isinstance(layer, positions._RelativeAttention)
        assert torch.equal(output(other, image), plain)
        compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(1, 4, 4, 64)
        assert torch.equal(compiled(x)[0], layer(x)[0])


def test_it_trains_by_the_layers_own_way(by_formula):
    """Also where only the projection is trained, and where weights drop out."""
    model, x = encoder(), torch.randn(1, 4, 4, 64)
    layer = model.layers[0].attn.requires_grad_(False)
    fuse_relative_positions(model)
    layer(x)
    assert len(by_formula) == 1
    layer.qkv.bias.requires_grad_()
    layer(x)[0].sum().backward()
    assert layer.qkv.bias.grad.abs().sum() > 0 and len(by_formula) == 1
    with torch.no_grad():
        layer(x)
        assert len(by_formula) == 2
        layer.dropout = 0.5
        layer.train()(x)
    assert len(by_formula) == 2


def test_attention_weights_are_given_where_they_were(by_formula):
    layer = encoder(attention="eager").layers[0].attn.requires_grad_(False)
    fuse_relative_positions(layer)
    x = torch.randn(1, 4, 4, 64)
    assert layer(x)[1] is None and layer(x, output_attentions=True)[1].shape == (2, 16, 16)


@pytest.mark.parametrize("model", [nn.Linear(4, 4), encoder(use_rel_pos=False)], ids=["linear", "no positions"])
def test_a_model_without_such_layers(model):
    with pytest.raises(ValueError, match="fuse_relative_positions: model .* has no attention layer .* use_rel_pos"):
        fuse_relative_positions(model)


def test_head_dims():
    """Two powers of two, of 16 at least."""
    assert [halves(d) for d in (16, 64, 80, 96, 128)] == [(16, 0), (64, 0), (64, 16), (64, 32), (128, 0)]
    assert all(halves(d) == (0, 0) for d in (8, 24, 72, 112))
    assert not takes_relative_attention(torch.zeros(1, dtype=torch.bfloat16), 80, 64, 64)  # a CPU


def case(b, heads, height, width, dim, dtype):
    torch.manual_seed(0)
    qkv = torch.randn(b, height * width, 3 * heads * dim, device="cuda").to(dtype)
    tables = [(torch.randn(2 * side - 1, dim, device="cuda") * 0.3).to(dtype) for side in (height, width)]
    return qkv, *tables, heads, height, width, dim**-0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 64, 64, 80),
        (3, 2, 14, 14, 80),
        (2, 1, 16, 16, 64),
        (2, 3, 9, 5, 64),
        (1, 2, 20, 17, 80),
        (1, 1, 48, 64, 128),
        (1, 2, 3, 64, 96),
        (2, 1, 100, 7, 16),
        (1, 1, 1, 33, 32),
        (1, 1, 128, 128, 64),
    ],
)
def test_the_kernels(shape, dtype):
    args = case(*shape, dtype)
    assert takes_relative_attention(args[0], shape[4], shape[2], shape[3])
    out, right = relative_attention(*args), formula(*args)
    assert out.dtype == dtype and out.shape == right.shape
    torch.testing.assert_close(out.float(), right, atol=0.03 if dtype == torch.bfloat16 else 0.006, rtol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
@torch.no_grad()
def test_an_encoder_on_a_gpu(mode, monkeypatch):
    """Close to the model's own attention in float32, in eager mode, compiled and in CUDA graphs; and the kernel is what runs."""
    model, image = encoder().cuda(), torch.randn(2, 3, 96, 96, device="cuda")
    right = output(model, image)
    model.bfloat16()
    assert fuse_relative_positions(model) == 2
    monkeypatch.setattr(SamVisionSdpaAttention, "forward", None)
    if mode is not None:
        torch._dynamo.reset()
        for layer in model.layers:
            layer.compile(mode=mode, fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        out = output(model, image.bfloat16())
    assert ao.compute_error(right, out.float()) > 25
