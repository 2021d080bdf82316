"""Two of four: which of four numbers that follow each other are kept, where they are stored, and how they are put back.

Which two is a code of 4 bits, first + 4 * second, as NVIDIA's sparse units count places. Codes of 16 groups of four, 64 elements,
are packed into 8 bytes: byte `lane` has group `lane` in its low bits and group `8 + lane` in its high ones. So the 32 numbers of
those groups and their codes can be cut at the same places.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .onnx_integers import shifted_right

UNIT = 64
"""The elements of a chunk of packed codes."""

TWO_OF_FOUR = tuple(itertools.combinations(range(4), 2))
"""Which two of four are kept, in the order of their numbers."""

_ROWS = [
    sum(1 << 3 * column for column in pair) for pair in TWO_OF_FOUR
]  # how many a row keeps of each column, 3 bits for each

TRANSPOSABLE = tuple(m for m in itertools.product(range(6), repeat=4) if sum(map(_ROWS.__getitem__, m)) == 0o2222)
"""The 90 masks of 4 x 4 with two in each row and each column, each as the places of its rows in `TWO_OF_FOUR`."""


def largest(x: Tensor) -> Tensor:
    """The codes of the two of the largest magnitude, the first of equal ones: (..., K) -> (..., K / 4) uint8."""
    size = x.abs()
    m = torch.where(size == size, size, torch.inf).unflatten(-1, (-1, 4)).unbind(-1)  # a NaN is kept
    ahead = {(i, j): m[i] >= m[j] for i in range(4) for j in range(i + 1, 4)}

    def kept(i: int) -> Tensor:
        lost = [~ahead[i, j] if i < j else ahead[j, i] for j in range(4) if j != i]
        return lost[0].to(torch.uint8) + lost[1] + lost[2] < 2

    no0, no3 = ~kept(0), ~kept(3)
    first = no0.to(torch.uint8) + (no0 & ~kept(1))
    second = 3 - (no3.to(torch.uint8) + (no3 & ~kept(2)))
    return first | second << 2


def taken(x: Tensor, codes: Tensor) -> Tensor:
    """The two of each four that codes say: (..., K) -> (..., K / 2)."""
    x0, x1, x2, x3 = x.unflatten(-1, (-1, 4)).unbind(-1)
    a, b = codes & 3, codes >> 2
    first = torch.where(a == 0, x0, torch.where(a == 1, x1, x2))
    second = torch.where(b == 3, x3, torch.where(b == 2, x2, x1))
    return torch.stack([first, second], -1).flatten(-2)


def spread(pairs: Tensor, codes: Tensor) -> Tensor:
    """Two of four in their places, and zeros: (..., K / 2) and codes (..., K / 4) -> (..., K)."""
    first, second = pairs.unflatten(-1, (-1, 2)).split(1, -1)  # (..., K / 4, 1) each
    place = torch.arange(4, dtype=torch.uint8, device=codes.device)
    a, b = (codes & 3).unsqueeze(-1), shifted_right(codes, 2).unsqueeze(-1)
    return torch.where(place == a, first, torch.where(place == b, second, 0)).flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes of an even number of groups, two in a byte: (..., K / 4) -> (..., K / 8) uint8."""
    whole = codes.shape[-1] - codes.shape[-1] % 16
    return _joined([_pack(part, chunk) for part, chunk in _parts(codes, whole, 16)], codes)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`: (..., K / 8) -> (..., K / 4)."""
    whole = packed.shape[-1] - packed.shape[-1] % 8
    return _joined([_unpack(part, chunk) for part, chunk in _parts(packed, whole, 8)], packed)


def _parts(t: Tensor, whole: int, chunk: int) -> list[tuple[Tensor, int]]:
    """Whole chunks, and a shorter one, with their sizes."""
    rest = t.shape[-1] - whole
    return [*([(t[..., :whole], chunk)] if whole else []), *([(t[..., whole:], rest)] if rest else [])]


def _joined(parts: list[Tensor], of: Tensor) -> Tensor:
    if not parts:
        return of.new_empty(of.shape)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _pack(codes: Tensor, chunk: int) -> Tensor:
    low, high = codes.unflatten(-1, (codes.shape[-1] // chunk, 2, chunk // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def _unpack(packed: Tensor, chunk: int) -> Tensor:
    chunks = packed.unflatten(-1, (packed.shape[-1] // chunk, 1, chunk))
    return torch.cat([chunks & 15, shifted_right(chunks, 4)], -2).flatten(-3)
