"""Packed elements as float vectors on a CPU: the same numbers as `decode`, in the form of which Inductor makes fast C++.

Only for graphs that are compiled, and for weights whose rows are chunks (bits.py) of whole words (`in_chunks`). What
decides the form, as measured on the generated code:

- AVX-512: a load of 16 bytes into 16 lanes costs one instruction. A chunk of 32 elements is two such vectors, `(2, 16)`.
- AVX2: a vector load of anything but floats takes a detour over the stack that costs as much as the arithmetic on thirty
  codes, while a scalar load that is broadcast is free. So codes are read as 32-bit words, a word into all lanes of a vector,
  and each lane shifts its own code down. A chunk is four vectors, `(2, 2, 8)`.
- A conversion of floats to bfloat16 costs ten instructions a vector. In integer arithmetic on pairs of them it costs three.
- Arithmetic on bytes is emulated. So bytes become 32-bit integers before anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..dtypes.base import QTensor, dense
from ..dtypes.bits import CHUNK
from ..dtypes.operand import Operand
from .anywhere import compiling

AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def in_chunks(w: QTensor) -> Operand | None:
    """The operand of a weight whose rows are chunks of whole words, where no chunk has more than one scale; else None."""
    operand = w.spec.operand(w)
    if operand is None or operand.kind == "int4pack" or w.dim() != 2 or w.numel() == 0:
        return None
    (n, k), q = w.shape, operand.codes
    qparams = [t for t in (operand.scale, operand.zero_point) if t is not None]
    whole = (
        k % CHUNK == 0
        and q.shape == (n, k * operand.bits // 8)
        and (q.stride(0) % 4, q.stride(1), q.storage_offset() % 4) == (0, 1, 0)
        and all(t.shape[0] in (1, n) and k // t.shape[1] % CHUNK == 0 for t in qparams)
    )
    return operand if whole else None


def fast(w: QTensor) -> Operand | None:
    """The operand of a weight to read by `numbers` rather than to `decode`."""
    return in_chunks(w) if (AVX2 or AVX512) and compiling() else None


def sections(width: int) -> list[tuple[int, int]]:
    """(bits of a section, its first word in a chunk, which is also its first bit in a code), see bits.py."""
    sizes = [size for size in (8, 4, 2, 1) if width & size]
    return [(size, sum(sizes[:i])) for i, size in enumerate(sizes)]


def words(w: Operand) -> Tensor:
    """The packed elements as int32: (n, groups, chunks of a group, words of a chunk)."""
    return w.codes.view(torch.int32).view(*_groups(w), -1, w.bits)


def _groups(w: Operand) -> tuple[int, int]:
    """Rows, and groups of a row."""
    return w.codes.shape[0], w.scale.shape[1]


def numbers(w: Operand) -> Tensor:
    """The elements before zero point and scale, float32: (n, groups, chunks of a group, 2, ..., lanes)."""
    if w.bits < 8:
        q = _codes_512(w) if AVX512 else _codes(words(w), w.bits)
    elif AVX512:
        q = _from_bytes(w.codes.view(*_groups(w), -1, 2, 16))
    else:
        q = from_top(top_bytes(words(w)), w.codes.dtype).unflatten(-2, (2, 2))
    return w.read(q)


def zero(w: Operand, as_floats: Callable[[Tensor], Tensor] = Tensor.float) -> Tensor | float:
    """What is to be subtracted from `numbers`: (n, groups), (1, groups) or one number."""
    if w.zero_point is None:
        return float(w.offset)
    return (dense(w.zero_point) if isinstance(w.zero_point, QTensor) else as_floats(w.zero_point)) + float(w.offset)


def scaled(q: Tensor, w: Operand) -> Tensor:
    """(q - zero) * scale, float32. q: `numbers` of the weight, or `halves` of them."""
    broad = (...,) + (None,) * (q.dim() - 2)
    scale = dense(w.scale).float()
    if w.kind == "shifted":
        q = (q - w.offset if w.offset else q) * scale[broad]
        return q if w.zero_point is None else q - dense(w.zero_point).float()[broad]
    z = zero(w)
    if not isinstance(z, Tensor) and z == 0:
        return q * scale[broad]
    if AVX512:
        return multiply_add(q, scale[broad], (scale * -z)[broad])
    return (q - (z[broad] if isinstance(z, Tensor) else z)) * scale[broad]


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, of which the compiler makes two instructions if it is not told to make one."""
    import torch._inductor.inductor_prims  # where the operator comes from

    shape = torch.broadcast_shapes(a.shape, b.shape, c.shape)
    return cast(Tensor, torch.ops.prims.fma.default(a.expand(shape), b.expand(shape), c.expand(shape)))


# bfloat16


def pairs(first: Tensor, second: Tensor, exact: bool = False) -> Tensor:
    """Two float32 tensors as one of int32, whose low half is a bfloat16 of `first` and whose high half one of `second`.

    Rounds halves away from zero. exact: there is nothing to round.
    """
    a, b = first.view(torch.int32), second.view(torch.int32)
    if not exact:
        a, b = a + 0x8000, b + 0x8000
    return ((a >> 16) & 0xFFFF) | (b & -0x10000)


def interleaved(x: Tensor) -> Tensor:
    """The elements of each chunk in the order in which `pairs` of its halves stores them. x: (M, K) bfloat16."""
    halves = x.contiguous().view(x.shape[0], -1, 2, 16).float()
    return pairs(halves[:, :, 0], halves[:, :, 1], exact=True).view(x.shape[0], -1).view(torch.bfloat16)


# AVX-512


def halves(w: Operand) -> tuple[Tensor, ...]:
    """`numbers` of the first and of the second half of each chunk: (n, groups, chunks of a group, 16) each."""
    if w.bits != 4:
        return numbers(w).unbind(-2)
    q = _bytes(w)
    codes = q & 15, q >> 4
    return tuple(map(w.read, codes))


def nibbles_and_bytes(w: Operand) -> tuple[Tensor, Tensor]:
    """Of codes of 4 bits: the low nibbles, and the bytes that hold them, float32: (n, groups, chunks of a group, 16)."""
    q = _bytes(w)
    return (q & 15).float(), q.float()


def _bytes(w: Operand) -> Tensor:
    """Of codes of 4 bits: the bytes, int32."""
    return w.codes.view(*_groups(w), -1, 16).to(torch.int32)


def _from_bytes(q: Tensor) -> Tensor:
    """Elements of 8 bits as float32."""
    if not q.dtype.is_floating_point:
        return q.to(torch.int32).float()
    # Sign, exponent and mantissa to their places in a float32, whose exponent has more bits and another bias. The codes of
    # infinity and NaN, which no finite number is quantized to, become numbers.
    shift, bias = (20, 2.0**120) if q.dtype == torch.float8_e4m3fn else (21, 2.0**112)
    word = q.view(torch.int8).to(torch.int32) << shift
    return (word & (-(2**31) | (0x7F << shift))).view(torch.float32) * bias


def _codes_512(w: Operand) -> Tensor:
    """Codes of fewer than 8 bits in their order, int32: (n, groups, chunks of a group, 2, 16)."""
    lane, half = arange(16), arange(2).view(2, 1)  # element 16 half + lane
    in_bytes = w.codes.view(*_groups(w), -1, 1, 4 * w.bits)
    in_words = words(w).unsqueeze(-1).unsqueeze(-1)  # (n, groups, chunks of a group, words, 1, 1)
    codes = None
    for size, start in sections(w.bits):
        if size == 4:
            part = in_bytes[..., 4 * start : 4 * start + 16].to(torch.int32) >> (4 * half)
        elif size == 2:
            word = torch.where((lane & 4) == 0, in_words[..., start, :, :], in_words[..., start + 1, :, :])
            part = word >> (8 * (lane & 3) + 4 * half + 2 * (lane >> 3))
        else:
            part = in_words[..., start, :, :] >> (8 * (lane & 3) + 4 * half + (lane >> 2))
        part = part & (2**size - 1)
        codes = part if codes is None else codes | (part << start)
    assert codes is not None
    return codes


# AVX2


def arange(*args: int) -> Tensor:
    return torch.arange(*args, dtype=torch.int32, device="cpu")


def _two_words(words: Tensor) -> Tensor:
    """Two words in eight lanes, the first in the lower four: (..., 2 m) -> (..., m, 8)."""
    pairs = words.unflatten(-1, (-1, 2)).unsqueeze(-1)
    return torch.where(arange(8) < 4, pairs[..., 0, :], pairs[..., 1, :])


def top_bytes(words: Tensor) -> Tensor:
    """The bytes of words in their order, each on top of a word of its own: (..., 2 m) -> (..., m, 8)."""
    return _two_words(words) << (24 - ((arange(8) & 3) << 3))


def from_top(top: Tensor, dtype: torch.dtype) -> Tensor:
    """What the byte on top of an int32 stands for in `dtype`, as float32."""
    if dtype == torch.int8:
        return (top >> 24).float()
    if dtype == torch.uint8:
        return ((top >> 24) & 255).float()
    shift, bias = (4, 2.0**120) if dtype == torch.float8_e4m3fn else (3, 2.0**112)  # see _from_bytes
    return ((top & -(2**31)) | ((top >> shift) & (0x7F000000 >> shift))).view(torch.float32) * bias


def _codes(words: Tensor, width: int) -> Tensor:
    """Codes of fewer than 8 bits in their order: (..., words of a chunk) -> (..., 2, 2, 8)."""
    lane, b, a = arange(8), arange(2).view(2, 1), arange(2).view(2, 1, 1)  # element 16 a + 8 b + lane
    byte = (lane & 3) << 3
    codes = None
    for size, start in sections(width):
        part = words[..., start : start + size]
        if size == 4:
            part = _two_words(part).unsqueeze(-3) >> (byte + 4 * a)
        elif size == 2:
            part = _two_words(part).unsqueeze(-3) >> (byte + (4 * a + 2 * b))
        else:
            part = part[..., None, None] >> (byte + (lane >> 2) + (4 * a + 2 * b))
        part = part & (2**size - 1)
        codes = part if codes is None else codes | (part << start)
    assert codes is not None
    return codes


def through_words(t: Tensor) -> Tensor:
    """`t.float()`, by words if it has 8 bits and they fit."""
    if not AVX2 or t.element_size() > 1 or t.numel() % 8 or t.storage_offset() % 4 or not t.is_contiguous():
        return t.float()
    return from_top(top_bytes(t.view(-1).view(torch.int32)), t.dtype).view(t.shape)
