"""The products with weights that leave out zeros: two of four along K, or whole blocks.

Decoding every zero at each product would take longer than a dense weight does. So, where it is faster, another form of the weight
is made at first use and kept beside it, within `KEPT_BYTES` in all and never in files:

    unfolded    the zeros beside the numbers, in the format that these have: what any product of that format takes. On a CPU, in
                eager mode, for any number of tokens; on a GPU up to MANY tokens, where sparse units lose
    compressed  as NVIDIA's cuSPARSELt reads two of four, from MANY tokens on where that is faster, with the algorithm that is
                fastest: both are timed when a shape is first multiplied

One token or two, integers of 4 and 8 bits and kept blocks are multiplied by kernels that decode in registers
(kernels/two_of_four.py, kernels/kept_blocks.py); where nothing more may be kept, so is any other 2:4 weight.

In a graph all of that is one operator: the choice is made when it runs.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..dtypes.base import QTensor, Spec
from ..dtypes.operand import Operand
from ..dtypes.pairs import TRANSPOSABLE, TWO_OF_FOUR, spread, unpack_codes
from ..dtypes.tracing import is_eager
from .anywhere import compiling, quantize_act, quantized_act, row_cast
from .form import Form, form_of, leaves, made
from .gpu import is_default_act
from .kernels.device import cuda_capability, has_kernels, is_hopper, on_its_device
from .path import Path, Product

KEPT_BYTES = 2**34
"""What is kept beside weights may take so much in all. Beyond, a weight is decoded at every call."""

FEW = 2
"""Up to so many tokens a GPU decodes integers in registers, one token after another; more are faster with a dense weight, and so
are those of 8 bits where a dense weight is kept."""

MANY = 256
"""From so many tokens on NVIDIA's sparse units may be faster than its dense ones."""


_FORMS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the first field of a weight: its other forms by name. No attributes of that tensor, which copies and files would take
along."""


class _Kept:
    """Another form of a weight. It is counted as long as it lives, which is as long as the first field of the weight."""

    total = 0

    def __init__(self, of: tuple[int, ...], form: Tensor | None) -> None:
        self.of, self.form = of, form
        self.bytes = 0 if form is None else sum(t.nbytes for t in leaves(form))
        _Kept.total += self.bytes

    def __del__(self) -> None:
        type(self).total -= self.bytes


def _beside(w: QTensor, name: str, make: Any) -> Tensor | None:
    """`make()` once for a weight as it is now; None for a weight that does not tell when it changes, beyond the budget, and while
    a CUDA graph is recorded: nothing is computed then, and the graph would make the form anew at each replay."""
    tensors = list(leaves(w))
    if any(t.is_inference() for t in tensors):
        return None
    of = tuple(n for t in tensors for n in (t._version, t.data_ptr()))
    forms: dict[str, _Kept] | None = _FORMS.get(tensors[0])
    if forms is None:
        forms = _FORMS[tensors[0]] = {}
    kept = forms.get(name)
    if kept is None or kept.of != of:
        forms.pop(name, None)
        device = tensors[0].device
        if _Kept.total >= KEPT_BYTES or _is_recorded(device):
            return None
        kept = forms[name] = _Kept(of, _apart(make, device))
    return kept.form


def _apart(make: Callable[[], Tensor | None], device: torch.device) -> Tensor | None:
    """`make()` without gradients; on a GPU in a thread of its own: what the thread that warms a CUDA graph up allocates is memory
    of PyTorch's graphs, which write over it, and refuse it where it outlives the call."""
    if device.type != "cuda":
        with torch.no_grad():
            return make()
    stream = torch.cuda.current_stream(device)

    def run() -> Tensor | None:
        with torch.cuda.stream(stream), torch.no_grad():
            return make()

    return _thread().submit(run).result()


@functools.cache
def _thread() -> ThreadPoolExecutor:
    """One for all forms: cuSPARSELt is set up anew in every thread."""
    return ThreadPoolExecutor(1, "ao-sparse-forms")


def _is_recorded(device: torch.device) -> bool:
    """Whether what runs on the device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def operand_of(w: QTensor, kind: str) -> Operand | None:
    """The operand of a weight (N, K) that is stored so, as rows of its own; else None."""
    operand = w.spec.operand(w) if w.dim() == 2 and w.numel() else None
    if operand is None or operand.kind != kind:
        return None
    return operand if kind == "blocks" or operand.codes.shape == (w.shape[0], w.shape[1] // 8) else None


def _unfolded(w: QTensor) -> Tensor | None:
    return _beside(w, "unfolded", lambda: w.spec.unfolded(w))


# On a CPU.


def unfolded_accepts(x: Tensor, w: QTensor) -> bool:
    return is_eager(x, or_recorded=False) and operand_of(w, "sparse24") is not None


def unfolded(x: Tensor, w: QTensor) -> Tensor:
    """x @ w.T by the product of the format that the numbers have, with the zeros beside them."""
    form = _unfolded(w)
    if form is None:
        return F.linear(quantized_act(x, w), w.decode(x.dtype))
    if isinstance(form, QTensor):
        return F.linear(x, form)
    return F.linear(quantized_act(x, w), form.to(x.dtype))


def blocks_accepts(x: Tensor, w: QTensor) -> bool:
    return operand_of(w, "blocks") is not None


def blocks(x: Tensor, w: QTensor) -> Tensor:
    """The sum over the kept blocks of what each makes of its part of x: time in proportion to what is kept."""
    operand = operand_of(w, "blocks")
    assert operand is not None
    n, kept = w.shape[0], operand.codes.shape[0]
    wide = x.dtype if x.device.type != "cpu" or x.dtype == torch.float64 else torch.float32
    rows = quantized_act(x, w).to(wide)
    part = _plain_part(x, w, operand, wide)
    size = part.shape[1]
    part = part.view(kept, size, size).transpose(1, 2)
    at = torch.searchsorted(
        operand.scale[1:].contiguous(), torch.arange(kept, device=x.device, dtype=torch.int32), right=True
    )
    made = torch.bmm(
        rows.unflatten(1, (-1, size)).transpose(0, 1).index_select(0, operand.codes), part
    )  # (kept, M, size)
    out = torch.zeros(n // size, x.shape[0], size, dtype=torch.float32, device=x.device)
    out = out.index_add(0, at, made.float())
    return out.transpose(0, 1).reshape(x.shape[0], n).to(x.dtype)


def unfolded_launch(x: Tensor, w: QTensor) -> Product:
    """`unfolded` for eager mode: x (..., K), and what the other form multiplies by is decided once."""
    form = _unfolded(w)
    if not isinstance(form, QTensor):
        return lambda x, w: unfolded(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[0])

    def run(x: Tensor, w: QTensor) -> Tensor:
        form = _unfolded(w)
        return F.linear(quantized_act(x, w), w.decode(x.dtype)) if form is None else F.linear(x, form)

    return run


def _plain_part(x: Tensor, w: QTensor, operand: Operand, dtype: torch.dtype) -> Tensor:
    """The kept blocks as `dtype`: in eager mode decoded once, and kept beside the weight."""
    part = operand.part
    if not isinstance(part, QTensor):
        return part.to(dtype)
    kept = _beside(w, f"blocks {dtype}", lambda: part.decode(dtype)) if is_eager(x, or_recorded=False) else None
    return part.decode(dtype) if kept is None else kept


CPU = (Path(unfolded_accepts, unfolded, launch=unfolded_launch),)
ANYWHERE = (Path(blocks_accepts, blocks),)


# On a GPU.


def sparse_accepts(x: Tensor, w: QTensor) -> bool:
    if not has_kernels(x.device) or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if operand_of(w, "blocks") is not None:
        return _reading(w) is not None
    return operand_of(w, "sparse24") is not None


def sparse(x: Tensor, w: QTensor) -> Tensor:
    """x @ w.T by what is fastest for so many tokens."""
    if not compiling():
        return _on_gpu(x, w)
    given = x.contiguous(), list(leaves(w)), _text(form_of(w)), w.shape[0]
    if x.dtype != torch.bfloat16 or _codes_for_units(w) is None:
        return torch.ops.ao.sparse_product(*given)
    # The compiler multiplies with the scales where it reads the sums for what comes next.
    total, rows, columns = torch.ops.ao.sparse_total(*given)
    return (total.float() * rows * columns).to(x.dtype)


@on_its_device
def _total_on_gpu(x: Tensor, w: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (M, N) and scales (M, 1) and (1, N), whose product is x @ w.T: of ones where the sparse units are not the fastest."""
    operand = w.spec.operand(w)
    assert operand is not None
    if x.shape[0] >= MANY and has_sparse_units(x.device) and _units_win(x, w, operand):
        found = _compressed_total(x, w, operand)
        if found is not None:
            return found
    one = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    return _on_gpu(x, w), one.expand(x.shape[0], 1).contiguous(), one.expand(1, w.shape[0]).contiguous()


@on_its_device
def _on_gpu(x: Tensor, w: QTensor) -> Tensor:
    operand, m = w.spec.operand(w), x.shape[0]
    assert operand is not None
    if m == 0:
        return x.new_empty(0, w.shape[0])
    if operand.kind == "blocks":
        from .kernels import kept_blocks

        reading, fields = _reading(w)  # type: ignore[misc]
        rows = quantized_act(x, w).contiguous()
        return kept_blocks.product(rows, operand.scale, operand.codes, w.shape[0], reading, fields)
    if m >= MANY and has_sparse_units(x.device) and _units_win(x, w, operand):
        y = _compressed_product(x, w, operand)
        if y is not None:
            return y
    from .kernels import two_of_four

    read, places = _reading(w), operand.codes
    few = m <= FEW and w.spec.act is None
    one = read if few and read is not None and two_of_four.for_one_token(*read) else None
    if one is not None and one[0].bits == 4:
        return two_of_four.gemv(x.contiguous(), places, *one)
    if (form := _unfolded(w)) is not None:  # 8 bits are faster with their zeros, for one token too
        if isinstance(form, QTensor):
            return F.linear(x, form)
        return F.linear(quantized_act(x, w), form.to(x.dtype))
    rows = quantized_act(x, w).contiguous()
    if read is None:
        return F.linear(rows, w.decode(x.dtype))
    if one is not None:
        return two_of_four.gemv(rows, places, *one)
    if m <= 64:
        return two_of_four.few(rows, places, *read)
    return F.linear(rows, two_of_four.decoded(places, *read, x.dtype))


def _reading(w: QTensor) -> tuple[Any, Any] | None:
    """How the kernels read what is there of a weight; None where they do not."""
    from .kernels.reading import Reading, reading_of

    operand = w.spec.operand(w)
    assert operand is not None
    part = operand.part
    whole = all(t.is_contiguous() for t in (operand.codes, operand.scale))
    if not whole or (operand.kind == "sparse24" and w.shape[1] % 64) or w.numel() >= 2**31:
        return None
    if isinstance(part, QTensor):
        read = reading_of(part)
        if read is not None and not read[0].by_template:
            return None
    else:
        (n, k), plain = part.shape, part.dtype.itemsize == 2 and part.is_contiguous()
        read = (Reading(n, k, 16, "affine", 0, False, 0.0, 1, 1), (part, part, *[None] * 4)) if plain else None
    if read is None or operand.kind == "sparse24":
        return read
    from .kernels import kept_blocks

    return read if kept_blocks.takes(read[0]) else None


GPU = (Path(sparse_accepts, sparse, operator=True),)
"""The paths of a CPU, of any device and of a GPU, which come before others."""


# NVIDIA's sparse units, by the operators that PyTorch has for cuSPARSELt.


_CUSPARSELT = torch.backends.cusparselt.is_available()


def has_sparse_units(device: torch.device) -> bool:
    """Whether PyTorch was built with cuSPARSELt, for a chip that has the units: since Ampere."""
    return _CUSPARSELT and cuda_capability(device) >= (8, 0)


def _compressed_product(x: Tensor, w: QTensor, operand: Operand) -> Tensor | None:
    """x @ w.T on the sparse units, in 8 bits where activation and weight are; None for shapes and formats they do not take."""
    n, k = w.shape
    if n % 32 or k % 32:
        return None
    if _codes_for_units(w) is None:
        if x.dtype != torch.bfloat16:
            return None  # cuSPARSELt 0.8 was seen to fault in float16
        compressed = _for_units(w)
        return None if compressed is None else multiplied(compressed, quantized_act(x, w).contiguous())
    found = _compressed_total(x, w, operand)
    if found is None:
        return None
    from .kernels import ampere

    total, rows, columns = found
    return ampere.scaled(total, rows, columns.t(), x.dtype, x.shape[0])


def _compressed_total(x: Tensor, w: QTensor, operand: Operand) -> tuple[Tensor, Tensor, Tensor] | None:
    """The sums of products of codes of 8 bits (M, N), bfloat16, and what multiplies them: scales (M, 1) and (1, N)."""
    codes = _codes_for_units(w)
    assert codes is not None
    compressed = _for_units(w)
    if compressed is None:
        return None
    rows, scale = _quantized_rows(x, w, codes)
    total = multiplied(compressed, rows, torch.bfloat16)
    if total is None:
        return None
    columns = torch.empty(1, w.shape[0], dtype=torch.float32, device=x.device)
    columns.copy_(codes.scale.t())  # an operator returns no argument of its own
    return total, scale.float().expand(x.shape[0], 1).contiguous(), columns


_WINS: dict[Any, tuple[bool, bool]] = {}


def _units_win(x: Tensor, w: QTensor, operand: Operand) -> bool:
    """Whether the sparse units are faster than the dense product of the same format: timed once per shape, format and power of
    two of tokens, by the clock of the GPU for what is recorded, and else by whichever of GPU and host is slower. The host takes
    longer to call cuSPARSELt than many a product does."""
    key = x.device, w.spec, w.shape, x.dtype, (x.shape[0] - 1).bit_length()
    recorded = _is_recorded(x.device)
    found = _WINS.get(key)
    if found is None:
        if recorded:
            return True
        form = _unfolded(w)
        found = (_compressed_product(x, w, operand) is not None,) * 2
        if found[0] and form is not None:
            ways = (
                lambda: F.linear(x, form) if isinstance(form, QTensor) else F.linear(quantized_act(x, w), form),
                lambda: _compressed_product(x, w, operand),
            )
            # In turns: another process may keep the host, and with it the GPU, waiting for one of them.
            turns = [[_took(way) for way in ways] for _ in range(3)]
            dense, units = ([min(clock) for clock in zip(*times)] for times in zip(*turns))
            found = units[0] < dense[0], max(units) < max(dense)
        _WINS[key] = found
    if found == (True, False) and not recorded:
        _for_units(w)  # for a graph that is recorded later, in which the host does not count
    return found[0 if recorded else 1]


def _quantized_rows(x: Tensor, w: QTensor, codes: Operand) -> tuple[Tensor, Tensor]:
    """The codes of an activation (M, K) and its scales (M, 1) or (1, 1), on Hopper by one kernel."""
    if is_default_act(w, codes) and is_hopper(x.device) and x.shape[1] <= 65536:
        from .kernels import quantize_rows

        assert w.spec.act is not None
        return quantize_rows.quantized(x.contiguous(), codes.codes.dtype, w.spec.act.block == (-1, -1))
    q = quantize_act(x, w)
    return q.codes.contiguous(), q.scale


def _codes_for_units(w: QTensor) -> Operand | None:
    """The operand of a weight's pairs where the sparse units multiply their codes of 8 bits with those of the activation."""
    act, whole = row_cast(w), w.spec.operand(w)
    if act is None or act.zero_point or act.dtype not in (torch.int8, torch.float8_e4m3fn) or whole is None:
        return None
    part = whole.part
    if whole.kind != "sparse24" or not isinstance(part, QTensor) or any(size % 32 for size in w.shape):
        return None
    operand = part.spec.operand(part)
    if operand is None or not operand.plain or not operand.by_row or operand.codes.dtype != act.dtype:
        return None
    return operand


def _spread(pairs: Tensor, places: Tensor) -> Tensor:
    """Codes of a byte each in their places: (N, K)."""
    return spread(pairs.view(torch.int8), unpack_codes(places)).view(pairs.dtype)


def _for_units(w: QTensor) -> Tensor | None:
    """The weight as the sparse units read it, kept beside it: with codes of 8 bits or in bfloat16."""
    codes, pairs = _codes_for_units(w), w.spec.operand(w)
    if codes is None or pairs is None:
        return _beside(w, "compressed_bfloat16", lambda: _compress(w, torch.bfloat16))
    return _beside(w, "compressed", lambda: torch._cslt_compress(_spread(codes.codes, pairs.codes)))


def _compress(w: QTensor, dtype: torch.dtype) -> Tensor:
    return torch._cslt_compress(w.decode(dtype).contiguous())


def multiplied(compressed: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """x @ w.T for a compressed w (N, K), as it is summed; None where the units do not take it. x: (M, K), contiguous -> (M, N) in
    `dtype`."""
    m = x.shape[0]
    rows = F.pad(x, (0, 0, 0, -m % 16)) if m % 16 else x
    algorithm = _algorithm(compressed, rows, dtype)
    if algorithm < 0:
        return None
    y = _run(compressed, rows, dtype, algorithm)
    return y[:m] if m % 16 else y


_ALGORITHMS: dict[Any, int] = {}


def _algorithm(compressed: Tensor, rows: Tensor, dtype: torch.dtype | None) -> int:
    """The number of cuSPARSELt's fastest algorithm: timed once per shape and power of two of tokens. -1 where it has none."""
    size = 1 << (rows.shape[0] - 1).bit_length()
    key = compressed.device, compressed.shape, compressed.dtype, rows.shape[1], size, dtype
    found = _ALGORITHMS.get(key)
    if found is None:
        if _is_recorded(rows.device):
            return 0
        found = _ALGORITHMS[key] = _fastest(compressed, rows, dtype)
    return found


_AHEAD = 8_000_000
"""Clock cycles that the GPU waits, so that the host, which takes longer to call cuSPARSELt than the product does, runs ahead."""


def _fastest(compressed: Tensor, rows: Tensor, dtype: torch.dtype | None) -> int:
    """By the clock of the GPU. cuSPARSELt's own search was seen to fault, and a fault ends all work on the GPU."""
    best, least = -1, float("inf")
    for algorithm in range(64):
        try:
            _run(compressed, rows, dtype, algorithm)
        except RuntimeError:
            break  # there are no more
        took, _ = _took(lambda: _run(compressed, rows, dtype, algorithm))  # noqa: B023  it is called at once
        best, least = (algorithm, took) if took < least else (best, least)
    return best


def _took(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of the GPU and of the host for a few calls."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_AHEAD)
    start.record()
    begin = time.perf_counter()
    for _ in range(4):
        call()
    host = (time.perf_counter() - begin) * 1e3
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def _run(compressed: Tensor, rows: Tensor, dtype: torch.dtype | None, algorithm: int) -> Tensor:
    return torch._cslt_sparse_mm(compressed, rows.t(), out_dtype=dtype, transpose_result=True, alg_id=algorithm)


# Weights that are pruned at every step of training.


def transposable_mask(w: Tensor) -> Tensor:
    """The mask of two of four along both dims that keeps the largest sum of magnitudes of each 4 x 4: (N, K) bool. NaN counts as
    the largest."""
    (n, k), highest = w.shape, torch.finfo(torch.float32).max / 16  # so that sums are finite
    rows = torch.tensor([[i in pair for i in range(4)] for pair in TWO_OF_FOUR], dtype=torch.bool, device=w.device)
    patterns = rows[torch.tensor(TRANSPOSABLE, dtype=torch.int64, device=w.device)].flatten(1)  # (90, 16)
    size = w.detach().float().abs().nan_to_num(highest, highest).clamp(max=highest)
    tiles = size.view(n // 4, 4, k // 4, 4).transpose(1, 2).reshape(-1, 16)  # (tiles, 16)
    best = (tiles @ patterns.float().t()).argmax(1)
    mask = patterns[best].view(n // 4, k // 4, 4, 4)
    return mask.transpose(1, 2).reshape(n, k)


def _on_sparse_units(w: Tensor) -> bool:
    """Whether cuSPARSELt multiplies `w` and its transpose."""
    fits = w.dim() == 2 and w.dtype == torch.bfloat16 and w.shape[0] % 64 == 0 and w.shape[1] % 64 == 0
    return fits and w.is_cuda and has_sparse_units(w.device)


def both_pruned(w: Tensor) -> Tensor:
    """w (N, K) with two of four along both dims, as `pruned_both` has it."""
    if _packs(w):
        *_, threads = torch._sparse_semi_structured_tile(w.contiguous(), "", False)
        return torch._sparse_semi_structured_apply_dense(w.contiguous(), threads)
    if has_kernels(w.device):
        return torch.ops.ao.both_pruned(w.contiguous())
    return torch.where(transposable_mask(w), w, 0)


def _packs(w: Tensor) -> bool:
    """Whether PyTorch's kernel, which prunes greedily, writes what cuSPARSELt reads: since Hopper that has another order."""
    return _on_sparse_units(w) and cuda_capability(w.device) < (9, 0)


COMPRESSED_FROM = 40_000
"""Tokens of a training step from which the sparse units gain more, in two products, than it takes to compress the weight and its
transpose for them: on an H200 150 us and 4 ns a token for 4096 x 1024 numbers."""


def pruned_both(w: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """w (N, K) with two of four along both dims, and its transpose: compressed for so many tokens, or plain."""
    if _on_sparse_units(w) and tokens >= (MANY if _packs(w) else COMPRESSED_FROM):
        return torch.ops.ao.pruned_both(w.contiguous())
    pruned = both_pruned(w)
    return pruned, pruned.t()


def semi_sparse_product(x: Tensor, w: Tensor, n: int) -> Tensor:
    """x @ w.T (M, n) of what `pruned_both` gives. x: (M, K), contiguous."""
    if w.dtype == x.dtype and w.shape[1] == x.shape[1]:
        return x @ w.t()
    return torch.ops.ao.compressed_product(x, w, n)


@on_its_device
def _both_pruned(w: Tensor) -> Tensor:
    from .kernels import transposable

    return transposable.pruned(w, turned=False)[0]


@on_its_device
def _pruned_both(w: Tensor) -> tuple[Tensor, Tensor]:
    if _packs(w):
        packed, _, packed_t, *_ = torch._sparse_semi_structured_tile(w, "", False)
        return packed.view(w.shape[0], -1), packed_t.view(w.shape[1], -1)
    from .kernels import transposable

    pruned, turned = transposable.pruned(w, turned=True)
    packed, packed_t = torch._cslt_compress(pruned), torch._cslt_compress(turned)
    return packed.view(w.shape[0], -1), packed_t.view(w.shape[1], -1)


def _compressed(x: Tensor, w: Tensor, n: int) -> Tensor:
    y = multiplied(w, x.contiguous())
    if y is None:
        raise RuntimeError(
            f"cuSPARSELt does not multiply {tuple(x.shape)} by a 2:4 weight of {n} rows; use nn.Linear here"
        )
    return y


def _compressed_shapes(w: Tensor) -> tuple[Tensor, Tensor]:
    n, k = w.shape
    return w.new_empty(n, k * 9 // 16), w.new_empty(k, n * 9 // 16)


# The operator of graphs.


def _text(form: Form) -> str:
    """A form as a word."""
    return json.dumps(_plain(form))


def _plain(form: Form) -> list[Any]:
    fields = [[name, None if inner is None else _plain(inner)] for name, inner in form.fields]
    shape = [int(n) for n in form.shape]
    return [form.spec.to_dict(), str(form.dtype).removeprefix("torch."), shape, form.whole, fields]


@functools.cache
def _form(text: str) -> Form:
    """The inverse of `_text`."""
    return _parsed(json.loads(text))


def _parsed(plain: list[Any]) -> Form:
    spec = Spec.from_dict(plain[0])
    fields = tuple((name, None if inner is None else _parsed(inner)) for name, inner in plain[4])
    return Form(spec.tensor_type, spec, getattr(torch, plain[1]), tuple(plain[2]), plain[3], fields)


def _operator(x: Tensor, tensors: list[Tensor], form: str, n: int) -> Tensor:
    return _on_gpu(x, made(_form(form), iter(tensors)))


def _total_operator(x: Tensor, tensors: list[Tensor], form: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    return _total_on_gpu(x, made(_form(form), iter(tensors)))


def _total_shapes(x: Tensor, tensors: list[Tensor], form: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    m = x.shape[0]
    return x.new_empty(m, n), x.new_empty(m, 1, dtype=torch.float32), x.new_empty(1, n, dtype=torch.float32)


torch.library.define(
    "ao::sparse_product", "(Tensor x, Tensor[] tensors, str form, int n) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl("ao::sparse_product", "CUDA", _operator)
torch.library.register_fake("ao::sparse_product", lambda x, tensors, form, n: x.new_empty(x.shape[0], n))
torch.library.define(
    "ao::sparse_total",
    "(Tensor x, Tensor[] tensors, str form, int n) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("ao::sparse_total", "CUDA", _total_operator)
torch.library.register_fake("ao::sparse_total", _total_shapes)
torch.library.define("ao::both_pruned", "(Tensor w) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("ao::both_pruned", "CUDA", _both_pruned)
torch.library.register_fake("ao::both_pruned", torch.empty_like)
torch.library.define("ao::pruned_both", "(Tensor w) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("ao::pruned_both", "CUDA", _pruned_both)
torch.library.register_fake("ao::pruned_both", _compressed_shapes)
torch.library.define(
    "ao::compressed_product", "(Tensor x, Tensor w, int n) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl("ao::compressed_product", "CUDA", _compressed)
torch.library.register_fake("ao::compressed_product", lambda x, w, n: x.new_empty(x.shape[0], n))
