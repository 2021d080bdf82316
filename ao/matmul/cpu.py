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
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit._trace import is_tracing

from ..dtypes.base import QTensor
from ..dtypes.bits import CHUNK, packed_dim
from ..dtypes.float8 import Float8Tensor
from ..dtypes.int4_prepacked import Int4PrepackedTensor
from ..dtypes.intx import IntxTensor
from ..dtypes.pieces import is_eager
from ..dtypes.tracing import known
from . import anywhere, cpu_decode
from .anywhere import compiling, quantize_act, quantized_act, scaled_by_row
from .shared_graph import shared

_VNNI = torch.cpu._is_vnni_supported()

# The floating-point products that this CPU does in hardware.
_FLOATS = {torch.float32, torch.float64}
if torch.backends.mkldnn.is_available():
    _FLOATS |= {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    _FLOATS |= {torch.float16} if torch.ops.mkldnn._is_mkldnn_fp16_supported() else set()

_LARGE = 2**20
"""A weight of so many elements is worth a graph of its own for a few tokens."""

_FEW = 4
"""Up to so many tokens it is faster to go through a large weight with all of them than to decode it."""


def sums_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cpu"
        and cpu_decode.AVX512
        and compiling()
        and isinstance(w, (IntxTensor, Float8Tensor))
        and cpu_decode.in_chunks(w)
        # Last, as this makes another graph: of one token, and for a large weight of a few.
        and (known(x.shape[0] == 1) or (w.numel() >= _LARGE and known(x.shape[0] > 0) and known(x.shape[0] <= _FEW)))
    )


@shared
def sums(x: Tensor, w: QTensor) -> Tensor:
    """sum over k of x * (q * scale) - sum over groups of (scale * z) * (sum over k of x): nothing dense is stored.

    In float32, 32 elements a step: the products with both halves of a chunk are added before they go to the sum.
    """
    assert isinstance(w, (IntxTensor, Float8Tensor))
    tokens, scale = x.shape[0], w.scale.float()  # (n or 1, groups)
    act = _activation(x, w)
    side = 1 if tokens == 1 else _FEW
    rows = F.pad(act, (0, 0, 0, -tokens % side)).view(
        -1, side, scale.shape[1], w.shape[1] // scale.shape[1] // CHUNK, 2, 16
    )
    if cpu_decode.bits(w) == 4:
        # Of a byte 16 h + l, h stays where it is: x h + y l = (x / 16) (16 h + l) + (y - x / 16) l.
        first, second = rows.unbind(-2)
        rows = torch.stack((first - second / 16, second / 16), -2)
        low, high = cpu_decode.nibbles_and_bytes(w)
    else:
        low, high = cpu_decode.halves(w)
    rows = _stored(rows)  # (tokens / side, side, groups, chunks of a group, 2, 16)
    parts = zip(low.chunk(2), high.chunk(2), scale.expand(w.shape[0], -1).chunk(2))
    out = torch.cat([_dots(rows, *part) for part in parts])  # (n, tokens / side, side)
    out = out.view(w.shape[0], -1)[:, :tokens]
    if scaled_by_row(w):
        out = out * scale
    zero = cpu_decode.zero(w)
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
        4 if torch.bfloat16 in _FLOATS else 8
    )  # A CPU without bfloat16 products takes twice as long for 2 tokens as for 1.
    return (
        x.device.type == "cpu"
        and not cpu_decode.AVX512
        and compiling()
        and isinstance(w, (IntxTensor, Float8Tensor))
        and (cpu_decode.bits(w) < 8 or cpu_decode.AVX2)
        and cpu_decode.in_chunks(w)
        and (
            known(x.shape[0] == 1) or (w.numel() >= _LARGE and known(x.shape[0] > 0) and known(x.shape[0] <= few))
        )  # last, as in `sums`
    )


@shared
def words(x: Tensor, w: QTensor) -> Tensor:
    """What `sums` computes, for CPUs that read words faster than bytes: no lane waits for another.

    The order of the elements is that of the packed words, so the activation is put into that order.
    """
    assert isinstance(w, (IntxTensor, Float8Tensor))
    n, groups = w.shape[0], w.scale.shape[1]
    rows = _activation(x, w).view(x.shape[0], groups, -1, CHUNK)  # (M, groups, chunks of a group, 32)
    packed = cpu_decode.words(w)  # (N, groups, chunks of a group, words of a chunk)
    scale = w.scale.float()[..., None, None].expand(n, -1, 1, 1)
    out = None
    for size, start in cpu_decode.sections(cpu_decode.bits(w)):
        section = _stored(_in_lanes(rows, size))
        # Four rows side by side share the loads of the activation.
        parts = zip(packed[..., start : start + size].chunk(4), scale.chunk(4))
        dots = torch.cat([_dot(section, part, size, w.qdata.dtype, part_scale) for part, part_scale in parts])  # (N, M)
        out = dots if out is None else out + dots * 2**start
    assert out is not None
    zero = cpu_decode.zero(w, cpu_decode.through_words)
    if isinstance(zero, Tensor) or zero:
        of_groups = _stored(rows.sum((-1, -2)))  # (M, groups)
        out = out - ((w.scale.float() * zero).unsqueeze(1) * of_groups).sum(-1)
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
    return (
        x.device.type == "cpu"
        and not (cpu_decode.AVX512 and compiling())
        and x.dtype == torch.bfloat16
        and known(x.shape[0] > 0)
        and known(x.shape[0] < 4)
        and isinstance(w, IntxTensor)
        and w.spec.act is None
        and w.qdata.dtype == torch.int8
        and w.zero_point is None
        and w.scale.shape == (w.shape[0], 1)
        # For other shapes ATen reads beyond the end of the weight, or takes its address to be a multiple of 16, and faults
        # where the weight is mapped from a file.
        and w.shape[0] % 4 == 0
        and w.shape[1] % 16 == 0
    )


def int8pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int8 weight-only product, which reads the weight once per token. Slow in any type but bfloat16, so that the
    float32 scale is applied to the sum."""
    assert isinstance(w, IntxTensor)
    signs = _stored(w.scale.flatten().sign().to(x.dtype))
    sums = torch._weight_int8pack_mm(_stored(x), w.qdata, signs)
    return (sums.float() * w.scale.float().abs().t()).to(x.dtype)


def int4pack_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        isinstance(w, Int4PrepackedTensor)
        and w.spec.kernel == "cpu"
        and w.spec.act is None
        and known(x.numel() > 0, True)
    )


def int4pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int4 product on its own layout."""
    assert isinstance(w, Int4PrepackedTensor)
    scale_and_zero = _stored(w.scale_and_zero.to(x.dtype))
    return torch._weight_int4pack_mm_for_cpu(_stored(x), w.qdata, w.spec.block[1], scale_and_zero)


KEPT_BYTES = 2**33
"""What the copies that `kept` makes may take in all. Beyond, a weight is decoded at every call."""

_GROUPS = (32, 64, 128, 256)


class _Copy:
    """A 4-bit weight once more, in the layout of ATen's product. It is counted as long as it lives, beside its weight."""

    total = bytes = 0

    def __init__(self, w: IntxTensor) -> None:
        self.form = self.form_of(w)
        self.codes = self._counted(torch._convert_weight_to_int4pack_for_cpu(w.codes().int() + w.spec._offset, 1))
        self.by_dtype: dict[torch.dtype, Tensor] = {}

    def _counted(self, t: Tensor) -> Tensor:
        self.bytes += t.nbytes
        _Copy.total += t.nbytes
        return t

    def __del__(self) -> None:
        _Copy.total -= self.bytes

    def scale_and_zero(self, w: IntxTensor, dtype: torch.dtype) -> Tensor:
        """(K / group, N, 2), where the value of a code is (code - 8) * scale + zero."""
        scale, offset = w.scale.float(), 8 - w.spec._offset
        zero = scale * (offset if w.zero_point is None else offset - w.zero_point.float())
        made = self.by_dtype[dtype] = self._counted(torch.stack([scale.t(), zero.t()], -1).to(dtype).contiguous())
        return made

    @staticmethod
    def form_of(w: QTensor) -> list[int]:
        """What changes when something is written to the weight or to a field, or when the fields are exchanged."""
        fields = w.fields().values()
        return [w._version, *(t._version for t in fields), *(t.data_ptr() for t in fields)]


def kept_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cpu"
        and is_eager(x)
        and not is_tracing()
        and 0 < x.shape[0] <= 64
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and isinstance(w, IntxTensor)
        and w.spec.bits == 4
        and w.spec.act is None
        and w.shape[0] % 16 == 0
        and packed_dim(w.qdata.shape, w.shape) == 1
        and w.scale.shape[0] == w.shape[0]
        and w.shape[1] in [group * w.scale.shape[1] for group in _GROUPS]
    )


def kept(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int4 product, in eager mode, on a copy of the weight in its own layout: made at the first call, kept beside the
    weight, and never stored. Without it, dozens of operators would decode the weight at every call.

    Of the dtype of x are scale and zero, which loses as much as casting the weight to it.
    """
    assert isinstance(w, IntxTensor)
    if w.is_inference() or w.qdata.is_inference():  # nothing would tell of a change
        return pieces(x, w)
    copy: _Copy | None = w.__dict__.get("cpu_copy")
    if copy is None or copy.form != _Copy.form_of(w):
        if _Copy.total + w.numel() // 2 > KEPT_BYTES:
            return pieces(x, w)
        copy = w.cpu_copy = _Copy(w)  # type: ignore[attr-defined]
    scale_and_zero = copy.by_dtype.get(x.dtype)
    if scale_and_zero is None:
        scale_and_zero = copy.scale_and_zero(w, x.dtype)
    group = w.shape[1] // w.scale.shape[1]
    return torch._weight_int4pack_mm_for_cpu(x.contiguous(), copy.codes, group, scale_and_zero)


def split_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cpu"
        and _VNNI
        and x.dtype in (torch.bfloat16, torch.float16)  # 16 bits are not enough for float32
        and isinstance(w, IntxTensor)
        and w.spec.act is None
        and w.qdata.dtype == torch.int8
        and w.zero_point is None
        and scaled_by_row(w)
        and known(x.numel() > 0, True)
    )


@shared
def split(x: Tensor, w: QTensor) -> Tensor:
    """(256 * (high @ q.T) + low @ q.T) * step * scale, where x = step * (256 * high + low) in 16-bit fixed point.

    step = max|x| / 32512 of a token, so that both bytes fit in int8, and what x loses is less than the output's rounding to
    bfloat16. Both products are one of integers, exact. It takes as long as a product of bfloat16, and reads half.
    """
    assert isinstance(w, IntxTensor)
    tokens = x.shape[0]
    step = x.float().abs().amax(-1, keepdim=True) / 32512
    whole = (x.float() * (1 / step)).round().to(torch.int32)
    low = ((whole + 128) & 255) - 128
    high = (whole - low) >> 8
    total = _integer_product(torch.cat([high.to(torch.int8), low.to(torch.int8)]), w.qdata)  # (N, 2 M)
    total = total[:, :tokens].float() * 256 + total[:, tokens:].float()
    return ((total * w.scale.float()).t() * step).to(x.dtype).contiguous()


def _integer_product(x: Tensor, q: Tensor) -> Tensor:
    """q @ x.T in int32. x: (M, K) int8, q: (N, K) int8 -> (N, M)."""
    # A single column whose stride the compiler sets to 0, which it may, comes out wrong.
    return torch._int_mm(q, _stored(x.t()) if known(x.shape[0] == 1) else x.t())


def int_mm_accepts(x: Tensor, w: QTensor) -> bool:
    return x.device.type == "cpu" and anywhere.int_mm_accepts(x, w)


@shared
def int_mm(x: Tensor, w: QTensor) -> Tensor:
    """((q_x - z) @ q_w.T) * scale_x * scale_w. Without integer dot products in float32, exact up to 2**24, and many times
    faster than integers there."""
    assert isinstance(w, IntxTensor)
    act = quantize_act(x, w)
    if _VNNI:
        q, tokens = act["qdata"], x.shape[0]
        if "zero_point" in act:
            # One more row, of ones, so that the same product gives the sums of the weight that the zero point multiplies.
            q = torch.cat([q, q.new_ones(1, q.shape[1])])
        total = _integer_product(q, w.qdata).t().float()  # (M, N), or one more row
        if "zero_point" in act:
            total = total[:tokens] - act["zero_point"].float() * total[tokens:]
    else:
        rows = act["qdata"].float()
        if "zero_point" in act:
            rows = rows - act["zero_point"].float()
        total = _by_piece(rows, w, _integers)
    return (total * act["scale"].float() * w.scale.float().t()).to(x.dtype).contiguous()


def _integers(w: QTensor) -> Tensor:
    assert isinstance(w, IntxTensor)
    return _in_order(w, lambda q: q) if cpu_decode.fast(w) else w.qdata.float()


def pieces_accepts(x: Tensor, w: QTensor) -> bool:
    return x.device.type == "cpu" and (x.dtype not in _FLOATS or _pieces(w) > 1 or cpu_decode.fast(w))


@shared
def pieces(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T, a large weight in row pieces: a piece that stays in cache from its decoding to its use saves a round
    trip through memory. Computed in float32 on a CPU without products of x's dtype."""
    dtype = x.dtype if x.dtype in _FLOATS else torch.float32
    rows = _activation(x, w).to(dtype)
    if not (cpu_decode.AVX512 and dtype == torch.bfloat16 and cpu_decode.fast(w)):
        return _by_piece(rows, w, lambda part: _decode(part, dtype)).to(x.dtype)
    if not _is_exact(w):
        return _by_piece(cpu_decode.interleaved(rows), w, _pairs)
    total = _by_piece(cpu_decode.interleaved(rows), w, _exact_pairs)
    return (total.float() * w.scale.float().t()).to(x.dtype)  # type: ignore[attr-defined]


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
    if not cpu_decode.fast(w):
        return w.decode(dtype)
    packed = cast(cpu_decode.Packed, w)
    return _in_order(packed, lambda q: cpu_decode.scaled(q, packed).to(dtype))


def _pairs(w: QTensor) -> Tensor:
    """The weight in bfloat16, for an activation that is `interleaved`."""
    w = cast(cpu_decode.Packed, w)
    first, second = (cpu_decode.scaled(q, w) for q in cpu_decode.halves(w))  # (n, groups, chunks, 16)
    return cpu_decode.pairs(first, second).view(w.shape[0], -1).view(torch.bfloat16)


def _exact_pairs(w: QTensor) -> Tensor:
    """The same without the scale."""
    first, second = cpu_decode.halves(cast(cpu_decode.Packed, w))
    return cpu_decode.pairs(first, second, exact=True).view(w.shape[0], -1).view(torch.bfloat16)


def _is_exact(w: QTensor) -> bool:
    """Whether elements of 8 bits are bfloat16 numbers, and one scale serves a row."""
    plain = isinstance(w, Float8Tensor) or (isinstance(w, IntxTensor) and w.spec.bits == 8 and w.zero_point is None)
    return plain and scaled_by_row(w)  # type: ignore[arg-type]


def _in_order(w: cpu_decode.Packed, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of all numbers of a weight, in its shape. With AVX-512 there is a store for each half of a chunk, where a
    loop over both would leave the vectors."""
    parts = [function(q) for q in (cpu_decode.halves(w) if cpu_decode.AVX512 else (cpu_decode.numbers(w),))]
    return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).view(w.shape)


def _activation(x: Tensor, w: QTensor) -> Tensor:
    """x in float32, through quantization and back where the weight's Spec wants it."""
    return quantized_act(x.float(), w)


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
