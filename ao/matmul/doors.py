"""The functions of PyTorch that multiply by a weight, in whatever spelling, for a weight that is quantized.

There are two kinds. A product of two matrices (`mm`, `matmul`, `addmm`, ...) is found by the names of its operands and goes to
`linear` and `matmul`. Any other function that is defined to read a weight (`einsum`, convolutions, recurrent layers) gets the
decoded weight, in the dtype of the first floating-point argument that is not quantized, and is otherwise PyTorch's own.

Both take what PyTorch's signature takes, by position or by keyword, and `out=`. A call that names other arguments than a
product is known to have goes the second way, so that PyTorch itself answers.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..dtypes.base import FUNCTIONS, OPS, QTensor
from .linear import decoded, dtype_with, embedding, grouped_mm, is_trained, linear, matmul

Door = Callable[..., Any]


def reading(function: Door) -> Door:
    """`function` of the numbers that its quantized arguments stand for.

    Raises NotImplementedError for a weight whose Spec quantizes activations, which only products of two matrices do.
    """

    def door(*args: Any, **kwargs: Any) -> Any:
        out = kwargs.pop("out", None)
        leaves = tree_leaves((args, kwargs))
        for q in leaves:
            if isinstance(q, QTensor) and q.spec.act is not None:
                raise NotImplementedError(
                    f"{function.__name__}: {q.spec} quantizes activations, which only a linear layer and products of two "
                    "matrices do; use a format that quantizes weights alone, or do not quantize this layer"
                )
        plain = next((t for t in leaves if _is_plain_float(t)), None)
        dtype = None if plain is None else plain.dtype
        if plain is not None and function in _CAST and (dtype := dtype_with(plain)) != plain.dtype:
            # Some of them ask for one dtype before autocast casts.
            args, kwargs = tree_map_only(
                Tensor, lambda t: t.to(dtype) if _is_plain_float(t) and t.dtype == plain.dtype else t, (args, kwargs)
            )
        args, kwargs = tree_map_only(QTensor, lambda q: decoded(q, dtype), (args, kwargs))
        if out is None:
            return function(*args, **kwargs)
        if isinstance(out, QTensor):
            return _into(out, function(*args, **kwargs))
        return function(*args, **kwargs, out=out)

    return door


def _is_plain_float(t: Any) -> bool:
    return isinstance(t, Tensor) and not isinstance(t, QTensor) and t.is_floating_point()


def _bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The arguments of `names`, by position or by keyword; None where the call has others."""
    rest = names[len(args) :]
    if len(args) > len(names) or kwargs.keys() != set(rest):
        return None
    return [*args, *(kwargs[name] for name in rest)]


def _fits(a: Tensor, b: Tensor, ranks: tuple[int, int] | None) -> bool:
    """Whether the product of `a` and `b` is one that `matmul` knows, of these ranks if they are given."""
    return (ranks is None or (a.dim(), b.dim()) == ranks) and a.layout == b.layout == torch.strided


def _product(function: Door, names: tuple[str, str], ranks: tuple[int, int] | None = None) -> Door:
    """`function`, a product of two operands of these names, and of these ranks unless it takes any."""

    def door(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
        given = _bound(names, args, kwargs)
        if given is None or not _fits(given[0], given[1], ranks):
            return reading(function)(*args, **kwargs, out=out)
        return _into(out, matmul(given[0], given[1]))

    return door


def _sum(function: Door, names: tuple[str, str, str], ranks: tuple[int, int]) -> Door:
    """`function`: beta * input + alpha * (a @ b), where an input that is multiplied by zero is not read."""

    def door(*args: Any, beta: Any = 1, alpha: Any = 1, out: Tensor | None = None, **kwargs: Any) -> Any:
        given = _bound(names, args, kwargs)
        if given is None or not _fits(given[1], given[2], ranks):
            return reading(function)(*args, **kwargs, beta=beta, alpha=alpha, out=out)
        total, a, b = given
        y = matmul(a, b)
        if alpha != 1:
            y = y * alpha
        if beta != 0:
            total = (total.dequantize() if isinstance(total, QTensor) else total).to(y.dtype).expand(y.shape)
            y = y + (total if beta == 1 else total * beta)
        return _into(out, y)

    return door


def _in_place(function: Door, door: Door) -> Door:
    """`function`, which writes into its first argument what `door` gives."""

    def written(target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(target, QTensor):
            with torch._C.DisableTorchFunctionSubclass():
                return function(target, *args, **kwargs)  # which quantizes anew
        return target.copy_(door(target, *args, **kwargs))

    return written


def _into(out: Tensor | None, y: Tensor) -> Tensor:
    """`y`, in the memory of `out` if that is given, by PyTorch's rules."""
    if out is None:
        return y
    if out.dtype != y.dtype:
        raise RuntimeError(f"out is {out.dtype}, and the result {y.dtype}; give an out of that dtype")
    if not isinstance(out, QTensor):
        return torch.mul(y, 1, out=out)
    if out.shape != y.shape:
        raise RuntimeError(f"out has shape {tuple(out.shape)}, and the result {tuple(y.shape)}")
    return out.copy_(y)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    return _into(out, linear(input, weight, bias))


def _rmatmul(self: Tensor, other: Tensor) -> Tensor:
    return matmul(other, self)


def _inner(function: Door) -> Door:
    def door(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
        given = _bound(("input", "other"), args, kwargs)
        if given is None or not _fits(given[0], given[1], None) or not 1 <= given[1].dim() <= 2:
            return reading(function)(*args, **kwargs, out=out)
        a, b = given
        return _into(out, matmul(a, b.t()))

    return door


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`torch.nn.functional.embedding_bag`: the rows in the bags are gathered and decoded, the others stay packed."""
    bags: dict[str, Any] = {
        "mode": mode,
        "per_sample_weights": per_sample_weights,
        "include_last_offset": include_last_offset,
    }
    if not isinstance(weight, QTensor) or input.is_nested or (is_trained(weight) and (scale_grad_by_freq or sparse)):
        norms = {"max_norm": max_norm, "norm_type": norm_type, "scale_grad_by_freq": scale_grad_by_freq}
        return reading(F.embedding_bag)(input, weight, offsets, **norms, **bags, sparse=sparse, padding_idx=padding_idx)
    rows = embedding(input.reshape(-1), weight, max_norm=max_norm, norm_type=norm_type)
    n = rows.shape[0]
    ids = torch.arange(n, dtype=input.dtype, device=input.device).view(input.shape)
    if padding_idx is not None:
        # All places that do not count share one row.
        rows, ids = F.pad(rows, (0, 0, 0, 1)), torch.where(input == padding_idx % weight.shape[0], n, ids)
        padding_idx = n
    return F.embedding_bag(ids, rows, offsets, **bags, padding_idx=padding_idx)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, which reads quantized keys and values piece by piece."""
    more: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    heads_fit = query.dim() == 4 and (enable_gqa or query.shape[1] == key.shape[1]) and query.shape[0] == key.shape[0]
    if (
        not (isinstance(key, QTensor) and isinstance(value, QTensor) and _is_plain_float(query))
        or not heads_fit
        or key.dim() != 4
        or key.shape[1] != value.shape[1]
        or any(q.spec.act is not None or q.pre_scale is not None for q in (key, value))
        or dropout_p
        or (torch.is_grad_enabled() and (query.requires_grad or is_trained(key) or is_trained(value)))
        or (is_causal and attn_mask is not None)
    ):
        return reading(F.scaled_dot_product_attention)(query, key, value, attn_mask, **more)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*(1,) * (4 - attn_mask.dim()), *attn_mask.shape[:-2], query.shape[2], key.shape[2])
    room = importlib.import_module(".attention", __package__)  # what few programs need is imported when it is asked for
    sight = room.Sight(end=query.shape[2] if is_causal else None, mask=attn_mask)
    return room.attend(query.to(dtype_with(query)), key, value, sight, scale)


_MATRICES: dict[str, tuple[tuple[str, str], tuple[int, int] | None]] = {
    "matmul": (("input", "other"), None),
    "mm": (("input", "mat2"), (2, 2)),
    "bmm": (("input", "mat2"), (3, 3)),
    "mv": (("input", "vec"), (2, 1)),
}

_SUMS: dict[str, tuple[tuple[str, str, str], tuple[int, int]]] = {
    "addmm": (("input", "mat1", "mat2"), (2, 2)),
    "addmv": (("input", "mat", "vec"), (2, 1)),
    "baddbmm": (("input", "batch1", "batch2"), (3, 3)),
}

_CAST: list[Door] = [
    torch.einsum,
    torch.tensordot,
    torch.chain_matmul,
    torch.linalg.multi_dot,
    torch.addbmm,
    torch.Tensor.addbmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    torch.conv_tbc,
    F.scaled_dot_product_attention,
]
"""Those whose arguments autocast casts."""

_READING: list[Door] = [
    *_CAST,
    torch.linalg.vecdot,
    torch.dot,
    torch.Tensor.dot,
    torch.vdot,
    torch.Tensor.vdot,
    torch.bilinear,
    torch.sparse.mm,
    torch.sparse.addmm,
    torch.smm,
    torch.Tensor.smm,
    torch.hspmm,
    torch.convolution,
    torch.lstm_cell,
    torch.gru_cell,
    torch.rnn_tanh_cell,
    torch.rnn_relu_cell,
]

_RECURRENT: list[Door] = [torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu]
"""Those that read all steps and layers, by cuDNN on a GPU."""


def _recurrent(function: Door) -> Door:
    """`reading`, without cuDNN's advice to keep weights in one piece of memory: they are decoded at every call."""
    door = reading(function)

    def quietly(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return door(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single", category=UserWarning)
            return door(*args, **kwargs)

    return quietly


def _fill() -> None:
    for name, (operands, ranks) in _MATRICES.items():
        for function in (getattr(torch, name), getattr(torch.Tensor, name)):
            FUNCTIONS[function] = _product(function, operands, ranks)
    FUNCTIONS[torch.linalg.matmul] = _product(torch.linalg.matmul, ("input", "other"))
    for name, (terms, ranks) in _SUMS.items():
        for function in (getattr(torch, name), getattr(torch.Tensor, name)):
            FUNCTIONS[function] = _sum(function, terms, ranks)
        function = getattr(torch.Tensor, f"{name}_")
        FUNCTIONS[function] = _in_place(function, FUNCTIONS[getattr(torch.Tensor, name)])
    for function in (torch.inner, torch.Tensor.inner):
        FUNCTIONS[function] = _inner(function)
    for function in _READING:
        FUNCTIONS[function] = reading(function)
    for function in _RECURRENT:
        FUNCTIONS[function] = _recurrent(function)
    FUNCTIONS[torch.Tensor.addbmm_] = _in_place(torch.Tensor.addbmm_, FUNCTIONS[torch.Tensor.addbmm])


_fill()
FUNCTIONS.update(
    {
        F.scaled_dot_product_attention: _sdpa,
        torch.dequantize: decoded,
        torch.Tensor.dequantize: decoded,
        F.linear: _linear,
        torch.Tensor.__matmul__: FUNCTIONS[torch.Tensor.matmul],
        torch.Tensor.__rmatmul__: _rmatmul,
        F.grouped_mm: grouped_mm,
        torch._grouped_mm: grouped_mm,
        F.embedding: embedding,
        F.embedding_bag: _embedding_bag,
        # Recurrent weights in one piece of memory, for a library that would read them there: ours are decoded first.
        torch._cudnn_rnn_flatten_weight: lambda *args, **kwargs: None,
    }
)

# A whole layer of torch.nn, which PyTorch calls in graphs, and in eager mode for plain weights only.
_LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default
OPS[_LAYER] = reading(_LAYER)
