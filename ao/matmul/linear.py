"""The one place where a quantized weight meets an activation.

Every product and every embedding comes here: what users call (`__torch_function__`, doors.py), what PyTorch calls itself
(`__torch_dispatch__`: inference mode, DTensor, exported graphs), and the backward of the one autograd.Function of a product.
A product takes the first path in `PATHS` of its device that accepts it:

    of weights that leave out zeros (sparse.py)
        unfolded    two of four, on a CPU, eager: the product of the format of the numbers, with the zeros beside them, kept
        sparse      on a GPU: kernels that decode in registers, the sparse units, or dense ones, by the number of tokens
        blocks      kept blocks, on any device
    on a CPU
        made        eager, and in graphs where no unit multiplies bfloat16: C++ that decodes in registers, compiled when it is
                    first needed (made.py); 8 tokens where there are units, any number elsewhere
        words       a few tokens, compiled: codes read as words, sums lane by lane; nothing dense is stored
        int8        int8 weight on the integer units: PyTorch's product, and C++ that makes bytes of the activation and numbers
                    of the sums (cpu_int8.py)
        int_mm      int8 activation x int8 weight on the integer units, int32 accumulation, scales applied to the sum
        sums        what `words` computes, with AVX-512
        int8pack    up to three tokens, int8 weight: ATen's own product
        kept        up to 64 tokens in eager mode without a C++ compiler, 4 bits in groups: ATen's own product, on a copy that
                    is kept
        split       int8 weight: the activation as two int8 numbers, two products of integers
        int4pack    ATen's int4 product, for weights in its own layout
        emulated    small floats in blocks x the same: their numbers in float32, and what multiplies all of them after the sum
        pieces      decode the weight, a large one in row pieces, then a floating-point product
    on a GPU of NVIDIA or AMD
        trits       up to 64 tokens, int8 activation x numbers -1, 0 and 1, five in a byte: kernels that read them as they are
        gemv        one token, 4- and 8-bit weights: a Triton kernel that reads the packed weight once
        fused       2 to 64 tokens (512 on Hopper), 4- and 8-bit weights: Triton kernels that decode on the way to the tensor
                    cores, or feed them 8 bits
        gemv_codes  one token, other integers, tables and floats of 4 bits or more: the kernel template; trits
        sums        one token, compiled: sums over each group, then over the groups; nothing dense is stored
        scaled_product  8-bit activation x 8-bit weight: int_mm or scaled_mm with the scales in the same kernel
        int_mm      as on a CPU
        scaled_mm   float8 x float8 on the tensor cores of a chip that has them, float32 accumulation
        int4pack    as on a CPU
        block_scaled  MX and NVFP4 activation x such a weight, on chips that multiply blocks (Blackwell)
        emulated    the same elsewhere, in bfloat16 with a float32 sum
        decode      4- and 8-bit weights: decode by one kernel, then a floating-point product
        few         any other format that has an operand: decoded on the way to the tensor cores, beyond 64 tokens (512 on Hopper)
                    to memory
    on any device, after those
        float8      float8 x float8 in float32, where the chip has no float8
        dequantize  decode the weight, then a floating-point product; always accepts
    in a graph that becomes an ONNX model
        standard_operators  those that ONNX has

The paths themselves are in cpu.py, gpu.py, anywhere.py, sparse.py and onnx.py. What they know of a weight is its operand
(ao/dtypes/operand.py), and never its format.

Autograd: the weight is kept packed and decoded again in backward, so that a frozen quantized weight costs a training run
its packed bytes and no more. Activation quantization is straight-through.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..dtypes.base import OPS, QTensor, as_bytes, has_scale_by_row
from ..dtypes.ops import gather
from ..dtypes.rounding import range_power
from ..dtypes.tracing import exporting, fresh, is_eager
from . import anywhere, cpu, gpu, onnx, sparse
from .form import key_of
from .kernels.device import has_kernels
from .path import Path, Product
from .shared_graph import inlined

aten = torch.ops.aten

PATHS: dict[str, tuple[Path, ...]] = {
    "cpu": (*sparse.CPU, *cpu.PATHS),
    "cuda": (*sparse.GPU, *gpu.PATHS),
    "onnx": onnx.PATHS,
    "": (*sparse.ANYWHERE, *anywhere.PATHS),
}
"""The paths of each type of device, in the order in which they are asked; then come those of "", which any device has."""


def path_name(x: Tensor, w: QTensor) -> str:
    """The name of the path that `F.linear(x, w)` takes. x: (..., K), w: (N, K)."""
    return _path(x.reshape(-1, x.shape[-1]), w).name


def _path(x: Tensor, w: QTensor) -> Path:
    """The first path that accepts. x: (M, K), w: (N, K)."""
    own = PATHS.get("onnx" if exporting() else x.device.type, ())
    if torch.compiler.is_exporting():
        any_number = isinstance(x.shape[0], torch.SymInt)
        own = tuple(p for p in own if not (p.operator or (p.few and any_number)))
    return next(p for p in (*own, *PATHS[""]) if p.accepts(x, w))


def _product(x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., K), w: (N, K), bias: (N,) -> (..., N)."""
    if is_eager(x, or_recorded=False):
        product, adds_bias = chosen(x, w)
        if bias is not None and adds_bias and _is_row(bias, w):
            return product(x, w, bias)
        return _plus(product(x, w), bias)
    if w.pre_scale is not None:
        return _with_multiplier(_product, x, w, bias)
    if 0 in w.shape:
        return _plus(F.linear(x, w.decode(x.dtype)), bias)
    if (other := w.spec.rearranged(w)) is not None:
        stored, order = other
        out = gpu.ordered(x.reshape(-1, x.shape[-1]), stored, order)
        if out is None:
            return _product(gpu.in_order(x, order), stored, bias)
        return _plus(out.reshape(*x.shape[:-1], w.shape[0]), bias)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    path = _path(rows, w)
    if _chooses_scale(x, w):
        out = _in_range(path.run, rows, w)
    elif bias is not None and _is_row(bias, w) and path.adds_bias(rows):
        out, bias = path.run(rows, w, bias), None
    else:
        out = path.run(rows, w)
    return _plus(out.reshape(*x.shape[:-1], w.shape[0]), bias)


def _plus(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(out.dtype)


def _is_row(bias: Tensor, w: QTensor) -> bool:
    """Whether a kernel may read `bias` as (N,), rather than PyTorch, which broadcasts, and raises where it does not fit."""
    plain = bias.shape == w.shape[:1] and bias.device == w.device and not isinstance(bias, QTensor)
    return plain and bias.is_floating_point() and bias.is_contiguous()


def _with_multiplier(product: Product, x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """`product` of x (..., K) and w (N, K) less its `pre_scale`, which is the input's or, where w is turned, the output's."""
    assert w.pre_scale is not None
    scale, plain = w.pre_scale.float(), _without_multiplier(w)
    if scale.shape[0] == 1:
        x = (_wide(x) * scale[0]).to(x.dtype)
        return product(x, plain) if bias is None else product(x, plain, bias)
    # (..., N), which may be more than float16 holds before
    return _plus((product(_wide(x), plain) * scale[:, 0]).to(x.dtype), bias)


def _wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _chooses_scale(x: Tensor, w: QTensor) -> bool:
    """Whether the format of `w` chooses a scale, in float32, for an activation in float64."""
    return x.dtype == torch.float64 and w.spec.act is not None and w.act_scale is None


def _in_range(product: Product, x: Tensor, w: QTensor) -> Tensor:
    """`product` of x (..., K) in float64 and w (N, K), whose format quantizes x in float32: x is brought into that range."""
    assert w.spec.act is not None
    power = range_power(x, has_scale_by_row(w.spec.act))
    return product(x / power, w) * power


def _without_multiplier(w: QTensor) -> QTensor:
    return w.like(w.shape, w.dtype, {name: t for name, t in w.fields().items() if name != "pre_scale"})


_CHOICES: dict[Any, dict[tuple[int, int, torch.dtype], tuple[Product, bool]]] = {}


def chosen(x: Tensor, w: QTensor) -> tuple[Product, bool]:
    """The product of x (..., K) with w (N, K) in eager mode, and whether it takes a bias, decided once for weights of one form
    and a class of M.

    The choice is kept in the weight itself, so that asking again takes a microsecond. Raises ValueError where K differs.
    """
    shape = x.shape
    k = shape[-1] if shape else 0
    tokens = x.numel() // k if k else 0
    key = k, tokens if tokens <= 16 else 1 << (tokens - 1).bit_length(), x.dtype
    choices = w.__dict__.get("choices")
    if choices is None:
        choices = w.choices = _CHOICES.setdefault(key_of(w), {})  # type: ignore[attr-defined]
    choice = choices.get(key)
    if choice is None:
        _check_fits(x, w)
        choice = choices[key] = _choose(x.reshape(-1, k) if k else x, w)
    return choice


def _choose(x: Tensor, w: QTensor) -> tuple[Product, bool]:
    """x: (M, K), w: (N, K) -> a function of x (..., K), any weight of this form and, where it takes one, a bias."""
    if w.dim() == 1 or 0 in w.shape:
        return lambda x, w: F.linear(x, decoded(w, x.dtype)), False
    if x.shape[0] == 0:
        return lambda x, w: x.new_empty(*x.shape[:-1], w.shape[0]), False
    if w.pre_scale is not None:
        of_input = w.pre_scale.shape[0] == 1
        plain, adds_bias = _choose(x if of_input else _wide(x), _without_multiplier(w))
        return functools.partial(_with_multiplier, plain), adds_bias and of_input
    if (other := w.spec.rearranged(w)) is not None:
        stored, order = other
        at_once = gpu.gemv_ordered_launch(x, stored, order) or gpu.fused_ordered_launch(x, stored, order)
        ordered = at_once or gpu.ordered_launch(x, order, _choose(x, stored)[0])
        return lambda x, w: ordered(x, *w.spec.rearranged(w)), False
    path = _path(x, w)
    in_range = _chooses_scale(x, w)
    adds_bias = not in_range and path.adds_bias(x)
    if path.launch is not None and not in_range:
        return path.launch(x, w), adds_bias
    product: Product = functools.partial(_in_range, path.run) if in_range else path.run

    def run(x: Tensor, w: QTensor, *bias: Tensor) -> Tensor:
        if x.dim() == 2:
            return product(x, w, *bias)
        return product(x.reshape(-1, x.shape[-1]), w, *bias).reshape(*x.shape[:-1], w.shape[0])

    return run, adds_bias


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


def _unwrapped(w: Tensor) -> Any:
    """The QTensor that torch.func wrapped, as it does with every tensor that a Function gets."""
    while not isinstance(w, QTensor):
        w = torch._C._functorch.get_unwrapped(w)
    return w


class _Linear(torch.autograd.Function):
    """`_product`, and what torch.func asks of it."""

    @staticmethod
    def forward(x: Tensor, w: QTensor) -> Tensor:
        with inlined():
            return _product(x, w).detach()  # a view that was made here could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QTensor], output: Tensor) -> None:
        x, w = inputs
        # Not the parameter itself, which modules could not move to another dtype or device as long as the graph is alive.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w.detach() if isinstance(w, QTensor) else w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        w = _unwrapped(w)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ gpu.decoded(anew(w), grad.dtype)
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])  # (M, N)
            grad_w = (rows.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(w.dtype)
        return grad_x, grad_w

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, w: QTensor) -> tuple[Tensor, int]:
        """Samples are rows like others, but where they share the scale of a quantized activation."""
        x, act = x.movedim(in_dims[0], 0), w.spec.act
        if act is None or w.act_scale is not None or act.block == (1, -1):
            return _differentiated(x, w), 0
        return torch.stack([_differentiated(sample, w) for sample in x]), 0


class _ForwardLinear(_Linear):
    """`_Linear` with a derivative in forward mode. Dynamo takes no Function that has one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QTensor], output: Tensor) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent_x: Tensor | None, tangent_w: Tensor | None) -> Tensor:
        x, w = ctx.saved_tensors
        w = _unwrapped(w)
        parts = []
        if tangent_x is not None:
            parts.append(tangent_x @ w.decode_scaled(tangent_x.dtype).t())
        if tangent_w is not None:
            parts.append(x @ tangent_w.to(x.dtype).t())
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _differentiated(x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """`_product`, under whatever computes derivatives."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return _plus(_ForwardLinear.apply(x, w), bias)
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return _plus(_Linear.apply(x, w), bias)
    if bias is not None and torch.is_grad_enabled() and bias.requires_grad:
        return _plus(_product(x, w), bias)
    return _product(x, w, bias)


def _check_fits(x: Tensor, w: QTensor) -> None:
    if w.dim() not in (1, 2) or x.dim() == 0 or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"linear: the input of shape {tuple(x.shape)} does not fit the weight of shape {tuple(w.shape)}; "
            "the last dim of the input must be the weight's second"
        )
    if not x.is_floating_point():
        raise TypeError(f"linear: the input must be floating point, got {x.dtype}; convert it first")


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a QTensor weight. x: (..., K), w: (N, K), bias: (N,) -> (..., N) in x's dtype.

    Autocast casts x to its dtype, as everywhere. Raises ValueError where K differs, TypeError for an input of integers.
    """
    if not isinstance(w, QTensor):
        return F.linear(_plain(x), w, _plain(bias))
    plain = not (torch._C._is_any_autocast_enabled() or torch.is_grad_enabled() or forward_ad._current_level >= 0)
    if plain and is_eager(x, or_recorded=False):
        product, adds_bias = chosen(x, w)  # nothing else to see to: the short way
        if bias is not None and adds_bias and _is_row(bias, w):
            return product(x, w, bias)
        out = product(x, w)
        return out if bias is None else out.add_(bias) if bias.dtype is out.dtype else out + bias.to(out.dtype)
    x = _plain(x)
    _check_fits(x, w)
    if w.dim() == 1 or 0 in w.shape:
        return F.linear(x, decoded(w, x.dtype), bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))
        # Sums over codes are larger than float16 holds, and need more bits than bfloat16 has.
        with torch.autocast(kind, enabled=False):
            return linear(x, w, bias)
    return _differentiated(x, w, bias)


def _plain(x: Any) -> Any:
    return x.dequantize() if isinstance(x, QTensor) else x


def is_trained(w: Tensor) -> bool:
    """Whether a gradient of `w` is recorded."""
    return torch.is_grad_enabled() and w.requires_grad


def decoded(w: QTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers of `w` in a floating-point `dtype`, or in its own; a gradient passes to `w` as if they were its own."""
    dtype = w.dtype if dtype is None or not dtype.is_floating_point else dtype
    return _Decoded.apply(w, dtype) if is_trained(w) else w.decode_scaled(dtype)


def dtype_with(x: Tensor) -> torch.dtype:
    """The dtype in which a function that autocast casts is to get the weight that meets `x`.

    That of `x`, but autocast's own where it goes from one dtype of 16 bits to the other: by way of the first a number would lose
    bits, or its size.
    """
    kind, dtype = x.device.type, x.dtype
    cast = torch.is_autocast_enabled(kind) and dtype in (torch.float16, torch.bfloat16)
    return torch.get_autocast_dtype(kind) if cast else dtype


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(w: QTensor, dtype: torch.dtype) -> Tensor:
        return w.decode_scaled(dtype).detach()  # a view that was made here could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[QTensor, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _Activation(torch.autograd.Function):
    """What the weight's Spec makes of an activation, with a straight-through gradient. x: (..., K), w: (..., N, K)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: QTensor) -> Tensor:
        pre_scale = None if w.pre_scale is None else w.pre_scale.float()
        if pre_scale is not None and pre_scale.shape[-1] != w.shape[-1]:
            pre_scale = None  # the output's, of a weight that is turned
        elif pre_scale is not None and pre_scale.numel() == w.shape[-1]:
            pre_scale = pre_scale.flatten()
        rows = x if pre_scale is None else (_wide(x) * pre_scale).to(x.dtype)
        rows = rows.reshape(-1, x.shape[-1])  # (M, K)
        quantized = (
            _in_range(anywhere.quantized_act, rows, w) if _chooses_scale(x, w) else anywhere.quantized_act(rows, w)
        )
        rows = fresh(quantized.view(x.shape))
        return rows if pre_scale is None else (_wide(rows) / pre_scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _activation(x: Tensor, w: QTensor) -> Tensor:
    return x if w.spec.act is None else _Activation.apply(x, w)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with a QTensor on either side, or on both.

    A quantized (K, N) right side or (N, K) left side is the weight of a linear layer; one with more dims is decoded, but for a
    stack of matrices that meet a row each on a GPU (routed_experts.py).
    """
    if isinstance(b, QTensor) and not isinstance(a, QTensor) and a.dim() > 0:
        if b.dim() == 2:
            return linear(a, b.t())
        if b.dim() > 2:
            a = _activation(a, b.mT)  # type: ignore[arg-type]
            out = _batched(a, b)
            return torch.matmul(a, decoded(b, dtype_with(a))) if out is None else out
    if isinstance(a, QTensor) and not isinstance(b, QTensor) and b.dim() > 0:
        if a.dim() == 2:
            return linear(b, a) if b.dim() == 1 else linear(b.mT, a).mT.contiguous()
        if a.dim() > 2:
            b = _activation(b, a) if b.dim() == 1 else _activation(b.mT, a).mT
            out = _batched(a, b)
            return torch.matmul(decoded(a, dtype_with(b)), b) if out is None else out
    dtype = next((t.dtype for t in (a, b) if not isinstance(t, QTensor)), None)
    a, b = (decoded(t, dtype) if isinstance(t, QTensor) else t for t in (a, b))
    return torch.matmul(a, b)


def _routed_experts() -> Any:
    """routed_experts.py, which few programs need."""
    return importlib.import_module(".routed_experts", __package__)


def _batched(a: Tensor, b: Tensor) -> Tensor | None:
    """The product of stacks of matrices, one of them quantized, where there are kernels for it."""
    return _routed_experts().batched(a, b) if has_kernels(a.device) else None


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.grouped_mm` with quantized experts: rows [offs[e - 1], offs[e]) of `x` times `w[e]`.

    x: (M, K), sorted by expert. w: (E, K, N), the transpose of the experts' weights. offs: (E,) int32, where each expert's
    rows end; rows after the last are zero. -> (M, N). On a GPU few rows read the codes of their experts. Else each expert that
    has rows multiplies as a linear layer does; where the groups are not known, in a traced graph, all experts are decoded.
    """
    simple = offs is not None and w.dim() == 3 and x.dim() == 2 and not any(v is not None for v in kwargs.values())
    each = simple and is_eager(x)
    turned, x = w.mT, _plain(x)
    if isinstance(turned, QTensor):
        x = x if each else _activation(x, turned)
        taken = has_kernels(w.device) and simple and not (each and turned.spec.act)
        if taken and (out := _routed_experts().grouped(x, turned, offs)) is not None:
            return out
    if not each:
        return torch._grouped_mm(x, decoded(w, x.dtype) if isinstance(w, QTensor) else w, offs, **kwargs)
    assert offs is not None
    ends = offs.tolist()
    groups = [(e, start, stop) for e, (start, stop) in enumerate(zip([0, *ends], ends)) if stop > start]
    rows = [matmul(x[start:stop], w[e]) for e, start, stop in groups]
    rows.append(x.new_zeros(x.shape[0] - (ends[-1] if ends else 0), w.shape[-1]))
    return torch.cat(rows)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ids: Tensor, w: QTensor, padding_idx: int) -> Tensor:
        # Not `dequantize`, which torch.export does not see through.
        return gather(w, 0, ids).decode_scaled(w.dtype).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QTensor, int], output: Tensor) -> None:
        ids, w, ctx.padding_idx = inputs
        ctx.rows = w.shape[0]
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        return None, aten.embedding_dense_backward(grad, ids, ctx.rows, ctx.padding_idx, False), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], ids: Tensor, w: QTensor, padding_idx: int
    ) -> tuple[Tensor, int]:
        return _Embedding.apply(ids.movedim(in_dims[0], 0), w, padding_idx), 0


def embedding(
    ids: Tensor,
    w: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding` with a QTensor table: the packed rows are gathered first, then decoded.

    max_norm: rows with a larger norm are scaled to it. The table stays as it is, which PyTorch would write to.

    Raises IndexError for a negative id, on a CPU, and ValueError for a padding_idx that is no row.
    """
    assert isinstance(w, QTensor)
    rows = w.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx must be within the {rows} rows of the table, got {padding_idx}")
    if is_eager(ids) and ids.device.type == "cpu" and ids.numel() and ids.min() < 0:
        raise IndexError(f"embedding: the ids must be 0 to {rows - 1}, got {ids.min().item()}")
    if onnx.decodes_table(w):
        return F.embedding(ids, onnx.weight(w, w.dtype), padding_idx, max_norm, norm_type)
    if is_trained(w) and (scale_grad_by_freq or sparse):
        return F.embedding(ids, decoded(w), padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if is_trained(w) or torch._C._are_functorch_transforms_active():
        out = _Embedding.apply(ids, w, -1 if padding_idx is None else padding_idx % rows)
    else:
        out = gather(w, 0, ids).decode_scaled(w.dtype)  # not `dequantize`, which torch.export does not see through
    if max_norm is not None:
        out = out.clone()  # the gradient passes as if the table had had these rows
        each = torch.arange(ids.numel(), device=ids.device)
        torch.embedding_renorm_(out.detach().view(-1, w.shape[1]), each, max_norm, norm_type)
    return out


# The same at the level of ATen, below autograd.


def _aten_mm(x: Tensor, w: Tensor) -> Tensor:
    if isinstance(w, QTensor) and not isinstance(x, QTensor):
        turned = w.t()
        if turned.stride() == (turned.shape[1], 1):  # which tells more than is_contiguous() where a dim has one element
            return linear(x, turned)
        # The other orientation is a backward, g @ w: no activation to quantize.
        return x @ gpu.decoded(anew(w), x.dtype)
    return _aten_reading(aten.mm.default)(x, w)


def _aten_bmm(x: Tensor, w: Tensor) -> Tensor:
    """As `_aten_mm`, of models side by side, each of which quantizes its own activations. x: (E, M, K), w: (E, K, N)."""
    if isinstance(w, QTensor) and w.spec.act is not None and not isinstance(x, QTensor) and w.mT.is_contiguous():
        x = torch.stack([_activation(rows, each) for rows, each in zip(x, w.mT)])
    return _aten_reading(aten.bmm.default)(x, w)


def _aten_addmm(bias: Tensor, x: Tensor, w: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _aten_mm(x, w) * alpha + _plain(bias) * beta


def _aten_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, w, bias)


def _aten_embedding(w: Tensor, ids: Tensor, padding_idx: int = -1, *unused: Any) -> Tensor:
    return embedding(ids, w)


def _aten_reading(op: Any) -> Callable[..., Any]:
    """`op` of decoded weights, in the dtype of the first argument that is not quantized."""

    def handler(*args: Any) -> Any:
        plain = next((t for t in args if isinstance(t, Tensor) and not isinstance(t, QTensor)), None)
        dtype = None if plain is None else plain.dtype
        return op(*(decoded(t, dtype) if isinstance(t, QTensor) else t for t in args))

    return handler


OPS.update(
    {
        aten.mm.default: _aten_mm,
        aten.addmm.default: _aten_addmm,
        aten.bmm.default: _aten_bmm,
        aten.linear.default: _aten_linear,
        aten.embedding.default: _aten_embedding,
    }
)
for _op in (aten.mv, aten.dot, aten._trilinear, aten.convolution, aten.convolution_backward):
    OPS[_op.default] = _aten_reading(_op.default)


def _experts_of_transformers(name: str) -> Callable[..., Any]:
    """The product of experts that transformers defines itself, for what PyTorch's `grouped_mm` does not compile (float32):
    the experts are decoded first. x: (M, K), w: (E, K, N)."""

    def handler(x: Tensor, w: Tensor, *args: Any) -> Any:
        return getattr(torch.ops.transformers, name)(x, _plain(w), *args)

    return handler


for _name in ("grouped_mm_fallback", "grouped_mm_fallback_backward"):
    OPS[f"transformers::{_name}"] = _experts_of_transformers(_name)
