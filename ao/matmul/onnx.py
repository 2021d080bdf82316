"""The product of an activation and a quantized weight in an ONNX model: standard operators, weights as small as the types allow.

- 8 bits with one scale per row or for all: `DequantizeLinear`, then a floating-point product. int8 by int8: `MatMulInteger`.
- 4 bits in groups along a row, and 8 bits in such groups: `DequantizeLinear` with its `block_size`, where the opset has that.
- All else is written out: shifts and masks over packed bytes, tables as `Gather`.

Activations are quantized by plain operators. `QuantizeLinear` divides, where we multiply by the reciprocal, and so rounds some
numbers the other way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import QTensor
from ..dtypes.onnx_integers import packs_int4
from ..dtypes.operand import Operand
from ..dtypes.tracing import exporting
from . import anywhere
from .path import Path

UINT4, INT4 = 21, 22
"""ONNX's numbers of its 4-bit types, which PyTorch has no names for."""


def standard_operators(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T, the activation quantized where the weight's Spec wants it. x: (M, K), w: (N, K) -> (M, N)."""
    if "opaque" in w.roles.values():
        raise NotImplementedError(
            f"ONNX has no product in the layout of {w.spec}, a kernel's own; quantize with the default layout, or with another "
            "format, for export"
        )
    operand, act = anywhere.int8_operand(w), anywhere.row_cast(w)
    if operand is not None and act is not None and not act.zero_point:
        return _int_mm(x, w, operand)
    if anywhere.float8_accepts(x, w):
        return anywhere.float8(x, w)
    return F.linear(anywhere.quantized_act(x, w), weight(w, x.dtype))


def _int_mm(x: Tensor, w: QTensor, operand: Operand) -> Tensor:
    """(q_x @ q_w.T) * scale_x * scale_w, the sum in int32."""
    act = anywhere.quantize_act(x, w)
    operands = (act.codes, operand.codes.t())
    total = torch.onnx.ops.symbolic("MatMulInteger", operands, dtype=torch.int32, shape=(x.shape[0], w.shape[0]))
    return (total.float() * act.scale.float() * operand.scale.float().t()).to(x.dtype)


def weight(w: QTensor, dtype: torch.dtype) -> Tensor:
    """`w.decode(dtype)`."""
    fields = _linear_fields(w)
    if fields is None:
        return w.decode(dtype)
    qdata, scale, zero_point, attributes = fields
    inputs = (qdata, scale) if zero_point is None else (qdata, scale, zero_point)
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=tuple(w.shape)
    ).to(dtype)


def decodes_table(w: QTensor) -> bool:
    """Whether an embedding decodes all rows before it looks some up: onnxruntime gathers no float8."""
    if not exporting():
        return False
    operand = w.spec.operand(w)
    return operand is not None and operand.kind == "float"


def _linear_fields(w: QTensor) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]] | None:
    """Codes, scale, zero point and attributes of a `DequantizeLinear` that decodes `w`, or None where there is none."""
    operand = w.spec.operand(w)
    if operand is None or operand.kind not in ("affine", "float") or operand.bits not in (4, 8) or w.dim() != 2:
        return None
    codes, scale, zero_point, _, bits, *_ = operand
    signed = operand.offset == 8 if bits == 4 else codes.dtype != torch.uint8
    if operand.offset not in (0, 8 if bits == 4 else 0) or isinstance(scale, QTensor):
        return None
    if zero_point is not None and zero_point.is_floating_point():
        return None
    rows, groups = scale.shape
    if (bits == 4 or groups > 1) and not packs_int4.get():
        return None
    if rows not in (1, w.shape[0]) or (rows == 1 and groups > 1):
        return None
    if bits == 4:
        codes = _int4(codes, tuple(w.shape), signed, packed=True)
        zero_point = None if zero_point is None else _int4(zero_point, tuple(zero_point.shape), signed, packed=False)
    if groups > 1:
        return codes, scale.float(), zero_point, {"axis": 1, "block_size": w.shape[1] // groups}
    shape = () if rows == 1 else (rows,)
    zero_point = None if zero_point is None else zero_point.reshape(shape)
    return codes, scale.float().reshape(shape), zero_point, {"axis": 0}


def _int4(t: Tensor, shape: tuple[int, ...], signed: bool, packed: bool) -> Tensor:
    """`t`, a weight's field, as the 4-bit initializer that `ao.integrations.onnx` puts in its place.

    packed: whether these are packed codes, which are stored with an offset of 8 if they are signed.
    """
    attributes: dict[str, Any] = {"signed": int(signed), "packed": int(packed)}
    return torch.onnx.ops.symbolic(
        "ao::Int4", (t,), attributes, dtype=INT4 if signed else UINT4, shape=shape, version=1
    )


PATHS = (Path(lambda x, w: True, standard_operators),)
