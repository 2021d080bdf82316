"""The kernels for any format, on a GPU: each by its name against plain PyTorch, over random shapes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from cases import weight

from ao import compute_error
from ao.dtypes import FP6, MXFP4, MXFP6, MXFP8, MXINT8, NF4, NVFP4, Codebook, Float8, FloatX, Intx, Ternary
from ao.matmul import path_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

FIVE_BITS = Codebook(tuple(float((i - 16) ** 3) for i in range(32)), (1, 32))

ONE_TOKEN = [
    *(
        Intx(bits, (1, group), signed=signed)
        for bits in (1, 2, 3, 5, 6, 7)
        for group, signed in ((64, True), (16, False))
    ),
    Intx(4, (1, 16)),
    Intx(4, (8, 32)),
    Intx(3),
    Intx(2, (-1, -1)),
    Intx(1, (1, 64), symmetric=True),
    Intx(2, (1, 32), signed=False, zero_point="float"),
    Intx(3, (1, 48), scale_dtype="bfloat16"),
    Intx(4, (1, 16), signed=False, zero_point="joint"),
    Intx(3, (1, 16), zero_point="joint"),
    Intx(2, (1, 64), zero_point="joint"),
    NF4,
    Codebook("nf4", (1, 64), Intx(8, (1, 3), signed=False, symmetric=False, zero_point="float")),
    Codebook(tuple(float(i**3) for i in range(-8, 8)), (1, 32)),
    MXFP4,
    NVFP4,
    FloatX(2, 1, (1, 16), "e4m3"),
    FloatX(3, 0, (1, 32), "bfloat16"),
    FP6,
    MXFP6,
    MXFP8,
    MXINT8,
    FloatX(2, 2),
    Float8(block=(1, 48)),
    Intx(8, (1, 16)),
    Intx(8, (16, 16), signed=False),
    Intx(8, (1, 96), zero_point="float", symmetric=False),
    FIVE_BITS,
    Ternary(),
    Ternary((1, -1), scale_dtype="bfloat16"),
    Ternary((8, -1), scale_dtype="float16"),
]
"""Formats that the kernels for one token take, but for those of ampere.py."""

OTHERS = [
    Codebook((-1.0, -0.2, 0.1, 1.0), (1, 32)),
    Float8("e5m2", (16, 32)),
    Ternary((1, 64)),
    Ternary((16, 192), scale_dtype="bfloat16"),
]
"""Formats that they do not take."""


def shape(seed):
    """Random (N, K), with rows that are no power of two."""
    draw = random.Random(seed)
    return 16 * draw.randint(1, 40), 384 * draw.randint(1, 9)


def worst(x, q, out):
    """The worst row, in dB, against float32 arithmetic on the decoded weight."""
    expected = x.float() @ q.dequantize().float().t()
    return min(compute_error(e, o).item() for e, o in zip(expected, out.float()))


def case(spec, n, k, m, dtype=torch.bfloat16):
    """Rows of x that differ a thousandfold, with an outlier."""
    x = weight((m, k), 1) * torch.logspace(-1.5, 1.5, m).unsqueeze(1)
    x[:, 3] *= 50
    return x.to(dtype).cuda(), spec.quantize(weight((n, k), 2, dtype=dtype).cuda())


@pytest.mark.parametrize("spec", ONE_TOKEN, ids=str)
def test_one_token(spec):
    for dtype in (torch.bfloat16, torch.float16):
        n, k = shape(dtype == torch.float16)
        x, q = case(spec, n, k - k % 256 if isinstance(spec, Ternary) else k, 1, dtype)
        assert path_name(x, q) == "gemv_codes"
        assert worst(x, q, F.linear(x, q)) > 46


@pytest.mark.parametrize("spec", [*ONE_TOKEN, *OTHERS], ids=str)
def test_a_few_tokens(spec):
    for m, dtype in ((3, torch.bfloat16), (9, torch.float16), (16, torch.bfloat16), (64, torch.bfloat16)):
        x, q = case(spec, *shape(m), m, dtype)
        assert path_name(x, q) == "few"
        assert worst(x, q, F.linear(x, q)) > 42


TILES = {
    "a part of K": (False, 16, 64, 4),
    "parts of K": (False, 16, 64, 4, 3, 3),
    "two warps": (False, 16, 32, 2, 3, 2),
    "hopper": (True, 16, 64, 4, 3, 1, 8, 4, 128, 2, False),
    "hopper, cut": (True, 32, 64, 4, 2),
    "hopper, tall": (True, 64, 128, 8, 2),
    "hopper, short steps": (True, 64, 128, 8, 2, 1, 4, 2),
    "hopper, few warps": (True, 64, 128, 4, 2, 1, 4, 2, 255),
    "hopper, one product in a step": (True, 128, 128, 8, 3, 1, 8, 1, 255, 1),
    "hopper, most tokens": (True, 256, 128, 8, 3, 1, 4, 1, 255, 1),
}


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("spec", [Intx(3, (1, 128)), Intx(7, (1, 16)), NF4, FP6, MXFP8, Intx(8, (1, 16))], ids=str)
def test_tiles_of_a_few_tokens(spec, name):
    """Each gives the product, of rows that are no multiple of the tile's, and of codes that begin anywhere."""
    from ao.matmul.kernels.device import is_hopper
    from ao.matmul.kernels.few_tokens import Tile, few_in_tiles
    from ao.matmul.kernels.reading import reading_of

    tile = Tile(*TILES[name])
    x, q = case(spec, 80, 1408, 21)
    if tile.hopper and not is_hopper(x.device):
        pytest.skip("needs Hopper")
    reading, (codes, *others) = reading_of(q)
    shifted = torch.empty(codes.numel() + 1, dtype=codes.dtype, device=codes.device)[1:].view(codes.shape)
    for each in (codes, shifted.copy_(codes)):
        assert worst(x, q, few_in_tiles(x, reading, [(each, *others)], tile)[0]) > 42


@pytest.mark.parametrize("spec", [Intx(3, (1, 128)), Intx(4, (1, 128)), NF4, FP6, MXFP8, Intx(8), Ternary()], ids=str)
def test_some_tokens_in_a_graph(spec):
    """As a graph calls the product, with a bias: of one tile, of tiles that are cut, and of more than there are programs."""
    from ao.matmul.kernels.operators import few_at_once
    from ao.matmul.kernels.reading import reading_of

    for n, k in ((80, 1408), (34000, 1024)):
        for m in (20, 65, 128, 200, 300):
            x, q = case(spec, n, k, m)
            bias = weight((n,), 3).cuda()
            reading, fields = reading_of(q)
            expected = x.float() @ q.dequantize().float().t() + bias
            out = few_at_once(x, fields, reading, bias).float()
            assert min(compute_error(e, o).item() for e, o in zip(expected, out)) > 42


TILES_OF_ONE = {
    "a slice": (1408, 16, 1, 128, 8, 4, True),
    "ahead of two tiles": (1920, 8, 2, 128, 8, 4, True),
    "a tile ahead": (1920, 8, 2, 128, 4, 1, False),
    "many slices": (8448, 16, 1, 128, 8, 4, True),
    "many slices, not apart": (8448, 16, 1, 128, 4, 4, False),
    "x in shared memory": (6656, 8, 1, 128, 8, 0, True),
}
"""K, and the tile."""


@pytest.mark.parametrize("name", TILES_OF_ONE)
@pytest.mark.parametrize("spec", [NF4, FP6, MXFP6, MXFP8, NVFP4, FIVE_BITS, Codebook("nf4", (1, 16))], ids=str)
def test_tiles_of_one_token(spec, name):
    """Each gives the product, of rows that are no multiple of the tile's and more tiles than are added at once, and of codes and
    tokens that begin anywhere."""
    from ao.matmul.kernels.one_token_mma import Tile, gemv
    from ao.matmul.kernels.reading import reading_of

    k, *tile = TILES_OF_ONE[name]
    x, q = case(spec, 1000, k, 40)  # of 40 tokens each has a few programs
    reading, (codes, *others) = reading_of(q)
    assert worst(x, q, gemv(x, reading, (codes, *others), Tile(*tile))) > 46
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape) for t in (x, codes)]
    assert torch.equal(
        gemv(shifted[0].copy_(x), reading, (shifted[1].copy_(codes), *others), Tile(*tile)),
        gemv(x, reading, (codes, *others), Tile(*tile)),
    )


CUTS = {
    "one part of K": (16, 1, 1),
    "parts of K": (8, 1, 2),
    "slices that follow each other": (8, 2, 1, 2),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("spec", [Intx(4, (1, 128)), Intx(7, (1, 16)), NF4, FP6, MXFP8, Intx(8)], ids=str)
def test_slices_of_k(spec, name):
    """Each cut gives the product, of rows that are no multiple of the tile's, and of codes and tokens that begin anywhere."""
    from ao.matmul.kernels.reading import reading_of
    from ao.matmul.kernels.slices_of_k import Cut, sliced

    for m, dtype in (
        (2, torch.bfloat16), (8, torch.bfloat16), (13, torch.bfloat16), (40, torch.bfloat16), (7, torch.float16),
        (21, torch.float16),
    ):  # fmt: skip
        x, q = case(spec, 80, 1408, m, dtype)
        reading, (codes, *others) = reading_of(q)
        shifted = torch.empty(codes.numel() + 1, dtype=codes.dtype, device=codes.device)[1:].view(codes.shape)
        moved = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
        for tokens, each in ((x, codes), (moved.copy_(x), shifted.copy_(codes))):
            assert worst(x, q, sliced(tokens, reading, [(each, *others)], Cut(*CUTS[name]))[0]) > 42


@pytest.mark.parametrize("spec", [MXFP4, NVFP4, NF4], ids=str)
def test_the_same_weight_in_both_kernels(spec):
    """What one kernel for a few tokens knows of a format, the other does not change."""
    for m in (8, 17, 2):
        for dtype in (torch.bfloat16, torch.float16):
            x, q = case(spec, 80, 1408, m, dtype)
            assert worst(x, q, F.linear(x, q)) > 42, (m, dtype)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_weights_that_are_not_numbers(format):
    """NaN, and infinity where there is one, are in the row where they are, and nowhere else."""
    from ao.matmul.kernels.few_tokens import few
    from ao.matmul.kernels.reading import reading_of

    x, q = case(Float8(format, (1, 32)), 48, 256, 5)
    x = x.abs()
    codes = q.qdata.view(torch.uint8)
    codes[3, 17], codes[20, 200] = 0x7F, 0xFF
    if format == "e5m2":
        codes[30, 64], codes[31, 64] = 0x7C, 0xFC
    out = few(x, *reading_of(q)).float()
    assert out[:, [3, 20]].isnan().all()
    rest = torch.ones(48, dtype=torch.bool)
    rest[[3, 20]] = False
    if format == "e5m2":
        assert (out[:, 30] == float("inf")).all() and (out[:, 31] == float("-inf")).all()
        rest[[30, 31]] = False
    expected = (x.float() @ q.dequantize().float().t())[:, rest]
    assert compute_error(expected, out[:, rest]) > 40


@pytest.mark.parametrize("spec", [*ONE_TOKEN, *OTHERS], ids=str)
def test_many_tokens(spec):
    x, q = case(spec, *shape(1), 100)
    assert torch.equal(F.linear(x, q), F.linear(x, q.dequantize()))  # the decoder's numbers are those of `decode`


@pytest.mark.parametrize("spec", OTHERS, ids=str)
def test_one_token_of_other_formats(spec):
    x, q = case(spec, *shape(2), 1)
    assert path_name(x, q) == "few"
    assert worst(x, q, F.linear(x, q)) > 42


@pytest.mark.parametrize(("n", "k"), [(8, 768), (32, 16896)])
@pytest.mark.parametrize("spec", [NF4, FP6, MXFP8], ids=str)
def test_one_token_of_few_or_long_rows(spec, n, k):
    """Tables and small floats, of which the kernel for one token takes 16 rows at a time and has x in registers."""
    x, q = case(spec, n, k, 1)
    assert path_name(x, q) == "few"
    assert worst(x, q, F.linear(x, q)) > 42


IN_HALVES = [
    Intx(4, (1, 16)),
    Intx(4, (1, 16), signed=False, scale_dtype="bfloat16"),
    Intx(4, (1, 16), zero_point="joint"),
    Intx(4),
    Intx(4, (8, 16)),
    NVFP4,
    FloatX(2, 1, (1, 16), "e4m3"),
    Codebook("nf4", (1, 16)),
    Codebook("nf4", (1, 16), Intx(8, (1, 1), signed=False, symmetric=False, zero_point="float")),
    Intx(8),
    Intx(8, signed=False, symmetric=False),
    Intx(8, (1, 16)),
    Intx(8, (-1, -1)),
    Float8(),
    Float8("e5m2"),
    Float8(block=(1, 16)),
]
"""Formats of 4 and 8 bits, whose rows may end in half a chunk."""


@pytest.mark.parametrize("spec", IN_HALVES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(40, 16), (24, 48), (72, 80), (1000, 240), (208, 4304), (64, 9232)])
def test_rows_that_end_in_half_a_chunk(spec, n, k):
    from ao.matmul.kernels.reading import reading_of

    for m, dtype in (
        (1, torch.bfloat16), (1, torch.float16), (2, torch.bfloat16), (5, torch.float16), (8, torch.bfloat16),
        (9, torch.float16), (13, torch.bfloat16), (17, torch.bfloat16), (40, torch.float16), (64, torch.bfloat16),
    ):  # fmt: skip
        x, q = case(spec, n, k, m, dtype)
        integers = isinstance(spec, Intx) and (spec.bits == 4 or not reading_of(q)[0].by_row)
        assert path_name(x, q) == ("gemv_codes" if m == 1 and integers else "few")
        assert worst(x, q, F.linear(x, q)) > 40, (m, dtype)  # a sum of few numbers may be near zero
    x, q = case(spec, n, k, 100)
    assert torch.equal(F.linear(x, q), F.linear(x, q.dequantize()))
    x, q = case(Intx(3, (1, 16)), n, k, 5)
    assert path_name(x, q) == "dequantize"


HALF_SPECS = [Intx(4, (1, 16)), Intx(4), NVFP4, Intx(8), Intx(8, (1, 16))]


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("spec", HALF_SPECS, ids=str)
def test_tiles_of_rows_that_end_in_half_a_chunk(spec, name):
    """Each gives the product, of codes that begin anywhere."""
    from ao.matmul.kernels.device import is_hopper
    from ao.matmul.kernels.few_tokens import Tile, few_in_tiles

    tile = Tile(*TILES[name])
    for k in (48, 1392):
        x, q = case(spec, 80, k, 21)
        if tile.hopper and not is_hopper(x.device):
            pytest.skip("needs Hopper")
        for reading, fields in read_anywhere(q):
            assert worst(x, q, few_in_tiles(x, reading, [fields], tile)[0]) > 40


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("spec", HALF_SPECS, ids=str)
def test_slices_of_rows_that_end_in_half_a_chunk(spec, name):
    from ao.matmul.kernels.slices_of_k import Cut, sliced

    for k in (48, 1392):
        for m, dtype in ((2, torch.bfloat16), (13, torch.bfloat16), (7, torch.float16)):
            x, q = case(spec, 80, k, m, dtype)
            for reading, fields in read_anywhere(q):
                assert worst(x, q, sliced(x, reading, [fields], Cut(*CUTS[name]))[0]) > 40


def read_anywhere(q):
    """How a weight is read, and with codes that begin at no multiple of 16 bytes."""
    from ao.matmul.kernels.reading import reading_of

    reading, (codes, *others) = reading_of(q)
    shifted = torch.empty(codes.numel() + 1, dtype=codes.dtype, device=codes.device)[1:].view(codes.shape)
    return (reading, (codes, *others)), (reading, (shifted.copy_(codes), *others))


@pytest.mark.parametrize("spec", [Float8(), Float8(block=(1, 16)), NVFP4, Intx(4, (1, 16)), Intx(8, (1, 16))], ids=str)
def test_what_follows_half_a_chunk_is_of_another_row(spec):
    """Rows that are no numbers make none of the row before: neither their codes nor their scales are read."""
    from ao.matmul.kernels.few_tokens import few
    from ao.matmul.kernels.reading import reading_of

    for m in (1, 7, 16, 30, 64):
        x, q = case(spec, 48, 80, m)
        reading, (codes, *others) = reading_of(q)
        if isinstance(spec, Float8):
            codes.view(torch.uint8)[::2] = 0x7F
        else:  # float8 or float32, of which either is not a number
            others[0].view(torch.uint8)[::2] = 0x7F if others[0].dtype == torch.uint8 else 0xFF
        for out in (F.linear(x, q), few(x, reading, (codes, *others))):
            assert out[:, ::2].isnan().all() and not out[:, 1::2].isnan().any(), m


@pytest.mark.parametrize("spec", [Intx(4, (1, 16)), Intx(8), NVFP4, Float8()], ids=str)
def test_rows_that_end_in_half_a_chunk_compiled(spec):
    compiled = torch.compile(F.linear, fullgraph=True, dynamic=True)
    for m in (1, 5, 17, 64, 256, 700):
        x, q = case(spec, 208, 4304, m)
        assert worst(x, q, compiled(x, q)) > 42, m


@pytest.mark.parametrize("spec", [Intx(3, (1, 64)), NF4, MXFP4, NVFP4, FP6, Intx(8, (1, 16)), Ternary()], ids=str)
def test_compiled(spec):
    compiled = torch.compile(F.linear, fullgraph=True, dynamic=False)
    for m in (1, 5):
        x, q = case(spec, 96, 768, m)
        assert worst(x, q, compiled(x, q)) > 42


@pytest.mark.parametrize("spec", [Intx(3, (1, 64)), NF4, MXFP4, NVFP4, Ternary()], ids=str)
def test_zeros_and_nan(spec):
    x, q = case(spec, 64, 512, 1)
    assert torch.equal(F.linear(torch.zeros_like(x), q), torch.zeros(1, 64, dtype=x.dtype, device="cuda"))
    x[0, 7] = float("nan")
    assert F.linear(x, q).isnan().all()
    assert F.linear(x.expand(4, -1), q).isnan().all()


def test_quantized_activations_of_any_width():
    spec = Intx(4, (1, 16), act=Intx(8, (1, -1), symmetric=False))
    for m in (1, 7):
        x, q = case(spec, 96, 512, m)
        expected = F.linear(spec.act.quantize(x.float()).dequantize(), q.dequantize().float())
        assert compute_error(expected, F.linear(x, q).float()) > 40
