"""A KV cache: what is written, what attention reads of it, and against plain attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ao
from ao.quant.kv_cache import KV_CACHES, KVCache

B, HEADS, KV_HEADS, D, LENGTH = 2, 4, 2, 32, 96
LEAST = {"int8": 38, "float8": 26, "int4": 15, "kivi4": 16, "kivi2": 2}
"""Signal to noise of the output in dB, for normal keys, values and queries."""


def states(tokens=LENGTH, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, heads, tokens, D, generator=g) for heads in (HEADS, KV_HEADS, KV_HEADS))


def cache_of(config, length=LENGTH, **kwargs):
    return KVCache(config, B, KV_HEADS, length, D, dtype=torch.float32, **kwargs)


def run(cache, q, k, v, chunks, **kwargs):
    """The outputs of tokens that come in chunks."""
    out, at = [], 0
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
