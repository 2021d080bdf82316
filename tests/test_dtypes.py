"""What every dtype must do, from the registry: numerics, structural ops, copies, saving."""

import copy
import io
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, SHAPE, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ao.dtypes import NF4, Codebook, Float8, Int4Prepacked, Intx, QTensor, Sparse24, Spec, pieces, to_nf4
from ao.dtypes.base import blank, dense
from ao.dtypes.blocks import expand, is_finite
from ao.dtypes.lattice import lattice
from ao.quant import compute_error

every = pytest.mark.parametrize("case", CASES, ids=str)


@every
def test_pinned_error(case, device):
    w = weight().to(device)
    error = (case.spec.quantize(w).dequantize() - w).norm() / w.norm()
    assert error.item() == pytest.approx(case.rmse, abs=2e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantizes_to_the_dtype_it_came_from(case, dtype):
    w = weight(dtype=dtype)
    q = case.spec.quantize(w)
    assert q.dtype == dtype and q.shape == w.shape and q.dequantize().dtype == dtype
    assert torch.equal(q.dequantize(), case.spec.quantize(w.float()).dequantize().to(dtype))


@every
def test_quantizing_twice_changes_nothing(case):
    once = case.spec.quantize(weight()).dequantize()
    again = case.spec.quantize(once).dequantize()
    assert (again - once).norm() <= (0.35 if getattr(case.spec, "bits", 8) < 3 else 0.1) * once.norm()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_without_storing_gives_the_same_bits(case, dtype, device):
    w = weight(dtype=dtype).to(device)
    qparams = case.spec.choose_qparams(w.float(), case.spec.grid(SHAPE))
    assert torch.equal(case.spec.round(w.float(), **qparams).to(dtype), case.spec.quantize(w).dequantize())
    assert torch.equal(case.spec.fake_quantize(w), case.spec.quantize(w).dequantize())
    again = case.spec.stored(**{name: dense(t).float() for name, t in qparams.items()})
    for name, t in qparams.items():
        assert again[name].dtype == t.dtype
        assert (dense(again[name]).float() - dense(t).float()).norm() <= 1e-3 * dense(t).float().norm()
    if isinstance(case.spec, Sparse24):
        return  # which is of four columns
    # A column, whose qparams are those of its elements.
    columns = {name: expand(dense(t), SHAPE)[:, 5:6] for name, t in qparams.items()}
    assert torch.equal(
        case.spec.round(w[:, 5:6].float(), **columns), case.spec.quantize(w.float()).dequantize()[:, 5:6]
    )


@every
def test_zeros_stay_zero(case, device):
    w = weight().to(device)
    w[3] = 0
    w[64:96, 128:192] = 0
    back = case.spec.quantize(w).dequantize()
    assert back.isfinite().all()
    exact = not (
        getattr(case.spec, "is_binary", False) or (isinstance(case.spec, Codebook) and 0.0 not in case.spec.values)
    )
    if exact and getattr(case.spec, "zero_point", "int") == "int":
        assert (back[w == 0] == 0).all()
    else:
        assert back[w == 0].abs().max() <= w.abs().max()
    assert torch.equal(case.spec.quantize(torch.zeros(SHAPE)).dequantize(), torch.zeros(SHAPE))


STRUCTURAL = {
    "row slice": lambda t: t[32:96],
    "col slice": lambda t: t[:, 64:128],
    "one row": lambda t: t[5:6],
    "strided rows": lambda t: t[::64],
    "select": lambda t: t[3],
    "cat rows": lambda t: torch.cat([t, t]),
    "cat cols": lambda t: torch.cat([t, t], 1),
    "stack": lambda t: torch.stack([t, t]),
    "t": lambda t: t.t(),
    "transpose twice": lambda t: t.transpose(0, 1).transpose(0, 1),
    "permute": lambda t: t.permute(1, 0),
    "view flat": lambda t: t.view(-1),
    "view flat and back": lambda t: t.view(-1)[:8192].view(32, 256),
    "reshape": lambda t: t.reshape(4, 32, 256),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "squeeze": lambda t: t[None].squeeze(0),
    "expand": lambda t: t[None].expand(3, -1, -1),
    "chunk rows": lambda t: t.chunk(2)[1],
    "chunk cols": lambda t: t.chunk(2, 1)[1],
    "split": lambda t: t.split([64, 64])[1],
    "unbind": lambda t: t.unbind()[7],
    "narrow": lambda t: t.narrow(0, 64, 64),
    "index": lambda t: t[torch.tensor([3, 1, 100], device=t.device)],
    "index 2-D": lambda t: t[torch.tensor([[3, -1], [0, 100]], device=t.device)],
    "mask": lambda t: t[torch.arange(128, device=t.device) % 3 == 0],
    "index_select": lambda t: t.index_select(0, torch.tensor([3, 1], device=t.device)),
    "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.t().contiguous(),
    "deepcopy": copy.deepcopy,
    "to float16": lambda t: t.to(torch.float16),
    "detach": lambda t: t.detach(),
}


@pytest.mark.parametrize("op", STRUCTURAL.values(), ids=STRUCTURAL.keys())
@every
def test_structural(case, op, device):
    """D(op(q)) == op(D(q)), bit for bit, and the result is still quantized."""
    q = case.spec.quantize(weight().to(device))
    out, expected = op(q), op(q.dequantize())
    assert isinstance(out, QTensor) and type(out) is type(q)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    assert torch.equal(out.dequantize(), expected)
    with torch.inference_mode():
        assert torch.equal(op(q).dequantize(), expected)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_chains_of_ops(data):
    case = data.draw(st.sampled_from(CASES))
    q = case.spec.quantize(weight())
    d = q.dequantize()
    for _ in range(data.draw(st.integers(1, 4))):
        op = data.draw(st.sampled_from(["rows", "cols", "t", "cat", "clone", "view", "gather"]))
        if q.dim() != 2:
            break
        n, k = q.shape
        if op == "rows":
            a = 64 * data.draw(st.integers(0, n // 64 - 1))
            q, d = q[a : a + 64], d[a : a + 64]
        elif op == "cols":
            a = 64 * data.draw(st.integers(0, k // 64 - 1))
            q, d = q[:, a : a + 64], d[:, a : a + 64]
        elif op == "t":
            q, d = q.t(), d.t()
        elif op == "cat":
            q, d = torch.cat([q, q]), torch.cat([d, d])
        elif op == "clone":
            q, d = q.clone(), d.clone()
        elif op == "view" and q.is_contiguous():
            q, d = q.unsqueeze(0).view(n, k), d.unsqueeze(0).view(n, k)
        elif (
            op == "gather" and getattr(q.spec, "bits", 8) == 8 and lattice(q, 0).chunk == 1
        ):  # rows, not packed columns
            rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=64)))
            q, d = q.index_select(0, rows), d.index_select(0, rows)
            break
    assert q.shape == d.shape and torch.equal(q.dequantize(), d)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from([(1, -1), (1, 32), (-1, -1), (16, 16), (-1, 1)]),
    st.booleans(),
    st.sampled_from([True, False]),
    st.sampled_from(["int", "float"]),
    st.integers(-60, 60),
)
def test_intx_properties(bits, block, signed, symmetric, zero_point, power):
    """Within half a step where nothing clips, and scaled by powers of two with the data."""
    spec = Intx(bits, block, signed=signed, symmetric=symmetric, zero_point=zero_point, clip=False)
    w = weight((32, 64), seed=power)
    if symmetric and not signed:
        w = w.abs()
    q = spec.quantize(w)
    assert q.qdata.numel() * 8 == w.numel() * bits
    if not (bits == 1 and symmetric):
        half = torch.nn.functional.interpolate(q.scale[None, None].float(), size=w.shape, mode="nearest")[0, 0] * (
            0.5 if zero_point == "float" or symmetric else 1.0
        )
        assert ((q.dequantize() - w).abs() <= half * 1.0001).all()
    scaled = spec.quantize(w * 2.0**power)
    assert torch.equal(scaled.qdata, q.qdata)
    assert torch.equal(scaled.dequantize(), q.dequantize() * 2.0**power)


@every
def test_views_share_storage(case):
    q = case.spec.quantize(weight())
    for view in (q[32:96], q.t(), q.view(-1), q[:, 64:128], q.detach()):
        assert first_field(view).untyped_storage().data_ptr() == first_field(q).untyped_storage().data_ptr()


def first_field(q: QTensor) -> Tensor:
    return next(iter(q.fields().values()))


@every
def test_save_and_load(case):
    q = case.spec.quantize(weight(dtype=torch.bfloat16))
    for value in (q, nn.Parameter(q, requires_grad=False), q[32:64]):
        buffer = io.BytesIO()
        torch.save({"w": value}, buffer)
        buffer.seek(0)
        back = torch.load(buffer, weights_only=True)["w"]
        assert torch.equal(back, value) and back.spec == q.spec and back.dtype == q.dtype
        assert torch.equal(pickle.loads(pickle.dumps(value)).dequantize(), value.dequantize())


@every
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(case, assign):
    def build(seed: int) -> nn.Module:
        layer = nn.Linear(SHAPE[1], SHAPE[0])
        layer.weight = nn.Parameter(case.spec.quantize(weight(seed=seed)), requires_grad=False)
        return layer

    a, b = build(1), build(2)
    b.load_state_dict(a.state_dict(), assign=assign)
    assert torch.equal(a.weight, b.weight) and isinstance(b.weight, nn.Parameter)
    with torch.device("meta"):
        empty = nn.Linear(SHAPE[1], SHAPE[0])
    empty.load_state_dict(a.state_dict(), assign=True)
    x = weight((3, SHAPE[1]))
    assert torch.equal(empty(x), a(x))
    plain = nn.Linear(SHAPE[1], SHAPE[0])
    plain.load_state_dict(a.state_dict())  # copies out of the quantized weight
    assert type(plain.weight) is nn.Parameter and torch.equal(plain.weight, a.weight.dequantize())


@every
def test_copy_and_in_place(case):
    spec, w = case.spec, weight()
    q = spec.quantize(w)
    before = q.data_ptr()
    q.copy_(2 * w)
    assert torch.equal(q, spec.quantize(2 * w)) and q.data_ptr() == before
    q.copy_(spec.quantize(w))
    assert torch.equal(q, spec.quantize(w))
    expected = q.dequantize()
    for step in (
        lambda t: t.add_(w, alpha=-0.5),
        lambda t: t.mul_(0.5),
        lambda t: t.lerp_(w, 0.1),
        lambda t: t.zero_(),
        lambda t: t.copy_(w),
    ):
        expected = q.dequantize()
        assert step(q) is q
        step(expected)
        assert torch.equal(q, spec.quantize(expected))
    expected = q.dequantize()
    turned = q.t()
    turned.mul_(2)
    assert torch.equal(q.dequantize(), spec.quantize(2 * expected).dequantize())
    row_blocks = lattice(q, 0).can_write(8, 16)
    if row_blocks:
        q.copy_(w)
        q[8:16].copy_(5 * w[8:16])
        assert torch.equal(q[8:16].dequantize(), spec.quantize(5 * w[8:16]).dequantize())
        assert torch.equal(q[:8].dequantize(), spec.quantize(w).dequantize()[:8])
    else:
        kept = q.dequantize()
        with pytest.raises(ValueError, match="shares the scales of its blocks"):
            q[8:16].copy_(w[8:16])
        assert torch.equal(q.dequantize(), kept)


def storage(q: Tensor) -> list[Tensor]:
    """The bytes of all fields, also of a field's fields."""
    fields = q.fields().values() if isinstance(q, QTensor) else [q.reshape(-1).contiguous().view(torch.uint8)]
    return [t for f in fields for t in storage(f)] if isinstance(q, QTensor) else list(fields)


def same_bits(a: QTensor, b: QTensor) -> bool:
    return all(torch.equal(x, y) for x, y in zip(storage(a), storage(b), strict=True))


UNCHANGED = {
    "copy_": lambda t: t.copy_(t.dequantize()),
    "copy_ float32": lambda t: t.copy_(t.dequantize().float()),
    "div_": lambda t: t.div_(1),
    "mul_": lambda t: t.mul_(1.0),
    "add_": lambda t: t.add_(0),
    "foreach": lambda t: torch._foreach_mul_([t], 1.0),
    "transposed": lambda t: t.t().mul_(1),
    "rows": lambda t: t[:64].mul_(1) if t[:64].whole else t,
    "mask": lambda t: t.masked_fill_(torch.zeros(t.shape, dtype=torch.bool, device=t.device), 1.0),
}


@pytest.mark.parametrize("op", UNCHANGED.values(), ids=UNCHANGED.keys())
@every
def test_what_is_written_back_unchanged_changes_no_bit(case, op, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = case.spec.quantize(weight(dtype=dtype).to(device))
        before = q.clone()
        op(q)
        assert same_bits(q, before)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_fixed_point_of_any_numbers(data):
    """Also where the numbers are as small or as large as can be, equal, or none."""
    spec = data.draw(st.sampled_from([case.spec for case in CASES]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shape = (data.draw(st.sampled_from([32, 64, 128])), data.draw(st.sampled_from([128, 256, 384])))
    power = data.draw(st.integers(-149, 126))
    w = (weight(shape, data.draw(st.integers(0, 99))).double() * 2.0**power).to(dtype)
    special = data.draw(st.sampled_from([None, 0.0, 0.3, torch.inf, -torch.inf, torch.nan, 3e38, 1e-45]))
    if special is not None:
        rows = data.draw(st.integers(1, shape[0]))
        w[:rows, :: data.draw(st.integers(1, 100))] = special
    q = spec.quantize(w)
    if data.draw(st.booleans()):
        q = spec.quantize(w, pre_scale=weight((1, shape[1])).abs() + 0.5)
    before = q.clone()
    data.draw(st.sampled_from(list(UNCHANGED.values())))(q)
    assert same_bits(q, before)


@pytest.mark.parametrize("spec", [Intx(8), Intx(4, (1, 64)), Intx(8, (16, 16)), Float8(block=(-1, -1)), NF4], ids=str)
def test_only_blocks_that_change_are_quantized_anew(spec, monkeypatch):
    """In pieces, too. One element of a block that changes is enough, wherever it is."""
    q = spec.quantize(weight())
    for size in (2**19, 4096):
        monkeypatch.setitem(pieces.ELEMENTS, "cpu", size)
        for row, col in ((0, 0), (77, 130), (127, 255)):
            made, values = q.clone(), q.dequantize()
            values[row, col] += 1
            made.copy_(values)
            again = spec.quantize(values).dequantize()
            places = [lattice(q, d).whole for d in (0, 1)]
            inside = torch.zeros(SHAPE, dtype=torch.bool)
            i, j = row - row % places[0], col - col % places[1]
            inside[i : i + places[0], j : j + places[1]] = True
            assert torch.equal(made.dequantize()[inside], again[inside])
            assert torch.equal(made.dequantize()[~inside], q.dequantize()[~inside])


def test_a_fixed_point_in_a_compiled_graph():
    """In 16 bits, where a compiler would go on with numbers that are not rounded."""
    q = Intx(8).quantize(weight((32, 64), dtype=torch.bfloat16))
    before, values = q.clone(), q.dequantize()
    values[5] *= 2
    torch.compile(lambda: q.copy_(values), fullgraph=True)()
    assert same_bits(q[:5], before[:5]) and same_bits(q[6:], before[6:])
    assert same_bits(q, before.copy_(values))


READS = {
    "norm": lambda t, w: t.norm(),
    "norm of rows": lambda t, w: torch.linalg.vector_norm(t, dim=1),
    "sum": lambda t, w: t.sum(0),
    "mean": lambda t, w: t.mean(),
    "std": lambda t, w: t.std(1),
    "abs max": lambda t, w: t.abs().max(),
    "amax": lambda t, w: t.amax((0, 1)),
    "max": lambda t, w: t.max(1).values,
    "argmin": lambda t, w: t.argmin(),
    "median": lambda t, w: t.median(),
    "quantile": lambda t, w: t.quantile(0.9, dim=1),
    "isnan": lambda t, w: t.isnan().any(),
    "isfinite": lambda t, w: torch.isfinite(t).all(),
    "==": lambda t, w: t == w,
    "== on the right": lambda t, w: w == t,
    "> 0": lambda t, w: (t > 0).sum(),
    "isclose": lambda t, w: torch.isclose(w, t),
    "histc": lambda t, w: torch.histc(t, 10),
    "histogram": lambda t, w: torch.histogram(t, bins=10).hist,
    "topk": lambda t, w: t.topk(3).values,
    "count_nonzero": lambda t, w: t.count_nonzero(),
    "unique": lambda t, w: t.unique(),
    "out": lambda t, w: torch.sum(t, 1, out=torch.empty(len(t))),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
@every
def test_reading(case, read):
    """What says something about the numbers reads them, gives a plain tensor, and changes nothing."""
    w = weight()
    q = case.spec.quantize(w)
    before = q.clone()
    made, expected = read(q, w), read(q.dequantize(), w)
    assert type(made) is Tensor and torch.equal(made, expected) and made.dtype == expected.dtype
    assert torch.equal(q, before)


@every
def test_comparing(case):
    q = case.spec.quantize(weight())
    plain = q.dequantize()
    assert torch.equal(q, plain) and torch.equal(plain, q) and not torch.equal(q, plain + 1)
    assert torch.allclose(q, plain) and torch.allclose(plain, q) and not q.allclose(2 * plain)
    torch.testing.assert_close(q, plain)
    torch.testing.assert_close(q, q.clone(), rtol=0, atol=0)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.testing.assert_close(q, plain + 1)


@every
def test_bytes_are_packed_bytes(case):
    q = case.spec.quantize(weight(dtype=torch.bfloat16))
    for value in (q, nn.Parameter(q, requires_grad=False), q.t(), q[:64]):
        packed = sum(t.numel() for t in storage(value))
        assert value.nbytes == value.nbytes_packed == value.untyped_storage().nbytes() == packed
        assert value.numel() * value.element_size() == pytest.approx(packed)
    with pytest.raises(RuntimeError, match="data pointer"):  # of numbers that are not there
        q.untyped_storage().data_ptr()


@every
def test_contiguous(case):
    """Also what is packed along the rows, as that of a transpose is, and views after it."""
    q = case.spec.quantize(weight())
    plain = q.dequantize()
    assert q.t().contiguous().is_contiguous() and torch.equal(q.t().contiguous().dequantize(), plain.t())
    assert q.is_contiguous() and q.contiguous() is q
    for op in (
        lambda t: t.t().contiguous().view(-1),
        lambda t: t.t().flatten(),
        lambda t: t.view(4, 16, 2, 256).transpose(1, 2).reshape(128, 256),
        lambda t: t.view(4, 16, 2, 256).transpose(1, 2).contiguous().view(-1, 256),
        lambda t: t.view(2, 64, 256).permute(1, 0, 2).reshape(64, 512),
    ):
        try:
            made = op(q)
        except ValueError as error:  # Blocks of several rows, which permuting rows would tear apart.
            assert (case.spec.grid(SHAPE)[0] != SHAPE[0] or not q.turns) and "cannot view" in str(error)
        else:
            assert isinstance(made, QTensor) and torch.equal(made.dequantize(), op(plain))


def test_channels_last():
    q = Intx(8, (1, -1, -1, -1)).quantize(weight((8, 16, 3, 3)))
    made = q.to(memory_format=torch.channels_last)
    assert torch.equal(made.dequantize(), q.dequantize()) and made.is_contiguous(memory_format=torch.channels_last)
    assert q.contiguous(memory_format=torch.channels_last).is_contiguous(memory_format=torch.channels_last)


@every
def test_shared_memory(case):
    layer = nn.Linear(SHAPE[1], SHAPE[0])
    layer.weight = nn.Parameter(case.spec.quantize(weight()), requires_grad=False)
    before, alias = layer.weight.clone(), layer.weight.detach()
    assert not layer.weight.is_shared()
    assert layer.share_memory() is layer
    assert layer.weight.is_shared() and alias.is_shared() and torch.equal(layer.weight, before)
    assert case.spec.quantize(weight()).share_memory_().is_shared()


def halve(tasks, done):
    layer, q = tasks.get()
    with torch.no_grad():
        layer.weight.mul_(0.5)
    done.put((q, q.is_shared(), q.requires_grad, isinstance(q, nn.Parameter)))
    tasks.get()


def test_another_process_shares_the_memory():
    context = torch.multiprocessing.get_context("spawn")
    tasks, done = context.Queue(), context.Queue()
    process = context.Process(target=halve, args=(tasks, done))
    process.start()
    layer = nn.Linear(256, 128)
    layer.weight = nn.Parameter(NF4.quantize(weight()), requires_grad=False)
    expected = layer.weight.clone().mul_(0.5)
    q = nn.Parameter(Float8().quantize(weight()))
    tasks.put((layer, q))
    back, shared, requires_grad, parameter = done.get(timeout=120)
    assert torch.equal(layer.weight, expected) and torch.equal(back, q)
    assert shared and requires_grad and parameter
    tasks.put(None)
    process.join(timeout=120)
    assert process.exitcode == 0


class Rows(torch.utils.data.Dataset):
    def __init__(self, table: QTensor) -> None:
        self.table = table

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> QTensor:
        return self.table[i : i + 1]


def test_workers_of_a_loader_send_quantized_tensors():
    q = Intx(4, (1, 32)).quantize(weight())
    rows = list(torch.utils.data.DataLoader(Rows(q), batch_size=None, num_workers=1))
    assert torch.equal(torch.cat(rows), q[:4])


def test_the_example_of_a_format(tmp_path, monkeypatch):
    """The format of CONTRIBUTING.md is written with public names alone, and its int8 scales stay int8 in every recipe."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (tmp_path / "shift.py").write_text(re.search(r"^```python\n(.*?)^```", text, re.S | re.M).group(1))
    monkeypatch.syspath_prepend(tmp_path)
    kept = dict(Spec.registry)
    try:
        from shift import Shift

        w = weight()
        q = Shift().quantize(w)
        assert compute_error(w, q.dequantize()) > 40
        made = Shift().stored(scale=q.scale.float() + 0.25)
        assert made["scale"].dtype == torch.int8 and torch.equal(made["scale"], q.scale)
        assert Shift().stored(scale=torch.tensor([[1000.0]]))["scale"].item() == 127
        assert lattice(q, 1).whole == 256 and torch.equal(q.clone().mul_(1), q)
    finally:
        Spec.registry.clear()
        Spec.registry.update(kept)
        sys.modules.pop("shift", None)


@every
def test_the_data_of_a_parameter_can_be_assigned(case):
    p = nn.Parameter(case.spec.quantize(weight()), requires_grad=False)
    q = case.spec.quantize(weight(seed=1, dtype=torch.bfloat16))
    p.data = q
    assert isinstance(p, nn.Parameter) and p.dtype == torch.bfloat16 and torch.equal(p, q)
    p.data = p.data.to(torch.float32)
    assert p.dtype == torch.float32 and torch.equal(p.dequantize(), q.float().dequantize())
    with pytest.raises(TypeError, match="cannot assign a plain tensor to the data of"):
        p.data = weight()
    assert torch.equal(p.dequantize(), q.float().dequantize())


@every
def test_a_parameter_made_by_its_class(case):
    q = case.spec.quantize(weight())
    p = type(q)(q, requires_grad=False)
    assert isinstance(p, nn.Parameter) and not p.requires_grad and torch.equal(p, q)
    assert p.data_ptr() == q.data_ptr() != case.spec.quantize(weight()).data_ptr()


@every
def test_module_moves(case, device):
    layer = nn.Linear(SHAPE[1], SHAPE[0])
    layer.weight = nn.Parameter(case.spec.quantize(weight()), requires_grad=False)
    values = layer.weight.dequantize()
    layer.to(device)
    assert layer.weight.device.type == device and first_field(layer.weight).device.type == device
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.dequantize().cpu(), values.bfloat16())
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    layer.float()
    assert torch.equal(layer.weight.dequantize().cpu(), values)


@every
def test_meta_and_fake(case):
    q = case.spec.quantize(torch.empty(SHAPE, device="meta"))
    real = case.spec.quantize(weight())
    assert q.device.type == "meta" and q.dequantize().shape == SHAPE
    assert {k: (t.shape, t.dtype) for k, t in q.fields().items()} == {
        k: (t.shape, t.dtype) for k, t in real.fields().items()
    }
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
        assert fake[:32].dequantize().shape == (32, SHAPE[1])


@every
def test_new_tensors(case):
    q = case.spec.quantize(weight())
    assert isinstance(torch.empty_like(q), QTensor) and isinstance(q.new_zeros(SHAPE), QTensor)
    assert torch.equal(q.new_zeros(SHAPE).dequantize().abs().nan_to_num(), torch.zeros(SHAPE))
    state = torch.zeros_like(q)  # an optimizer's state is not a weight
    assert type(state) is torch.Tensor and state.shape == q.shape and state.dtype == q.dtype


@every
def test_nothing_dequantizes_silently(case):
    q = case.spec.quantize(weight())
    for op in (torch.sin, torch.neg, lambda t: t + 1, lambda t: t * t, lambda t: weight() - t, torch.Tensor.tolist):
        with pytest.raises((NotImplementedError, RuntimeError)):
            op(q)
    plain = weight()
    with pytest.raises(NotImplementedError, match="dequantize"):
        plain.add_(q)
    with pytest.raises(NotImplementedError, match="dequantize"):
        torch.add(q, 1, out=plain)


@every
def test_json(case):
    import json

    assert Spec.from_dict(json.loads(json.dumps(case.spec.to_dict()))) == case.spec


@every
@pytest.mark.parametrize("shape", [(256,), (4, 32, 256), (2, 2, 32, 64), (0, 256)], ids=str)
def test_other_ranks(case, shape):
    w = weight(shape)
    if shape == (256,) and isinstance(getattr(case.spec, "block", ()), tuple) and case.spec.block[0] not in (1, -1):
        with pytest.raises(ValueError, match="more dims"):
            case.spec.quantize(w)
        return
    block = case.spec.block
    if block[-1] > shape[-1]:
        with pytest.raises(ValueError, match="not a multiple of its block"):
            case.spec.quantize(w)
        return
    q = case.spec.quantize(w)
    assert q.shape == shape and q.dequantize().isfinite().all()
    if len(shape) > 2:
        assert torch.equal(q[1].dequantize(), q.dequantize()[1])


def sqnr(spec: Spec) -> float:
    w = weight((1024, 1024))
    return compute_error(w, spec.quantize(w).dequantize()).item()


def test_published_quality():
    """Signal to noise on a normal weight, in dB; the bars of the field."""
    assert sqnr(Intx(8)) > 41.5
    assert sqnr(Intx(8, (1, 128))) > 43
    assert sqnr(Intx(4, (1, 128), symmetric=False)) > 19.5
    assert sqnr(Intx(4, (1, 32), symmetric=False)) > 21.5
    assert sqnr(Intx(3, (1, 128), symmetric=False)) > 13
    assert sqnr(Float8()) > 31
    assert sqnr(NF4) > 20.4


@pytest.mark.parametrize("block", [(1, -1), (1, 128), (1, 32)], ids=str)
@pytest.mark.parametrize("symmetric", [None, True, False])
def test_more_bits_are_better(block, symmetric):
    quality = [sqnr(Intx(bits, block, symmetric=symmetric)) for bits in range(1, 9)]
    assert quality == sorted(quality) and len(set(quality)) == 8


def test_storage_counts_every_field():
    w = weight((1024, 1024), dtype=torch.bfloat16)
    dense = w.numel() * 2
    for spec, most in [(Intx(4, (1, 128)), 0.28), (Intx(3, (1, 128)), 0.22), (Intx(8), 0.51), (NF4, 0.27)]:
        assert spec.quantize(w).nbytes_packed <= most * dense


def test_golden_nf4():
    """The table of QLoRA's appendix E, and codes of known values."""
    table = Codebook().values
    assert len(table) == 16 and table[0] == -1 and table[7] == 0 and table[15] == 1
    assert (
        table[1] == pytest.approx(-0.6961928)
        and table[8] == pytest.approx(0.0795803)
        and table[14] == pytest.approx(0.7229568)
    )
    q = Codebook(block=(1, 32)).quantize(torch.tensor([table + table[::-1]]) * 3)
    assert q.scale.tolist() == [[3.0]]
    assert q.qdata.tolist() == [[i | (15 - i) << 4 for i in range(16)]]
    assert torch.equal(q.dequantize(), torch.tensor([table + table[::-1]]) * 3)


def test_nf4_shapes_and_published_error():
    for shape in ((64, 64), (3, 192), (64,), (2, 5, 128), (7, 64 * 257)):
        q = to_nf4(weight(shape))
        assert q.shape == shape and compute_error(weight(shape), q.dequantize()) > 19
    w = weight((1024, 1024))
    # The mean error that bitsandbytes documents for blocks of 64, 0.0728, from a unit normal.
    assert (to_nf4(w).dequantize() - w).abs().mean() < 0.0732
    with pytest.raises(ValueError, match="not a multiple of its block 64"):
        to_nf4(weight((4, 96)))


def test_golden_integers():
    x = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 0.75, -0.25]])
    q = Intx(8).quantize(x)
    assert q.scale.item() == pytest.approx(1 / 127.5, rel=1e-6) and q.qdata.tolist() == [
        [-127, -64, 0, 32, 64, 127, 96, -32]
    ]
    y = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 0.5, 0.875, 0.75, -0.25]])
    q = Intx(4, symmetric=False, signed=False).quantize(y)
    assert q.scale.item() == 0.125 and q.zero_point.tolist() == [[8]] and torch.equal(q.dequantize(), y)
    assert q.codes().tolist() == [[0, 4, 8, 10, 12, 15, 14, 6]]
    q = Intx(4, symmetric=False).quantize(y)
    assert q.zero_point.tolist() == [[0]] and q.codes().tolist() == [[-8, -4, 0, 2, 4, 7, 6, -2]]
    q = Intx(1, symmetric=True).quantize(x)
    assert q.dequantize()[0].abs().unique().item() == pytest.approx(x.abs().mean().item())


def test_stochastic_rounding():
    spec = Intx(8, narrow=True, rounding="stochastic")
    w = weight()
    q = spec.quantize(w)
    assert torch.equal(q, spec.quantize(w.clone()))  # a copy rounds alike
    assert torch.equal(q, torch.compile(spec.quantize, fullgraph=True)(w))
    assert torch.equal(spec.quantize(q.dequantize()).qdata, q.qdata)  # what has a code keeps it
    error = (q.dequantize() - w) / q.scale
    assert error.abs().max() < 1.001 and error.mean().abs() < 0.01
    w[0, 0] += 1e-3
    assert not torch.equal(spec.quantize(w).qdata[64:], q.qdata[64:])  # one number changed: all round anew
    # Updates of a thousandth of a step arrive.
    before, update = q.dequantize(), 1e-3 * q.scale * weight(seed=1)
    for _ in range(100):
        q.add_(update)
    moved = ((q.dequantize() - before) * update).sum() / (100 * update.square().sum())
    assert 0.8 < moved < 1.2


def test_golden_float8():
    x = torch.tensor([[448.0, 1.0, 0.1, -224.0]])
    q = Float8().quantize(x)
    assert q.scale.item() == 1 and q.qdata.view(torch.uint8).tolist() == [[0x7E, 0x38, 0x1D, 0xF6]]
    q = Float8("e5m2").quantize(torch.tensor([[57344.0, 1.0]]))
    assert q.qdata.view(torch.uint8).tolist() == [[0x7B, 0x3C]]
    nan = Float8().quantize(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    assert nan.dequantize()[0].isnan().all() and nan.dequantize()[1].isfinite().all()


def test_pre_scale():
    """AWQ's and SmoothQuant's multiplier is a field like any other: sliced, joined and undone by dequantize."""
    w, scale = weight(), weight((1, 256)).abs() + 0.5
    q = Intx(8).quantize(w, pre_scale=scale)
    assert compute_error(w, q.dequantize()) > 35
    x = weight((3, 256))
    assert compute_error(x @ w.t(), torch.nn.functional.linear(x, q)) > 35
    cut = q[:, 64:128]
    assert cut.pre_scale.shape == (1, 64) and torch.equal(cut.dequantize(), q.dequantize()[:, 64:128])
    q.mul_(2)
    assert compute_error(2 * w, q.dequantize()) > 35


def test_int4_prepacked():
    spec = Int4Prepacked("cpu", (1, 64))
    plain = Intx(4, (1, 64), signed=False, symmetric=False, zero_point="float").quantize(weight())
    q = spec.quantize(weight())
    assert (q.dequantize() - plain.dequantize()).abs().max() < 1e-5
    x = weight((5, 256))
    assert (torch.nn.functional.linear(x, q) - torch.nn.functional.linear(x, plain)).abs().max() < 1e-3
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_int4_prepacked_cuda():
    w = weight((256, 1024)).cuda().bfloat16()
    q = Int4Prepacked("cuda", (1, 128)).quantize(w)
    plain = Intx(4, (1, 128), signed=False, symmetric=False, zero_point="float").quantize(w)
    assert compute_error(w, q.dequantize()) > compute_error(w, plain.dequantize()) - 0.3
    x = weight((5, 1024)).cuda().bfloat16()
    reference = x.double() @ q.dequantize().double().t()
    assert compute_error(reference, torch.nn.functional.linear(x, q)) > 40


def test_a_copy_of_a_spec_is_the_spec():
    """Compiled models compare Specs with copies at every call."""
    for spec in (Intx(4, (1, 32)), NF4):
        assert copy.deepcopy(spec) is spec


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_finite(dtype):
    assert is_finite(torch.empty(0, 4, dtype=dtype))
    assert is_finite(torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype))  # whose sum is not
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(64, 65).to(dtype)
        x[3, 7] = bad
        assert not is_finite(x)
        x[5, 5] = -bad
        assert not is_finite(x)


def test_blank_keeps_no_fake_tensors():
    """What is asked under a mode that fakes tensors is not the answer outside of it."""
    spec, shape = Intx(5, (1, 24)), (8, 72)
    with FakeTensorMode():
        fake = blank(spec, shape)
    kept = blank(spec, shape)
    assert type(kept.qdata) is torch.Tensor and kept.qdata.shape == fake.qdata.shape
    assert blank(spec, shape) is kept
    with FakeTensorMode():
        assert blank(spec, shape) is not kept
