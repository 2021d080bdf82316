"""The kernels that read a weight with five numbers in a byte, on a GPU: each by its name, and products of codes to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import weight

from ao import compute_error
from ao.dtypes import Intx, QTensor, Ternary
from ao.matmul import path_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def read(q: QTensor):
    from ao.matmul.kernels.reading import reading_of

    found = reading_of(q)
    assert found is not None
    return found


def case(n, k, m, block=(-1, -1), dtype=torch.bfloat16, **settings):
    x = weight((m, k), 1)
    x[:, 3] *= 50
    return x.to(dtype).cuda(), Ternary(block, **settings).quantize(weight((n, k), 2, dtype=dtype).cuda())


def worst(x, q, out):
    """The worst row, in dB, against float32 arithmetic on the decoded weight."""
    expected = x.float() @ q.dequantize().float().t()
    return min(compute_error(e, o).item() for e, o in zip(expected, out.float()))


def of_integers(x, q):
    """The product of the codes of x and of the weight, scaled as `int_mm` does."""
    codes, act = q.spec.codes(q.qdata, q.shape), q.spec.act.quantize(x)
    total = (act.qdata.double() @ codes.double().t()).float()
    rows = q.scale.float().repeat_interleave(q.shape[0] // q.scale.shape[0], 0)
    return (total * act.scale * rows.t()).to(x.dtype)


@pytest.mark.parametrize("k", [256, 512, 768, 1024, 2048, 3072, 4096, 5120, 8192, 11008, 14336, 28672, 65536])
def test_one_token_of_rows_of_any_length(k):
    """Each takes another number of threads for a row, and words for a thread; rows are no multiple of a tile's."""
    from ao.matmul.kernels import trits

    for n, block, dtype in (
        (1, (-1, -1), torch.bfloat16),
        (37, (1, -1), torch.float16),
        (1056, (8, -1), torch.bfloat16),
    ):
        x, q = case(n, k, 1, block, dtype)
        assert path_name(x, q) == "gemv_codes"
        out = F.linear(x, q)
        assert worst(x, q, out) > 46
        assert torch.equal(out, F.linear(x, q))
        for most in (4, 7, 13):
            if k <= 14336:
                assert worst(x, q, trits.gemv(x, *read(q), x.dtype, most=most)) > 46


@pytest.mark.parametrize("act", [Intx(8, narrow=True), Intx(8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_to_the_bit(act, dtype):
    """At any number of tokens, in eager mode and compiled."""
    compiled = torch.compile(F.linear, dynamic=False)
    for n, k, block in ((192, 512, (-1, -1)), (1000, 1280, (1, -1)), (64, 14336, (-1, -1)), (40, 1344, (1, -1))):
        for m in (1, 2, 9, 16, 17, 40, 64, 65, 300):
            x, q = case(n, k, m, block, dtype, act=act)
            assert path_name(x, q) in (("trits",) if m <= 64 else ("scaled_product", "int_mm"))
            expected = of_integers(x, q)
            if m <= 64 or dtype == torch.float32:
                assert torch.equal(F.linear(x, q), expected)
            else:
                assert compute_error(expected, F.linear(x, q)) > 60  # parts of K may have been scaled
            if m in (1, 9) and n == 192:
                torch.compiler.reset()
                assert torch.equal(compiled(x, q), expected)


def test_other_scales_of_the_activation():
    """One for all tokens, and one that was calibrated."""
    for m in (1, 7):
        x, q = case(64, 512, m, act=Intx(8, (-1, -1)))
        assert path_name(x, q) == "trits"
        assert torch.equal(F.linear(x, q), of_integers(x, q))
        fixed = q.like(q.shape, q.dtype, {**q.fields(), "act_scale": torch.tensor(0.3, device="cuda")})
        codes = (x.float() * (1 / torch.tensor(0.3))).round().clamp(-128, 127)
        expected = codes @ (fixed.spec.codes(q.qdata, q.shape)).float().t() * 0.3 * q.scale.float()
        assert path_name(x, fixed) == "trits"
        assert compute_error(expected, F.linear(x, fixed).float()) > 40


TILES = {
    "a part of K": (16, 64, 4, 1),
    "parts of K": (16, 64, 4, 3),
    "many tokens": (64, 128, 4, 1, 2),
    "tall": (32, 128, 8, 2),
    "tall, few warps": (16, 128, 4, 1),
    "two steps ahead": (32, 64, 4, 2, 2),
}


@pytest.mark.parametrize("name", TILES)
def test_tiles_of_a_few_tokens(name):
    """Each gives the product, of rows that are no multiple of the tile's, and of codes that begin anywhere."""
    from ao.matmul.kernels import trits

    tile = trits.Tile(*TILES[name])
    for k in (4096, 1280, 768, 2880):
        for block in ((-1, -1), (1, -1), (1, 64)):
            x, q = case(80, k, 21, block)
            reading, (codes, *others) = read(q)
            shifted = torch.empty(codes.numel() + 4, dtype=codes.dtype, device=codes.device)[4:].view(codes.shape)
            for each in (codes, shifted.copy_(codes)):
                assert worst(x, q, trits.few(x, reading, (each, *others), x.dtype, tile=tile)) > 42


def test_the_decoder():
    from ao.matmul.kernels import trits

    for n, k in ((5, 64), (70, 1344), (16, 4096)):
        _, q = case(n, k, 1, (1, 64))
        assert torch.equal(trits.decoded(*read(q), torch.int8), q.spec.codes(q.qdata, q.shape))
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(trits.decoded(*read(q), dtype), q.decode(dtype))


def test_codes_that_begin_anywhere():
    """Rows that are no whole words may; those that are, are read another way."""
    for k, path in ((320, "few"), (512, "dequantize")):
        x, q = case(64, k, 3)
        shifted = torch.empty(q.qdata.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view(q.qdata.shape)
        part = q.like(q.shape, q.dtype, {**q.fields(), "qdata": shifted.copy_(q.qdata)})
        assert path_name(x, part) == path
        assert worst(x, part, F.linear(x, part)) > 42


def test_zeros_and_nan():
    """Of an activation that is quantized, too."""
    for settings in ({}, {"act": Intx(8, narrow=True)}):
        for m in (1, 4):
            x, q = case(64, 512, m, **settings)
            assert not F.linear(torch.zeros_like(x), q).any()
            x[0, 7] = float("nan")
            out = F.linear(x, q)
            assert out[0].isnan().all() and not out[1:].isnan().any()
