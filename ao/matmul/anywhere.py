"""The products of an activation and a quantized weight that run on any device, and what all of them ask of an activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import QTensor, quantize_fields
from ..dtypes.operand import Cast, Operand
from ..dtypes.tracing import is_eager
from .block_scaled import levels, numbers
from .path import Path


def compiling() -> bool:
    """Whether a graph is being traced, by Dynamo or, below it, by AOTAutograd."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


class _Fields:
    """Fields as attributes."""

    def __init__(self, fields: dict[str, Tensor | None]) -> None:
        for name, t in fields.items():
            setattr(self, name, t)


def _act_fields(x: Tensor, w: QTensor) -> dict[str, Tensor | None]:
    """The fields of the activation (M, K), dynamic unless the weight carries an act_scale."""
    act = w.spec.act
    assert act is not None
    qparams = None if w.act_scale is None else {"scale": w.act_scale.reshape(1, 1)}
    return quantize_fields(act, x, act.grid(x.shape), qparams=qparams)


def quantize_act(x: Tensor, w: QTensor) -> Operand:
    """The activation (M, K) as the Spec of the weight wants it, which has a `row_cast`: scale (M, 1) or (1, 1)."""
    act = w.spec.act
    operand = None if act is None else act.operand(_Fields(_act_fields(x, w)))
    assert operand is not None
    return operand


def quantized_act(x: Tensor, w: QTensor) -> Tensor:
    """x as the weight's Spec wants it: through quantization and back, where it quantizes activations."""
    act = w.spec.act
    if act is None:
        return x
    fields = _act_fields(x, w)
    if not is_eager(x, or_recorded=False):  # a QTensor made in a graph has a shape that the graph does not know
        qparams = {name: t for name, t in fields.items() if name != "qdata" and t is not None}
        return act.round(x.float(), **qparams).to(x.dtype)
    return act.wrap(fields, x.dtype, x.shape).decode(x.dtype)


def emulates(w: QTensor) -> bool:
    """Whether weight and activation are small floats in blocks, whose numbers `emulated` multiplies exactly."""
    act = w.spec.act
    return act is not None and w.act_scale is None and w.dim() == 2 and levels(w.spec.operand(w)) is not None


def act_numbers(x: Tensor, w: QTensor) -> tuple[Tensor, Tensor | None]:
    """The activation (M, K) as the Spec of the weight rounds it, float32, and what multiplies all of it, or None."""
    act = w.spec.act
    assert act is not None
    fields = _act_fields(x, w)
    operand = act.operand(_Fields(fields))
    if levels(operand) is not None:
        return numbers(operand, x.shape)  # type: ignore[arg-type]
    qparams = {name: t for name, t in fields.items() if name != "qdata" and t is not None}
    return act.round(x.float(), **qparams), None


def row_cast(w: QTensor) -> Cast | None:
    """How the Spec of the weight makes bytes of an activation, with one scale per row or for all; None where it does not."""
    act = w.spec.act
    return act.cast() if act is not None and act.block in ((1, -1), (-1, -1)) else None


def is_int8(w: QTensor) -> bool:
    """Whether the codes of weight and activation are int8, or trits, and the scales can be applied to the sum over K."""
    operand, act = w.spec.operand(w), row_cast(w)
    if operand is None or act is None or act.dtype != torch.int8:
        return False
    return (operand.kind == "trits" or (operand.plain and operand.codes.dtype == torch.int8)) and operand.by_row


def int8_operand(w: QTensor) -> Operand | None:
    """The weight that `is_int8`, in bytes."""
    operand = w.spec.operand(w) if is_int8(w) else None
    return None if operand is None else operand.in_bytes()


def int8_weight(w: QTensor) -> Operand | None:
    """The weight, where it is int8 with one scale per row or for all, and its Spec leaves activations as they are."""
    operand = w.spec.operand(w) if w.spec.act is None else None
    fits = operand is not None and operand.plain and operand.codes.dtype == torch.int8 and operand.by_row
    return operand if fits else None


def float8_operand(w: QTensor) -> Operand | None:
    """The weight, where both it and the activation are float8 and the scales can be applied to the sum over K."""
    operand, act = w.spec.operand(w), row_cast(w)
    fits = operand is not None and operand.kind == "float" and operand.by_row
    return operand if fits and act is not None and act.dtype.is_floating_point else None


def float8_accepts(x: Tensor, w: QTensor) -> bool:
    return float8_operand(w) is not None


def float8(x: Tensor, w: QTensor) -> Tensor:
    """(q_x @ q_w.T) * scale_x * scale_w, in float32, where the chip has no float8 products."""
    operand = float8_operand(w)
    assert operand is not None
    act = quantize_act(x, w)
    total = act.codes.float() @ operand.codes.float().t()
    return (total * act.scale * operand.scale.t()).to(x.dtype)


def dequantize(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T in x's dtype."""
    return F.linear(quantized_act(x, w), w.decode(x.dtype))


PATHS = (Path(float8_accepts, float8), Path(lambda x, w: True, dequantize))
"""The last resort of every device, in the order in which they are asked; `dequantize` takes all."""
