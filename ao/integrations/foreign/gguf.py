"""GGUF (llama.cpp): tensors in blocks of bytes, by type. What a block is made of, in bytes:

    Q4_0 d16 nibbles[16]          d * (q - 8)             Q8_0 d16 int8[32]             d * q
    Q4_1 d16 m16 nibbles[16]      d * q + m               Q5_0, Q5_1 the same with four bytes of fifth bits before the nibbles
    Q2_K scales[16] q[64] d16 m16                         d * s * q - m * t, of 16 elements; s and t are nibbles of a byte
    Q3_K high[32] q[64] scales[12] d16                    d * (s - 32) * (q - 4), of 16; s of 6 bits
    Q4_K d16 m16 scales[12] q[128]                        d * s * q - m * t, of 32; s and t of 6 bits
    Q5_K d16 m16 scales[12] high[32] q[128]               the same with five bits
    Q6_K low[128] high[64] s8[16] d16                     d * s * (q - 32), of 16
    IQ4_NL d16 nibbles[16]        d * table[q]            IQ4_XS d16 high16 low[4] q[128]   d * (s - 32) * table[q], of 32
    MXFP4 e8 nibbles[16]          2**(e - 128) * doubled  NVFP4 e4m3[4] nibbles[32]

d16 and m16 are float16. In a run of 32 elements the low nibbles of 16 bytes are the first 16. Elements are along K, and a block
never crosses a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...dtypes import E8M0, MXFP4, NVFP4, Codebook, Intx, QTensor, Shifted, pack

IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""The table of IQ4_NL and IQ4_XS."""

_NESTED = Intx(6, (1, 8), signed=False, symmetric=True, scale_dtype="float16")
_NIBBLES = Intx(4, (1, 16), signed=False, symmetric=True, scale_dtype="float16")

Decoder = Callable[[Tensor, torch.dtype], QTensor]


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: (N, B, bytes) -> (N, B)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _halves(octets: Tensor) -> Tensor:
    """(..., 16 n) bytes -> (..., 32 n) nibbles: of each 16 bytes the low ones, then the high ones."""
    runs = octets.unflatten(-1, (-1, 16))  # (..., n, 16)
    return torch.cat([runs & 15, runs >> 4], -1).flatten(-2)


def _rows(t: Tensor) -> Tensor:
    """(N, B, n) -> (N, B n)."""
    return t.flatten(1).contiguous()


def _intx(spec: Intx, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> QTensor:
    """codes: (N, K) uint8 as they are packed, or int8 of 8 bits."""
    qdata = codes if spec.bits == 8 else pack(codes, spec.bits)
    return spec.wrap({"qdata": qdata, "scale": scale}, dtype, codes.shape)


def _shifted(spec: Shifted, codes: Tensor, scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> QTensor:
    return spec.wrap({"qdata": pack(codes, spec.bits), "scale": scale, "shift": shift}, dtype, codes.shape)


def _fifth(octets: Tensor, nibbles: Tensor) -> Tensor:
    """Nibbles (..., 32) with the bits of four bytes on top."""
    bits = (octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1  # (..., 4, 8)
    return nibbles | (bits.flatten(-2) << 4)


def q4_0(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 18) bytes."""
    spec = Intx(4, (1, 32), symmetric=True, scale_dtype="float16")
    return _intx(spec, _rows(_halves(blocks[..., 2:])), _half(blocks, 0), dtype)


def q4_1(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 20) bytes."""
    spec = Shifted(4, (1, 32), scale_dtype="float16")
    return _shifted(spec, _rows(_halves(blocks[..., 4:])), _half(blocks, 0), -_half(blocks, 2), dtype)


def q5_0(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 22) bytes."""
    spec = Intx(5, (1, 32), symmetric=True, scale_dtype="float16")
    return _intx(spec, _rows(_fifth(blocks[..., 2:6], _halves(blocks[..., 6:]))), _half(blocks, 0), dtype)


def q5_1(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 24) bytes."""
    spec = Shifted(5, (1, 32), scale_dtype="float16")
    codes = _rows(_fifth(blocks[..., 4:8], _halves(blocks[..., 8:])))
    return _shifted(spec, codes, _half(blocks, 0), -_half(blocks, 2), dtype)


def q8_0(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 34) bytes."""
    spec = Intx(8, (1, 32), scale_dtype="float16")
    return _intx(spec, _rows(blocks[..., 2:]).view(torch.int8), _half(blocks, 0), dtype)


def _nested(spec: Intx, codes: Tensor, scale: Tensor) -> QTensor:
    """Scales of a super-block: codes (N, B, n) and one number for each of the B."""
    flat = _rows(codes)
    qdata = flat if spec.bits == 8 else pack(flat, spec.bits, -1 if flat.shape[-1] % 8 == 0 else 0)
    return spec.wrap({"qdata": qdata, "scale": scale}, torch.float32, flat.shape)


def q2_k(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 84) bytes. Bits 2 i of 32 bytes are run i of 32 elements, of each half of 128."""
    spec = Shifted(2, (1, 16), scale_spec=_NIBBLES, shift_spec=_NIBBLES)
    scales, quants = blocks[..., :16], blocks[..., 16:80].unflatten(-1, (2, 1, 32))
    codes = (quants >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").unsqueeze(-1)) & 3  # (N, B, 2, 4, 32)
    scale = _nested(_NIBBLES, scales & 15, _half(blocks, 80))
    shift = _nested(_NIBBLES, scales >> 4, _half(blocks, 82))
    return _shifted(spec, _rows(codes), scale, shift, dtype)


def q3_k(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 110) bytes. The third bit is the complement of what is taken off: q - 4 * (1 - bit)."""
    high, quants, packed = blocks[..., :32], blocks[..., 32:96].unflatten(-1, (2, 1, 32)), blocks[..., 96:108]
    low = (quants >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").unsqueeze(-1)) & 3  # (N, B, 2, 4, 32)
    third = (high.unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8, device="cpu").unsqueeze(-1)) & 1  # (N, B, 8, 32)
    codes = low.flatten(-3, -2) | (third << 2)
    first = torch.cat([packed[..., :8] & 15, packed[..., :8] >> 4], -1)  # (N, B, 16): low four bits
    second = (packed[..., 8:].unsqueeze(-2) >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").unsqueeze(-1)) & 3
    inner = Intx(6, (1, 16), symmetric=True, scale_dtype="float16")
    scale = _nested(inner, first | (second.flatten(-2) << 4), _half(blocks, 108))
    return _shifted(Shifted(3, (1, 16), symmetric=True, scale_spec=inner), _rows(codes), scale, None, dtype)


def _pairs_of_six(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes -> eight scales and eight shifts of six bits."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], -1)
    return scale, torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], -1)


def _runs_of_32(octets: Tensor) -> Tensor:
    """128 bytes -> 256 nibbles: of each 32 bytes the low ones, then the high ones."""
    runs = octets.unflatten(-1, (4, 32))
    return torch.cat([runs & 15, runs >> 4], -1).flatten(-2)


def q4_k(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 144) bytes."""
    scale, shift = _pairs_of_six(blocks[..., 4:16])
    spec = Shifted(4, (1, 32), scale_spec=_NESTED, shift_spec=_NESTED)
    nested = _nested(_NESTED, scale, _half(blocks, 0)), _nested(_NESTED, shift, _half(blocks, 2))
    return _shifted(spec, _rows(_runs_of_32(blocks[..., 16:])), *nested, dtype)


def q5_k(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 176) bytes. Bit i of the 32 bytes of high bits is that of run i of 32 elements."""
    scale, shift = _pairs_of_six(blocks[..., 4:16])
    fifth = (blocks[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8, device="cpu").unsqueeze(-1)) & 1
    codes = _runs_of_32(blocks[..., 48:]) | (fifth.flatten(-2) << 4)
    spec = Shifted(5, (1, 32), scale_spec=_NESTED, shift_spec=_NESTED)
    nested = _nested(_NESTED, scale, _half(blocks, 0)), _nested(_NESTED, shift, _half(blocks, 2))
    return _shifted(spec, _rows(codes), *nested, dtype)


def q6_k(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 210) bytes: of each half of 128 elements, 64 bytes of low and 32 of high bits."""
    low = blocks[..., :128].unflatten(-1, (2, 64))
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    nibbles = torch.cat([low & 15, low >> 4], -1)  # (N, B, 2, 128)
    pairs = ((high >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").unsqueeze(-1)) & 3).flatten(-2)
    inner = Intx(8, (1, 16), scale_dtype="float16")
    scale = _nested(inner, blocks[..., 192:208].contiguous().view(torch.int8), _half(blocks, 208))
    spec = Shifted(6, (1, 16), symmetric=True, scale_spec=inner)
    return _shifted(spec, _rows(nibbles | (pairs << 4)), scale, None, dtype)


def _codebook(spec: Codebook, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> QTensor:
    table = torch.tensor(spec.values, dtype=torch.float32, device=codes.device)
    return spec.wrap({"qdata": pack(codes, spec.bits), "scale": scale, "table": table}, dtype, codes.shape)


def iq4_nl(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 18) bytes."""
    spec = Codebook(IQ4, (1, 32), scale_dtype="float16")
    return _codebook(spec, _rows(_halves(blocks[..., 2:])), _half(blocks, 0), dtype)


def iq4_xs(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 136) bytes."""
    high = blocks[..., 2:4].unsqueeze(-1) >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu") & 3  # (N, B, 2, 4)
    low = torch.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], -1).flatten(-2)  # (N, B, 8)
    inner = Intx(6, (1, 8), symmetric=True, scale_dtype="float16")
    scale = _nested(inner, low | (high.flatten(-2) << 4), _half(blocks, 0))
    codes = _halves(blocks[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return _codebook(Codebook(IQ4, (1, 32), inner), _rows(codes), scale, dtype)


def mxfp4(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 17) bytes."""
    scale = E8M0().wrap({"qdata": blocks[..., 0].contiguous()}, torch.float32, blocks.shape[:2])
    codes = _rows(_halves(blocks[..., 1:]))
    return MXFP4.wrap({"qdata": pack(codes, 4), "scale": scale}, dtype, codes.shape)


def nvfp4(blocks: Tensor, dtype: torch.dtype) -> QTensor:
    """blocks: (N, B, 36) bytes: four runs of 16 elements, in each the low nibbles of 8 bytes first."""
    scale = _rows(blocks[..., :4]).view(torch.float8_e4m3fn)
    runs = blocks[..., 4:].unflatten(-1, (4, 8))
    codes = _rows(torch.cat([runs & 15, runs >> 4], -1).flatten(-2))
    spec = replace(NVFP4, scale="e4m3", scale_spec=None)
    return spec.wrap({"qdata": pack(codes, 4), "scale": scale}, dtype, codes.shape)


TYPES: dict[str, tuple[int, int, Decoder]] = {
    "Q4_0": (32, 18, q4_0),
    "Q4_1": (32, 20, q4_1),
    "Q5_0": (32, 22, q5_0),
    "Q5_1": (32, 24, q5_1),
    "Q8_0": (32, 34, q8_0),
    "Q2_K": (256, 84, q2_k),
    "Q3_K": (256, 110, q3_k),
    "Q4_K": (256, 144, q4_k),
    "Q5_K": (256, 176, q5_k),
    "Q6_K": (256, 210, q6_k),
    "IQ4_NL": (32, 18, iq4_nl),
    "IQ4_XS": (256, 136, iq4_xs),
    "MXFP4": (32, 17, mxfp4),
    "NVFP4": (64, 36, nvfp4),
}
"""Type -> elements and bytes of a block, and what reads blocks."""


def tensor_of(kind: str, octets: Tensor, dtype: torch.dtype) -> QTensor:
    """The tensor (N, K) of rows of blocks. octets: (N, bytes) uint8. Raises ValueError for a type that is not read, and for bytes
    that are no whole blocks."""
    if kind not in TYPES:
        raise ValueError(f"GGUF's type {kind} is none of {', '.join(TYPES)}")
    _, size, decode = TYPES[kind]
    if octets.shape[-1] % size:
        raise ValueError(f"rows of {octets.shape[-1]} bytes are no blocks of {size}, as {kind} has")
    return decode(octets.unflatten(-1, (-1, size)), dtype)
