"""Where a quantized tensor can be cut and written, for every format and for scales that are quantized themselves."""

from types import SimpleNamespace

import pytest
import torch
from cases import CASES, SHAPE, Case, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ao.dtypes import NF4, Codebook, Float8, Int4Prepacked, Intx, QTensor, Spec, pieces
from ao.dtypes.lattice import Lattice, lattice

SCALES = {"signed": False, "symmetric": False, "zero_point": "float"}
NESTED = [
    NF4,
    Codebook("nf4", (1, 64), Intx(8, (-1, -1), **SCALES)),
    Codebook("nf4", (1, 64), Float8(block=(-1, -1))),
    Codebook("nf4", (1, 32), Intx(8, (1, 2), **SCALES)),
    Codebook("nf4", (1, 32), Intx(8, (16, 4), **SCALES)),
    Codebook("nf4", (32, 32), Intx(8, (2, -1), **SCALES)),
]
SPECS = [*(case.spec for case in CASES), *NESTED]


def name(spec: Spec) -> str:
    return str(Case(spec, 0.0))


@pytest.mark.parametrize(
    ("spec", "rows", "cols"),
    [
        (Intx(8), (1, 1), (1, 256)),
        (Intx(8, (-1, -1)), (1, 128), (1, 256)),
        (Intx(4, (1, 64)), (1, 1), (64, 64)),
        (Intx(4, (32, 16)), (32, 32), (32, 32)),
        (Float8(), (1, 1), (1, 256)),
        (NESTED[0], (1, 1), (64, 256)),
        (NESTED[1], (1, 128), (64, 256)),
        (NESTED[3], (1, 1), (64, 64)),
        (NESTED[4], (16, 16), (128, 128)),
        (NESTED[5], (64, 64), (32, 256)),
    ],
    ids=str,
)
def test_golden(spec, rows, cols):
    q = spec.quantize(weight())
    for turned, dims in ((q, (0, 1)), (q.t(), (1, 0)), (q[None], (1, 2))):
        for d, expected in zip(dims, (rows, cols)):
            places = lattice(turned, d)
            assert (places.cut, places.whole) == expected


def test_a_range():
    places = Lattice(128, 32, (64,))
    assert places.can_cut(0, 64) and places.can_write(0, 64)
    assert places.can_cut(32, 64) and not places.can_write(32, 64)
    assert not places.can_cut(32, 96) and not places.can_cut(16, 32)
    short = Lattice(40, 32, grain=8)
    assert short.can_cut(32, 40) and not short.can_cut(0, 16) and short.can_be(48) and not short.can_be(44)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_view_is_right_or_refused_and_a_write_stays_inside(data):
    q = data.draw(st.sampled_from(SPECS)).quantize(weight())
    if data.draw(st.booleans()):
        q = q.t()
    part, inside = q, torch.zeros(q.shape, dtype=torch.bool)
    index = []
    for n in q.shape:
        ends = st.integers(0, n // 16).map(lambda i: 16 * i) | st.integers(0, n)
        start, stop = sorted(data.draw(st.tuples(ends, ends)))
        index.append(slice(start, stop))
    try:
        part = q[tuple(index)]
    except ValueError as error:
        assert "cannot take" in str(error)
        return
    before = q.dequantize()
    assert torch.equal(part.dequantize(), before[tuple(index)])
    inside[tuple(index)] = True
    values = 20 * weight(tuple(part.shape), 1)
    try:
        part.copy_(values)
    except ValueError as error:
        assert "shares the scales" in str(error) or "no dim of shape" in str(error)
    assert torch.equal(q.dequantize()[~inside], before[~inside])


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_pieces_cut_no_block(spec, monkeypatch):
    """Large data is quantized, and written, in pieces, with the same result."""
    w = weight(dtype=torch.bfloat16)
    qparams = spec.choose_qparams(w.float(), spec.grid(SHAPE))
    q, changed = spec.quantize(w), w.clone()
    changed[3, 5] += 1
    written = q.clone().copy_(changed)
    for size in (4096, 10000):
        monkeypatch.setitem(pieces.ELEMENTS, "cpu", size)
        assert torch.equal(spec.quantize(w), q) and torch.equal(spec.quantize(w, **qparams), q)
        assert torch.equal(q.clone().copy_(changed), written)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_writing_at_positions(spec):
    shape = (4, *SHAPE) if spec.grid((4, *SHAPE))[0] == 4 else SHAPE
    q = spec.quantize(weight(shape))
    before = q.dequantize()
    for d, n in enumerate(shape):
        index = torch.tensor([2, 0, -1])
        values = 20 * weight(tuple(3 if i == d else n for i, n in enumerate(shape)), 1)
        made = q.clone()
        if lattice(q, d).whole != 1:
            with pytest.raises(ValueError, match="cannot write at single positions"):
                made.index_copy_(d, index % n, values)
            with pytest.raises(ValueError, match="cannot write at single positions"):
                made[(slice(None),) * d + (index,)] = values
            assert torch.equal(made, q)
            continue
        expected = before.index_copy(d, index % n, spec.quantize(values).dequantize())
        assert made.index_copy_(d, index % n, values) is made and torch.equal(made.dequantize(), expected)
        made = q.clone()
        made[(slice(None),) * d + (index,)] = values
        assert torch.equal(made.dequantize(), expected)
        made = q.clone()
        made.index_copy_(d, index % n, spec.quantize(values))
        if not isinstance(getattr(spec, "scale_spec", None), Spec):  # Values that are quantized twice.
            assert (made.dequantize() - expected).norm() <= 0.35 * expected.norm()
        made = q.clone()
        made[(slice(None),) * d + (torch.arange(n) == 1,)] = 0.0
        rest = [i for i in range(n) if i != 1]
        assert torch.equal(
            made.dequantize().index_select(d, torch.tensor(rest)), before.index_select(d, torch.tensor(rest))
        )


def at_a_position(cache: Tensor, k: Tensor) -> None:
    cache[:, :, torch.tensor([5])] = k


def by_index_copy(cache: Tensor, k: Tensor) -> None:
    cache.index_copy_(2, torch.tensor([5]), k)


def by_slice(cache: Tensor, k: Tensor) -> None:
    cache[:, :, 5:6].copy_(k)


compiled = torch.compile(by_index_copy, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("spec", "write"),
    [
        *((s, w) for s in (Intx(8), Intx(4, (1, 32)), Float8(), NF4) for w in (at_a_position, by_index_copy, by_slice)),
        (Intx(8), compiled),
    ],
)
def test_a_cache_is_written_at_a_position(spec, write):
    """What a static cache does: all else keeps its bits."""
    cache = spec.quantize(weight((1, 2, 16, 64)))
    k = weight((1, 2, 1, 64), 1)
    expected = cache.dequantize()
    expected[:, :, 5:6] = spec.quantize(k).dequantize()
    write(cache, k)
    assert torch.equal(cache.dequantize(), expected)


def test_positions_with_a_multiplier():
    q = Intx(8).quantize(weight(), pre_scale=weight((1, 256)).abs() + 0.5)
    x = weight((2, 256), 1)
    expected = Intx(8).quantize(x, pre_scale=q.pre_scale).dequantize()
    q[torch.tensor([7, 3])] = x
    assert torch.equal(q.dequantize()[[7, 3]], expected)


def test_a_source_that_does_not_fit():
    q = Intx(8).quantize(weight())
    before = q.clone()
    with pytest.raises(IndexError, match="take a source of shape"):
        q.index_copy_(0, torch.tensor([1, 2]), torch.ones(1, 256))
    with pytest.raises(IndexError, match="out of bounds"):
        q[torch.tensor([500])] = 0.0
    assert torch.equal(q, before)


def test_several_indices_quantize_anew():
    q = Intx(8).quantize(weight())
    expected = q.dequantize()
    expected[3, 4] = 0.0
    q[torch.tensor([3]), torch.tensor([4])] = 0.0
    assert torch.equal(q[3].dequantize(), Intx(8).quantize(expected)[3].dequantize())
    assert torch.equal(q.dequantize()[4:], expected[4:])


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_a_shard_that_is_trained(spec):
    """Two ranks quantize their shards anew: the gathered weight has the values of both, or is refused."""
    w = torch.cat([weight((64, 256)), 50 * weight((64, 256))])
    shards = [spec.quantize(part) for part in w.chunk(2)]
    modules = [nn.Linear(256, 64, bias=False) for _ in shards]
    for module, shard in zip(modules, shards):
        module.weight = nn.Parameter(shard)
    mesh = SimpleNamespace(ndim=1, size=lambda *_: 2)
    if lattice(spec.quantize(w), 0).whole > 64:
        with pytest.raises(ValueError, match="spans dim 0, and each rank would choose its own"):
            shards[0].fsdp_pre_all_gather(mesh, w.shape, w.stride(), modules[0], None)
        return
    leaves = [s.fsdp_pre_all_gather(mesh, w.shape, w.stride(), m, None)[0] for s, m in zip(shards, modules)]
    whole, _ = shards[0].fsdp_post_all_gather(tuple(torch.cat(p) for p in zip(*leaves)), 2, torch.float32)
    assert torch.equal(whole.dequantize(), torch.cat([s.dequantize() for s in shards]))


def test_new_tensors_have_the_blocks_of_the_old():
    """Also of one row, whose shapes do not say whether the block spans it."""
    for spec in (Intx(8), Intx(8, (-1, -1)), NF4, NESTED[1]):
        for rows in (1, 4):
            made = spec.quantize(weight((rows, 256))).new_zeros(6, 256)
            expected = spec.quantize(weight((6, 256)))
            assert isinstance(made, QTensor)
            assert [t.shape for t in made.fields().values()] == [t.shape for t in expected.fields().values()]
    with pytest.raises(ValueError, match="cannot take"):
        Intx(4, (1, 32)).quantize(weight()).new_zeros(128, 80)


def test_a_private_layout_has_no_lattice():
    q = Int4Prepacked("cpu", (1, 64)).quantize(weight())
    for call in (lambda: lattice(q, 0), lambda: q[:16], lambda: q.index_copy_(0, torch.tensor([0]), weight((1, 256)))):
        with pytest.raises(NotImplementedError, match="device-specific layout"):
            call()


def test_a_view_of_one_form_is_not_written_either():
    """Fields of one form could be copied as they are, with the scales that others share."""
    q, other = NF4.quantize(weight()), NF4.quantize(20 * weight(seed=1))
    before = q.dequantize()
    with pytest.raises(ValueError, match="shares the scales"):
        q[:, :128].copy_(other[:, :128])
    assert torch.equal(q.dequantize(), before)


@pytest.mark.parametrize("spec", [Intx(8), Intx(4, (1, 64)), Intx(2, (1, 32), symmetric=True)], ids=str)
def test_beyond_the_largest_number_of_float16(spec):
    """Values beyond it dequantize to it, and stay as they are when that is written back."""
    q = spec.quantize(1e6 * weight()).half()
    before = q.clone()
    assert torch.equal(q.copy_(q.dequantize()), before)
