"""A KV cache: what is written, what attention reads of it, and against plain attention."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import run_and_get_code

import ao
from ao.matmul import Sight, attend, attention_cpu
from ao.matmul.softmax_pieces import finish, plain
from ao.quant.kv_cache import KV_CACHES, KVCache, KVCacheConfig, kv_cache_config

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import long_context
from tables import fill

B, HEADS, KV_HEADS, D, LENGTH = 2, 4, 2, 32, 96
LEAST = {"int8": 38, "float8": 26, "int4": 15, "kivi4": 16, "kivi2": 2}
"""Signal to noise of the output in dB, for normal keys, values and queries."""
WIDE = KVCacheConfig(ao.Intx(8, (1, 8)), ao.Intx(8, (1, 8)))
"""What no compiled function reads."""


def states(tokens=LENGTH, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, heads, tokens, D, generator=g) for heads in (HEADS, KV_HEADS, KV_HEADS))


def cache_of(config, length=LENGTH):
    return KVCache(config, B, KV_HEADS, length, D, dtype=torch.float32)


def run(cache, q, k, v, chunks, at=0, **kwargs):
    """The outputs of tokens that come in chunks."""
    out = []
    for n in chunks:
        cache.update(k[:, :, at : at + n], v[:, :, at : at + n])
        out.append(cache.attend(q[:, :, at : at + n], **kwargs))
        at += n
    return torch.cat(out, 2)


@pytest.mark.parametrize("name", KV_CACHES)
def test_attention_of_a_cache(name):
    q, k, v = states()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    whole = run(cache_of(name), q, k, v, [LENGTH])
    parts = run(cache_of(name), q, k, v, [40, 1, 1, 31, 3, 20])
    for out in (whole, parts):
        assert ao.compute_error(expected, out) > LEAST[name]
    if not KV_CACHES[name].residual:
        assert torch.allclose(whole, parts, atol=1e-5)


def test_windows_masks_caps_and_sinks():
    """Of both ways to read 8 bits, against the formula."""
    q, k, v = states()
    q = q[:, :, :3]
    mask = torch.rand(B, 1, 3, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
    sinks = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for spec in (KV_CACHES["int8"].k, WIDE.k):
        keys, values = spec.quantize(k), spec.quantize(v)
        plain = [t.dequantize().repeat_interleave(HEADS // KV_HEADS, 1) for t in (keys, values)]
        s = 5 * torch.tanh(q @ plain[0].mT * 0.3 / 5)
        position, own = torch.arange(LENGTH), torch.arange(77, 80)[:, None]
        seen = (position <= own) & (position > own - 50) & (position >= 40) & mask
        s = s.masked_fill(~seen, -torch.inf)
        p = torch.cat([s, sinks.view(1, HEADS, 1, 1).expand(B, -1, 3, 1)], -1).softmax(-1)[..., :-1]
        out = attend(q, keys, values, Sight(40, 90, 80, 50, mask), 0.3, 5.0, sinks)
        assert torch.allclose(out, p @ plain[1], atol=1e-5)
        numbers = torch.where(mask, 0.0, -torch.inf)
        assert torch.allclose(attend(q, keys, values, Sight(40, 90, 80, 50, numbers), 0.3, 5.0, sinks), out, atol=1e-5)
        assert not attend(q, keys, values, Sight(stop=0)).any()


@pytest.mark.parametrize("name", ["int8", "float8", "int4"])
@pytest.mark.parametrize(
    ("group", "tokens", "dim", "dtype"),
    [(1, 1, 64, torch.float32), (3, 1, 96, torch.bfloat16), (7, 1, 64, torch.float16), (3, 5, 32, torch.float64)],
)
def test_compiled_attention_is_the_plain_one(name, group, tokens, dim, dtype):
    """Over several pieces, of which a query may see nothing, with scores far below 0."""
    g = torch.Generator().manual_seed(2)
    length, spec = 4232, KV_CACHES[name].k
    keys, values = (spec.quantize(torch.randn(1, 2, length, dim, generator=g) + shift) for shift in (2, 0))
    q = torch.randn(1, 2 * group, tokens, dim, generator=g).to(dtype)
    q[:, -1] -= 10  # its scores are about -100 and less
    late = torch.arange(length) >= torch.tensor([0, 2100])[:, None].repeat_interleave(group, 0)[:, None]
    sinks = torch.randn(2 * group, generator=g)
    for sight in (Sight(), Sight(3, 4200, 4190, 700), Sight(stop=4230, end=4230, mask=late.expand(1, -1, tokens, -1))):
        for s in (None, sinks):
            out = attend(q, keys, values, sight, sinks=s)
            state = plain(q, keys, values, sight, dim**-0.5, None, s)
            near = max(1e-4, torch.finfo(dtype).eps)
            assert torch.allclose(out.double(), finish(state, torch.float64), atol=near, rtol=near)
            assert out.dtype == dtype


@pytest.mark.parametrize("name", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_graph_reads_the_codes(name):
    """One token that is written and attends, compiled to loops: by the operator that reads codes, and as in eager mode."""
    q, k, v = (t[..., :1, :] for t in states(1))
    caches = [cache_of(name) for _ in range(2)]
    for cache in caches:
        cache.update(*states(40, 1)[1:])

    def step(cache, q, k, v):
        cache.update(k, v, check=False)
        return cache.attend(q)

    got, (code,) = run_and_get_code(torch.compile(functools.partial(step, caches[0]), fullgraph=True), q, k, v)
    assert attention_cpu.can(D, ({"int8": "int8", "int4": "uint4"}[name],) * 2) == ("kv_decode" in code)
    torch.testing.assert_close(got, step(caches[1], q, k, v))


def test_a_graph_with_rotations_reads_the_codes():
    """The same of 4 bits, in the operators of a graph: the loops of a rotation take the compiler most of a minute."""
    q, k, v = (t[..., :1, :] for t in states(1))
    caches, graphs = [cache_of("int4") for _ in range(2)], []
    for cache in caches:
        cache.update(*states(40, 1)[1:])

    def step(cache, q, k, v):
        cache.update(k, v, check=False)
        return cache.attend(q)

    def backend(graph, inputs):
        graphs.append("".join(m.code for m in graph.modules() if isinstance(m, torch.fx.GraphModule)))
        return make_boxed_func(graph)

    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    with torch.no_grad():
        got = compiled(caches[0], q, k, v)
    assert attention_cpu.can(D, ("uint4", "uint4")) == ("kv_decode" in graphs[0])
    torch.testing.assert_close(got, step(caches[1], q, k, v))


def test_scaled_dot_product_attention():
    q, k, v = states()
    for spec in (ao.Intx(8), ao.Intx(4, (1, 32))):
        keys, values = spec.quantize(k), spec.quantize(v)
        for more in ({}, {"is_causal": True}, {"attn_mask": torch.randn(LENGTH, LENGTH)}):
            out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True, **more)
            expected = F.scaled_dot_product_attention(
                q, keys.dequantize(), values.dequantize(), enable_gqa=True, **more
            )
            assert torch.allclose(out, expected, atol=1e-5)


def test_writing_by_the_dtype_layer():
    """A position of a QTensor is written alone, and a block is not cut."""
    _, k, v = states()
    whole, one = ao.Intx(8, (1, -1)).quantize(k), ao.Intx(8, (1, -1)).quantize(v[:, :, :1])
    before = whole.dequantize()
    whole[:, :, 5] = v[:, :, 0]
    after = whole.dequantize()
    assert torch.equal(after[:, :, 5:6], one.dequantize())
    before[:, :, 5] = after[:, :, 5]
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match="cannot write at single positions of dim 2"):
        KV_CACHES["kivi4"].k.quantize(k).index_copy_(2, torch.tensor([5]), v[:, :, :1])


@pytest.mark.parametrize("name", ["int8", "kivi4"])
def test_what_is_there_stays(name):
    _, k, v = states()
    cache = cache_of(name)
    cache.update(k[:, :, :64], v[:, :, :64])
    before = cache.keys.dequantize()[:, :, :64].clone()
    cache.update(k[:, :, 64:70] * 100, v[:, :, 64:70])
    assert torch.equal(before, cache.keys.dequantize()[:, :, :64])
    if name == "int8":
        assert torch.equal(before, cache.config.k.quantize(k[:, :, :64]).dequantize())


def test_parts_in_floating_point():
    """First and newest tokens are exact, and what is between is not."""
    q, k, v = states()
    config = KVCacheConfig(ao.Intx(2, (1, -1)), ao.Intx(2, (1, -1)), rotate=True, first=5, residual=16)
    cache = cache_of(config)
    run(cache, q, k, v, [30, 1, 9])
    keys, values = cache.read(40)
    for x, exact in ((keys, k), (values, v)):
        error = (x - exact[:, :, :40]).abs().amax((0, 1, 3))
        assert error[:5].max() < 1e-5 and error[25:].max() < 1e-5 and error[5:24].min() > 0.1
    expected = F.scaled_dot_product_attention(q[:, :, 39:40], keys, values, enable_gqa=True)
    assert torch.allclose(cache.attend(q[:, :, 39:40]), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["int4", "kivi4"])
def test_crop_reorder_select_and_grow(name):
    q, k, v = states()
    cache, straight = cache_of(name), cache_of(name)
    run(cache, q, k, v, [50])
    other = [t.flip(2) for t in (q, k, v)]
    run(cache, *other, [9], at=50)
    cache.crop(9)
    run(straight, q, k, v, [50])
    assert torch.allclose(run(cache, q, k, v, [6], at=50), run(straight, q, k, v, [6], at=50), atol=1e-5)
    more = cache.grown(2 * LENGTH)
    picked = cache.select(torch.tensor([1, 0, 0]))
    cache.reorder(torch.tensor([1, 0]))
    mine = [t[:, :, 56:57] for t in (q, k, v)]
    a, b = (run(c, *(t.flip(0) if c is cache else t for t in mine), [1]) for c in (cache, more))
    assert torch.allclose(a.flip(0), b, atol=1e-5)
    assert torch.allclose(run(picked, *(t[[1, 0, 0]] for t in mine), [1]), b[[1, 0, 0]], atol=1e-5)
    with pytest.raises(ValueError, match="tokens must be 0 to 57, got 58"):
        more.crop(58)


def test_errors_before_anything_is_written():
    _, k, v = states()
    cache = cache_of("int8", 48)
    cache.update(k[:, :, :40], v[:, :, :40])
    before = [t.clone() for t in cache.tensors()]
    with pytest.raises(ValueError, match="40 tokens and 9 more are longer than max_length=48"):
        cache.update(k[:, :, :9], v[:, :, :9])
    with pytest.raises(ValueError, match=r"values must have shape \(2, 2, 3, 32\), got \(2, 2, 2, 32\)"):
        cache.update(k[:, :, :3], v[:, :, :2])
    assert all(map(torch.equal, before, cache.tensors()))
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 to pack k"):
        KVCache("int4", 1, 1, 8, 20)
    for wrong, message in (
        (lambda: kv_cache_config("int5"), "unknown KV cache 'int5'; there are int8, "),
        (lambda: kv_cache_config(k=ao.Intx(8)), "give a name .*, a KVCacheConfig, or both k= and v="),
        (lambda: kv_cache_config(ao.Intx(8, (-1, -1))), "one scale for all tokens"),
        (lambda: KVCacheConfig(ao.Intx(4, (32, 1)), ao.Intx(4)), "must be a multiple of 32 that keeps the others"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize("name", KV_CACHES)
def test_outliers_and_nan_are_bounded(name):
    """A number that is no number, or is a million times the others, touches its own token and head: or, in KIVI's keys, its own
    channel of a block."""
    q, k, v = states(160)
    good, bad = cache_of(name, 160), cache_of(name, 160)
    run(good, q, k, v, [160])
    k, v = k.clone(), v.clone()
    k[0, 0, 7, 3], v[1, 1, 9, 0], k[1, 0, 40, 2] = torch.nan, 1e6, torch.inf
    run(bad, q, k, v, [160])
    for (a, b), at in zip(zip(good.read(160), bad.read(160)), ([(0, 0, 7), (1, 0, 40)], [(1, 1, 9)])):
        near = (a == b) | ~torch.isfinite(a)
        for i, j, t in at:
            near[i, j, t // 32 * 32 : t // 32 * 32 + 32 if name.startswith("kivi") else t + 1] = True
            near[i, j, t] = True
        assert near.all()
    other = bad.attend(q[:, :, 159:])
    assert torch.equal(other[0, 2:], good.attend(q[:, :, 159:])[0, 2:])  # the heads of a key head without any of it


def test_the_page_is_what_the_numbers_say(tmp_path):
    tables = {name: getattr(long_context, name) for name in ("accuracy", "texts", "memory")}
    fill(long_context.PAGE, tables | {"speed-cpu": lambda: long_context.speed(device="cpu")}, True)
    assert long_context.speed(tmp_path) == "Not measured."


def test_attention_to_a_scaled_weight_is_that_to_its_values():
    w = ao.Intx(8).quantize(torch.randn(64, 32), pre_scale=torch.rand(1, 32) + 0.5)
    q, dense = torch.randn(1, 1, 3, 32), w.dequantize()[None, None]
    out = F.scaled_dot_product_attention(q, w[None, None], w[None, None])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, dense, dense))
