"""Where a compiled graph quantizes an activation: after a norm, in the kernel of the norm.

`ao::dynamic_product` quantizes an activation by a kernel of its own, which reads all of it once more, and does so anew for each
weight that it meets. Where Inductor makes a graph of such products, it asks how to lower each of them:

    after a norm    of rows that are not long: they are reduced already, so that their largest numbers are found, and codes are
                    written, in the same kernel, in place of the activation; of long rows, by our kernel, which computes the
                    norm too, with a weight and a bias, or those of each image as in a diffusion transformer
    after a GELU or SiLU of a product, of what the graph is given, or of some columns of these, which others may multiply, and
    which may come after other columns
                    by our kernel, which computes that too: Inductor would compute it once for the largest number and once
                    more for the codes
    elsewhere       by our kernel

and what several products share, such as those of queries, keys and values, is quantized once, and meets weights of one shape in
one launch.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from . import joined, norms_in_graphs
from .ways_of_codes import joins

LONGEST = 1024
"""Numbers of a row, at most: Inductor reads longer ones anew for each thing that it computes of them, which takes longer than our
kernel."""

SEARCHED = 64
"""Operators of a graph that are looked at for a norm, at most."""

TINY = torch.finfo(torch.float32).tiny

aten = torch.ops.aten

_RANGES = {torch.int8: (-128.0, 127.0, 127.5), torch.float8_e4m3fn: (-448.0, 448.0, 448.0)}
"""The lowest and the highest code, and max|x| / scale, of `Intx(8)` and `Float8()`."""

_MOVES = (
    *joined.VIEWS, aten.permute.default, aten.transpose.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.clone.default, aten.slice.Tensor, aten.select.int, aten.constant_pad_nd.default,
    torch.ops.prims.convert_element_type.default, operator.getitem,
)  # fmt: skip
"""What leaves numbers as they are, beside what PyTorch says is computed number by number."""

_SUMS = (aten.mean.dim, aten.sum.dim_IntList, aten.var.correction, aten.var_mean.correction)
"""What norms are made of when Inductor sees them."""


class _Lowered(NamedTuple):
    """Of a graph: the codes and scales of what was quantized, the products by their nodes, and what comes before others by the
    nodes where these follow it."""

    found: dict[Any, Any]
    products: dict[Any, Any]
    befores: dict[Any, Any]


_lowered: WeakKeyDictionary[Any, _Lowered] = WeakKeyDictionary()

_registered = False


def lower_in_compiled_graphs() -> None:
    """Tell Inductor, where it is loaded, how our operator is lowered: no other code sees it."""
    global _registered
    if _registered or "torch._inductor.graph" not in sys.modules:
        return
    from torch._inductor.lowering import register_lowering

    register_lowering(torch.ops.ao.dynamic_product.default, type_promotion_kind=None)(_lower)
    _registered = True


def _lower(x: Any, qdata: Any, columns: Any, whole: bool, bias: Any = None) -> Any:
    """The product, as the compiler knows it."""
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import fallback_handler
    from torch._inductor.virtualized import V

    def call(name: str, *args: Any) -> Any:
        return fallback_handler(getattr(torch.ops.ao, name).default, add_to_fallback_set=False)(*args)

    node: Any = V.graph.current_node
    tokens = node.args[0].meta["val"].shape[0]
    if isinstance(tokens, int) and tokens <= joined.MOST:
        return joined.lower(x, qdata, columns, whole, *(() if bias is None else (bias,)))
    dtype = qdata.get_dtype()
    token, k = joined.viewed(node.args[0]), node.args[0].meta["val"].shape[1]
    if not isinstance(k, int):
        return call("dynamic_product", x, qdata, columns, whole, bias)
    if V.graph not in _lowered:
        _lowered[V.graph] = _Lowered({}, {}, {})
        _put_columns_off(node.graph)
    found, products, befores = _lowered[V.graph]
    if node in products:
        return products[node]
    form = k, dtype, whole
    key, alone = (token, *form), products_of(token, form) == _users_of(token)
    if key not in found:
        if not whole and k <= LONGEST and dtype in _RANGES and follows_norm(token, k):
            found[key] = quantized(x, dtype)
        elif not whole and alone and (normed := _lowered_norm(token, k)) is not None:
            found[key] = call("quantized_norm", *normed, dtype)
        elif not whole and alone and (made := activation_of(token, products)) is not None:
            parts = (_lowered_columns(part, products) for part in (made.source, made.other))
            found[key] = call("quantized_activation", *parts, made.function, dtype, _rows(befores.get(made.before)))
        elif products_of(token, form) > 1:
            x = ExternKernel.require_contiguous(ExternKernel.realize_input(x))
            found[key] = call("quantized", x, dtype, whole)
    together = _together(node, token, products) if key in found and isinstance(tokens, int) else [node]
    if len(together) > 1:
        given = zip(*map(_weight, together))
        all_qdata, all_columns, biases = ([each and joined.value(each) for each in fields] for fields in given)
        out = call("scaled_product_joined", *found[key], all_qdata, all_columns, x.get_dtype(), biases)
        products |= zip(together, joined.parts_of(out, tokens, [qdata.get_size()[0]] * len(together)))
    elif key in found:
        products[node] = call("scaled_product", *found[key], qdata, columns, x.get_dtype(), bias)
    else:
        products[node] = call("dynamic_product", x, qdata, columns, whole, bias)
    return products[node]


def _weight(node: torch.fx.Node) -> tuple[Any, Any, Any]:
    """The codes, the scales and the bias of a product."""
    return node.args[1], node.args[2], _argument(node, 4, "bias", None)


def _together(node: torch.fx.Node, token: torch.fx.Node, products: Any) -> list[torch.fx.Node]:
    """This product and those after it that one launch can do: of the same codes, with a weight of the same shape."""
    from torch._inductor.virtualized import V

    def kind(other: Any) -> Any:
        x, (qdata, columns, bias) = other.args[0].meta["val"], (each and each.meta["val"] for each in _weight(other))
        n, k = qdata.shape
        at_once = joins(len(x), n, k, qdata.dtype, x.dtype, bias is not None, x.device)
        return (x.shape, qdata.shape, qdata.dtype, columns.dtype, other.args[3]) if at_once else None

    own = kind(node)
    nodes = [
        other
        for other in joined.users_of(token, node.target)
        if other not in products and joined.is_ready(_weight(other), V.graph.env) and kind(other) == own
    ]
    if own is None or node not in nodes:
        return [node]
    first = nodes.index(node)
    return nodes[first : first + joined.AT_ONCE]


def quantized(x: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The codes (M, K) and scales (M, 1) of x (M, K), as `Intx(8)` or `Float8()` quantize it, in operators of the compiler. That
    they are the same to the bit, a test holds."""
    from torch._inductor.lowering import lowerings

    def call(op: Any, *args: Any) -> Any:
        return lowerings[op](*args)

    cast = torch.ops.prims.convert_element_type.default
    low, high, levels = _RANGES[dtype]
    wide = call(cast, x, torch.float32)
    scale = call(aten.mul.Tensor, call(aten.amax.default, call(aten.abs.default, wide), [1], True), 1 / levels)
    inverse = call(cast, call(aten.reciprocal.default, call(cast, scale, torch.float64)), torch.float32)
    inverse = call(aten.where.self, call(aten.lt.Scalar, scale, TINY), 0.0, inverse)
    codes = call(aten.mul.Tensor, wide, inverse)
    codes = call(aten.minimum.default, call(aten.maximum.default, codes, low), high)
    if dtype == torch.int8:
        codes = call(aten.round.default, codes)
    return call(cast, codes, dtype), scale


def follows_norm(node: torch.fx.Node, k: int) -> bool:
    """Whether rows of k numbers are computed number by number from what was summed over such rows, as by a norm."""
    nodes = [node]
    for node in nodes:  # which grows meanwhile
        if node.target in _SUMS:
            given = node.args[0].meta["val"]  # type: ignore[union-attr]
            dims = [d % given.dim() for d in node.args[1] or ()]  # type: ignore[union-attr]
            if dims == [given.dim() - 1] and given.shape[-1] == k:
                return True
        elif len(nodes) < SEARCHED and _is_pointwise(node):
            nodes += [other for other in node.all_input_nodes if other not in nodes]
    return False


def _is_pointwise(node: torch.fx.Node) -> bool:
    return node.target in _MOVES or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _lowered_norm(token: Any, k: int) -> tuple[Any, ...] | None:
    """`norms_in_graphs.norm_of` with what the compiler knows of its nodes: x (M, K), weight and bias (B, K), and the rest."""
    norm = norms_in_graphs.norm_of(token, k)
    if norm is None:
        return None
    values = [_value(norm.source), *(each and _value(each) for each in (norm.weight, norm.bias))]
    if any(value is None and node is not None for value, node in zip(values, norm)):
        return None
    x, weight, bias = (value and _rows(value, whole=i == 0) for i, value in enumerate(values))
    return x, weight, bias, *norm[3:]


def _value(node: Any) -> Any:
    """What the compiler has made of a node before; None where it has forgotten that."""
    from torch._inductor.ir import StorageBox, TensorBox
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    if node in V.graph.env:
        return V.graph.env[node]
    if node.op == "placeholder":
        return V.graph.graph_inputs.get(V.graph.qualify_name(node.target))
    made = next((buffer for buffer in V.graph.buffers if buffer.get_origin_node() is node), None)
    if made is not None:
        return TensorBox(StorageBox(made))
    views = (*joined.VIEWS, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int)
    part = node.target == operator.getitem and node.args[0].target in _SPLITS
    source = _value(node.args[0].args[0] if part else node.args[0]) if part or node.target in views else None
    if source is None:
        return None
    if part:
        return lowerings[node.args[0].target](source, *node.args[0].args[1:], **node.args[0].kwargs)[node.args[1]]
    return lowerings[node.target](source, *node.args[1:], **node.kwargs)


class Columns(NamedTuple):
    """`size` columns of a product (M, N), or of what a graph is given, (..., N), from `first` on."""

    product: torch.fx.Node
    first: int
    size: int


class Activation(NamedTuple):
    """What `quantize_rows.quantized` computes: the function, as it names it, the columns that it is of, those that multiply it,
    and the node in which others come before."""

    function: str
    source: Columns
    other: Columns | None
    before: torch.fx.Node | None


def activation_of(token: Any, products: Any) -> Activation | None:
    """How `token` comes from columns of `products`, or of what the graph is given; None where it is something else."""
    before = None
    if token.target == _columns:
        before, token = token, joined.viewed(token.args[1])
    found, other = _function_of(token), None
    if found is None and token.target == aten.mul.Tensor:
        for one, another in (token.args, reversed(token.args)):
            if found is None and isinstance(one, torch.fx.Node) and isinstance(another, torch.fx.Node):
                found, other = _function_of(joined.viewed(one)), another
    if found is None:
        return None
    function, source = found
    made, parts = token.meta["val"], []
    for node in (source,) if other is None else (source, other):
        part = columns_of(node, products)
        if part is None:
            return None
        given = part.product.meta["val"]
        rows = given.numel() // given.shape[-1]
        same = given.dtype == made.dtype and rows * part.size == made.numel() and part.size == made.shape[-1]
        if not same or given.dtype not in (torch.bfloat16, torch.float16):
            return None
        parts.append(part)
    return Activation(function, parts[0], None if other is None else parts[1], before)


def columns_of(node: Any, products: Any) -> Columns | None:
    """Which columns of which of `products`, or of what the graph is given, a node is; they begin where 16 bytes do, as a kernel
    reads them."""
    node = whole = joined.viewed(node)
    shown = node.meta["val"]
    if not isinstance(shown, torch.Tensor) or not shown.dim():
        return None
    size, first = shown.shape[-1], 0
    if node.target == operator.getitem and node.args[0].target in _SPLITS:
        split, index = node.args
        whole, dim = split.args[0], _argument(split, 2, "dim", 0)
        first = sum(part.shape[-1] for part in split.meta["val"][:index])
    elif node.target == aten.slice.Tensor:
        whole, dim = node.args[0], _argument(node, 1, "dim", 0)
        first = _argument(node, 2, "start", None) or 0
        if _argument(node, 4, "step", 1) != 1:
            return None
    if whole is not node:
        shown, whole = whole.meta["val"], joined.viewed(whole)
        if dim not in (-1, shown.dim() - 1) or shown.shape[-1] != whole.meta["val"].shape[-1]:
            return None
    if whole not in products and whole.op != "placeholder":
        return None
    n = whole.meta["val"].shape[-1]
    if not (isinstance(first, int) and isinstance(size, int) and isinstance(n, int) and n):
        return None
    apart = first >= 0 and first % 8 == 0 and n % 8 == 0
    return Columns(whole, first, size) if apart or size == n else None


def _argument(node: torch.fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _lowered_columns(part: Columns | None, products: Any) -> Any:
    """Columns of a product as the compiler knows them: where they are, not copied."""
    from torch._inductor.lowering import lowerings

    if part is None:
        return None
    product = products.get(part.product)
    if product is None:
        given = _value(part.product)
        *shape, n = given.get_size()
        product = lowerings[aten.reshape.default](given, [math.prod(shape), n])
    if part.size == part.product.meta["val"].shape[-1]:
        return product
    return lowerings[aten.slice.Tensor](product, 1, part.first, part.first + part.size)


def _put_columns_off(graph: torch.fx.Graph) -> None:
    """Where products take such columns after others, let them not be put together, unless one asks for that."""
    products = [
        node for node in graph.nodes if node.target == torch.ops.ao.dynamic_product.default and not node.args[3]
    ]
    for token in dict.fromkeys(joined.viewed(node.args[0]) for node in products):
        if token.target != aten.cat.default or not _come_after(token, products):
            continue
        if _users_of(token) == sum(joined.viewed(node.args[0]) is token for node in products):
            token.target, token.args, token.kwargs = _columns, tuple(token.args[0]), {}  # type: ignore[arg-type]


def _come_after(token: Any, products: Any) -> bool:
    """Whether two tensors are put together by columns, of which the kernel may compute the second."""
    if len(token.args[0]) != 2 or _argument(token, 1, "dim", 0) not in (-1, token.meta["val"].dim() - 1):
        return False
    first, second = (node.meta["val"] for node in token.args[0])
    aligned = isinstance(first.shape[-1], int) and first.shape[-1] % 8 == 0 and first.dtype == second.dtype
    return aligned and activation_of(joined.viewed(token.args[0][1]), products) is not None


def _columns(before: Any, last: Any) -> Any:
    """Columns after others, which are computed where they are read."""
    from torch._inductor.lowering import pointwise_cat
    from torch._inductor.virtualized import V

    _lowered[V.graph].befores[V.graph.current_node] = before
    return pointwise_cat([before, last], len(last.get_size()) - 1)


_columns._inductor_lowering_function = True  # type: ignore[attr-defined]


def _rows(x: Any, whole: bool = True) -> Any:
    """What the compiler knows (..., J) as rows, which follow each other where it is to be `whole`."""
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import lowerings

    if x is None:
        return None
    *shape, columns = x.get_size()
    rows = ExternKernel.realize_input(lowerings[aten.reshape.default](x, [math.prod(shape), columns]))
    return ExternKernel.require_contiguous(rows) if whole else rows


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)

_FUNCTIONS = {"aten.gelu.default": "gelu", "aten.silu.default": "silu"}
"""By names: graphs hold copies of these operators."""


def _function_of(node: torch.fx.Node) -> tuple[str, torch.fx.Node] | None:
    """An activation function and what it is of, from the operators into which PyTorch took it apart or that it is written in."""
    if (written := _by_sigmoid(node)) is not None:
        return written
    origin = _origin(node)
    if origin not in _FUNCTIONS:
        return None
    given: list[torch.fx.Node] = []
    parts = [node]
    for part in parts:  # which grows meanwhile
        for other in part.all_input_nodes:
            same = parts if _origin(other) == origin else given
            if other not in same:
                same.append(other)
    curves = [part.target for part in parts if part.target in (aten.erf.default, aten.tanh.default, aten.exp.default)]
    if len(given) != 1 or len(curves) != 1:  # such as a GELU of a GELU
        return None
    return "gelu_tanh" if curves[0] == aten.tanh.default else _FUNCTIONS[origin], given[0]


_BY_SIGMOID = {1.0: "silu", 1.702: "quick_gelu"}
"""x * sigmoid(factor * x), by the factor."""


def _by_sigmoid(node: Any) -> tuple[str, torch.fx.Node] | None:
    """Such a function and its x."""
    if node.target != aten.mul.Tensor:
        return None
    for x, other in (node.args, reversed(node.args)):
        if isinstance(other, torch.fx.Node) and other.target == aten.sigmoid.default:
            inner: Any = other.args[0]
            times = inner.args if inner is not x and inner.target == aten.mul.Tensor else (inner, 1.0)
            if times[0] is x and times[1] in _BY_SIGMOID:
                return _BY_SIGMOID[times[1]], x
    return None


def _origin(node: torch.fx.Node) -> str:
    """The operator that was called before PyTorch took it apart."""
    return str(node.meta.get("original_aten"))


def _users_of(token: torch.fx.Node) -> int:
    """How many operators take it, through its views."""
    return sum(_users_of(user) if user.target in joined.VIEWS else 1 for user in token.users)


def products_of(token: torch.fx.Node, form: tuple[Any, ...]) -> int:
    """How many of our products quantize the rows of `token` alike. form: their length, the dtype of their codes, and `whole`."""
    count = 0
    for user in token.users:
        if user.target in joined.VIEWS:
            count += products_of(user, form)
        elif user.target == torch.ops.ao.dynamic_product.default and user.args[0] is token:
            k = token.meta["val"].shape[1]
            count += form == (k, user.args[1].meta["val"].dtype, user.args[3])  # type: ignore[union-attr]
    return count
