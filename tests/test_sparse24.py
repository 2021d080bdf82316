"""Two of four: what is stored, what is refused, and what a product makes of it."""

import copy
import gc

import pytest
import torch
from cases import weight
from test_dtypes import STRUCTURAL

import ao
from ao.dtypes import NF4, NVFP4, Float8, Intx, Sparse24, pairs
from ao.matmul import sparse
from ao.quant import compute_error

VALUES = [None, Intx(8), Intx(8, (-1, -1), symmetric=False), Intx(4, (1, 128)), Float8(), NF4, NVFP4]


def pruned(shape=(128, 256), dtype=torch.float32, seed=0):
    """A 2:4 weight."""
    return Sparse24(prune=True).quantize(weight(shape, seed, dtype)).dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_values_are_kept_as_they_are(dtype):
    w = pruned(dtype=dtype)
    q = Sparse24().quantize(w)
    assert torch.equal(q.dequantize(), w) and q.pairs.dtype == dtype
    assert q.nbytes_packed * 8 == w.numel() * (dtype.itemsize * 4 + 1)


def test_the_largest_two_are_kept():
    w = weight((64, 32))
    w[0, :8] = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, -3.0])  # equal ones, and fewer than two
    w[1, 0] = torch.nan
    q = Sparse24(prune=True).quantize(w)
    size = w.nan_to_num(torch.inf).abs().view(-1, 4)
    keep = (
        torch.zeros_like(size)
        .scatter_(1, size.sort(dim=1, descending=True, stable=True)[1][:, :2], 1)
        .bool()
        .view_as(w)
    )
    torch.testing.assert_close(q.dequantize(), torch.where(keep, w, 0), rtol=0, atol=0, equal_nan=True)


def test_packing():
    for groups in (2, 4, 16, 20, 64):
        codes = torch.randint(0, 16, (3, groups), dtype=torch.uint8)
        packed = pairs.pack_codes(codes)
        assert packed.shape == (3, groups // 2) and torch.equal(pairs.unpack_codes(packed), codes)
    assert pairs.unpack_codes(pairs.pack_codes(torch.empty(2, 0, dtype=torch.uint8))).shape == (2, 0)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_what_is_done_to_it_is_done_to_its_numbers(values):
    q = Sparse24(values).quantize(pruned())
    plain = q.dequantize()
    error = (plain - pruned()).norm() / pruned().norm()
    assert error == 0 if values is None else error < 0.12
    for name, op in STRUCTURAL.items():
        assert torch.equal(op(q).dequantize(), op(plain)), name
    q.mul_(2)
    assert compute_error(2 * plain, q.dequantize()) > 20
    turned = q.t()
    assert turned[:0, :16].dequantize().shape == (0, 16) and turned[:64, :0].dequantize().shape == (64, 0)
    turned.copy_(pruned(seed=1).t())
    assert torch.equal(q, q.spec.quantize(pruned(seed=1)))


def test_what_is_not_two_of_four_is_an_error():
    w = pruned()
    w[3, 4:8] = 1
    w[100, :4] = 1
    q = Sparse24(Intx(8)).quantize(pruned())
    before = q.clone()
    for call in (Sparse24().quantize, Sparse24(Intx(8)).quantize, Sparse24(Float8()).check_range, q.copy_, q.add_):
        with pytest.raises(ValueError, match=r"2 of the 8,192 groups of four have more than two .*prune_"):
            call(w if call != q.add_ else w - q.dequantize())
    assert torch.equal(q, before)
    layer = torch.nn.Linear(256, 128)
    with pytest.raises(ValueError, match=r"^weight: .*of the 8,192 groups"):
        ao.quantize_(layer, Sparse24())
    assert not isinstance(layer.weight, ao.QTensor)


def test_what_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        Sparse24().quantize(torch.zeros(4, 24))
    with pytest.raises(ValueError, match="multiple of 4 along the last dim"):
        Sparse24(Intx(8, (1, 2)))
    with pytest.raises(ValueError, match="to Sparse24 rather than"):
        Sparse24(Intx(8, act=Intx(8)))
    with pytest.raises(TypeError, match="must be a Spec"):
        Sparse24(4)


def test_what_is_kept_beside_stays_out_of_files_and_copies(tmp_path):
    """And it follows the weight, and goes with it."""
    q = Sparse24(Intx(8)).quantize(pruned())
    x = weight((5, 256), 1)
    start = sparse._Kept.total
    first = torch.nn.functional.linear(x, q)
    assert sparse._Kept.total > start
    torch.save(q, tmp_path / "q.pt")
    assert (tmp_path / "q.pt").stat().st_size < q.nbytes_packed + 8000
    assert torch.equal(torch.load(tmp_path / "q.pt"), q) and torch.equal(copy.deepcopy(q), q)
    q.mul_(2)
    assert compute_error(2 * first, torch.nn.functional.linear(x, q)) > 30
    del q
    gc.collect()
    assert sparse._Kept.total == start


WRITES = {
    "all of it": lambda q: q.mul_(2),
    "by a copy": lambda q: q.copy_(q.dequantize() * 2),
    "a part": lambda q: q[8:].mul_(2),
    "a view": lambda q: q.view(q.shape).mul_(2),
    "in a list": lambda q: torch._foreach_mul_([q], 2),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_products_follow_what_is_written(write):
    q, x = Sparse24().quantize(pruned()), weight((5, 256), 1)
    first = torch.nn.functional.linear(x, q)
    write(q)
    now = torch.nn.functional.linear(x, q)
    assert not torch.equal(first, now) and compute_error(x @ q.dequantize().t(), now) > 100


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("act", [None, Intx(8)], ids=str)
def test_products(values, act):
    """And their gradients."""
    x, w = weight((5, 256), 1), pruned()
    q = Sparse24(values, act=act).quantize(w)
    expected = (x if act is None else act.fake_quantize(x)) @ q.dequantize().t()
    assert compute_error(expected, torch.nn.functional.linear(x, q)) > 50
    x.requires_grad_()
    torch.nn.functional.linear(x, q).sum().backward()
    assert compute_error(q.dequantize().sum(0).expand_as(x), x.grad) > 50


@pytest.mark.parametrize(
    ("dense", "units", "expected"),
    [
        ((1.0, 0.2), (0.7, 0.4), (True, True)),
        ((1.0, 0.2), (0.7, 2.0), (True, False)),
        ((1.0, 0.2), (1.2, 0.1), (False, False)),
    ],
)
def test_sparse_units_are_chosen_by_the_slower_of_gpu_and_host(monkeypatch, dense, units, expected):
    """Milliseconds of the GPU and of the host, the least of three turns. In a CUDA graph those of the host do not count."""
    q, x = Sparse24(Intx(8), prune=True).quantize(weight((64, 96))), weight((300, 96))
    slow = [tuple(4 * ms for ms in way) for way in (dense, units)]  # while something else runs
    operand, recorded, clock = q.spec.operand(q), [False], iter([dense, slow[1], slow[0], units, *slow])
    monkeypatch.setattr(sparse, "_is_recorded", lambda _: recorded[0])
    monkeypatch.setattr(sparse, "_compressed_product", lambda *_: x)
    monkeypatch.setattr(sparse, "_for_units", lambda _: None)
    monkeypatch.setattr(sparse, "_took", lambda call: call() is not None and next(clock))
    monkeypatch.setattr(sparse, "_WINS", {})
    recorded[0] = True
    assert sparse._units_win(x, q, operand)  # nothing may be timed now
    recorded[0] = False
    found = [sparse._units_win(x, q, operand), sparse._units_win(x[:290], q, operand)]
    assert found == [expected[1]] * 2
    recorded[0] = True
    assert sparse._units_win(x, q, operand) == expected[0]


def test_no_other_form_is_made_while_a_graph_is_recorded(monkeypatch):
    """Nothing is computed then, so what was kept would hold nothing."""
    q = Sparse24(prune=True).quantize(weight((64, 96)))
    recorded = [True]
    monkeypatch.setattr(sparse, "_is_recorded", lambda _: recorded[0])
    assert sparse._unfolded(q) is None
    recorded[0] = False
    assert torch.equal(sparse._unfolded(q), q.dequantize())
    recorded[0] = True
    assert torch.equal(sparse._unfolded(q), q.dequantize())
