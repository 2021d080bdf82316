"""The one place where a quantized weight meets an activation.

`F.linear`, `matmul`, `mm`, `addmm`, `F.embedding` and the convolutions on a QTensor come here, from three doors:
`__torch_function__` (user code), `__torch_dispatch__` (inference mode, DTensor, exported graphs), and the backward of the
one autograd.Function below. A product takes the first path in `PATHS` that accepts it:

    words       a few tokens on a CPU, compiled: codes read as words, sums lane by lane; nothing dense is stored
    int8pack    up to three tokens on a CPU, int8 weight: ATen's own product
    gemv        one token on a GPU, 4- and 8-bit weights: a Triton kernel that reads the packed weight once
    fused       2 to 64 tokens on a GPU (512 on Hopper), 4- and 8-bit weights: Triton kernels that decode on the way
                to the tensor cores, or feed them 8 bits
    sums        one token on a GPU, compiled: sums over each group, then over the groups; nothing dense is stored
    scaled_product  8-bit activation x 8-bit weight on a GPU: int_mm or scaled_mm with the scales in the same kernel
    int_mm      int8 activation x int8 weight on the integer units, int32 accumulation, scales applied to the sum
    scaled_mm   float8 x float8 on the tensor cores of a chip that has them, float32 accumulation
    float8      the same product in float32, where the chip has no float8
    int4pack    ATen's int4 product, for weights in its own layout
    decode      on a GPU: decode the weight by one kernel, then a floating-point product
    pieces      on a CPU: decode the weight, a large one in row pieces, then a floating-point product
    dequantize  decode the weight, then a floating-point product; always accepts

The paths themselves are in anywhere.py, cpu.py and gpu.py.

Autograd: the weight is kept packed and decoded again in backward, so that a frozen quantized weight costs a training run
its packed bytes and no more. Activation quantization is straight-through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import FUNCTIONS, OPS, QTensor, as_bytes
from ..dtypes.ops import gather
from ..dtypes.pieces import is_eager
from . import anywhere, cpu, gpu
from .shared_graph import inlined

aten = torch.ops.aten

Path = Callable[[Tensor, QTensor], Tensor]

PATHS: list[tuple[str, Callable[[Tensor, QTensor], bool], Path]] = [
    ("words", cpu.words_accepts, cpu.words),
    ("int_mm", cpu.int_mm_accepts, cpu.int_mm),
    ("sums", cpu.sums_accepts, cpu.sums),
    ("int8pack", cpu.int8pack_accepts, cpu.int8pack),
    ("split", cpu.split_accepts, cpu.split),
    ("gemv", gpu.gemv_accepts, gpu.gemv),
    ("fused", gpu.fused_accepts, gpu.fused),
    ("sums", gpu.sums_accepts, gpu.sums),
    ("scaled_product", gpu.scaled_product_accepts, gpu.scaled_product),
    ("int_mm", anywhere.int_mm_accepts, anywhere.int_mm),
    ("scaled_mm", anywhere.scaled_mm_accepts, anywhere.scaled_mm),
    ("int4pack", cpu.int4pack_accepts, cpu.int4pack),
    ("int4pack", anywhere.int4pack_accepts, anywhere.int4pack),
    ("decode", gpu.decode_accepts, gpu.decode),
    ("pieces", cpu.pieces_accepts, cpu.pieces),
    ("float8", anywhere.float8_accepts, anywhere.float8),
    ("dequantize", lambda x, w: True, anywhere.dequantize),
]
"""Each path with its name and what it accepts, in the order in which they are asked. x: (M, K), w: (N, K)."""


_OPERATORS = {"gemv", "fused", "scaled_product", "decode"}
"""Those that call operators of ours: an exported program runs where nobody defines them."""

_BY_TOKENS = {"words", "int8pack", "sums"}
"""Those that are for a few tokens only: an exported program has one graph for any number."""


def path_name(x: Tensor, w: QTensor) -> str:
    """The name of the path that `F.linear(x, w)` takes. x: (..., K), w: (N, K)."""
    return _path(x.reshape(-1, x.shape[-1]), w)[0]


def _path(x: Tensor, w: QTensor) -> tuple[str, Path]:
    """The first path that accepts. x: (M, K), w: (N, K)."""
    out = set()
    if torch.compiler.is_exporting():
        out = _OPERATORS | (_BY_TOKENS if isinstance(x.shape[0], torch.SymInt) else set())
    return next((name, path) for name, accepts, path in PATHS if name not in out and accepts(x, w))


def _product(x: Tensor, w: QTensor) -> Tensor:
    """x: (..., K), w: (N, K) -> (..., N)."""
    if is_eager(x):
        return chosen(x, w)(x, w)
    if w.pre_scale is not None:
        x = _scaled(x, w)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    _, path = _path(rows, w)
    return path(rows, w).reshape(*x.shape[:-1], w.shape[0])


def _scaled(x: Tensor, w: QTensor) -> Tensor:
    assert w.pre_scale is not None
    return (x.float() * w.pre_scale.float()).to(x.dtype)


_CHOICES: dict[tuple[Any, ...], dict[tuple[int, int, torch.dtype], Path]] = {}


def chosen(x: Tensor, w: QTensor) -> Path:
    """The product of x (..., K) with w (N, K) in eager mode, decided once for weights of one form and a class of M.

    The choice is kept in the weight itself, so that asking again takes a microsecond. Raises ValueError where K differs.
    """
    shape = x.shape
    k = shape[-1] if shape else 0
    tokens = x.numel() // k if k else 0
    key = k, tokens if tokens <= 16 else 1 << (tokens - 1).bit_length(), x.dtype
    choices = w.__dict__.get("choices")
    if choices is None:
        choices = w.choices = _CHOICES.setdefault(_form(w), {})  # type: ignore[attr-defined]
    choice = choices.get(key)
    if choice is None:
        _check_fits(x, w)
        choice = choices[key] = _choose(x.reshape(-1, k), w)
    return choice


def _form(w: QTensor) -> tuple[Any, ...]:
    """What a choice depends on."""
    fields = ((name, t.shape, t.stride(), t.dtype) for name, t in w.fields().items())
    return type(w), w.spec, w.shape, w.device, *fields


_LAUNCHES = {"gemv": gpu.gemv_launch, "fused": gpu.fused_launch}
"""Of the paths that have a shorter way in eager mode: what makes it, for a form of the weight."""


def _choose(x: Tensor, w: QTensor) -> Path:
    """x: (M, K), w: (N, K) -> a function of x (..., K) and any weight of this form."""
    if w.pre_scale is not None:
        plain = _choose(x, w.like(w.shape, w.dtype, {n: t for n, t in w.fields().items() if n != "pre_scale"}))
        return lambda x, w: plain(_scaled(x, w), w)
    name, path = _path(x, w)
    launch = _LAUNCHES[name](x, w) if name in _LAUNCHES else None
    if launch is not None:
        return launch

    def run(x: Tensor, w: QTensor) -> Tensor:
        if x.dim() == 2:
            return path(x, w)
        return path(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[0])

    return run


def anew(w: QTensor) -> QTensor:
    """`w`, and in a graph that is traced one that a compiler takes for another tensor than in forward.

    It merges two decodings of one weight, and then keeps the dense weight from forward to backward. It does not know that the
    complement of a complement is the number itself, and computes that in the same kernel.
    """
    return w.map(_anew) if anywhere.compiling() else w


def _anew(t: Tensor) -> Tensor:
    if isinstance(t, QTensor):
        return t.map(_anew)
    codes = as_bytes(t)
    return (codes.neg().neg() if codes.is_floating_point() else ~(~codes)).view(t.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: QTensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        with inlined():
            return _product(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ gpu.decoded(anew(w), grad.dtype)
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])  # (M, N)
            grad_w = (rows.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(w.dtype)
        return grad_x, grad_w


def _check_fits(x: Tensor, w: QTensor) -> None:
    if w.dim() != 2 or x.dim() == 0 or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"linear: the input of shape {tuple(x.shape)} does not fit the weight of shape {tuple(w.shape)}; "
            "the last dim of the input must be the weight's second"
        )


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a QTensor weight. x: (..., K), w: (N, K), bias: (N,) -> (..., N) in x's dtype.

    Raises ValueError where K differs.
    """
    if not isinstance(w, QTensor):
        return F.linear(_plain(x), w, _plain(bias))
    if is_eager(x) and not torch._C._is_any_autocast_enabled() and not torch.is_grad_enabled():
        out = chosen(x, w)(x, w)  # nothing else to see to: the short way
        return out if bias is None else out.add_(bias) if bias.dtype is out.dtype else out + bias.to(out.dtype)
    _check_fits(x, w)
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


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.grouped_mm` with quantized experts: rows [offs[e - 1], offs[e]) of `x` times `w[e]`.

    x: (M, K), sorted by expert. w: (E, K, N), the transpose of the experts' weights. offs: (E,) int32, where each expert's
    rows end; rows after the last are zero. -> (M, N). Each expert that has rows multiplies as a linear layer does; where
    the groups are not known, in a traced graph, all experts are decoded.
    """
    if offs is None or w.dim() != 3 or x.dim() != 2 or not is_eager(x) or any(v is not None for v in kwargs.values()):
        return torch._grouped_mm(_plain(x), _plain(w), offs, **kwargs)
    ends = offs.tolist()
    groups = [(e, start, stop) for e, (start, stop) in enumerate(zip([0, *ends], ends)) if stop > start]
    rows = [matmul(x[start:stop], w[e]) for e, start, stop in groups]
    rows.append(x.new_zeros(x.shape[0] - (ends[-1] if ends else 0), w.shape[-1]))
    return torch.cat(rows)


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
        F.grouped_mm: grouped_mm,
        torch._grouped_mm: grouped_mm,
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
        return x @ gpu.decoded(anew(w), x.dtype)
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
