"""The products of an activation and a quantized weight that run on any device.

A path takes x: (M, K) and w: (N, K), and returns (M, N) in x's dtype. Beside each stands what it accepts; `linear.py` has
the order in which they are asked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit._trace import is_tracing

from ..dtypes.base import QTensor, Spec, quantize_fields
from ..dtypes.float8 import Float8, Float8Tensor
from ..dtypes.int4_prepacked import Int4PrepackedTensor
from ..dtypes.intx import Intx, IntxTensor
from ..dtypes.pieces import is_eager
from ..dtypes.tracing import known
from .kernels.device import has_float8

# Without integer dot products the sum of int8 x int8 is many times faster in float32, exact up to 2**24.
_VNNI = torch.cpu._is_vnni_supported()


def compiling() -> bool:
    """Whether a graph is being traced, by Dynamo or, below it, by AOTAutograd."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def quantize_act(x: Tensor, w: QTensor) -> dict[str, Tensor]:
    """The fields of the activation (M, K): scale (M, 1) or (1, 1), dynamic unless the weight carries an act_scale."""
    act = w.spec.act
    assert act is not None
    qparams = None if w.act_scale is None else {"scale": w.act_scale.reshape(1, 1)}
    fields = quantize_fields(act, x, act.grid(x.shape), qparams=qparams)
    return {name: t for name, t in fields.items() if t is not None}


def per_row(spec: Spec | None, kind: type[Spec] | tuple[type[Spec], ...]) -> bool:
    """Whether an activation Spec scales whole rows or the whole tensor."""
    return isinstance(spec, kind) and spec.block in ((1, -1), (-1, -1))


def scaled_by_row(w: IntxTensor | Float8Tensor) -> bool:
    """Whether the scale is (N, 1) or (1, 1), so that it can be applied to the sum over K."""
    return w.scale.shape[1] == 1 and w.scale.shape[0] in (1, w.shape[0])


def int_mm_accepts(x: Tensor, w: QTensor) -> bool:
    act = w.spec.act
    fits = x.device.type != "cuda" or (w.shape[0] % 8 == 0 and w.shape[1] % 8 == 0)
    return (
        isinstance(w, IntxTensor)
        and w.qdata.dtype == torch.int8
        and w.zero_point is None
        and scaled_by_row(w)
        and per_row(act, Intx)
        and act.bits == 8  # type: ignore[union-attr]
        and act.signed  # type: ignore[union-attr]
        and fits
        and known(x.numel() > 0, True)
        and x.device.type in ("cpu", "cuda")
    )


def int_mm(x: Tensor, w: QTensor) -> Tensor:
    """((q_x - z) @ q_w.T) * scale_x * scale_w, with the sum over K in int32."""
    assert isinstance(w, IntxTensor)
    tokens = x.shape[0]
    act = quantize_act(x, w)
    q = act["qdata"]
    if "zero_point" in act:
        # One more row, of ones, so that the same product gives the column sums that the zero point multiplies.
        q = torch.cat([q, q.new_ones(1, q.shape[1])])
    if x.device.type == "cuda" and not known(q.shape[0] > 16):  # torch._int_mm on CUDA takes more than 16 rows
        q = F.pad(q, (0, 0, 0, 32 - q.shape[0] if known(q.shape[0] <= 16) else 17))
    if x.device.type == "cpu" and not _VNNI:
        total = q.float() @ w.qdata.float().t()  # (M, N), or one more row
    else:
        total = torch._int_mm(q, w.qdata.t()).float()  # (M, N), or more rows
    out = total[:tokens]
    if "zero_point" in act:
        out = out - act["zero_point"].float() * total[tokens : tokens + 1]
    return (out * act["scale"].float() * w.scale.float().t()).to(x.dtype)


def float8_accepts(x: Tensor, w: QTensor) -> bool:
    return isinstance(w, Float8Tensor) and scaled_by_row(w) and per_row(w.spec.act, Float8)


def scaled_mm_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        float8_accepts(x, w)
        and w.shape[0] % 16 == 0
        and w.shape[1] % 16 == 0
        and "e4m3" in (w.spec.format, w.spec.act.format)  # type: ignore[attr-defined, union-attr]
        and known(x.numel() > 0, True)
        and has_float8(x.device)
    )


def scaled_mm(x: Tensor, w: QTensor) -> Tensor:
    """(q_x @ q_w.T) * scale_x * scale_w with float8 operands and a float32 sum."""
    assert isinstance(w, Float8Tensor)
    act = quantize_act(x, w)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    total = torch._scaled_mm(act["qdata"], w.qdata.t(), one, one, out_dtype=torch.float32)
    return (total * act["scale"] * w.scale.t()).to(x.dtype)


def float8(x: Tensor, w: QTensor) -> Tensor:
    """What `scaled_mm` computes, in float32."""
    assert isinstance(w, Float8Tensor)
    act = quantize_act(x, w)
    total = act["qdata"].float() @ w.qdata.float().t()
    return (total * act["scale"] * w.scale.t()).to(x.dtype)


def int4pack_accepts(x: Tensor, w: QTensor) -> bool:
    return isinstance(w, Int4PrepackedTensor) and w.spec.act is None and known(x.numel() > 0, True)


def int4pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int4 product on its own layout."""
    assert isinstance(w, Int4PrepackedTensor)
    return w.matmul(x)


def dequantize(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T in x's dtype."""
    return F.linear(quantized_act(x, w), w.decode(x.dtype))


def quantized_act(x: Tensor, w: QTensor) -> Tensor:
    """x as the weight's Spec wants it: through quantization and back, where it quantizes activations."""
    if w.spec.act is None:
        return x
    fields = quantize_act(x, w)
    if is_tracing() or not is_eager(x):  # a QTensor made in a graph has a shape that the graph does not know
        return w.spec.act.round(x.float(), **{name: t for name, t in fields.items() if name != "qdata"}).to(x.dtype)
    return w.spec.act.wrap(fields, x.dtype, x.shape).decode(x.dtype)
