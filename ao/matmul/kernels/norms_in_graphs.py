"""Which nodes of a compiled graph are the norm of rows, LayerNorm or RMSNorm, from the operators into which PyTorch took it apart
or that it is written in, with a weight and a bias after it, for all rows or, as in a diffusion transformer, for those of each
image."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch

from . import joined

aten = torch.ops.aten


class Norm(NamedTuple):
    """What `normalize_rows.normalized` computes: the node that it is of, (..., K), and the nodes of weights and biases, (K,) or
    (B, 1, ..., K), or None."""

    source: Any
    weight: Any
    bias: Any
    eps: float
    centered: bool
    added: bool


def norm_of(token: Any, k: int) -> Norm | None:
    """How rows of k numbers come from a norm; None where they are something else."""
    dtype, shape = token.meta["val"].dtype, token.meta["val"].shape
    if dtype not in (torch.bfloat16, torch.float16) or k % 8 or not all(isinstance(size, int) for size in shape):
        return None
    node: Any = _converted(token)
    weight, bias, added = None, None, False
    while (core := _core(node, k)) is None:
        op = node.target
        if (bias is not None and op == aten.add.Tensor) or weight is not None or len(node.args) != 2 or node.kwargs:
            return None
        parts = _apart(node, k) if op in (aten.add.Tensor, aten.mul.Tensor) else None
        if parts is None:
            return None
        node, vector = parts
        if op == aten.add.Tensor:
            bias = vector
        else:
            added = _is(vector, aten.add.Tensor) and vector.args[1] == 1 and not vector.kwargs
            weight = _converted(vector.args[0]) if added else vector
    source, eps, centered = core
    given = (source, *(each for each in (weight, bias) if each is not None))
    if any(each.meta["val"].dtype != dtype for each in given) or source.meta["val"].numel() != math.prod(shape):
        return None
    rows = {_rows_of(each, k) for each in given[1:]} - {1}
    if len(rows) > 1 or any(source.meta["val"].shape[0] != each for each in rows):
        return None
    return Norm(source, weight, bias, eps, centered, added)


def _converted(node: Any) -> Any:
    """What `node` is in another dtype or shape."""
    while node.target in joined.VIEWS or node.target == torch.ops.prims.convert_element_type.default:
        node = node.args[0]
    return node


def _rows_of(node: Any, k: int) -> int:
    """How many vectors of k numbers a node is; 0 where it is something else, or they are not each for as many rows."""
    shape = getattr(node.meta.get("val"), "shape", ())
    if not shape or shape[-1] != k or not all(isinstance(size, int) for size in shape):
        return 0
    if math.prod(shape) == k:
        return 1
    return shape[0] if len(shape) > 1 and math.prod(shape) == shape[0] * k else 0


def _apart(node: Any, k: int) -> tuple[Any, Any] | None:
    """Of a sum or product of rows and vectors: the rows and the vectors, without their conversions."""
    for rows, vector in (node.args, reversed(node.args)):
        if isinstance(rows, torch.fx.Node) and isinstance(vector, torch.fx.Node):
            shape, of_vector = rows.meta["val"].shape, vector.meta["val"].shape
            count = _rows_of(vector, k)
            if shape == node.meta["val"].shape and (count == 1 or (count > 1 and len(of_vector) == len(shape))):
                return _converted(rows), _converted(vector)
    return None


def _core(node: Any, k: int) -> tuple[Any, float, bool] | None:
    """Of (x - mean(x)) / sqrt(var(x) + eps): x, eps and True; of x / sqrt(mean(x^2) + eps): x, eps and False."""
    for top, root in (node.args, reversed(node.args)) if _is(node, aten.mul.Tensor) else ():
        total: Any = root.args[0] if _is(root, aten.rsqrt.default) and isinstance(top, torch.fx.Node) else None
        if not _is(total, aten.add.Tensor, aten.add.Scalar) or not isinstance(total.args[1], (int, float)):
            continue
        sums, eps = total.args[0], float(total.args[1])
        centered = _is(top, aten.sub.Tensor) and _is(sums, operator.getitem)
        if centered:
            top, mean = top.args
            sums, which = sums.args
            found = _is(sums, aten.var_mean.correction) and _is(mean, operator.getitem) and mean.args == (sums, 1)
            found = found and which == 0 and sums.kwargs.get("correction") == 0 and sums.args[0] is top
        else:
            square: Any = sums.args[0] if _is(sums, aten.mean.dim) else None
            found = _is(square, aten.pow.Tensor_Scalar) and square.args == (top, 2)
        if not found:
            continue
        given = top.meta["val"]
        if given.dtype == torch.float32 and given.shape[-1] == k and list(sums.args[1]) in ([-1], [given.dim() - 1]):
            return _converted(top), eps, centered
    return None


def _is(node: Any, *targets: Any) -> bool:
    """Whether it is a node of one of these operators."""
    return isinstance(node, torch.fx.Node) and node.target in targets
