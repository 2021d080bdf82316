"""Random cases over formats, shapes, numbers, operators and modes; each is known by a number, so that it can be run again.

A case holds where an operator on a quantized tensor gives what the operator gives on the numbers that the tensor stands for: bit
for bit where nothing is summed up, else to a stated bound; where it gives finite numbers if a plain tensor does; or where it is
refused by an error that says why, and has changed nothing.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import CASES
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ao
from ao.dtypes import Codebook, DynamicTree, Float8, FloatX, Intx, PositiveSteps, QTensor, Shifted, Spec, dense
from ao.dtypes.permuted import Permuted
from ao.train import PRECISIONS, convert_to_precision

REFUSALS = (ValueError, TypeError, NotImplementedError, IndexError)


class Case:
    """The dice of one case."""

    def __init__(self, number: int) -> None:
        self.dice = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.said: list[str] = [f"case {number}"]

    def one_of(self, options: Any, name: str = "") -> Any:
        """One of some options, by the name under which a failure shows it."""
        chosen = self.dice.choice(list(options))
        if name:
            self.said.append(f"{name} {chosen}")
        return chosen

    def often(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.dice.random() < share

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers, float32."""
        return torch.randn(shape, generator=self.generator)

    def must(self, holds: bool | Tensor, what: str) -> None:
        """Raise AssertionError unless it holds."""
        if not bool(holds):
            raise AssertionError(f"{what} ({'; '.join(self.said)})")


# What is drawn.

INTEGERS = ("float32", "bfloat16", "float16")
TERNARY = (-1.0, 0.0, 0.5, 1.0)


def random_spec(case: Case, depth: int = 0) -> Spec:
    """A format of the registry, or one whose parameters are drawn. Raises ValueError where they contradict each other."""
    if case.often(0.5) and not depth:
        return case.one_of(CASES).spec
    dice, block = (
        case.one_of,
        case.one_of([(1, -1), (1, 32), (1, 32), (1, 64), (1, 16), (-1, -1), (16, 16), (-1, 1), (2, 8)]),
    )
    kind = dice(
        ["intx"] * 5 + ["float8", "floatx", "floatx", "codebook", "shifted", "shifted", "permuted", "tree", "steps"]
    )
    if kind == "intx":
        act = None if depth else dice([None] * 4 + [Intx(8), Intx(8, symmetric=False), Intx(8, (-1, -1)), Float8()])
        return Intx(
            dice(range(1, 9)), block, signed=dice([True, False]), symmetric=dice([None, True, False]), clip=dice([True, False]),
            zero_point=dice(["int", "float"]), narrow=case.often(0.2), scale_dtype=dice(INTEGERS), act=act,
        )  # fmt: skip
    if kind == "float8":
        act = None if depth else dice([None, None, Float8(), Float8(block=(-1, -1)), Float8("e5m2")])
        return Float8(dice(["e4m3", "e5m2"]), block, power_of_two=dice([True, False]), act=act)
    if kind == "floatx":
        scale = dice(["float32", "bfloat16", "float16", "e8m0", "e8m0", "e4m3"])
        nested = dice([None, Float8(block=(-1, -1)), Intx(8, signed=False)]) if scale == "float32" else None
        rule, both = dice(["floor", "ceil", "rceil", "even"]), case.often(0.2)
        return FloatX(dice([2, 2, 3, 4, 5]), dice([0, 1, 1, 2, 3]), block, scale, rule, nested, both)
    if kind == "codebook":
        nested = dice(
            [None, None, Intx(8, (1, 4), signed=False), Float8(block=(-1, -1)), Codebook(block=(1, -1), offset=True)]
        )
        return Codebook(dice(["nf4", "fp4", TERNARY]), block, nested, case.often(0.2), dice(INTEGERS))
    if kind == "shifted":
        scales, shifts = (dice([None, None, Intx(6, (1, 2), signed=False, symmetric=True)]) for _ in range(2))
        return Shifted(dice(range(1, 9)), block, dice([True, False]), dice(INTEGERS), scales, shifts)
    if kind == "permuted":
        return Permuted(random_spec(case, depth + 1))
    if kind == "tree":
        return DynamicTree(dice(range(2, 9)), dice([True, False]), block)
    return PositiveSteps(dice([4, 8]), block)


NUMBERS = (
    "normal", "normal", "zeros", "constant", "constant rows", "zero rows", "scaled", "scaled", "scaled", "all sizes",
    "rows of all sizes", "an outlier", "NaN", "infinity", "small integers",
)  # fmt: skip


def random_numbers(case: Case, shape: tuple[int, ...], dtype: torch.dtype, spoilt: bool = True) -> Tensor:
    """Numbers of a kind: zeros, constants, of sizes from 1e-30 to 1e30, NaN."""
    x, size = case.normal(*shape), 10.0 ** case.dice.uniform(-30, 30)
    kind = case.one_of(NUMBERS if spoilt else [n for n in NUMBERS if n not in ("NaN", "infinity")], "numbers")
    rows = (*shape[:1], *[1] * (len(shape) - 1))
    if kind == "zeros":
        x = torch.zeros(shape)
    elif kind == "constant":
        x = torch.full(shape, case.one_of([1.0, -0.5, 0.1, size, -size]))
    elif kind == "constant rows":
        x = case.normal(*rows).expand(shape).clone()
    elif kind == "zero rows":
        x = x * (torch.arange(math.prod(rows)).view(rows) % 3 != 0)
    elif kind == "scaled":
        x = x * size
    elif kind == "all sizes":
        x = x * 10.0 ** (60 * torch.rand(shape, generator=case.generator) - 30)
    elif kind == "rows of all sizes":
        x = x * 10.0 ** (60 * torch.rand(rows, generator=case.generator) - 30)
    elif kind == "small integers":
        x = x.round()
    elif x.numel() and kind != "normal":
        wild = {"an outlier": 1e4, "NaN": math.nan, "infinity": case.one_of([math.inf, -math.inf])}[kind]
        x.view(-1)[case.dice.randrange(x.numel())] = wild
    if dtype == torch.float16:
        x = torch.where(x.isfinite(), x.clamp(-65504, 65504), x)
    return x.to(dtype)


ROWS, COLUMNS = (1, 2, 3, 7, 16, 32, 33, 48, 64, 96), (1, 4, 8, 16, 32, 33, 40, 64, 64, 96, 128, 192, 256)


def random_shape(case: Case, dims: int) -> tuple[int, ...]:
    """A shape of this many dims; once in a while without elements."""
    lead = [case.one_of([1, 2, 3, 4]) for _ in range(dims - 2)]
    shape = (*lead, case.one_of(ROWS), case.one_of(COLUMNS))[-dims:]
    return (0, *shape[1:]) if case.often(0.01) else shape


DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_quantized(case: Case, dims: int) -> tuple[QTensor, Tensor] | None:
    """A quantized tensor and what it was; None where the format and the shape do not fit."""
    dtype, pre_scale = case.one_of(DTYPES, "weight:"), None
    start = len(case.said)
    for _ in range(5):
        try:
            spec, shape = random_spec(case), random_shape(case, dims)
            w = random_numbers(case, shape, dtype)
            case.said += [str(spec), f"shape {shape}"]
            if dims > 1 and case.often(0.05):
                case.said.append("a multiplier")
                pre_scale = case.normal(*[1] * (dims - 1), shape[-1]).abs() + 0.1
            return spec.quantize(w, pre_scale=pre_scale), w
        except REFUSALS as error:
            case.must(len(str(error)) > 30, f"the error says little: {error!r}")
            case.said, pre_scale = case.said[:start], None
    return None


# What is compared.


def same(a: Any, b: Any) -> bool:
    """Whether two results are the same bits, where a NaN is a NaN and a quantized tensor is its numbers."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if not isinstance(a, Tensor):
        return type(a) is type(b) and (a == b or a != a)
    a, b = dense(a), dense(b)
    return a.dtype == b.dtype and a.shape == b.shape and bool(_same_each(a, b).all())


PRECISION = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""The largest error of a product, as a part of max|x| over the row of x times sum|w| over the row of w."""

SMALLEST = {torch.float64: 1e-37, torch.float32: 1e-37, torch.float16: 1e-7, torch.bfloat16: 1e-37}


def run(case: Case, mode: str, call: Callable[..., Any], *args: Any) -> Any:
    """A call in some mode."""
    if mode == "inference mode":
        with torch.inference_mode():
            return call(*args)
    if mode in ("compiled", "traced"):
        torch.compiler.reset()
        backend = "inductor" if mode == "compiled" else "aot_eager"
        with torch.no_grad():
            return torch.compile(
                call, backend=backend, dynamic=None if mode == "traced" else case.one_of([None, True])
            )(*args)
    with torch.set_grad_enabled(mode == "gradients on"):
        return call(*args)


def random_mode(case: Case, compiled: float) -> str:
    """How a call is made; a share is compiled."""
    if case.often(compiled):
        return case.one_of(["traced"] * 15 + ["compiled"], "mode")
    return case.one_of(["no gradients", "inference mode", "gradients on"], "mode")


# Operators that move numbers, and those that read them.


def _range(case: Case, n: int) -> tuple[int, int]:
    unit = case.one_of([1, 1, 8, 16, 32, 64])
    ends = [min(unit * case.dice.randint(0, -(-n // unit)), n) for _ in range(2)]
    return min(ends), max(ends)


def _slice(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    d = case.dice.randrange(len(shape))
    start, stop = _range(case, shape[d])
    return lambda t: t[(slice(None),) * d + (slice(start, stop),)]


def _steps(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    d, step = case.dice.randrange(len(shape)), case.one_of([2, 3, 16, 32])
    return lambda t: t[(slice(None),) * d + (slice(None, None, step),)]


def _select(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    d = case.dice.randrange(len(shape))
    i = case.dice.randrange(-shape[d], shape[d]) if shape[d] else 0
    return lambda t: t.select(d, i)


def _permute(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    dims = list(range(len(shape)))
    case.dice.shuffle(dims)
    return lambda t: t.permute(dims)


def _view(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    rest, new = math.prod(shape), []
    while rest > 1 and len(new) < 3:
        factor = case.one_of([f for f in (1, 2, 3, 4, 8, 16, 32, 64, 128, rest) if rest % f == 0])
        new.append(factor)
        rest //= factor
    new.append(rest)
    case.dice.shuffle(new)
    return lambda t: t.reshape(new)


def _heads(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    n, k = shape[0], shape[-1]
    return lambda t: t.view(n // 4 or 1, -1, 2, k).transpose(1, 2).reshape(n, k)


def _gather(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    d = case.dice.randrange(len(shape))
    index = torch.randint(0, max(shape[d], 1), (case.one_of([0, 1, 5]),), generator=case.generator)
    return case.one_of([lambda t: t.index_select(d, index), lambda t: t[(slice(None),) * d + (index,)]])


def _mask(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    mask = torch.rand(shape[0], generator=case.generator) < 0.5
    return lambda t: t[mask]


def _cat(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    d = case.dice.randrange(len(shape))
    return lambda t: torch.cat([t, t], d)


def _split(case: Case, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    d, parts = case.dice.randrange(len(shape)), case.one_of([1, 2, 3])
    return case.one_of([lambda t: t.chunk(parts, d), lambda t: t.split(16, d), lambda t: t.unbind(d)])


def _constant(call: Callable[[Tensor], Any]) -> Callable[[Case, tuple[int, ...]], Callable[[Tensor], Any]]:
    return lambda case, shape: call


def _pickled(t: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(t))


def _saved(t: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _to_float16(t: Tensor) -> Tensor:
    """But where numbers are a step more than the largest of float16."""
    if t.dtype != torch.float32:
        return t.clone()
    size = dense(t).abs()
    return t.clone() if ((size >= 65520) & (size < 131008)).any() else t.to(torch.float16)


MOVES: dict[str, Callable[[Case, tuple[int, ...]], Callable[[Tensor], Any]]] = {
    "slice": _slice,
    "slice twice": lambda case, shape: (lambda a, b: lambda t: b(a(t)))(_slice(case, shape), _slice(case, shape)),
    "steps": _steps,
    "select": _select,
    "permute": _permute,
    "permute and slice": lambda case, shape: (lambda a, b: lambda t: b(t).contiguous())(*2 * [_permute(case, shape)]),
    "reshape": _view,
    "heads": _heads,
    "gather": _gather,
    "mask": _mask,
    "cat": _cat,
    "split": _split,
    "t().contiguous()": _constant(lambda t: t.mT.contiguous()),
    "t().flatten()": _constant(lambda t: t.mT.flatten()),
    "t().contiguous().is_contiguous()": _constant(lambda t: t.mT.contiguous().is_contiguous()),
    "unsqueeze": _constant(lambda t: t.unsqueeze(0).squeeze()),
    "expand": _constant(lambda t: t[None].expand(3, *t.shape)),
    "repeat": _constant(lambda t: t.repeat_interleave(2, 0)),
    "stack": _constant(lambda t: torch.stack([t, t])),
    "flip": _constant(lambda t: t.flip(0)),
    "roll": _constant(lambda t: t.roll(1, 0)),
    "clone": _constant(lambda t: t.clone()),
    "to float16": _constant(_to_float16),
    "to bfloat16": _constant(lambda t: t.bfloat16() if t.dtype == torch.float32 else t.clone()),
    "deepcopy": _constant(copy.deepcopy),
    "pickle": _constant(_pickled),
    "torch.save": _constant(_saved),
    "a sum of tensors": _constant(lambda t: t + 1),
    "scaled": _constant(lambda t: t * 2),
    "relu": _constant(torch.relu),
}

READS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda t: t.norm(),
    "linalg.vector_norm": lambda t: torch.linalg.vector_norm(t, 3),
    "sum": lambda t: t.sum(),
    "sum of rows": lambda t: t.sum(-1, keepdim=True),
    "mean": lambda t: t.mean(),
    "std": lambda t: t.std(),
    "abs().max()": lambda t: t.abs().max(),
    "amax": lambda t: t.amax(-1),
    "aminmax": lambda t: tuple(t.aminmax()),
    "argmax": lambda t: t.argmax(),
    "median": lambda t: t.median(),
    "isnan().any()": lambda t: t.isnan().any(),
    "isfinite().all()": lambda t: t.isfinite().all(),
    "isinf": lambda t: torch.isinf(t),
    "==": lambda t: t == t,
    "< 0": lambda t: t < 0,
    "equal to its numbers": lambda t: torch.equal(t, dense(t)),
    "allclose": lambda t: torch.allclose(t, dense(t), equal_nan=True),
    "isclose": lambda t: torch.isclose(t, dense(t)),
    "assert_close": lambda t: torch.testing.assert_close(dense(t), dense(t), equal_nan=True),
    "count_nonzero": lambda t: t.count_nonzero(),
    "nonzero": lambda t: t.nonzero(),
    "sort": lambda t: t.sort(-1).values,
    "topk": lambda t: t.topk(1, -1).values,
    "unique": lambda t: t.unique(),
    "histc": lambda t: torch.histc(t, 5, -3, 3),
    "item": lambda t: t.flatten()[0].item(),
    "tolist": lambda t: t.sum().tolist(),
    "numpy": lambda t: torch.from_numpy(dense(t).float().numpy()),
    "float(norm)": lambda t: float(t.norm()),
}


def moved_or_read(case: Case) -> str:
    """`op(q)` and `op(q.dequantize())` are the same bits."""
    made = random_quantized(case, case.one_of([1, 2, 2, 2, 2, 3, 4]))
    if made is None:
        return "no such weight"
    q = made[0]
    d = q.dequantize()
    if case.often(0.7):
        call, share = MOVES[case.one_of(MOVES, "operator")](case, tuple(q.shape)), 0.0015
    else:
        call, share = READS[case.one_of(READS, "operator")], 0.0
    eager = any(name in case.said[-1] for name in ("pickle", "torch.save", "deepcopy"))
    mode = random_mode(case, 0 if eager or not q.numel() else share)
    try:
        expected = call(d)
    except Exception:
        expected = None
    try:
        found = run(
            case,
            mode,
            (lambda t: torch.utils._pytree.tree_map(dense, call(t)))
            if share and mode in ("traced", "compiled")
            else call,
            q,
        )
    except REFUSALS as error:
        case.must(len(str(error)) > 20, f"the error says little: {error!r}")
        case.must(same(q.dequantize(), d), "a call that is refused changed the tensor")
        return "refused"
    except Exception as error:
        said = any(f"got {kind.__name__}(" in str(error) for kind in REFUSALS)  # by us, and Dynamo repeats it
        case.must(expected is None or said, f"{type(error).__name__}: {error}")
        return "refused"
    if expected is not None:
        case.must(same(found, expected), f"found {found}, expected {expected}")
    case.must(same(q.dequantize(), d), "what reads changed the tensor")
    return "held"


# Operators that write.


def _with_values(case: Case, shape: tuple[int, ...]) -> Tensor:
    return random_numbers(case, shape, torch.float32, spoilt=False)


def written(case: Case) -> str:
    """What is written is quantized anew; blocks that stay as they are keep their bits, and so does all that is not written."""
    made = random_quantized(case, case.one_of([1, 2, 2, 2, 3]))
    if made is None or getattr(made[0].spec, "rounding", "nearest") != "nearest":
        return "no such weight"
    q = made[0]
    before, q_before, shape = q.decode_scaled(), q.dequantize().float(), tuple(q.shape)
    values = _with_values(case, shape)
    mask = torch.rand(shape, generator=case.generator) < 0.1
    c = case.one_of([0.0, 1.0, -0.5, 2.0**60 if q.dtype != torch.float16 else 1e4])
    row = torch.tensor([case.dice.randrange(shape[0])] if shape[0] else [], dtype=torch.int64)
    start, stop = _range(case, shape[0])
    call = {
        "copy_": lambda t: t.copy_(values),
        "copy_ of its numbers": lambda t: t.copy_(dense(t)),
        "mul_": lambda t: t.mul_(c),
        "div_(1)": lambda t: t.div_(1),
        "add_": lambda t: t.add_(values, alpha=c),
        "lerp_": lambda t: t.lerp_(values, 0.25),
        "addcmul_": lambda t: t.addcmul_(values, values, value=0.1),
        "neg_": lambda t: t.neg_(),
        "clamp_": lambda t: t.clamp_(-1, 1),
        "zero_": lambda t: t.zero_(),
        "fill_": lambda t: t.fill_(c),
        "masked_fill_": lambda t: t.masked_fill_(mask, c),
        "t[mask] =": lambda t: t.__setitem__(mask, c),
        "t[i] =": lambda t: t.__setitem__(row, values[row]),
        "index_copy_": lambda t: t.index_copy_(0, row, values[row]),
        "rows": lambda t: t[start:stop].copy_(values[start:stop]),
        "columns": lambda t: t[..., start:stop].copy_(values[..., start:stop]),
        "turned": lambda t: t.mT.mul_(2),
        "foreach": lambda t: torch._foreach_mul_([t], 3.0),
        "trunc_": lambda t: t.trunc_(),
    }  # fmt: skip
    name = case.one_of(call, "operator")
    wanted = before.clone()
    try:
        with torch.inference_mode(case.often(0.2)):
            call[name](q)
    except REFUSALS as error:
        case.must(len(str(error)) > 20, f"the error says little: {error!r}")
        case.must(same(q.decode_scaled(), before), "a write that is refused changed the tensor")
        return "refused"
    except RuntimeError:
        try:
            call[name](wanted)
        except RuntimeError:
            return "refused"
        raise
    call[name](wanted)
    after = q.decode_scaled()
    if name not in ("rows", "columns", "t[i] =", "index_copy_"):
        anew = q.spec.quantize(wanted, pre_scale=q.pre_scale).decode_scaled()
        held = _same_each(q_before, wanted)  # what the dtype of the tensor says it holds
        fits = (
            _same_each(after, anew)
            | (held & _same_each(after, before))
            | (_same_each(after, before) & _same_each(before, wanted))
        )
        if getattr(q.spec, "values", "") is None:  # plain numbers, of the dtype of the tensor
            fits = fits | _same_each(after, anew.to(q.dtype).float())
        if name in ("turned",):  # whose blocks are those of the view
            fits = fits | _same_each(after, wanted)
        case.must(fits.all(), f"{int((~fits).sum())} numbers are neither those of quantizing anew nor unchanged")
    else:
        rest = _same_each(wanted, before)
        touched = torch.zeros(shape, dtype=torch.bool)
        if name == "rows":
            touched[start:stop] = True
        elif name == "columns":
            touched[..., start:stop] = True
        else:
            touched[row] = True
        case.must((_same_each(after, before) | touched | ~rest).all(), "numbers outside of what was written changed")
        case.must(_same_each(after, before)[~touched].all(), "numbers outside of what was written changed")
    return "held"


def _same_each(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


# Quantizing.


def _wide(spec: Spec) -> bool:
    """Whether the scales of a format hold numbers of any size, each block by itself."""
    if isinstance(spec, Permuted):
        return _wide(spec.inner)
    return (
        getattr(spec, "scale_dtype", "float32") != "float16"
        and getattr(spec, "scale", "float32") not in ("float16", "e4m3")
        and getattr(spec, "scale_spec", None) is None
        and getattr(spec, "shift_spec", None) is None
        and not getattr(spec, "offset", False)
        and getattr(spec, "signed", True) is not False
        and not isinstance(spec, PositiveSteps)
    )


def _shows(spec: Spec) -> bool:
    """Whether a format takes numbers of both signs, so that none is cut off."""
    inner = spec.inner if isinstance(spec, Permuted) else spec
    return not isinstance(inner, PositiveSteps) and getattr(inner, "signed", True)


def quantized(case: Case) -> str:
    """Finite numbers stay finite, and within the largest of the tensor; a NaN or an infinity is not hidden."""
    made = random_quantized(case, case.one_of([1, 2, 2, 3]))
    if made is None or not made[1].numel():
        return "no such weight"
    q, w = made
    d, w = q.decode_scaled(), w.float()
    if w.isfinite().all():
        if _wide(q.spec) and q.pre_scale is None:
            case.must(d.isfinite().all() and q.dequantize().isfinite().all(), "numbers are no longer finite")
            case.must((d - w).abs().max() <= 1.01 * w.abs().max() + 1e-30, "an error is larger than every number")
    elif _shows(q.spec):
        case.must(not d.isfinite().all(), "a number that is not finite is hidden")
    case.must(
        same(q.spec.quantize(made[1], pre_scale=q.pre_scale).dequantize(), q.dequantize()), "twice is not the same"
    )
    if q.dtype != torch.float16:
        case.must(same(q.dequantize(), d.to(q.dtype)), "dequantize() and decode_scaled() differ")
    case.must(q.nbytes == q.nbytes_packed, "nbytes are not the packed bytes")
    return "held"


# Products.

Door = Callable[..., Tensor]
DOORS: dict[str, tuple[Door, tuple[int, ...]]] = {
    "linear": (lambda x, w, b: F.linear(x, w), (1, 2, 3)),
    "linear, by keyword": (lambda x, w, b: F.linear(input=x, weight=w), (1, 2, 3)),
    "linear with a bias": (lambda x, w, b: F.linear(x, w, bias=b), (1, 2, 3)),
    "x @ w.t()": (lambda x, w, b: x @ w.t(), (1, 2, 3)),
    "matmul, other=": (lambda x, w, b: torch.matmul(x, other=w.mT), (1, 2, 3)),
    "w @ x.mT": (lambda x, w, b: (w @ x.mT).mT, (2, 3)),
    "mm": (lambda x, w, b: torch.mm(x, mat2=w.t()), (2,)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.t(), beta=0), (2,)),
    "mv": (lambda x, w, b: torch.mv(w, x), (1,)),
    "einsum": (lambda x, w, b: torch.einsum("...k,nk->...n", x, w), (1, 2, 3)),
    "inner": (lambda x, w, b: torch.inner(x, w), (1, 2, 3)),
    "tensordot": (lambda x, w, b: torch.tensordot(x, w, dims=([-1], [1])), (2, 3)),
    "out=": (lambda x, w, b: torch.matmul(x, w.t(), out=x.new_empty(*x.shape[:-1], w.shape[0])), (2, 3)),
    "changed in place": (lambda x, w, b: F.linear(x, w).mul_(1), (2, 3)),
}


def _layer(w: Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


PRODUCT_MODES = (
    "no gradients",
    "inference mode",
    "gradients on",
    "trained",
    "float16 autocast",
    "bfloat16 autocast",
    "func",
)


def multiplied(case: Case) -> str:
    """A product of a matrix, in some spelling, against float64."""
    made = random_quantized(case, 2)
    if made is None:
        return "no such weight"
    q = made[0]
    turned = case.often(0.15)
    door, ranks = DOORS[case.one_of(DOORS, "operator")]
    lead = [case.one_of([1, 2, 3, 5, 17, 40, 70]) for _ in range(case.one_of(ranks) - 1)]
    lead = [0] if lead and case.often(0.02) else lead
    dtype = case.one_of(DTYPES, "input:")
    compiled = case.one_of(["traced"] * 15 + ["compiled", "exported"]) if case.often(0.0015) else ""
    mode = compiled or case.one_of(PRODUCT_MODES)
    if mode == "func" and turned and q.spec.act is not None:
        mode = "gradients on"  # below autograd nothing tells a weight that is turned from a backward
    case.said.append(mode)
    try:
        w = q.t() if turned else q
    except NotImplementedError:
        return "refused"
    x = random_numbers(case, (*lead, w.shape[1]), dtype)
    b = torch.zeros(w.shape[0], dtype=dtype)
    try:
        y = _product_in(case, mode, door, x, w, b)
    except REFUSALS as error:
        case.must(len(str(error)) > 20, f"the error says little: {error!r}")
        act = q.spec.act is not None
        case.must(
            act or isinstance(q.spec, Permuted) or "autocast" in mode or "out" in str(error), f"refused: {error!r}"
        )
        return "refused"
    except RuntimeError as error:
        if "out" in str(error) and ("autocast" in mode or mode in ("gradients on", "trained", "func")):
            return "refused"  # by PyTorch, also for plain tensors
        raise
    given = x.dtype
    if "autocast" in mode and x.dtype != torch.float64:
        x = x.to(getattr(torch, mode.split()[0]))
    _judge_product(case, x, w, y, given)
    return "held"


def _product_in(case: Case, mode: str, door: Door, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    if mode == "gradients on" or mode == "trained":
        x = x.clone().requires_grad_()
        w = w.detach().requires_grad_(mode == "trained")
        y = door(x, w, b)
        g = case.normal(*y.shape).to(y.dtype)
        y.backward(g)
        _judge_gradients(case, x, w, y, g)
        return y.detach()
    if mode == "func":
        y = door(x, w, b)
        g = case.normal(*y.shape).to(y.dtype)
        grad = torch.func.grad(lambda x: (door(x, w, b) * g).sum())(x)
        z = x.clone().requires_grad_()
        z.grad = grad
        _judge_gradients(case, z, w, y, g)
        return y
    if mode.endswith("autocast"):
        with torch.no_grad(), torch.autocast("cpu", getattr(torch, mode.split()[0])):
            return door(x, w, b)
    if mode == "exported":
        with torch.no_grad():
            return torch.export.export(_layer(w), (x,)).module()(x)
    if mode in ("traced", "compiled") and case.often(0.5):
        return run(case, mode, _layer(w).eval(), x)
    return run(case, mode, door, x, w, b)


def _finite(t: Tensor) -> Tensor:
    return t.nan_to_num(0.0, 0.0, 0.0)


def _bound(a: Tensor, b: Tensor, dtype: torch.dtype, smallest: float = 0.0) -> Tensor:
    """How far a @ b.T in `dtype` may be off. a: (..., K), b: (N, K) -> (..., N)."""
    a, b = a.double().abs(), b.double().abs()
    largest, total = a.amax(-1, keepdim=True) if a.shape[-1] else a.sum(-1, keepdim=True), b.sum(-1)
    if dtype.itemsize == 2 and b.shape[-1]:
        total = b.shape[-1] * b.amax(-1)  # zero points are of the size of the largest number of a group
    tiny = max(SMALLEST[dtype], smallest) * (a.sum(-1, keepdim=True) + total + 1)
    return PRECISION[dtype] * largest * total + tiny


def _judge_product(case: Case, x: Tensor, w: Any, y: Tensor, before: torch.dtype) -> None:
    """y = x @ w.T, where the format quantizes x first if it says so. x: (..., K), w: (N, K).

    before: the dtype of x before autocast.
    """
    said = " ".join(case.said)
    by_elements = ("einsum" in said and w.shape[1] == 1) or ("tensordot" in said and w.shape[0] == 1)
    case.must(y.dtype == x.dtype or by_elements, f"the result is {y.dtype}")
    if y.dtype != x.dtype:
        return
    plain = F.linear(x, w.dequantize().to(x.dtype))
    case.must(y.shape == plain.shape, f"the result is of shape {tuple(y.shape)}")
    if w.spec.act is not None and w.spec.act.block != (1, -1) and not x.isfinite().all():
        return  # One scale for all rows.
    d, given = w.decode_scaled(), x
    coarse = torch.bfloat16 if before == torch.bfloat16 else y.dtype
    if w.spec.act is not None and x.numel() and d.numel():
        times = None if w.pre_scale is None or w.pre_scale.shape[0] != 1 else w.pre_scale[0].float()
        rows = x if times is None else (x.float() * times).to(x.dtype)
        x = w.spec.act.quantize(rows.reshape(-1, x.shape[-1])).decode().view(x.shape)
        d = d if times is None else w.decode()
    reference = x.double() @ d.double().t()
    # An input of bfloat16 that autocast makes float16 has the precision of one and the smallest numbers of the other.
    off = _bound(_finite(x), _finite(d), coarse, max(SMALLEST[before], SMALLEST[y.dtype]))
    near = (y.double() - reference).abs() <= off
    highest = torch.finfo(y.dtype).max
    if w.spec.act is not None:
        highest = min(highest, torch.finfo(torch.float32).max)
    large = reference.abs() + 2 * PRECISION[y.dtype] * reference.abs() > highest
    total = _finite(x).double().abs() @ _finite(d).double().abs().t()
    large = large | (total > 0.1 * highest)  # sums in another order, or of codes, may pass the limit on the way
    # A number of 3e28 times what rounding leaves of a zero point, where the weight is 0, is within the bound and is none.
    large = large | (off > 0.1 * highest)
    if given.dtype == torch.float16:
        large = large | (d.abs().amax(-1) > 65504) if d.numel() else large  # reading casts to the dtype of the input
    if w.pre_scale is not None and w.pre_scale.shape[0] == 1:
        # What a format multiplies its input by is to be in the range of the input's dtype.
        large = large | ((given.float() * w.pre_scale[0].float()).to(y.dtype).isinf().any(-1, keepdim=True))
    case.must((y.isfinite() | ~plain.isfinite() | large).all(), "not finite where a plain tensor is")
    fits = near | ~reference.isfinite() | ~plain.isfinite() | large
    case.must(fits.all(), f"off: {_worst(y.double() - reference, ~fits)}")
    if w.spec.act is None:
        case.must((~y.isfinite() | reference.isfinite()).all(), "a NaN or an infinity is hidden")


def _worst(error: Tensor, wrong: Tensor) -> str:
    return f"{int(wrong.sum())} numbers by {error.abs()[wrong].max():.3g}" if wrong.any() else "nowhere"


def _judge_gradients(case: Case, x: Tensor, w: Any, y: Tensor, g: Tensor) -> None:
    d = w.decode_scaled()
    assert x.grad is not None
    case.must(x.grad.dtype == x.dtype and x.grad.shape == x.shape, "the gradient has another form")
    pairs = [(x.grad, g, d.t())]
    if w.requires_grad:
        case.must(type(w.grad) is Tensor, "the gradient of the weight is no plain tensor")
        rows = g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
        pairs.append((w.grad, rows.t(), x.detach().reshape(rows.shape[0], x.shape[-1]).t()))
    for found, a, b in pairs:
        reference = a.double() @ b.double().t()
        near_to = (y.dtype, found.dtype, w.dtype)
        dtype = next((t for t in (torch.bfloat16, torch.float16) if t in near_to), torch.float32)
        near = (found.double() - reference).abs() <= _bound(
            _finite(a), _finite(b), dtype, max(SMALLEST[t] for t in near_to)
        )
        plain = (a.to(y.dtype) @ b.to(y.dtype).t()).to(found.dtype)
        case.must((near | ~plain.isfinite()).all(), f"a gradient is off: {_worst(found.double() - reference, ~near)}")


def looked_up(case: Case) -> str:
    """Embeddings, bags, convolutions, experts and attention: as of the decoded weight."""
    kind = case.one_of(
        ["embedding", "embedding", "bag", "conv1d", "conv2d", "conv_transpose1d", "bmm", "grouped_mm", "attention"],
        "operator",
    )
    dims = {"conv1d": 3, "conv2d": 4, "conv_transpose1d": 3, "bmm": 3, "grouped_mm": 3}.get(kind, 2)
    made = random_quantized(case, dims)
    if made is None or not made[1].numel():
        return "no such weight"
    q, d = made[0], made[0].dequantize()
    mode = case.one_of(["no gradients", "inference mode", "gradients on"], "mode")
    n, k = q.shape[0], q.shape[-1]
    dtype = q.dtype
    ids = torch.randint(0, n, (2, 3), generator=case.generator)
    if kind in ("embedding", "bag"):
        call = (
            (lambda w: F.embedding(ids, weight=w))
            if kind == "embedding"
            else (lambda w: F.embedding_bag(ids, w, mode="sum"))
        )
    elif kind.startswith("conv"):
        sides = [s + 2 for s in q.shape[2:]]
        x = random_numbers(case, (2, q.shape[1] if kind != "conv_transpose1d" else n, *sides), dtype)
        call = lambda w: getattr(F, kind)(x, weight=w)  # noqa: E731
    elif kind == "bmm":
        x = random_numbers(case, (n, 3, k), dtype)
        call = lambda w: torch.bmm(x, w.mT)  # noqa: E731
        d = q.mT.dequantize().mT  # how a weight lies in memory decides in which order a batched product sums
    elif kind == "grouped_mm":
        x = random_numbers(case, (4 * n, k), torch.bfloat16, spoilt=False)
        ends = torch.arange(4, 4 * n + 1, 4, dtype=torch.int32)
        call = lambda w: F.grouped_mm(x, w.mT if isinstance(w, QTensor) else w.to(x.dtype).mT, offs=ends)  # noqa: E731
    else:
        x = case.normal(1, 1, 3, k).to(dtype)
        call = lambda w: F.scaled_dot_product_attention(x, w[None, None], w[None, None])  # noqa: E731
    try:
        with sdpa_kernel(SDPBackend.MATH):
            expected = call(d)
    except RuntimeError:
        return "refused"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            found = run(case, mode, call, q)
    except REFUSALS as error:
        case.must(len(str(error)) > 20, f"the error says little: {error!r}")
        return "refused"
    case.must(found.shape == expected.shape and found.dtype == expected.dtype, "another form")
    if kind == "grouped_mm":
        total = x.double().abs().amax(-1, keepdim=True) * d.double().abs().sum(-1).repeat_interleave(4, 0)
        near = (found.double() - expected.double()).abs() <= 2 * PRECISION[x.dtype] * total + 1e-30
        if q.spec.act is None and same(q.decode_scaled().to(q.dtype), d):
            case.must((near | ~expected.isfinite()).all(), "off")
        case.must((found.isfinite() | ~expected.isfinite()).all(), "not finite where a plain tensor is")
    elif (
        q.spec.act is None and kind == "attention"
    ):  # in pieces: weights of the sum are off by the rounding of their scores
        score = (x.double().abs() @ d.double().abs().mT).amax() / d.shape[1] ** 0.5
        near = (found.double() - expected.double()).abs() <= 8 * PRECISION[x.dtype] * (
            1 + score
        ) * d.double().abs().amax() + SMALLEST[x.dtype]
        large = expected.abs() > 0.9 * torch.finfo(expected.dtype).max  # a number rounded up may pass the limit
        case.must((near | ~expected.isfinite() | large).all(), f"found {found}, expected {expected}")
    elif q.spec.act is None:
        case.must(same(found, expected), f"found {found}, expected {expected}")
    elif kind not in ("bmm", "attention") or (x.isfinite().all() and q.dtype != torch.float16):
        case.must((found.isfinite() | ~expected.isfinite()).all(), "not finite where a plain tensor is")
    return "held"


# Layers.

CONFIGS: dict[str, Callable[[str], Any]] = {
    "int8": lambda a: ao.Int8WeightOnlyConfig(algorithm=a),
    "int4": lambda a: ao.Int4WeightOnlyConfig(group_size=32, algorithm=a),
    "uint3": lambda a: ao.UIntXWeightOnlyConfig(torch.uint3, 32, algorithm=a),
    "int8-dynamic": lambda a: ao.Int8DynamicActivationInt8WeightConfig(algorithm=a),
    "8da4w": lambda a: ao.Int8DynamicActivationInt4WeightConfig(algorithm=a),
    "int4, float16 scales": lambda a: ao.IntxWeightOnlyConfig(
        torch.int4, ao.PerGroup(32), scale_dtype=torch.float16, algorithm=a
    ),
    "int8 static": lambda a: ao.Int8StaticActivationInt8WeightConfig(algorithm=a),
}
ALGORITHMS = ("rtn", "rtn", "clip", "hqq", "gptq", "awq", "smoothquant", "bias_correction")


def layer_quantized(case: Case) -> str:
    """`quantize_` by every algorithm: what comes out is finite, and no worse than nothing; or the layer is named in an error, and
    the model stays as it was."""
    name, algorithm = case.one_of(CONFIGS, "format"), case.one_of(ALGORITHMS, "algorithm")
    n, k = case.one_of([1, 8, 33, 48]), case.one_of([32, 64, 128])
    dtype = case.one_of([torch.float32, torch.float32, torch.bfloat16, torch.float16], "dtype")
    model = nn.Sequential(nn.Linear(k, n, bias=case.often(0.5), dtype=dtype))
    model[0].weight = nn.Parameter(random_numbers(case, (n, k), dtype))
    case.said.append("data:")
    data = [
        random_numbers(case, (16, k), dtype, spoilt=case.often(0.2))
        if case.often(0.3)
        else case.normal(16, k).to(dtype)
        for _ in range(3)
    ]
    before = copy.deepcopy(model)
    try:
        config = CONFIGS[name](algorithm)
        chosen = lambda module, _: isinstance(module, nn.Linear)  # noqa: E731  also of few outputs
        ao.quantize_(model, config, chosen, calibration_data=data if case.often(0.8) else None)
    except (TypeError, *REFUSALS) as error:
        case.must(len(str(error)) > 30, f"the error says little: {error!r}")
        case.must(same(model[0].weight.detach(), before[0].weight.detach()), "a call that is refused changed the model")
        return "refused"
    w, d = before[0].weight.detach().float(), model[0].weight.decode_scaled()
    case.must(w.isfinite().all(), "a weight that is not finite is taken")
    case.must(d.isfinite().all(), "the weight is not finite")
    if algorithm in ("rtn", "clip", "hqq"):
        case.must((d - w).norm() <= 0.6 * w.norm() + 1e-36, "more noise than half of the signal")
    x = case.normal(5, k)
    with torch.no_grad():
        expected, found = before.float()(x), model.float()(x)
    case.must((found.isfinite() | ~expected.isfinite()).all(), "the output is not finite")
    return "held"


def layer_trained(case: Case) -> str:
    """A layer that trains in low precision: finite where a plain layer is, forward and backward, in autocast and out of it."""
    precision = case.one_of([p for p in PRECISIONS if p != "bf16"], "precision")
    n, k, m = case.one_of([8, 16, 64, 128]), case.one_of([16, 64, 128]), case.one_of([1, 4, 16, 33])
    plain = nn.Linear(k, n, bias=False)
    plain.weight = nn.Parameter(random_numbers(case, (n, k), torch.float32, spoilt=False))
    autocast = case.one_of([None, torch.bfloat16, torch.float16], "autocast")
    x = random_numbers(case, (m, k), torch.float32, spoilt=False)
    if autocast == torch.float16:  # whose range one scale for a tensor has to fit
        plain.weight.data.clamp_(-100, 100)
        x.clamp_(-100, 100)
    layer = nn.Sequential(copy.deepcopy(plain))
    try:
        convert_to_precision(layer, precision)
    except REFUSALS as error:
        case.must(len(str(error)) > 30, f"the error says little: {error!r}")
        return "refused"
    results = []
    for model in (plain, layer):
        z = x.clone().requires_grad_()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            try:
                y = model(z)
                y.float().mean().backward()
            except REFUSALS as error:
                case.must(len(str(error)) > 30, f"the error says little: {error!r}")
                return "refused"
        results.append((y.detach(), z.grad, next(model.parameters()).grad))
    # Sums of what is rounded may pass the limit where those of a plain layer stay just below. (M, N), (M, K), (N, K)
    a, b = x.double().abs(), plain.weight.detach().double().abs()
    totals = a @ b.t(), b.sum(0).expand(m, k) / (m * n), a.sum(0).expand(n, k) / (m * n)
    for expected, found, total in zip(*results, totals):
        assert expected is not None and found is not None
        large = total > 0.1 * torch.finfo(autocast or torch.float32).max
        case.must((found.isfinite() | ~expected.isfinite() | large).all(), "not finite where a plain layer is")
        case.must(found.dtype == expected.dtype and found.shape == expected.shape, "another form")
    return "held"


KINDS: dict[Callable[[Case], str], int] = {
    moved_or_read: 35, multiplied: 30, written: 15, looked_up: 8, quantized: 6, layer_quantized: 3, layer_trained: 3,
}  # fmt: skip


def judge(number: int) -> tuple[str, str]:
    """The kind of a case, and "held", "refused" or "no such weight". Raises AssertionError where it does not hold."""
    case = Case(number)
    torch.manual_seed(number)
    (kind,) = case.dice.choices(list(KINDS), list(KINDS.values()))
    case.said.append(kind.__name__)
    try:
        return kind.__name__, kind(case)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error} ({'; '.join(case.said)})") from error
