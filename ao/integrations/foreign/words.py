"""Codes in streams of bits: how other libraries pack numbers of fewer than 8 bits into 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor


def from_words(words: Tensor, bits: int, count: int, *, padded: bool = False) -> Tensor:
    """words: (..., W) int32 -> (..., count) uint8: codes of `bits` bits, the first in the lowest bits of the first word.

    padded: a word holds 32 // bits codes, and its last bits are unused; otherwise a code may go on in the next word.

    Raises ValueError for too few words.
    """
    have = words.shape[-1] * (32 // bits if padded else 32) // (1 if padded else bits)
    if have < count:
        raise ValueError(f"{words.shape[-1]} words hold {have} codes of {bits} bits, and {count} are wanted")
    if padded or 32 % bits == 0:
        shifts = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
        codes = (words.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)  # (..., W, 32 // bits)
        return codes.flatten(-2)[..., :count].to(torch.uint8)
    octets = words.contiguous().view(torch.uint8)  # (..., 4 W), little-endian
    positions = torch.arange(8, dtype=torch.uint8, device=words.device)
    stream = ((octets.unsqueeze(-1) >> positions) & 1).flatten(-2)[..., : count * bits]  # (..., count * bits)
    values = 2 ** torch.arange(bits, dtype=torch.uint8, device=words.device)
    return (stream.unflatten(-1, (count, bits)) * values).sum(-1, dtype=torch.uint8)


def to_words(codes: Tensor, bits: int, *, padded: bool = False) -> Tensor:
    """The inverse of `from_words`: (..., count) uint8 -> (..., W) int32, the last word filled up with zeros."""
    count = codes.shape[-1]
    if padded or 32 % bits == 0:
        each = 32 // bits
        codes = torch.nn.functional.pad(codes, (0, -count % each)).unflatten(-1, (-1, each)).to(torch.int64)
        shifts = torch.arange(each, device=codes.device) * bits
        return (codes << shifts).sum(-1).to(torch.uint32).view(torch.int32)
    positions = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> positions) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32)).unflatten(-1, (-1, 8))
    values = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream * values).sum(-1, dtype=torch.uint8).contiguous().view(torch.int32)
