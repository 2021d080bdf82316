"""Attention to a quantized cache on a GPU: the kernel and the way of a prompt, against the plain one on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ao
from ao.matmul import Sight, attend
from ao.matmul.attention_kinds import kinds_of
from ao.quant.kv_cache import KV_CACHES, KVCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CASES = {
    "int8": ("int8", "int8", {}, {}),
    "int4": ("int4", "int4", {}, {}),
    "float8": ("float8", "float8", {}, {}),
    "mixed, several queries": ("int8", "int4", {"d": 64, "group": 2, "queries": 3}, {}),
    "rows of several blocks": ("int4", "int4", {"group": 3, "queries": 16, "batch": 2}, {}),
    "window, soft cap": ("int4", "float8", {"group": 8, "window": 50}, {"softcap": 5.0}),
    "mask, sinks": ("float8", "int8", {"d": 64, "mask": True, "stop": 37}, {"sinks": True}),
    "mask of each head": ("int4", "int4", {"mask": "heads", "batch": 2, "start": 40}, {}),
    "nothing to see": ("int8", "int8", {"stop": 0, "causal": False}, {}),
    "long": ("int4", "int8", {"length": 40000, "stop": 39999, "batch": 1, "causal": False}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel(name):
    kv, vv, sizes, more = CASES[name]
    s = {"d": 128, "group": 4, "queries": 1, "batch": 1, "length": 264, "stop": 200, "start": 0, "causal": True} | sizes
    g = torch.Generator().manual_seed(0)
    shape = s["batch"], 2, s["length"], s["d"]
    k, v = (KV_CACHES[each].k.quantize(torch.randn(shape, generator=g)) for each in (kv, vv))
    heads = 2 * s["group"]
    q = torch.randn(s["batch"], heads, s["queries"], s["d"], generator=g).bfloat16()
    mask = None
    if "mask" in s:
        of_heads = heads if s["mask"] == "heads" else 1
        mask = torch.rand(s["batch"], of_heads, s["queries"], s["length"], generator=g) > 0.3
    sinks = torch.randn(heads, generator=g) if more.get("sinks") else None
    end = s["stop"] if s["causal"] else None

    def run(device):
        at, to = device, lambda t: None if t is None else t.to(device)
        sight = Sight(
            s["start"], torch.tensor(s["stop"], device=at), None if end is None else torch.tensor(end, device=at),
            s.get("window"), to(mask),
        )  # fmt: skip
        assert device == "cpu" or kinds_of(to(q), to(k), to(v), to(mask)) is not None
        x = to(q) if device == "cuda" else q.float()
        return attend(x, to(k), to(v), sight, softcap=more.get("softcap"), sinks=to(sinks)).float().cpu()

    expected, out = run("cpu"), run("cuda")
    assert torch.isfinite(out).all()
    if expected.any():
        assert ao.compute_error(expected, out) > 40
    else:
        assert not out.any()


@pytest.mark.parametrize("tile", [(1, 2, True), (2, 8, False), (4, 3, True), (8, 1, False)], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4", "float8"])
def test_tiles(name, tile):
    """However many warps there are, and whether they load ahead."""
    from ao.matmul.attention_kinds import code_kind
    from ao.matmul.kernels.decode_attention import Tile, decode

    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, 1, 128, generator=g).bfloat16()
    k, v = (KV_CACHES[name].k.quantize(torch.randn(1, 2, 1000, 128, generator=g)) for _ in range(2))
    sight = Sight(0, torch.tensor(987), None, None, None)
    expected = attend(q.float(), k, v, sight)
    a, b = (t.cuda().spec.operand(t.cuda()) for t in (k, v))
    out, _ = decode(
        q.cuda(), a.codes, a.scale, a.zero_point, b.codes, b.scale, b.zero_point, code_kind(a, 128), code_kind(b, 128), 0,
        sight.stop.cuda(), None, None, None, 128**-0.5, None, None, Tile(*tile),
    )  # fmt: skip
    assert ao.compute_error(expected, out.float().cpu()) > 40


@pytest.mark.parametrize("name", KV_CACHES)
def test_prompt_in_chunks_and_steps(name):
    """A cache on the GPU holds and gives what one on the CPU does."""
    g = torch.Generator().manual_seed(0)
    tokens = [300, 200, 1, 1, 5, 40, 1]
    q, k, v = (torch.randn(2, heads, sum(tokens), 64, generator=g).bfloat16() for heads in (8, 2, 2))
    caches = [KVCache(name, 2, 2, 600, 64, device=device) for device in ("cpu", "cuda")]
    at = 0
    for n in tokens:
        outs = []
        for cache in caches:
            cache.update(*(t[:, :, at : at + n].to(cache.device) for t in (k, v)))
            outs.append(cache.attend(q[:, :, at : at + n].to(cache.device)).float().cpu())
        assert ao.compute_error(*outs) > 30, n
        at += n


def test_graph_of_a_step():
    """A CUDA graph appends a token and attends to it, at a position that moves on."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, heads, 80, 128, generator=g, device="cuda").bfloat16() for heads in (8, 2, 2))
    cache, other = (KVCache("int8", 1, 2, 80, 128, device="cuda") for _ in range(2))
    for each in (cache, other):
        each.update(k[:, :, :70], v[:, :, :70])
        each.attend(q[:, :, :1])
    inputs = [t[:, :, :1].clone() for t in (q, k, v)]
    length = cache.length.clone()

    def step():
        cache.update(*inputs[1:], check=False)
        return cache.attend(inputs[0])

    step()
    cache.length.copy_(length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for i in range(70, 80):
        for buffer, t in zip(inputs, (q, k, v)):
            buffer.copy_(t[:, :, i : i + 1])
        graph.replay()
        other.update(k[:, :, i : i + 1], v[:, :, i : i + 1])
        assert torch.equal(out, other.attend(q[:, :, i : i + 1]))
    expected = F.scaled_dot_product_attention(q[:, :, -1:].float(), k.float(), v.float(), enable_gqa=True)
    assert ao.compute_error(expected, out.float()) > 35
