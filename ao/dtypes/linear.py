"""The one place where a quantized weight meets an activation.

`F.linear`, `matmul`, `mm`, `addmm`, `F.embedding` and the convolutions on a QTensor come here, from three doors:
`__torch_function__` (user code), `__torch_dispatch__` (inference mode, DTensor, exported graphs), and the backward of the
one autograd.Function below. A product takes the first path in `PATHS` that accepts it:

    int8pack    one token on a CPU, int8 weight: ATen's own product
    gemv        one token on a GPU, compiled: sums over each group, then over the groups; nothing dense is stored
    int_mm      int8 activation x int8 weight on the integer units, int32 accumulation, scales applied to the sum
    scaled_mm   float8 x float8 on the tensor cores of a chip that has them, float32 accumulation
    float8      the same product in float32, where the chip has no float8
    int4pack    ATen's int4 product, for weights in its own layout
    dequantize  decode the weight, then a floating-point product; always accepts

Autograd: the weight is kept packed and decoded again in backward, so that a frozen quantized weight costs a training run
its packed bytes and no more. Activation quantization is straight-through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import FUNCTIONS, OPS, QTensor, Spec, quantize_fields
from .bits import CHUNK, packed_dim
from .float8 import Float8, Float8Tensor
from .int4_prepacked import Int4PrepackedTensor
from .intx import Intx, IntxTensor
from .ops import gather

aten = torch.ops.aten

# What this CPU does in hardware: products of 8-bit integers, and of 16-bit floats.
_VNNI = torch.cpu._is_vnni_supported()
_FLOATS = {torch.float32, torch.float64}
if torch.backends.mkldnn.is_available():
    _FLOATS |= {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    _FLOATS |= {torch.float16} if torch.ops.mkldnn._is_mkldnn_fp16_supported() else set()


# Paths. Each takes x: (M, K) and w: (N, K), and returns (M, N) in x's dtype.


def _quantize_act(x: Tensor, w: QTensor) -> dict[str, Tensor]:
    """The fields of the activation (M, K): scale (M, 1) or (1, 1), dynamic unless the weight carries an act_scale."""
    act = w.spec.act
    assert act is not None
    qparams = None if w.act_scale is None else {"scale": w.act_scale.reshape(1, 1)}
    fields = quantize_fields(act, x, act.grid(x.shape), qparams=qparams)
    return {name: t for name, t in fields.items() if t is not None}


def _per_row(spec: Spec | None, kind: type[Spec]) -> bool:
    """Whether an activation Spec scales whole rows or the whole tensor."""
    return isinstance(spec, kind) and spec.block in ((1, -1), (-1, -1))  # type: ignore[attr-defined]


def _scaled_by_row(w: IntxTensor | Float8Tensor) -> bool:
    """Whether the scale is (N, 1) or (1, 1), so that it can be applied to the sum over K."""
    return w.scale.shape[1] == 1 and w.scale.shape[0] in (1, w.shape[0])


def _int8pack_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.shape[0] == 1
        and isinstance(w, IntxTensor)
        and w.spec.act is None
        and w.qdata.dtype == torch.int8
        and w.zero_point is None
        and w.scale.shape == (w.shape[0], 1)
    )


def int8pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int8 weight-only product, in float32. Fast for one token only: it reads the weight once per token."""
    assert isinstance(w, IntxTensor)
    return torch._weight_int8pack_mm(x.float(), w.qdata, w.scale.flatten().float()).to(x.dtype)


def _gemv_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cuda"
        and x.shape[0] == 1
        and _compiling()
        and w.spec.act is None
        and (isinstance(w, Float8Tensor) or (isinstance(w, IntxTensor) and w.spec.bits in (4, 8)))
        and w.scale.shape[0] in (1, w.shape[0])
        and x.shape[1] % _gemv_group(w) == 0
        and _gemv_group(w) % CHUNK == 0
        and packed_dim(w.qdata.shape, w.shape) == 1
    )


def _compiling() -> bool:
    """Whether a graph is being traced, by Dynamo or, below it, by AOTAutograd."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def _gemv_group(w: IntxTensor | Float8Tensor) -> int:
    """The elements that are summed before a scale is applied: a group, or a piece of a row that is a short reduction."""
    return w.shape[1] // w.scale.shape[1] if w.scale.shape[1] > 1 else 128


def gemv(x: Tensor, w: QTensor) -> Tensor:
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


def _int_mm_accepts(x: Tensor, w: QTensor) -> bool:
    act = w.spec.act
    fits = x.device.type != "cuda" or (w.shape[0] % 8 == 0 and w.shape[1] % 8 == 0)
    return (
        isinstance(w, IntxTensor)
        and w.qdata.dtype == torch.int8
        and w.zero_point is None
        and _scaled_by_row(w)
        and _per_row(act, Intx)
        and act.bits == 8  # type: ignore[union-attr]
        and act.signed  # type: ignore[union-attr]
        and fits
        and x.numel() > 0
        and x.device.type in ("cpu", "cuda")
    )


def int_mm(x: Tensor, w: QTensor) -> Tensor:
    """((q_x - z) @ q_w.T) * scale_x * scale_w, with the sum over K in int32."""
    assert isinstance(w, IntxTensor)
    tokens = x.shape[0]
    act = _quantize_act(x, w)
    q = act["qdata"]
    if "zero_point" in act:
        # One more row, of ones, so that the same product gives the column sums that the zero point multiplies.
        q = torch.cat([q, torch.ones_like(q[:1])])
    if x.device.type == "cuda" and q.shape[0] <= 16:
        q = F.pad(q, (0, 0, 0, 32 - q.shape[0]))  # torch._int_mm on CUDA takes more than 16 rows
    if x.device.type == "cpu" and not _VNNI:
        # Without integer dot products the same sum is many times faster in float32, exact up to 2**24.
        total = q.float() @ w.qdata.float().t()  # (M, N), or one more row
    else:
        total = torch._int_mm(q, w.qdata.t()).float()  # (M, N), or more rows
    out = total[:tokens]
    if "zero_point" in act:
        out = out - act["zero_point"].float() * total[tokens : tokens + 1]
    return (out * act["scale"].float() * w.scale.float().t()).to(x.dtype)


def _float8_accepts(x: Tensor, w: QTensor) -> bool:
    return isinstance(w, Float8Tensor) and _scaled_by_row(w) and _per_row(w.spec.act, Float8)


def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _scaled_mm_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        _float8_accepts(x, w)
        and w.shape[0] % 16 == 0
        and w.shape[1] % 16 == 0
        and "e4m3" in (w.spec.format, w.spec.act.format)  # type: ignore[attr-defined, union-attr]
        and x.numel() > 0
        and _has_float8(x.device)
    )


def scaled_mm(x: Tensor, w: QTensor) -> Tensor:
    """(q_x @ q_w.T) * scale_x * scale_w with float8 operands and a float32 sum."""
    assert isinstance(w, Float8Tensor)
    act = _quantize_act(x, w)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    total = torch._scaled_mm(act["qdata"], w.qdata.t(), one, one, out_dtype=torch.float32)
    return (total * act["scale"] * w.scale.t()).to(x.dtype)


def float8(x: Tensor, w: QTensor) -> Tensor:
    """What `scaled_mm` computes, in float32."""
    assert isinstance(w, Float8Tensor)
    act = _quantize_act(x, w)
    total = act["qdata"].float() @ w.qdata.float().t()
    return (total * act["scale"] * w.scale.t()).to(x.dtype)


def _int4pack_accepts(x: Tensor, w: QTensor) -> bool:
    return isinstance(w, Int4PrepackedTensor) and w.spec.act is None and x.numel() > 0


def int4pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int4 product on its own layout."""
    assert isinstance(w, Int4PrepackedTensor)
    return w.matmul(x)


def dequantize(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T in x's dtype."""
    if w.spec.act is not None:
        x = w.spec.act.wrap(_quantize_act(x, w), x.dtype, x.shape).decode(x.dtype)
    # A CPU without 16-bit products is faster in float32.
    dtype = x.dtype if x.device.type != "cpu" or x.dtype in _FLOATS else torch.float32
    rows = x.to(dtype)
    if x.device.type == "cpu" and (count := _pieces(w)) > 1:
        # A piece of the weight that stays in cache from its decoding to its use saves a round trip through memory.
        pieces: Any = w.chunk(count)
        return torch.cat([F.linear(rows, piece.decode(dtype)) for piece in pieces], -1).to(x.dtype)
    return F.linear(rows, w.decode(dtype)).to(x.dtype)


def _pieces(w: QTensor) -> int:
    """Into how many row pieces to cut a large weight on a CPU. More than eight would only cost compile time."""
    size = w.shape[0] * w.shape[1]
    roles = type(w).roles
    blocks = [t.shape[0] for name, t in w.fields().items() if roles[name] in ("elements", "per_block")]
    if size < 2**22 or "opaque" in roles.values() or any(f not in (1, w.shape[0]) for f in blocks):
        return 1
    return 4 if size <= 2**24 else 8


Path = Callable[[Tensor, QTensor], Tensor]

PATHS: list[tuple[str, Callable[[Tensor, QTensor], bool], Path]] = [
    ("int8pack", _int8pack_accepts, int8pack),
    ("gemv", _gemv_accepts, gemv),
    ("int_mm", _int_mm_accepts, int_mm),
    ("scaled_mm", _scaled_mm_accepts, scaled_mm),
    ("float8", _float8_accepts, float8),
    ("int4pack", _int4pack_accepts, int4pack),
    ("dequantize", lambda x, w: True, dequantize),
]


def path_name(x: Tensor, w: QTensor) -> str:
    """The name of the path that `F.linear(x, w)` takes. x: (..., K), w: (N, K)."""
    x = x.reshape(-1, x.shape[-1])
    return next(name for name, accepts, _ in PATHS if accepts(x, w))


def _product(x: Tensor, w: QTensor) -> Tensor:
    """x: (..., K), w: (N, K) -> (..., N)."""
    lead = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if w.pre_scale is not None:
        rows = (rows.float() * w.pre_scale.float()).to(x.dtype)
    for _, accepts, path in PATHS:
        if accepts(rows, w):
            return path(rows, w).reshape(*lead, w.shape[0])
    raise AssertionError("the last path accepts everything")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: QTensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        return _product(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ w.decode_scaled(grad.dtype)
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])  # (M, N)
            grad_w = (rows.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(w.dtype)
        return grad_x, grad_w


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a QTensor weight. x: (..., K), w: (N, K), bias: (N,) -> (..., N) in x's dtype.

    Raises ValueError where K differs.
    """
    if not isinstance(w, QTensor):
        assert isinstance(x, QTensor) or isinstance(bias, QTensor)
        return F.linear(_plain(x), w, _plain(bias))
    if w.dim() != 2 or x.dim() == 0 or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"linear: the input of shape {tuple(x.shape)} does not fit the weight of shape {tuple(w.shape)}; "
            "the last dim of the input must be the weight's second"
        )
    x = _plain(x)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        out = _Linear.apply(x, w)
    else:
        out = _product(x, w)
    return out if bias is None else out + bias.to(out.dtype)


def _plain(x: Any) -> Any:
    return x.dequantize() if isinstance(x, QTensor) else x


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w` with a QTensor on either side. A quantized (K, N) right side is the transpose of a linear's weight."""
    if isinstance(w, QTensor) and w.dim() == 2 and not isinstance(x, QTensor) and x.dim() > 0:
        return linear(x, w.t())
    return torch.matmul(_plain(x), _plain(w))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, w: QTensor, padding_idx: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding_idx = w.shape[0], padding_idx
        return gather(w, 0, ids).dequantize()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        return None, aten.embedding_dense_backward(grad, ids, ctx.rows, ctx.padding_idx, False), None


def embedding(
    ids: Tensor,
    w: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding` with a QTensor table: the packed rows are gathered first, then decoded."""
    assert isinstance(w, QTensor)
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotImplementedError(
            "embedding: max_norm, scale_grad_by_freq and sparse are not supported for a quantized table; leave them out"
        )
    if torch.is_grad_enabled() and w.requires_grad:
        return _Embedding.apply(ids, w, -1 if padding_idx is None else padding_idx)
    return gather(w, 0, ids).dequantize()


def _convolution(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def quantized(x: Tensor, w: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(w, QTensor)
        if w.spec.act is not None:
            raise NotImplementedError(
                f"{conv.__name__}: {w.spec} quantizes activations, and only a linear layer does that"
            )
        return conv(x, w.decode_scaled(x.dtype), *args, **kwargs)

    return quantized


FUNCTIONS.update(
    {
        F.linear: linear,
        torch.matmul: matmul,
        torch.Tensor.matmul: matmul,
        torch.Tensor.__matmul__: matmul,
        torch.Tensor.__rmatmul__: lambda w, x: matmul(x, w),
        torch.mm: matmul,
        torch.Tensor.mm: matmul,
        F.embedding: embedding,
        F.conv1d: _convolution(F.conv1d),
        F.conv2d: _convolution(F.conv2d),
        F.conv3d: _convolution(F.conv3d),
    }
)


# The same at the level of ATen, below autograd.


def _aten_mm(x: Tensor, w: Tensor) -> Tensor:
    if isinstance(w, QTensor) and not isinstance(x, QTensor):
        turned = w.t()
        if turned.is_contiguous():
            return _product(x, turned)  # type: ignore[arg-type]
        # The other orientation is a backward, g @ w: no activation to quantize.
        return x @ w.decode_scaled(x.dtype)
    return torch.mm(_plain(x), _plain(w))


def _aten_addmm(bias: Tensor, x: Tensor, w: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _aten_mm(x, w) * alpha + _plain(bias) * beta


def _aten_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, w, bias)


def _aten_embedding(w: Tensor, ids: Tensor, padding_idx: int = -1, *unused: Any) -> Tensor:
    return embedding(ids, w)


def _aten_convolution(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    return aten.convolution.default(x, w.decode_scaled(x.dtype) if isinstance(w, QTensor) else w, *args)


OPS.update(
    {
        aten.mm.default: _aten_mm,
        aten.addmm.default: _aten_addmm,
        aten.bmm.default: lambda x, w: torch.bmm(_plain(x), _plain(w)),
        aten.linear.default: _aten_linear,
        aten.embedding.default: _aten_embedding,
        aten.convolution.default: _aten_convolution,
    }
)
