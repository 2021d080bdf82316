"""Packing integers of 1 to 8 bits into bytes, `bits / 8` bytes per element.

A row is cut into chunks of `CHUNK` elements (the last one may be shorter). A chunk stores its elements *planar*: with
`s` bits per element, byte `lane` of the chunk's `CHUNK * s / 8` bytes holds, from its low bits up, the elements
`lane`, `lane + width`, `lane + 2 * width`, ... where `width = CHUNK * s / 8`. For 4 bits and a chunk of 32:

    byte  lane:   [ element 16 + lane | element lane ]        lane = 0 .. 15
                    bits 7..4           bits 3..0

so that `byte & 15` and `byte >> 4` are two contiguous runs of elements: unpacking is a shift and a mask over whole
vectors, and nothing is interleaved. Widths that do not divide 8 are the sum of sections that do, one after another
within the chunk, low bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1.

The chunk is independent of the block of the scales. It is the unit in which a packed dim can be cut.

Numbers of three values, trits, take less than two bits: 3**5 = 243, so that five fit in a byte (`pack_trits`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .onnx_integers import shift
from .tracing import exporting, is_eager

CHUNK = 32

_SECTIONS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def pack_dim(shape: Sequence[int], bits: int, who: object = "pack") -> int:
    """The dim along which to pack data of `shape`: the last one that is a multiple of 8. ValueError if there is none."""
    for dim in reversed(range(len(shape))):
        if shape[dim] % 8 == 0 or bits == 8:
            return dim
    raise ValueError(f"{who}: no dim of shape {tuple(shape)} is a multiple of 8, so nothing can be packed; use 8 bits")


def packed_dim(packed_shape: Sequence[int], shape: Sequence[int]) -> int:
    """The dim along which data of `shape` was packed into `packed_shape`: where the two differ."""
    return next((d for d in reversed(range(len(shape))) if packed_shape[d] != shape[d]), len(shape) - 1)


def packed_along(packed: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """`packed`, whose codes are of `shape`, packed along another dim."""
    now = packed_dim(packed.shape, shape)
    if now == dim or packed.shape[now] == shape[now]:
        return packed
    if packed.shape[now] * TRIT_CHUNK == shape[now] * TRIT_BYTES:
        return pack_trits(unpack_trits(packed, now), dim)
    bits = 8 * packed.shape[now] // shape[now]
    return pack(unpack(packed, bits, now), bits, dim)


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack unsigned codes along `dim`.

    codes: (..., K, ...) integers in [0, 2**bits) -> (..., K * bits / 8, ...) uint8. `bits=8` only casts.
    Raises ValueError when `bits` is not 1 to 8, or K is not a multiple of 8 (only whole bytes are stored).
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    size, codes = codes.shape[dim], codes.to(torch.uint8)
    if bits == 8:
        return codes
    if size % 8:
        raise ValueError(f"cannot pack {size} elements of {bits} bits: the size must be a multiple of 8")
    codes = codes.movedim(dim, -1)
    whole = size - size % CHUNK
    if 0 < whole < size:
        parts = [pack(codes[..., :whole], bits), pack(codes[..., whole:], bits)]
        return torch.cat(parts, -1).movedim(-1, dim).contiguous()
    chunk = CHUNK if whole else max(size, 8)
    lead, chunks = codes.shape[:-1], size // chunk
    if chunk == CHUNK and is_eager(codes):
        # Four codes in an int32, for shifts and masks that never leave a byte: eager ops then run over a quarter of the items.
        # The compiler, which has vectors of its own and cannot look through such a view, gets the codes as they are.
        fits = codes.stride(-1) == 1 and not any(s % 4 for s in (*codes.stride()[:-1], codes.storage_offset()))
        codes = codes.view(torch.int32) if fits else codes
    lanes = codes.element_size()
    ones = sum(1 << 8 * lane for lane in range(lanes))
    sections = []
    offset = 0
    for section in _SECTIONS[bits]:
        width = chunk * section // 8
        word = codes if section == bits else (codes >> offset) & (2**section - 1) * ones
        planes = 8 // section
        word = word.reshape(*lead, chunks, planes, width // lanes)
        while planes > 1:  # half of the planes go above the other half
            planes //= 2
            word = word[..., :planes, :] | (word[..., planes:, :] << (planes * section))
        sections.append(word.squeeze(-2))  # (..., chunks, width / lanes)
        offset += section
    packed = sections[0] if len(sections) == 1 else torch.cat(sections, -1)
    packed = packed.reshape(*lead, size * bits // 8 // lanes).view(torch.uint8)
    return packed.movedim(-1, dim).contiguous()


def unpack(packed: Tensor, bits: int, dim: int = -1, shape: Sequence[int] | None = None) -> Tensor:
    """The inverse of `pack`: (..., K * bits / 8, ...) uint8 -> (..., K, ...) uint8 codes in [0, 2**bits).

    shape: a view of that to return. Asked for here it costs nothing; Inductor does not see through two reshapes in a row,
    and generates a kernel that is five times slower.
    """
    if bits == 8:
        return packed if shape is None else packed.reshape(shape)
    size = packed.shape[dim] * 8 // bits
    whole = size - size % CHUNK
    last = dim in (-1, packed.dim() - 1)
    if last and whole in (0, size):
        return _unpack_chunks(packed, bits, CHUNK if whole else max(size, 8), shape)
    packed = packed.movedim(dim, -1)
    cut = whole * bits // 8
    parts = [_unpack_chunks(packed[..., :cut], bits, CHUNK)] if whole else []
    if whole < size:
        parts.append(_unpack_chunks(packed[..., cut:], bits, size - whole))
    codes = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).movedim(-1, dim)
    return codes if shape is None else codes.reshape(shape)


def _unpack_chunks(packed: Tensor, bits: int, chunk: int, shape: Sequence[int] | None = None) -> Tensor:
    lead, size = packed.shape[:-1], packed.shape[-1] * 8 // bits
    packed = packed.reshape(*lead, size // chunk, chunk * bits // 8)
    codes = None
    start = offset = 0
    for section in _SECTIONS[bits]:
        width = chunk * section // 8
        word = packed[..., start : start + width].unsqueeze(-2)  # (..., chunks, 1, width)
        shifts = torch.arange(0, 8, section, device=packed.device, dtype=torch.uint8).unsqueeze(-1)
        shifted = shift(word, shifts) if exporting() else word >> shifts
        part = shifted & (2**section - 1)  # (..., chunks, 8 // section, width)
        part = part.reshape((*lead, size) if shape is None else tuple(shape))
        if offset and exporting():
            part = shift(part, torch.tensor(offset, dtype=torch.uint8, device=part.device), "LEFT")
        elif offset:
            part = part << offset
        codes = part if codes is None else codes | part
        start += width
        offset += section
    assert codes is not None
    return codes


TRIT_CHUNK, TRIT_BYTES = 64, 13
"""Trits of a chunk, and its bytes: 1.625 bits each. Of the 65 places one stays empty."""

_PLACES = (81, 27, 9, 3, 1)
"""What a byte counts its trits by."""


def pack_trits(trits: Tensor, dim: int = -1) -> Tensor:
    """Pack numbers 0, 1 and 2 along `dim`, five in a byte: (..., K, ...) integers -> (..., K * 13 / 64, ...) uint8.

    Planar as `pack`: byte `lane` of a chunk has elements lane, lane + 13, ..., lane + 52. With v the five as digits of base 3 a
    byte is ceil(v * 256 / 243), so that digit i is the integer part of 3 / 256 * (byte * 3**i mod 256): no division.
    Raises ValueError where K is no multiple of 64.
    """
    size = trits.shape[dim]
    if size % TRIT_CHUNK:
        raise ValueError(f"cannot pack {size} numbers five in a byte: the size must be a multiple of {TRIT_CHUNK}")
    t = trits.movedim(dim, -1)
    lead = t.shape[:-1]
    t = t.to(torch.int32).reshape(*lead, size // TRIT_CHUNK, TRIT_CHUNK)
    t = torch.nn.functional.pad(t, (0, 5 * TRIT_BYTES - TRIT_CHUNK)).reshape(*t.shape[:-1], 5, TRIT_BYTES)
    v = (t * torch.tensor(_PLACES, dtype=torch.int32, device=t.device).unsqueeze(-1)).sum(-2, dtype=torch.int32)
    packed = ((v * 256 + 242) // 243).to(torch.uint8)  # (..., chunks, 13)
    return packed.reshape(*lead, size // TRIT_CHUNK * TRIT_BYTES).movedim(-1, dim).contiguous()


def unpack_trits(packed: Tensor, dim: int = -1) -> Tensor:
    """The inverse of `pack_trits`: (..., K * 13 / 64, ...) uint8 -> (..., K, ...) uint8 of 0, 1 and 2."""
    b = packed.movedim(dim, -1)
    lead, chunks = b.shape[:-1], b.shape[-1] // TRIT_BYTES
    word = torch.int32 if exporting() else torch.int16  # onnxruntime shifts no signed numbers of 16 bits
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=word, device=b.device).unsqueeze(-1)
    b = b.reshape(*lead, chunks, 1, TRIT_BYTES).to(word)
    digits = ((b * powers & 255) * 3) >> 8  # (..., chunks, 5, 13)
    digits = digits.reshape(*lead, chunks, 5 * TRIT_BYTES)[..., :TRIT_CHUNK].to(torch.uint8)
    return digits.reshape(*lead, chunks * TRIT_CHUNK).movedim(-1, dim)


def signed_trits(packed: Tensor, dim: int = -1) -> Tensor:
    """`unpack_trits` less 1, int8."""
    return unpack_trits(packed, dim).to(torch.int8) - 1
