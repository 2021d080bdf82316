"""The products of an activation and a quantized weight that are fast on a CPU (see paths.py).

What decides how an expression is written here, as measured on the C++ that Inductor makes of it:

- On AVX2 a vector load of anything but floats takes a detour over the stack that costs as much as the arithmetic on thirty
  codes. A scalar load that is broadcast is free. So codes are read as 32-bit words, a word into all lanes of a vector, and
  each lane shifts its own code down.
- What depends on the activation alone must be stored before the loop over the weight, or it is computed once per row.
- A buffer of more than 32 MB is mapped anew in every call, which costs as much as the product of 16 tokens. So a weight is
  decoded in pieces; one kernel serves them all if no offset distinguishes their inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import paths
from .base import QTensor, dense
from .bits import CHUNK
from .codebook import CodebookTensor
from .float8 import Float8Tensor
from .int4_prepacked import Int4PrepackedTensor
from .intx import IntxTensor
from .paths import compiling, quantize_act

_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
_VNNI = torch.cpu._is_vnni_supported()

# The floating-point products that this CPU does in hardware.
_FLOATS = {torch.float32, torch.float64}
if torch.backends.mkldnn.is_available():
    _FLOATS |= {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    _FLOATS |= {torch.float16} if torch.ops.mkldnn._is_mkldnn_fp16_supported() else set()

# Up to so many tokens it is faster to read a large weight once per token than to decode it. A CPU with bfloat16 products
# takes as long for 16 tokens as for 2; one without takes twice as long for 2 as for 1.
_FEW = 4 if torch.bfloat16 in _FLOATS else 8
_LARGE = 2**20


def words_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cpu"
        and compiling()
        and isinstance(w, (IntxTensor, Float8Tensor))
        and (_bits(w) < 8 or _AVX2)
        and _in_chunks(w)
        # Last, as this makes another graph: of one token, and for a large weight of a few.
        and (x.shape[0] == 1 or (w.numel() >= _LARGE and 0 < x.shape[0] <= _FEW))
    )


def words(x: Tensor, w: QTensor) -> Tensor:
    """sum over k of x * (q - z) * scale: nothing dense is stored, and no lane waits for another.

    The order of the elements is that of the packed words, so the activation is put into that order.
    """
    assert isinstance(w, (IntxTensor, Float8Tensor))
    n, groups = w.shape[0], w.scale.shape[1]
    rows = _activation(x, w).view(x.shape[0], groups, -1, CHUNK)  # (M, groups, chunks of a group, 32)
    packed = _words(w)  # (N, groups, chunks of a group, words of a chunk)
    scale = w.scale.float()[..., None, None].expand(n, -1, 1, 1)
    out = None
    for size, start in _sections(_bits(w)):
        lanes = _stored(_in_lanes(rows, size))
        # Four rows side by side share the loads of the activation.
        parts = zip(packed[..., start : start + size].chunk(4), scale.chunk(4))
        sums = torch.cat([_dot(lanes, part, size, w.qdata.dtype, part_scale) for part, part_scale in parts])  # (N, M)
        out = sums if out is None else out + sums * 2**start
    assert out is not None
    zero = _zero(w, _through_words)
    if isinstance(zero, Tensor) or zero:
        sums = _stored(rows.sum((-1, -2)))  # (M, groups)
        out = out - ((w.scale.float() * zero).unsqueeze(1) * sums).sum(-1)
    return out.t().to(x.dtype)


def _in_lanes(x: Tensor, size: int) -> Tensor:
    """Chunks in the order in which `_dot` meets the codes of a section: (..., 32) -> (..., vectors / 2, 2, lanes)."""
    if size == 8:
        return x.unflatten(-1, (2, 2, 8))
    planes = x.unflatten(-1, (8 // size, size, 4))  # plane, word, byte
    return planes.movedim(-3, -1).flatten(-2).unflatten(-2, (-1, min(size, 2)))


def _dot(x: Tensor, packed: Tensor, size: int, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """x: (M, groups, chunks, vectors / 2, 2, lanes), packed: (n, groups, chunks, words of a section) -> (n, M)."""
    if size == 8:
        values = _numbers(_bytes(packed), dtype).unflatten(-2, (2, 2))
    else:
        values = ((packed.unsqueeze(-1) >> _arange(0, 32, size)) & (2**size - 1)).float()
        values = values.unflatten(-2, (-1, min(size, 2)))
    products = values.unsqueeze(1) * x  # (n, M, groups, chunks, vectors / 2, 2, lanes)
    # Two vectors before the scale and the sum, so that these are not what takes the time.
    products = products[..., 0, :] + products[..., 1, :] if products.shape[-2] == 2 else products[..., 0, :]
    return (products * scale.unsqueeze(1).unsqueeze(-1)).sum((2, 3, 4)).sum(-1)


def int8pack_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and 0 < x.shape[0] < 4
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
    return isinstance(w, Int4PrepackedTensor) and w.spec.kernel == "cpu" and w.spec.act is None and x.numel() > 0


def int4pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int4 product on its own layout."""
    assert isinstance(w, Int4PrepackedTensor)
    scale_and_zero = _stored(w.scale_and_zero.to(x.dtype))
    return torch._weight_int4pack_mm_for_cpu(_stored(x), w.qdata, w.spec.block[1], scale_and_zero)


def int_mm_accepts(x: Tensor, w: QTensor) -> bool:
    return x.device.type == "cpu" and not _VNNI and paths.int_mm_accepts(x, w)


def int_mm(x: Tensor, w: QTensor) -> Tensor:
    """((q_x - z) @ q_w.T) * scale_x * scale_w in float32, which is exact up to 2**24, and many times faster than integers
    on a CPU without integer dot products."""
    assert isinstance(w, IntxTensor)
    act = quantize_act(x, w)
    rows = act["qdata"].float()
    if "zero_point" in act:
        rows = rows - act["zero_point"].float()
    total = _by_piece(rows, w, _integers)
    return (total * act["scale"].float() * w.scale.float().t()).to(x.dtype)


def _integers(w: QTensor) -> Tensor:
    assert isinstance(w, IntxTensor)
    return _values(w).view(w.shape) if _reads_words(w) else w.qdata.float()


def pieces_accepts(x: Tensor, w: QTensor) -> bool:
    return x.device.type == "cpu" and (x.dtype not in _FLOATS or _pieces(w) > 1)


def pieces(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T, a large weight in row pieces: a piece that stays in cache from its decoding to its use saves a round
    trip through memory. Computed in float32 on a CPU without products of x's dtype."""
    dtype = x.dtype if x.dtype in _FLOATS else torch.float32
    return _by_piece(_activation(x, w).to(dtype), w, lambda part: _decode(part, dtype)).to(x.dtype)


def _by_piece(rows: Tensor, w: QTensor, decode: Callable[[QTensor], Tensor]) -> Tensor:
    count = _pieces(w)
    if count == 1:
        return F.linear(rows, decode(w))
    parts = w.chunk(count)
    if compiling():
        parts = [part.map(_without_offset) for part in parts]  # type: ignore[attr-defined, assignment]
    return torch.cat([F.linear(rows, decode(part)) for part in parts], -1)  # type: ignore[arg-type]


def _pieces(w: QTensor) -> int:
    """Into how many row pieces to cut a large weight: each 8 MB of float32, or 2 MB where every step of the decoding is a
    pass over it; at most 32, which a graph can hold."""
    roles = type(w).roles
    rows = [t.shape[0] for name, t in w.fields().items() if roles[name] in ("elements", "per_block")]
    if "opaque" in roles.values() or any(n not in (1, w.shape[0]) for n in rows):
        return 1
    return min(max(w.numel() // (2**21 if compiling() else 2**19), 1), 32)


def _decode(w: QTensor, dtype: torch.dtype) -> Tensor:
    """`w.decode(dtype)`, read by words where that is faster."""
    if not _reads_words(w):
        return w.decode(dtype)
    assert isinstance(w, (IntxTensor, Float8Tensor, CodebookTensor))
    values, zero = _values(w), _zero(w)
    if isinstance(zero, Tensor):
        zero = zero[..., None, None, None, None]
    return ((values - zero) * dense(w.scale).float()[..., None, None, None, None]).to(dtype).view(w.shape)


def _reads_words(w: QTensor) -> bool:
    return _AVX2 and compiling() and _in_chunks(w)


def _activation(x: Tensor, w: QTensor) -> Tensor:
    """x in float32, through quantization and back where the weight's Spec wants it."""
    if w.spec.act is None:
        return x.float()
    return w.spec.act.wrap(quantize_act(x, w), torch.float32, x.shape).decode(torch.float32)


# Codes as words.


def _in_chunks(w: QTensor) -> bool:
    """Whether the rows of a weight are chunks of whole words, and no chunk has more than one scale."""
    if not isinstance(w, (IntxTensor, Float8Tensor, CodebookTensor)) or w.numel() == 0:
        return False
    (n, k), q = w.shape, w.qdata
    qparams = [t for t in (w.scale, getattr(w, "zero_point", None)) if t is not None]
    return (
        k % CHUNK == 0
        and q.shape == (n, k * _bits(w) // 8)
        and (q.stride(0) % 4, q.stride(1), q.storage_offset() % 4) == (0, 1, 0)
        and all(t.shape[0] in (1, n) and k // t.shape[1] % CHUNK == 0 for t in qparams)
    )


def _bits(w: QTensor) -> int:
    bits: int = getattr(w.spec, "bits", 8)
    return bits


def _sections(bits: int) -> list[tuple[int, int]]:
    """(bits of a section, its first word in a chunk, which is also its first bit in a code), see bits.py."""
    sizes = [size for size in (8, 4, 2, 1) if bits & size]
    return [(size, sum(sizes[:i])) for i, size in enumerate(sizes)]


def _words(w: IntxTensor | Float8Tensor | CodebookTensor) -> Tensor:
    """The packed elements as int32: (n, groups, chunks of a group, words of a chunk)."""
    return w.qdata.view(torch.int32).view(w.shape[0], w.scale.shape[1], -1, _bits(w))


def _arange(*args: int) -> Tensor:
    return torch.arange(*args, dtype=torch.int32)


def _pairs(words: Tensor) -> Tensor:
    """Two words in eight lanes, the first in the lower four: (..., 2 m) -> (..., m, 8)."""
    pairs = words.unflatten(-1, (-1, 2)).unsqueeze(-1)
    return torch.where(_arange(8) < 4, pairs[..., 0, :], pairs[..., 1, :])


def _bytes(words: Tensor) -> Tensor:
    """The bytes of words in their order, each on top of a word of its own: (..., 2 m) -> (..., m, 8)."""
    return _pairs(words) << (24 - ((_arange(8) & 3) << 3))


def _numbers(top: Tensor, dtype: torch.dtype) -> Tensor:
    """What the byte on top of an int32 stands for in `dtype`, as float32."""
    if dtype == torch.int8:
        return (top >> 24).float()
    if dtype == torch.uint8:
        return ((top >> 24) & 255).float()
    # Sign, exponent and mantissa to their places in a float32, whose exponent has more bits and another bias.
    shift, bias = (4, 2.0**120) if dtype == torch.float8_e4m3fn else (3, 2.0**112)
    return ((top & -(2**31)) | ((top >> shift) & (0x7F000000 >> shift))).view(torch.float32) * bias


def _codes(words: Tensor, bits: int) -> Tensor:
    """Codes of fewer than 8 bits in their order: (..., words of a chunk) -> (..., 2, 2, 8)."""
    lane, b, a = _arange(8), _arange(2).view(2, 1), _arange(2).view(2, 1, 1)  # element 16 a + 8 b + lane
    byte = (lane & 3) << 3
    codes = None
    for size, start in _sections(bits):
        part = words[..., start : start + size]
        if size == 4:
            part = _pairs(part).unsqueeze(-3) >> (byte + 4 * a)
        elif size == 2:
            part = _pairs(part).unsqueeze(-3) >> (byte + (4 * a + 2 * b))
        else:
            part = part[..., None, None] >> (byte + (lane >> 2) + (4 * a + 2 * b))
        part = part & (2**size - 1)
        codes = part if codes is None else codes | (part << start)
    assert codes is not None
    return codes


def _values(w: QTensor) -> Tensor:
    """The elements in their order before zero point and scale, float32: (n, groups, chunks of a group, 2, 2, 8)."""
    assert isinstance(w, (IntxTensor, Float8Tensor, CodebookTensor))
    if _bits(w) == 8:
        values = _numbers(_bytes(_words(w)), w.qdata.dtype).unflatten(-2, (2, 2))
    else:
        values = _codes(_words(w), _bits(w))
    return w.table[values.int()] if isinstance(w, CodebookTensor) else values.float()


def _zero(w: QTensor, as_floats: Callable[[Tensor], Tensor] = Tensor.float) -> Tensor | float:
    """What is to be subtracted from `_values`: (n, groups), (1, groups) or one number."""
    if not isinstance(w, IntxTensor):
        return 0.0
    offset = 2.0 ** (w.spec.bits - 1) if w.spec.signed and w.spec.bits < 8 else 0.0
    if w.zero_point is None:
        return offset - 0.5 if w.spec.is_binary else offset
    return as_floats(w.zero_point) + offset


def _through_words(t: Tensor) -> Tensor:
    """`t.float()`, by words if it has 8 bits and they fit."""
    if not _AVX2 or t.element_size() > 1 or t.numel() % 8 or t.storage_offset() % 4 or not t.is_contiguous():
        return t.float()
    return _numbers(_bytes(t.view(-1).view(torch.int32)), t.dtype).view(t.shape)


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
