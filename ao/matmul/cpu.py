"""The products of an activation and a quantized weight that are fast on a CPU (cpu_decode.py reads the weight).

What decides how an expression is written here, as measured on the C++ that Inductor makes of it:

- What depends on the activation alone must be stored before the loop over the weight, or it is computed once per row.
- Rows side by side share the loads of the activation, tokens side by side the decoding.
- The library's product rearranges its right operand in every call, which for a few tokens takes longer than the product.
  The integer one leaves its left operand as it is: with the weight there, 16 tokens take as long as 2.
- A buffer of more than 32 MB is mapped anew in every call, which costs as much as the product of 16 tokens. So a weight is
  decoded in pieces; one kernel serves them all if no offset distinguishes their inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import QTensor, dense
from ..dtypes.bits import CHUNK, packed_dim, unpack
from ..dtypes.operand import Operand
from ..dtypes.tracing import is_eager, known
from . import cpu_decode
from .anywhere import act_numbers, compiling, emulates, int8_operand, int8_weight, is_int8, quantize_act, quantized_act
from .block_scaled import levels, numbers, times
from .kernels.device import FLOATS, VNNI
from .path import Path, Product
from .shared_graph import shared

_LARGE = 2**20
"""A weight of so many elements is worth a graph of its own for a few tokens."""

_FEW = 4
"""Up to so many tokens it is faster to go through a large weight with all of them than to decode it."""


def _linear_in_chunks(w: QTensor) -> Operand | None:
    """The operand of a weight in chunks whose numbers are codes less a zero point."""
    operand = cpu_decode.in_chunks(w)
    if operand is None or not operand.linear:
        return None
    if operand.words is not None:
        return operand._replace(scale=dense(operand.scale), zero_point=dense(operand.zero_point), words=None)  # type: ignore[arg-type]
    return None if isinstance(operand.scale, QTensor) else operand


def sums_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        cpu_decode.AVX512
        and compiling()
        and _linear_in_chunks(w) is not None
        # Last, as this makes another graph: of one token, and for a large weight of a few.
        and (known(x.shape[0] == 1) or (w.numel() >= _LARGE and known(x.shape[0] > 0) and known(x.shape[0] <= _FEW)))
    )


@shared
def sums(x: Tensor, w: QTensor) -> Tensor:
    """sum over k of x * (q * scale) - sum over groups of (scale * z) * (sum over k of x): nothing dense is stored.

    In float32, 32 elements a step: the products with both halves of a chunk are added before they go to the sum.
    """
    operand = _linear_in_chunks(w)
    assert operand is not None
    tokens, scale = x.shape[0], operand.scale.float()  # (n or 1, groups)
    act = _activation(x, w)
    side = 1 if tokens == 1 else _FEW
    rows = F.pad(act, (0, 0, 0, -tokens % side)).view(
        -1, side, scale.shape[1], w.shape[1] // scale.shape[1] // CHUNK, 2, 16
    )
    if operand.bits == 4:
        # Of a byte 16 h + l, h stays where it is: x h + y l = (x / 16) (16 h + l) + (y - x / 16) l.
        first, second = rows.unbind(-2)
        rows = torch.stack((first - second / 16, second / 16), -2)
        low, high = cpu_decode.nibbles_and_bytes(operand)
    else:
        low, high = cpu_decode.halves(operand)
    rows = _stored(rows)  # (tokens / side, side, groups, chunks of a group, 2, 16)
    parts = zip(low.chunk(2), high.chunk(2), scale.expand(w.shape[0], -1).chunk(2))
    out = torch.cat([_dots(rows, *part) for part in parts])  # (n, tokens / side, side)
    out = out.view(w.shape[0], -1)[:, :tokens]
    if operand.by_row:
        out = out * scale
    zero = cpu_decode.zero(operand)
    if isinstance(zero, Tensor) or zero:
        of_groups = _stored(act.unflatten(1, (scale.shape[1], -1)).sum(-1))  # (tokens, groups)
        out = out - ((scale * zero).unsqueeze(1) * of_groups).sum(-1)
    return out.t().to(x.dtype).contiguous()


def _dots(x: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> Tensor:
    """x: (tokens / side, side, groups, chunks, 2, 16), low and high: (n, groups, chunks, 16) -> (n, tokens / side, side)."""
    low, high = low.unsqueeze(1), high.unsqueeze(1)  # (n, 1, groups, chunks, 16)
    by_group = scale.shape[1] > 1
    broad = scale[:, None, :, None, None]
    if by_group and x.shape[1] > 1:
        low, high = low * broad, high * broad
    out = []
    for token in x.unbind(1):
        products = cpu_decode.multiply_add(high, token[..., 1, :], low * token[..., 0, :])
        if by_group and x.shape[1] == 1:
            products = products * broad  # one product less than to scale both
        out.append(products.sum((2, 3)).sum(-1))
    return torch.stack(out, -1)


def words_accepts(x: Tensor, w: QTensor) -> bool:
    few = (
        4 if torch.bfloat16 in FLOATS else 8
    )  # A CPU without bfloat16 products takes twice as long for 2 tokens as for 1.
    operand = None if cpu_decode.AVX512 or not compiling() else _linear_in_chunks(w)
    return (
        operand is not None
        and (operand.bits < 8 or cpu_decode.AVX2)
        and (
            known(x.shape[0] == 1) or (w.numel() >= _LARGE and known(x.shape[0] > 0) and known(x.shape[0] <= few))
        )  # last, as in `sums`
    )


@shared
def words(x: Tensor, w: QTensor) -> Tensor:
    """What `sums` computes, for CPUs that read words faster than bytes: no lane waits for another.

    The order of the elements is that of the packed words, so the activation is put into that order.
    """
    operand = _linear_in_chunks(w)
    assert operand is not None
    n, groups = w.shape[0], operand.scale.shape[1]
    rows = _activation(x, w).view(x.shape[0], groups, -1, CHUNK)  # (M, groups, chunks of a group, 32)
    packed = cpu_decode.words(operand)  # (N, groups, chunks of a group, words of a chunk)
    scale = operand.scale.float()[..., None, None].expand(n, -1, 1, 1)
    out = None
    for size, start in cpu_decode.sections(operand.bits):
        section = _stored(_in_lanes(rows, size))
        # Four rows side by side share the loads of the activation.
        parts = zip(packed[..., start : start + size].chunk(4), scale.chunk(4))
        dots = torch.cat(
            [_dot(section, part, size, operand.codes.dtype, part_scale) for part, part_scale in parts]
        )  # (N, M)
        out = dots if out is None else out + dots * 2**start
    assert out is not None
    zero = cpu_decode.zero(operand, cpu_decode.through_words)
    if isinstance(zero, Tensor) or zero:
        of_groups = _stored(rows.sum((-1, -2)))  # (M, groups)
        out = out - ((operand.scale.float() * zero).unsqueeze(1) * of_groups).sum(-1)
    return out.t().to(x.dtype).contiguous()


def _in_lanes(x: Tensor, size: int) -> Tensor:
    """Chunks in the order in which `_dot` meets the codes of a section: (..., 32) -> (..., vectors / 2, 2, lanes)."""
    if size == 8:
        return x.unflatten(-1, (2, 2, 8))
    planes = x.unflatten(-1, (8 // size, size, 4))  # plane, word, byte
    return planes.movedim(-3, -1).flatten(-2).unflatten(-2, (-1, min(size, 2)))


def _dot(x: Tensor, packed: Tensor, size: int, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """x: (M, groups, chunks, vectors / 2, 2, lanes), packed: (n, groups, chunks, words of a section) -> (n, M)."""
    if size == 8:
        values = cpu_decode.from_top(cpu_decode.top_bytes(packed), dtype).unflatten(-2, (2, 2))
    else:
        values = ((packed.unsqueeze(-1) >> cpu_decode.arange(0, 32, size)) & (2**size - 1)).float()
        values = values.unflatten(-2, (-1, min(size, 2)))
    products = values.unsqueeze(1) * x  # (n, M, groups, chunks, vectors / 2, 2, lanes)
    # Two vectors before the scale and the sum, so that these are not what takes the time.
    products = products[..., 0, :] + products[..., 1, :] if products.shape[-2] == 2 else products[..., 0, :]
    return (products * scale.unsqueeze(1).unsqueeze(-1)).sum((2, 3, 4)).sum(-1)


def int8pack_accepts(x: Tensor, w: QTensor) -> bool:
    operand = int8_weight(w)
    return (
        operand is not None
        and not (cpu_decode.AVX512 and compiling())
        and x.dtype == torch.bfloat16
        and known(x.shape[0] > 0)
        and known(x.shape[0] < 4)
        and operand.scale.shape == (w.shape[0], 1)
        and operand.codes.is_contiguous()  # not those of a weight that is turned
        # For other shapes ATen reads beyond the end of the weight, or takes its address to be a multiple of 16, and faults
        # where the weight is mapped from a file.
        and w.shape[0] % 4 == 0
        and w.shape[1] % 16 == 0
    )


def int8pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int8 weight-only product, which reads the weight once per token. Slow in any type but bfloat16, so that the
    float32 scale is applied to the sum."""
    operand = w.spec.operand(w)
    assert operand is not None
    signs = _stored(operand.scale.flatten().sign().to(x.dtype))
    sums = torch._weight_int8pack_mm(_stored(x), operand.codes, signs)
    return (sums.float() * operand.scale.float().abs().t()).to(x.dtype)


def int8pack_launch(x: Tensor, w: QTensor) -> Product:
    """`int8pack` for eager mode, where there is no compiler to store anything for."""
    operand, k, n = w.spec.operand, w.shape[1], w.shape[0]

    def run(x: Tensor, w: QTensor) -> Tensor:
        codes, scale, *_ = operand(w)  # type: ignore[misc]
        sums = torch._weight_int8pack_mm(x.reshape(-1, k).contiguous(), codes, scale.flatten().sign().to(x.dtype))
        return (sums.float() * scale.float().abs().t()).to(x.dtype).view(*x.shape[:-1], n)

    return run


def int4pack_accepts(x: Tensor, w: QTensor) -> bool:
    operand = w.spec.operand(w)
    return (
        operand is not None
        and operand.kind == "int4pack"
        and operand.codes.dtype == torch.uint8  # that of a GPU is int32
        and w.spec.act is None
        and known(x.numel() > 0, True)
    )


def int4pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int4 product on its own layout."""
    operand = w.spec.operand(w)
    assert operand is not None
    scale_and_zero = _stored(operand.scale.to(x.dtype))  # (K / group, N, 2)
    group = x.shape[1] // scale_and_zero.shape[0]
    return torch._weight_int4pack_mm_for_cpu(_stored(x), operand.codes, group, scale_and_zero)


KEPT_BYTES = 2**33
"""What the copies that `kept` makes may take in all. Beyond, a weight is decoded at every call."""

_GROUPS = (32, 64, 128, 256)


class _Copy:
    """A 4-bit weight once more, in the layout of ATen's product. It is counted as long as it lives, beside its weight."""

    total = bytes = 0

    def __init__(self, w: QTensor, form: list[int]) -> None:
        operand = w.spec.operand(w)
        assert operand is not None
        self.form = form
        codes = unpack(operand.codes, 4).int()
        self.codes = self._counted(torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.group = w.shape[1] // operand.scale.shape[1]
        self.by_dtype: dict[torch.dtype, Tensor] = {}

    def _counted(self, t: Tensor) -> Tensor:
        self.bytes += t.nbytes
        _Copy.total += t.nbytes
        return t

    def __del__(self) -> None:
        type(self).total -= self.bytes  # the name of the class may be gone when Python ends

    def scale_and_zero(self, w: QTensor, dtype: torch.dtype) -> Tensor:
        """(K / group, N, 2), where the value of a code is (code - 8) * scale + zero."""
        operand = w.spec.operand(w)
        assert operand is not None
        scale, offset = operand.scale.float(), 8 - operand.offset
        zero = scale * (offset if operand.zero_point is None else offset - dense(operand.zero_point).float())
        made = self.by_dtype[dtype] = self._counted(torch.stack([scale.t(), zero.t()], -1).to(dtype).contiguous())
        return made

    @staticmethod
    def form_of(w: QTensor) -> list[int] | None:
        """What changes when something is written to the weight or to a field, or when the fields are exchanged; None for tensors
        of inference mode, which do not tell."""
        if w.is_inference():
            return None
        form = [w._version]
        for t in w.fields().values():
            if t.is_inference():
                return None
            form += t._version, t.data_ptr()
        return form


def kept_accepts(x: Tensor, w: QTensor) -> bool:
    operand = w.spec.operand(w) if w.spec.act is None and is_eager(x, or_recorded=False) else None
    return (
        operand is not None
        and 0 < x.shape[0] <= 64
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and operand.kind == "affine"
        and operand.bits == 4
        and w.shape[0] % 16 == 0
        and packed_dim(operand.codes.shape, w.shape) == 1
        and operand.scale.shape[0] == w.shape[0]
        and w.shape[1] in [group * operand.scale.shape[1] for group in _GROUPS]
        and not isinstance(operand.scale, QTensor)
    )


def kept(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int4 product, in eager mode, on a copy of the weight in its own layout: made at the first call, kept beside the
    weight, and never stored. Without it, dozens of operators would decode the weight at every call.

    Of the dtype of x are scale and zero, which loses as much as casting the weight to it.
    """
    form = _Copy.form_of(w)
    if form is None:
        return pieces(x, w)
    copy: _Copy | None = w.__dict__.get("cpu_copy")
    if copy is None or copy.form != form:
        if _Copy.total + w.numel() // 2 > KEPT_BYTES:
            return pieces(x, w)
        copy = w.cpu_copy = _Copy(w, form)  # type: ignore[attr-defined]
    scale_and_zero = copy.by_dtype.get(x.dtype)
    if scale_and_zero is None:
        scale_and_zero = copy.scale_and_zero(w, x.dtype)
    return torch._weight_int4pack_mm_for_cpu(x.contiguous(), copy.codes, copy.group, scale_and_zero)


def made_accepts(x: Tensor, w: QTensor) -> bool:
    if not known(x.numel() > 0, True) or not (compiling() or is_eager(x, or_recorded=False)):
        return False
    from . import made  # with it come ctypes, subprocess and C++

    return made.accepts(x, w)


def made(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T by C++ that decodes in registers (made.py)."""
    from . import made

    return made.product(x, w)


def made_launch(x: Tensor, w: QTensor) -> Product:
    """`made` for eager mode."""
    from . import made

    return made.launch(x, w)


def int8_accepts(x: Tensor, w: QTensor) -> bool:
    if not VNNI:
        return False
    from . import cpu_int8

    return cpu_int8.accepts(x, w)


def int8(x: Tensor, w: QTensor) -> Tensor:
    """The product in integer units, of an activation in bytes, by C++ around PyTorch's (cpu_int8.py)."""
    from . import cpu_int8

    return cpu_int8.product(x, w)


def int8_launch(x: Tensor, w: QTensor) -> Product:
    """`int8` for eager mode."""
    from . import cpu_int8

    return cpu_int8.launch(x, w)


def split_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        VNNI
        and x.dtype in (torch.bfloat16, torch.float16)  # 16 bits are not enough for float32
        and int8_weight(w) is not None
        and known(x.numel() > 0, True)
    )


@shared
def split(x: Tensor, w: QTensor) -> Tensor:
    """(256 * (high @ q.T) + low @ q.T) * step * scale, where x = step * (256 * high + low) in 16-bit fixed point.

    step = max|x| / 32512 of a token, so that both bytes fit in int8, and what x loses is less than the output's rounding to
    bfloat16. Both products are one of integers, exact. It takes as long as a product of bfloat16, and reads half.
    """
    operand = w.spec.operand(w)
    assert operand is not None
    tokens = x.shape[0]
    step = x.float().abs().amax(-1, keepdim=True) / 32512
    whole = (x.float() * (1 / step)).round().to(torch.int32)
    low = ((whole + 128) & 255) - 128
    high = (whole - low) >> 8
    total = _integer_product(torch.cat([high.to(torch.int8), low.to(torch.int8)]), operand.codes)  # (N, 2 M)
    total = total[:, :tokens].float() * 256 + total[:, tokens:].float()
    return ((total * operand.scale.float()).t() * step).to(x.dtype).contiguous()


def _integer_product(x: Tensor, q: Tensor) -> Tensor:
    """q @ x.T in int32. x: (M, K) int8, q: (N, K) int8 -> (N, M)."""
    if q.shape[1] == 1:
        return q.to(torch.int32) * x.t().to(torch.int32)  # `_int_mm` of one column is wrong (PyTorch 2.13)
    if known(q.shape[0] == 1):  # so is one of a row with another stride than K, and a compiler picks any
        return (q.to(torch.int32) * x.to(torch.int32)).sum(-1, dtype=torch.int32).unsqueeze(0)
    # A single column whose stride the compiler sets to 0, which it may, comes out wrong.
    return torch._int_mm(q, _stored(x.t()) if known(x.shape[0] == 1) else x.t())


def int_mm_accepts(x: Tensor, w: QTensor) -> bool:
    return is_int8(w) and known(x.numel() > 0, True)


@shared
def int_mm(x: Tensor, w: QTensor) -> Tensor:
    """((q_x - z) @ q_w.T) * scale_x * scale_w. Without integer dot products in float32, exact up to 2**24, and many times
    faster than integers there."""
    operand, act = int8_operand(w), quantize_act(x, w)
    assert operand is not None
    if VNNI:
        q, tokens = act.codes, x.shape[0]
        if act.zero_point is not None:
            # One more row, of ones, so that the same product gives the sums of the weight that the zero point multiplies.
            q = torch.cat([q, q.new_ones(1, q.shape[1])])
        total = _integer_product(q, operand.codes).t().float()  # (M, N), or one more row
        if act.zero_point is not None:
            total = total[:tokens] - act.zero_point.float() * total[tokens:]
    else:
        rows = act.codes.float()
        if act.zero_point is not None:
            rows = rows - act.zero_point.float()
        total = _by_piece(rows, w, _integers)
    return (total * act.scale.float() * operand.scale.float().t()).to(x.dtype).contiguous()


def _integers(w: QTensor) -> Tensor:
    operand = cpu_decode.fast(w)
    if operand is not None:
        return _in_order(operand, lambda q: q)
    operand = int8_operand(w)
    assert operand is not None
    return operand.codes.float()


def emulated_accepts(x: Tensor, w: QTensor) -> bool:
    return emulates(w)


@shared
def emulated(x: Tensor, w: QTensor) -> Tensor:
    """Small floats in blocks on both sides: their numbers in float32, and what multiplies all of them after the sum."""
    rows, whole = act_numbers(x, w)
    found = levels(w.spec.operand(w))
    assert found is not None
    total = _by_piece(rows, w, lambda part: numbers(part.spec.operand(part), part.shape)[0])  # type: ignore[arg-type]
    return times(total, whole, found.whole).to(x.dtype)


def pieces_accepts(x: Tensor, w: QTensor) -> bool:
    return x.dtype not in FLOATS or _pieces(w) > 1 or cpu_decode.fast(w) is not None


@shared
def pieces(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T, a large weight in row pieces: a piece that stays in cache from its decoding to its use saves a round
    trip through memory. Computed in float32 on a CPU without products of x's dtype."""
    dtype = x.dtype if x.dtype in FLOATS else torch.float32
    rows = _activation(x, w).to(dtype)
    operand = cpu_decode.fast(w) if cpu_decode.AVX512 and dtype == torch.bfloat16 else None
    if operand is None:
        return _by_piece(rows, w, lambda part: _decode(part, dtype)).to(x.dtype)
    if not (operand.plain and operand.by_row):
        return _by_piece(cpu_decode.interleaved(rows), w, _pairs)
    # Bytes are bfloat16 numbers.
    total = _by_piece(cpu_decode.interleaved(rows), w, _exact_pairs)
    return (total.float() * operand.scale.float().t()).to(x.dtype)


def _by_piece(rows: Tensor, w: QTensor, decode: Callable[[QTensor], Tensor]) -> Tensor:
    count = _pieces(w)
    if count == 1:
        return F.linear(rows, decode(w))
    parts = w.chunk(count)
    if compiling():
        parts = [part.map(_without_offset) for part in parts]  # type: ignore[attr-defined, assignment]
    return torch.cat([F.linear(rows, decode(part)) for part in parts], -1)  # type: ignore[arg-type]


def _pieces(w: QTensor) -> int:
    """Into how many row pieces to cut a large weight: each of 1M to 2M elements, or half a million where every step of the
    decoding is a pass over it; at most 32, which a graph can hold."""
    roles = type(w).roles
    rows = [t.shape[0] for name, t in w.fields().items() if roles[name] in ("elements", "per_block")]
    if "opaque" in roles.values() or any(n not in (1, w.shape[0]) for n in rows):
        return 1
    count = w.numel() // (2**21 if compiling() else 2**19)
    return min(1 << (count - 1).bit_length(), 32) if count > 1 else 1


def _decode(w: QTensor, dtype: torch.dtype) -> Tensor:
    """`w.decode(dtype)`."""
    operand = cpu_decode.fast(w)
    return w.decode(dtype) if operand is None else _in_order(operand, lambda q: cpu_decode.scaled(q, operand).to(dtype))


def _pairs(w: QTensor) -> Tensor:
    """The weight in bfloat16, for an activation that is `interleaved`."""
    operand = _readable(w)
    first, second = (cpu_decode.scaled(q, operand) for q in cpu_decode.halves(operand))  # (n, groups, chunks, 16)
    return cpu_decode.pairs(first, second).view(w.shape[0], -1).view(torch.bfloat16)


def _exact_pairs(w: QTensor) -> Tensor:
    """The same without the scale."""
    first, second = cpu_decode.halves(_readable(w))
    return cpu_decode.pairs(first, second, exact=True).view(w.shape[0], -1).view(torch.bfloat16)


def _readable(w: QTensor) -> Operand:
    operand = cpu_decode.fast(w)
    assert operand is not None
    return operand


def _in_order(w: Operand, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of all numbers of a weight, in its shape. With AVX-512 there is a store for each half of a chunk, where a
    loop over both would leave the vectors."""
    parts = [function(q) for q in (cpu_decode.halves(w) if cpu_decode.AVX512 else (cpu_decode.numbers(w),))]
    return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).view(w.codes.shape[0], -1)


def _activation(x: Tensor, w: QTensor) -> Tensor:
    """x in at least float32, through quantization and back where the weight's Spec wants it."""
    return quantized_act(x if x.dtype == torch.float64 else x.float(), w)


def _stored(t: Tensor) -> Tensor:
    """`t`, which the compiler is made to store rather than to compute again where it is used."""
    t = t.contiguous()
    return t.unsqueeze(0).as_strided(t.shape, t.stride()) if compiling() else t


def _without_offset(t: Tensor) -> Tensor:
    """`t`, which the compiler takes for a tensor of its own rather than for a place in a larger one."""
    if isinstance(t, QTensor):
        return t.map(_without_offset)
    wider = {1: torch.int16, 2: torch.int32, 4: torch.int64}[t.element_size()]
    if t.numel() % 2 or not t.is_contiguous() or t.storage_offset() % 2:
        return t
    return t.view(-1).view(wider).unsqueeze(-1).view(t.dtype).view(t.shape)


PATHS = (
    Path(made_accepts, made, launch=made_launch, operator=True),
    Path(words_accepts, words, few=True),
    Path(int8_accepts, int8, launch=int8_launch, operator=True),
    Path(int_mm_accepts, int_mm),
    Path(sums_accepts, sums, few=True),
    Path(int8pack_accepts, int8pack, launch=int8pack_launch, few=True),
    Path(kept_accepts, kept),
    Path(split_accepts, split),
    Path(int4pack_accepts, int4pack),
    Path(emulated_accepts, emulated),
    Path(pieces_accepts, pieces),
)
"""In the order in which they are asked."""
