"""Quantizing and dequantizing tensors in blocks of 4 and 8 bits, as bitsandbytes stores them.

Blocks are of elements that follow one another in memory, across rows. The numbers are ao's `Codebook`; the order of codes and
the packing, two codes in a byte with the first in the high nibble, are bitsandbytes'.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dtypes import Codebook, QTensor, packed_dim, unpack
from .maps import (
    codes_of_ranks,
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from .state import QuantState

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """4-bit codes of `A` and the state that dequantizes them.

    A: float32, bfloat16 or float16, of any shape.
    absmax, out: tensors to write the largest magnitudes and the codes to.
    blocksize: elements that share a scale, 32 to 4096; None is 64.
    compress_statistics: quantize the largest magnitudes themselves, to 8 bits in blocks of 256.
    quant_type: "nf4" or "fp4".
    quant_storage: the dtype as which the bytes are given, (bytes / itemsize, 1).

    Raises ValueError for another dtype, blocksize or type.
    """
    size = _block_size(blocksize)
    _check_float(A)
    table = codes_of_ranks(quant_type).to(A.device)
    q = Codebook(quant_type, (1, -1)).quantize(_in_rows(A, size))
    ranks = unpack(q.qdata, 4, packed_dim(q.qdata.shape, q.shape)).flatten()[: A.numel() + A.numel() % 2]  # type: ignore[attr-defined]
    octets = _nibbles(table[ranks.int()], quant_storage)
    largest = q.scale.flatten()  # type: ignore[attr-defined]
    code = get_4bit_type(quant_type, A.device)
    state = QuantState(largest, A.shape, code, size, quant_type, A.dtype)
    if compress_statistics:
        state.offset = largest.mean()
        state.absmax, state.state2 = quantize_blockwise(largest - state.offset, blocksize=256)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return octets if out is None else out.copy_(octets), state


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The tensor that codes of `quantize_4bit` stand for, of the dtype and shape that it had.

    A: the codes, or a quantized tensor of ao, such as the weight of a `Linear4bit`.
    absmax, out, blocksize, quant_type: in place of `quant_state`; out says the shape and the dtype.

    Raises ValueError where neither a state, nor absmax and out, are given.
    """
    if isinstance(A, QTensor):
        return A.dequantize() if out is None else out.copy_(A.dequantize())
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit: give quant_state, or absmax and out")
        code = get_4bit_type(quant_type, A.device)
        quant_state = QuantState(absmax, out.shape, code, _block_size(blocksize), quant_type, out.dtype)
    assert quant_state.shape is not None and quant_state.blocksize is not None
    codes = codes_of(A, quant_state.shape.numel())
    table = get_4bit_type(str(quant_state.quant_type), A.device) if quant_state.code is None else quant_state.code
    values = _looked_up(codes, table, absmax_of(quant_state), quant_state.blocksize)
    made = values.to(quant_state.dtype).reshape(quant_state.shape)
    return made if out is None else out.copy_(made)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with quant_type="nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with quant_type="fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` with quant_type="nf4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` with quant_type="fp4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """8-bit codes of `A`, uint8 of its shape, and the state that dequantizes them.

    code: the table, in order; by default the signed dynamic map.
    absmax, out: tensors to write the largest magnitudes and the codes to.
    blocksize: elements that share a scale.
    nested: quantize the largest magnitudes themselves.

    Raises ValueError for a dtype that is not float32, bfloat16 or float16, and for a blocksize below 1.
    """
    _check_float(A)
    if blocksize < 1:
        raise ValueError(f"blocksize must be positive, got {blocksize}")
    table = (create_dynamic_map() if code is None else code).to(A.device, torch.float32)
    rows = _in_rows(A, blocksize).float()
    largest = rows.abs().amax(1)
    unit = rows * torch.where(largest == 0, 0.0, 1 / largest)[:, None]
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).to(torch.uint8).flatten()[: A.numel()].reshape(A.shape)
    state = QuantState(largest, None, table.clone(), blocksize, None, A.dtype)
    if nested:
        state.offset = largest.mean()
        state.absmax, state.state2 = quantize_blockwise(largest - state.offset, blocksize=blocksize)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return codes if out is None else out.copy_(codes), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The tensor that codes of `quantize_blockwise` stand for.

    absmax, code, blocksize: in place of `quant_state`; the result is then float32.

    Raises ValueError where neither is given, and for codes that are not uint8.
    """
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be codes, uint8, got {A.dtype}")
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise: give quant_state or absmax")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if quant_state.blocksize is None or quant_state.blocksize < 1:
        raise ValueError(f"blocksize must be positive, got {quant_state.blocksize}")
    table = create_dynamic_map().to(A.device) if quant_state.code is None else quant_state.code.to(A.device)
    values = _looked_up(A.flatten(), table, absmax_of(quant_state), quant_state.blocksize)
    made = values.to(quant_state.dtype).reshape(A.shape)
    return made if out is None else out.copy_(made)


def absmax_of(state: QuantState) -> Tensor:
    """The largest magnitudes, float32."""
    if state.state2 is None or state.offset is None:
        return state.absmax.float()
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def codes_of(A: Tensor, n: int) -> Tensor:
    """The first `n` codes, uint8 (n,), of packed bytes of any dtype."""
    octets = A.detach().contiguous().flatten().view(torch.uint8)
    return torch.stack([octets >> 4, octets & 15], -1).flatten()[:n]


def _looked_up(codes: Tensor, table: Tensor, largest: Tensor, size: int) -> Tensor:
    return table.float()[codes.int()] * largest.flatten().repeat_interleave(size)[: codes.numel()]


def _in_rows(A: Tensor, size: int) -> Tensor:
    """`A` as rows of `size` elements, the last filled with zeros."""
    return F.pad(A.detach().reshape(-1), (0, -A.numel() % size)).reshape(-1, size)


def _nibbles(codes: Tensor, storage: torch.dtype) -> Tensor:
    octets = codes[::2] << 4 | codes[1::2]
    width = torch.empty(0, dtype=storage).element_size()
    return F.pad(octets, (0, -octets.numel() % width)).view(storage).reshape(-1, 1)


def _block_size(given: int | None) -> int:
    size = 64 if given is None else given
    if size not in _SIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, _SIZES))}, got {given}")
    return size


def _check_float(A: Tensor) -> None:
    if A.dtype not in _FLOATS:
        raise ValueError(f"A must be float32, bfloat16 or float16, got {A.dtype}")


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of int8: codes = round(127 * A / max|row|), the float32 maxima of the rows, and the columns with outliers.

    A: (..., K) float16 or another float.
    threshold: columns in which a magnitude reaches it have codes 0, and are told, int64; those magnitudes are left out of the
        maxima. 0 for none; then the columns are None.
    """
    rows = A.detach().reshape(-1, A.shape[-1]).float()
    columns = None
    kept = rows
    if threshold > 0:
        outliers = rows.abs() >= threshold
        kept = rows.masked_fill(outliers, 0.0)
        columns = outliers.any(0).nonzero().flatten()
    largest = kept.abs().amax(1) if rows.numel() else rows.new_zeros(rows.shape[0])
    codes = (kept * torch.where(largest == 0, 0.0, 127 / largest)[:, None]).round()
    if columns is not None:
        codes[:, columns] = 0
    return codes.to(torch.int8).reshape(A.shape), largest, columns


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """codes * maxima / 127, float32."""
    return A.float() * (stats.float() / 127).reshape(-1, *[1] * (A.dim() - 1))


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """int8 codes per row and per column, the maxima of both, and the columns with outliers. The other tensors are not used."""
    rows, row_max, columns = int8_vectorwise_quant(A, threshold)
    kept = A.float() if threshold <= 0 else A.float().masked_fill(A.abs() >= threshold, 0.0)
    by_column, column_max, _ = int8_vectorwise_quant(kept.reshape(-1, A.shape[-1]).t())
    return rows, by_column.t().reshape(A.shape).contiguous(), row_max, column_max, columns


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """A @ B.T of int8 codes, exact. A: (..., K), B: (N, K)."""
    made = (A.double() @ B.double().t()).to(dtype)
    return made if out is None else out.copy_(made)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """What a product of int8 codes stands for, float16: A * row_stats * col_stats / 127**2 + bias."""
    values = A.float() * row_stats.float().reshape(-1, 1) * (col_stats.float() / (127 * 127))
    made = (values if bias is None else values + bias.float()).to(torch.float16)
    return made if out is None else out.copy_(made)


def igemm(A: Tensor, B: Tensor, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    """A @ B of int8 codes, int32."""
    made = (A.double() @ B.double()).to(torch.int32)
    return made if out is None else out.copy_(made)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A @ W.T, with W the 4-bit weight (N, K): `matmul_4bit` without a bias. A: (..., K). B: codes, also transposed.

    transposed_A, transposed_B: accepted and without effect. Raises ValueError without `state`.
    """
    if state is None:
        raise ValueError("gemv_4bit: give state with codes; functional.quantize_4bit returns both")
    made = torch.nn.functional.linear(A, dequantize_4bit(B, state).to(A.dtype))
    return made if out is None else out.copy_(made)


__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]
