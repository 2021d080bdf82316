"""Which quantized keys and values the kernels for a few queries read, and the operator by which they are called.

They read codes of one scale per position and head: int8, float8 (e4m3), and unsigned ones of 4 bits with a zero point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes.base import QTensor
from ..dtypes.operand import Operand
from . import attention_cpu
from .kernels.device import has_kernels

QUERIES = 16
"""Of a call of the kernels, at most."""


def code_kind(a: Operand | None, width: int) -> str | None:
    """How the kernels read codes of (..., width) with one scale per position; None where they do not."""
    if a is None or a.codes.dim() != 4 or isinstance(a.scale, QTensor) or a.scale.shape != (*a.codes.shape[:3], 1):
        return None
    per_byte = {8: 1, 4: 2}.get(a.bits, 0)
    row = width // max(per_byte, 1)
    laid_out = a.codes.shape[3] == row and a.codes.stride()[2:] == (row, 1) and a.scale.stride(2) == 1
    if not per_byte or not laid_out or a.codes.shape[2] % 8 or a.codes.shape[2] == 0:
        return None
    if a.kind == "float":
        return "float8" if a.codes.dtype == torch.float8_e4m3fn else None
    if a.kind != "affine" or a.offset:
        return None
    if a.bits == 8:
        return "int8" if a.codes.dtype == torch.int8 and a.zero_point is None else None
    zero = a.zero_point
    if zero is None or isinstance(zero, QTensor):
        return None
    return "uint4" if zero.shape == a.scale.shape and zero.stride() == a.scale.stride() else None


def kinds_of(q: Tensor, k: QTensor, v: QTensor, mask: Tensor | None) -> tuple[str, str] | None:
    """How the kernel of q's device reads the codes of `k` and `v`; None where there is none for them."""
    d = q.shape[3]
    if q.shape[2] > QUERIES or not (mask is None or mask.dtype == torch.bool):
        return None
    kinds = code_kind(k.spec.operand(k), d), code_kind(v.spec.operand(v), d)
    if kinds[0] is None or kinds[1] is None:
        return None
    found = kinds[0], kinds[1]
    if q.is_cuda:
        fits = d in (64, 128) and q.dtype in (torch.bfloat16, torch.float16) and has_kernels(q.device)
        return found if fits else None
    if q.device.type != "cpu":
        return None
    return found if attention_cpu.can(d, found) else None


def _on_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from .kernels.decode_attention import decode

    return decode(*args)


torch.library.define(
    "ao::kv_decode",
    "(Tensor q, Tensor k, Tensor k_scale, Tensor? k_zero, Tensor v, Tensor v_scale, Tensor? v_zero, str kind_k, str kind_v, "
    "int start, Tensor stop, Tensor? end, int? window, Tensor? mask, float scale, float? softcap, Tensor? sinks) "
    "-> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("ao::kv_decode", "CUDA", _on_cuda)
torch.library.impl("ao::kv_decode", "CPU", attention_cpu.decode)
torch.library.register_fake(
    "ao::kv_decode", lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32))
)
decode_operator = torch.ops.ao.kv_decode.default
"""(q, k's codes, scale and zero point, v's, kinds, what is seen, ...) -> the attention (B, heads, T, head_dim) in q's dtype, and
the logarithm of the sum of exp of the scores, (B, heads, T) float32."""
