"""The products of an activation and a quantized weight that are fast on a GPU (see paths.py)."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from .base import QTensor
from .bits import CHUNK, packed_dim
from .chip import cuda_capability
from .float8 import Float8, Float8Tensor
from .intx import Intx, IntxTensor
from .paths import compiling, int_mm_accepts, per_row, quantize_act, scaled_mm_accepts
from .tracing import known

_TRITON = find_spec("triton") is not None

FEW = 64
"""The largest number of tokens for which weights are decoded on their way to the tensor cores."""

SOME = 512
"""The same on Hopper, for the formats that hopper_kernels.py knows; beyond, the weight is decoded to memory first."""


def _has_kernels(device: torch.device) -> bool:
    return _TRITON and cuda_capability(device) >= (8, 0)


def _packed(x: Tensor, w: QTensor) -> bool:
    """Whether the Triton kernels read this weight: contiguous 4- or 8-bit codes, scales per row or group."""
    if not (
        _has_kernels(x.device)
        and (isinstance(w, Float8Tensor) or (isinstance(w, IntxTensor) and w.spec.bits in (4, 8)))
        and w.numel() < 2**31
    ):
        return False
    n, k = (int(size) for size in w.shape)  # int: a graph may have any number of tokens, but one shape of the weight
    group = 128 if w.scale.shape[1] == 1 else k // w.scale.shape[1]
    return (
        group in (32, 64, 128, 256)
        and k % group == 0
        and w.scale.shape[0] == n
        and packed_dim(w.qdata.shape, w.shape) == 1
        and all(t.is_contiguous() for t in w.fields().values())
    )


def _weight(w: QTensor) -> tuple[Tensor, Tensor, Tensor | None, int]:
    assert isinstance(w, (IntxTensor, Float8Tensor))
    zero_point = w.zero_point if isinstance(w, IntxTensor) else None
    # Signed codes of fewer than 8 bits are stored with an offset.
    offset = 8 if isinstance(w, IntxTensor) and w.spec.bits == 4 and w.spec.signed else 0
    return w.qdata, w.scale, zero_point, offset


def gemv_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        known(x.shape[0] == 1)
        and x.dtype in (torch.bfloat16, torch.float16)
        and (w.spec.act is None or per_row(w.spec.act, (Intx, Float8)))
        and _packed(x, w)
        and not (isinstance(w, Float8Tensor) and w.scale.shape[1] > 1)
    )


def gemv(x: Tensor, w: QTensor) -> Tensor:
    """sum over groups of (sum over the group of x * (q - z)) * scale, with the weights read once and nothing stored.

    For integer weights x becomes 16-bit fixed point, relative to the largest of each group (an error of 1.5e-5 of that,
    against 4e-3 of bfloat16 itself), and the sum over the group is exact. A quantized activation goes in as its codes, of
    which bfloat16 has every one.
    """
    from . import triton_kernels  # Triton is there only with a GPU build of PyTorch

    if not compiling() and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current one; compiled code sees to that
            return gemv(x, w)
    if w.spec.act is None:
        return triton_kernels.gemv(x.contiguous(), *_weight(w))
    act = quantize_act(x, w)
    codes = act["qdata"].float()
    if "zero_point" in act:
        codes = codes - act["zero_point"].float()
    return (triton_kernels.gemv(codes.to(torch.bfloat16), *_weight(w)).float() * act["scale"].float()).to(x.dtype)


def fused_accepts(x: Tensor, w: QTensor) -> bool:
    if not (x.dtype == torch.bfloat16 and w.spec.act is None and _packed(x, w)):
        return False
    if isinstance(w, IntxTensor) and w.zero_point is not None and w.zero_point.is_floating_point():
        return False  # q - z would not be exact in bfloat16
    return known(x.shape[0] > 1) and known(x.shape[0] <= _most(x, w))


def _most(x: Tensor, w: QTensor) -> int:
    """The largest number of tokens that `fused` takes with this weight."""
    assert isinstance(w, (IntxTensor, Float8Tensor))
    n, k = (int(size) for size in w.shape)
    if cuda_capability(x.device)[0] != 9 or n % 64 or k % 128 or k > 65536:
        return FEW
    if w.qdata.shape[1] == k:
        kernel = w.qdata.dtype in (torch.int8, torch.float8_e4m3fn) and w.scale.shape[1] == 1
        return SOME if kernel and getattr(w, "zero_point", None) is None else FEW
    return SOME if w.scale.shape[1] == k // 128 else FEW


def fused(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T, with the weights decoded to bfloat16 in registers, a tile at a time.

    On Hopper, 17 tokens and more meet an 8-bit weight as a sum of two 8-bit numbers: two products at twice the rate, and no
    decoding. Its error is that of x in 16-bit fixed point (int8), or of a sum of 14 bits (float8).
    """
    from . import gpu_ops

    return gpu_ops.fused(x.contiguous(), *_weight(w))


def scaled_product_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        _has_kernels(x.device)
        and x.dtype in (torch.bfloat16, torch.float16)
        and isinstance(w, (IntxTensor, Float8Tensor))
        and all(t.is_contiguous() for t in w.fields().values())
        and (scaled_mm_accepts(x, w) or (int_mm_accepts(x, w) and w.spec.act.symmetric))  # type: ignore[union-attr]
    )


def scaled_product(x: Tensor, w: QTensor) -> Tensor:
    """(q_x @ q_w.T) * scale_x * scale_w, of int8 or float8, by the product that is fastest at this number of tokens.

    On Hopper the activation is quantized in the same operator: when the number of tokens is unknown at compile time,
    Inductor's reduction over long rows is ten times slower.
    """
    from . import gpu_ops

    assert isinstance(w, (IntxTensor, Float8Tensor))
    columns = w.scale.float().expand(w.shape[0], 1).contiguous()
    if _quantized_by_operator(x, w):
        return gpu_ops.dynamic_product(x.contiguous(), w.qdata, columns, w.spec.act.block == (-1, -1))  # type: ignore[union-attr]
    act = quantize_act(x, w)
    rows = act["scale"].float().expand(x.shape[0], 1).contiguous()
    return gpu_ops.scaled_product(act["qdata"], rows, w.qdata, columns, x.dtype)


_ACTS = {torch.int8: Intx(8), torch.float8_e4m3fn: Float8()}


def _quantized_by_operator(x: Tensor, w: IntxTensor | Float8Tensor) -> bool:
    """Whether the activation is quantized dynamically, per row or whole, with the defaults of `Intx(8)` or `Float8()`."""
    act = _ACTS.get(w.qdata.dtype)
    return (
        w.act_scale is None
        and act is not None
        and w.spec.act in (act, replace(act, block=(-1, -1)))  # type: ignore[call-arg]
        and w.shape[1] <= 65536
        and cuda_capability(x.device)[0] == 9
    )


def sums_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cuda"
        and known(x.shape[0] == 1)
        and compiling()
        and w.spec.act is None
        and (isinstance(w, Float8Tensor) or (isinstance(w, IntxTensor) and w.spec.bits in (4, 8)))
        and w.scale.shape[0] in (1, w.shape[0])
        and x.shape[1] % _gemv_group(w) == 0
        and _gemv_group(w) % CHUNK == 0
        and packed_dim(w.qdata.shape, w.shape) == 1
    )


def _gemv_group(w: IntxTensor | Float8Tensor) -> int:
    """The elements that are summed before a scale is applied: a group, or a piece of a row that is a short reduction."""
    return w.shape[1] // w.scale.shape[1] if w.scale.shape[1] > 1 else 128


def sums(x: Tensor, w: QTensor) -> Tensor:
    """sum over groups of (sum over the group of x * (q - z)) * scale: two reductions, of which the first is short.

    One reduction over the whole row would load scale and zero point once per element.
    """
    assert isinstance(w, (IntxTensor, Float8Tensor))
    n, group = w.shape[0], _gemv_group(w)
    xs = x.float().view(-1, group)  # (K / group, group)
    zero: Tensor | int = 0
    if isinstance(w, IntxTensor) and w.spec.bits == 4:
        # Both halves of a byte from one load: (N, K / group, chunks of a group, 16), see bits.py.
        pairs = w.qdata.view(n, -1, group // CHUNK, CHUNK // 2)
        low, high = xs.view(-1, group // CHUNK, 2, CHUNK // 2).unbind(2)
        sums = ((pairs & 15).float() * low + (pairs >> 4).float() * high).sum((-1, -2))  # (N, K / group)
        zero = 8 if w.spec.signed else 0  # signed codes are stored with an offset
    else:
        sums = (w.qdata.view(n, -1, group).float() * xs).sum(-1)
    if isinstance(w, IntxTensor) and w.zero_point is not None:
        zero = w.zero_point.float() + zero
    if not isinstance(zero, int) or zero:
        sums = sums - zero * xs.sum(-1)
    return (sums * w.scale.float()).sum(-1).unsqueeze(0).to(x.dtype)
