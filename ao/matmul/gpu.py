"""The products of an activation and a quantized weight that are fast on a GPU (see anywhere.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import QTensor
from ..dtypes.bits import CHUNK, packed_dim
from ..dtypes.float8 import Float8, Float8Tensor
from ..dtypes.intx import Intx, IntxTensor
from ..dtypes.tracing import known
from .anywhere import compiling, int_mm_accepts, per_row, quantize_act, quantized_act, scaled_mm_accepts
from .kernels.device import cuda_capability

_TRITON = find_spec("triton") is not None


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
    against 4e-3 of bfloat16 itself), and the sum over the group is exact. An activation that is quantized by the defaults is
    quantized in the kernel; any other goes in as its codes, of which bfloat16 has every one.
    """
    from .kernels import ampere  # Triton is there only with a GPU build of PyTorch

    if not compiling() and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current one; compiled code sees to that
            return gemv(x, w)
    if w.spec.act is None or _quantized_in_kernel(w):
        return ampere.gemv(x.contiguous(), *_weight(w), w.spec.act is not None)
    codes, scale = _codes(x, w)
    return (ampere.gemv(codes, *_weight(w), False).float() * scale).to(x.dtype)


def _codes(x: Tensor, w: QTensor) -> tuple[Tensor, Tensor]:
    """The codes of an activation (1, K) less its zero point, bfloat16, and its scale, float32."""
    act = quantize_act(x, w)
    codes = act["qdata"].float()
    if "zero_point" in act:
        codes = codes - act["zero_point"].float()
    return codes.to(torch.bfloat16), act["scale"].float()


def gemv_launch(x: Tensor, w: QTensor) -> Callable[[Tensor, QTensor], Tensor]:
    """`gemv` for eager mode, with all that depends on the form of the weight decided."""
    from .kernels import ampere

    n, k = w.shape
    in_kernel = w.spec.act is not None and _quantized_in_kernel(w)
    run = _launched(w, ampere.gemv_launch(n, k, *_weight(w), in_kernel))
    if w.spec.act is None or in_kernel:
        return run

    def of_codes(x: Tensor, w: QTensor) -> Tensor:
        codes, scale = _codes(x.reshape(1, k), w)
        return (run(codes, w).float() * scale).to(x.dtype).view(*x.shape[:-1], n)

    return of_codes


def _launched(w: QTensor, run: Callable[..., Tensor]) -> Callable[[Tensor, QTensor], Tensor]:
    """`run` of x and the fields of a weight like `w`, on its device."""
    index, has_zero = w.device.index, getattr(w, "zero_point", None) is not None
    current = torch._C._cuda_getDevice

    def launched(x: Tensor, w: Any) -> Tensor:
        if current() != index:
            with torch.cuda.device(index):  # Triton launches on the current one
                return launched(x, w)
        return run(x.contiguous(), w.qdata, w.scale, w.zero_point if has_zero else None)

    return launched


def _quantized_in_kernel(w: QTensor) -> bool:
    """Whether `gemv` quantizes the activation itself: per row or whole, which is the same for one token."""
    return w.qdata.shape == w.shape and _is_default_act(w)  # type: ignore[attr-defined]


def fused_accepts(x: Tensor, w: QTensor) -> bool:
    if not (x.dtype == torch.bfloat16 and w.spec.act is None and _packed(x, w)):
        return False
    if isinstance(w, IntxTensor) and w.zero_point is not None and w.zero_point.is_floating_point():
        return False  # q - z would not be exact in bfloat16
    return known(x.shape[0] > 1, otherwise=True)


def fused(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T. Up to 64 tokens (512 on Hopper, for most formats) the weights are decoded to bfloat16 in registers, a
    tile at a time; beyond, to memory, by one kernel.

    On Hopper, 17 tokens and more meet an 8-bit weight as a sum of two 8-bit numbers: two products at twice the rate, and no
    decoding. Its error is that of x in 16-bit fixed point (int8), or of a sum of 14 bits (float8).
    """
    from .kernels import operators

    return operators.fused(x.contiguous(), *_weight(w))


def fused_launch(x: Tensor, w: QTensor) -> Callable[[Tensor, QTensor], Tensor]:
    """`fused` for eager mode.

    Few tokens are one launch: another one, for the sum of parts of K, takes longer than what they save, so that the host would
    be waited for. While a CUDA graph records, that does not count.
    """
    from .kernels import ampere, operators

    (m, k), n = x.shape, w.shape[0]
    qdata, scale, zero_point, offset = _weight(w)
    records = torch._C._cuda_isCurrentStreamCapturing

    def at_once(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return operators.fused_at_once(x, qdata, scale, zero_point, offset, not records())

    if m > 16 or operators.is_for_hopper(m, k, qdata, scale, zero_point):
        return _launched(w, at_once)
    few = ampere.fused_launch(m, n, k, qdata, scale, zero_point, offset)
    return _launched(w, lambda *args: at_once(*args) if records() else few(*args))


def decode_accepts(x: Tensor, w: QTensor) -> bool:
    return x.dtype.itemsize == 2 and _packed(x, w)


def decode(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T, decoded to memory by one kernel."""
    return F.linear(quantized_act(x, w), decoded(w, x.dtype))


def decoded(w: QTensor, dtype: torch.dtype) -> Tensor:
    """`w.decode_scaled(dtype)`, (N, K), on a GPU by one kernel where it knows the format."""
    if w.pre_scale is not None or dtype.itemsize != 2 or w.dim() != 2 or not _packed(w, w):
        return w.decode_scaled(dtype)
    from .kernels import operators

    qdata, scale, zero_point, offset = _weight(w)
    return operators.decoded(qdata, scale, zero_point, offset, int(w.shape[1]), dtype)


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
    from .kernels import operators

    assert isinstance(w, (IntxTensor, Float8Tensor))
    columns = w.scale.float().expand(w.shape[0], 1).contiguous()
    if _quantized_by_operator(x, w):
        return operators.dynamic_product(x.contiguous(), w.qdata, columns, w.spec.act.block == (-1, -1))  # type: ignore[union-attr]
    act = quantize_act(x, w)
    rows = act["scale"].float().expand(x.shape[0], 1).contiguous()
    return operators.scaled_product(act["qdata"], rows, w.qdata, columns, x.dtype)


_ACTS = {torch.int8: Intx(8), torch.float8_e4m3fn: Float8()}


def _is_default_act(w: QTensor) -> bool:
    """Whether the activation is quantized dynamically, per row or whole, with the defaults of `Intx(8)` or `Float8()`."""
    act = _ACTS.get(w.qdata.dtype)  # type: ignore[attr-defined]
    return w.act_scale is None and act is not None and w.spec.act in (act, replace(act, block=(-1, -1)))  # type: ignore[call-arg]


def _quantized_by_operator(x: Tensor, w: IntxTensor | Float8Tensor) -> bool:
    """Whether one operator quantizes the activation and multiplies."""
    return _is_default_act(w) and w.shape[1] <= 65536 and cuda_capability(x.device)[0] == 9


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
