"""`Ternary`: five numbers in a byte, and the inference of what `bitnet_training` trained."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import weight

import ao
from ao.dtypes import Intx, Ternary, pack_trits, unpack_trits
from ao.matmul import path_name
from ao.train import bitnet_training, convert_to_low_precision_training

SAME = Intx(2, (-1, -1), symmetric=True, narrow=True)


def test_five_in_a_byte():
    """Every byte that five digits make is read back; 64 numbers take 13 bytes, along any dim."""
    every = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)  # (243, 5)
    chunk = torch.zeros(243, 64, dtype=torch.uint8)
    chunk[:, ::13] = every
    packed = pack_trits(chunk)
    assert packed.shape == (243, 13) and packed[:, 0].unique().numel() == 243
    assert torch.equal(unpack_trits(packed), chunk)
    codes = torch.randint(3, (128, 3, 192), generator=torch.Generator().manual_seed(0))
    for dim in (0, 2, -1):
        packed = pack_trits(codes, dim)
        assert packed.numel() * 64 == codes.numel() * 13 and torch.equal(unpack_trits(packed, dim), codes)
    with pytest.raises(ValueError, match="multiple of 64"):
        pack_trits(torch.zeros(2, 40))


@pytest.mark.parametrize("packing", ["trits", "bits"])
def test_the_values_of_two_bits(packing):
    w = weight((64, 192))
    q, expected = Ternary(packing=packing).quantize(w), SAME.quantize(w)
    assert torch.equal(q.dequantize(), expected.dequantize())
    assert torch.equal(q.spec.codes(q.qdata, q.shape), expected.codes())
    assert q.qdata.numel() / q.numel() == (13 / 64 if packing == "trits" else 1 / 4)
    assert torch.equal(q.t().contiguous().dequantize(), q.dequantize().t())
    assert torch.equal(q[:, 64:128].dequantize(), q.dequantize()[:, 64:128])
    q.copy_(-w)
    assert torch.equal(q.dequantize(), -expected.dequantize())


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 64.*packing='bits'"):
        Ternary().quantize(weight((3, 40)))
    q = Ternary().quantize(weight((8, 128)))
    with pytest.raises(ValueError, match="packed in chunks of 64"):
        q[:, 32:64]
    with pytest.raises(ValueError, match="packed in chunks of 64"):
        q.new_empty(8, 72)
    with pytest.raises(ValueError, match="packing must be"):
        ao.TernaryWeightOnlyConfig("two")
    with pytest.raises(ValueError, match="scale_dtype must be"):
        Ternary(scale_dtype="int8")


@pytest.mark.parametrize(
    ("packing", "dtype"),
    [
        ("trits", torch.float32),
        pytest.param("bits", torch.float32, marks=pytest.mark.slow),
        pytest.param("trits", torch.bfloat16, marks=pytest.mark.slow),
        ("bits", torch.bfloat16),
    ],
)
def test_inference_is_what_training_computed(packing, dtype):
    """Bit for bit, eager and compiled, and the product is one of integers."""
    torch.manual_seed(0)
    layer = convert_to_low_precision_training(torch.nn.Linear(128, 96, dtype=dtype), bitnet_training())
    config = ao.Int8DynamicActivationTernaryWeightConfig(packing)
    batches = [weight((tokens, 128), tokens, dtype) for tokens in (1, 5, 40)]
    with torch.no_grad():
        expected = [layer(x) for x in batches]
        ao.quantize_(layer, config)
        assert isinstance(layer.weight.spec, Ternary) and path_name(batches[1], layer.weight) in ("int_mm", "int8pack")
        for x, y in zip(batches, expected):
            assert torch.equal(layer(x), y)
        assert torch.equal(torch.compile(layer, fullgraph=True, dynamic=False)(batches[1]), expected[1])


def test_products_of_the_two_packings():
    """Two bits are read by the path of int2; five in a byte give the same numbers."""
    w = weight((64, 256), dtype=torch.bfloat16)
    bits, trits = Ternary(packing="bits").quantize(w), Ternary().quantize(w)
    two = SAME.quantize(w)
    for tokens in (1, 3, 20):
        x = weight((tokens, 256), 1, torch.bfloat16)
        assert torch.equal(F.linear(x, bits), F.linear(x, two))
        assert ao.compute_error(x.float() @ two.dequantize().float().t(), F.linear(x, trits)) > 45


def test_names():
    model = torch.nn.Sequential(torch.nn.Linear(128, 64))
    ao.quantize_(model, "bitnet")
    assert model[0].weight.spec == Ternary(act=Intx(8, narrow=True))
    ao.quantize_(ao.dequantize_(model), ao.TernaryWeightOnlyConfig("bits", ao.PerRow()))
    assert model[0].weight.spec == Ternary((1, -1), "bits")


@pytest.mark.parametrize("tokens", [1, 5])
def test_int8_activations_without_integer_dot_products(tokens, monkeypatch):
    """As on a CPU that has none, whichever this one is."""
    from ao.matmul import cpu, linear, made

    for module in (cpu, made):
        monkeypatch.setattr(module, "VNNI", False)
    monkeypatch.setattr(linear, "_CHOICES", {})
    spec = Ternary(act=Intx(8, narrow=True))
    q, x = spec.quantize(weight((52, 256))), weight((tokens, 256), 1)
    exact = spec.act.quantize(x).dequantize() @ q.dequantize().t()
    assert torch.allclose(F.linear(x, q), exact, rtol=1e-5, atol=1e-5)
