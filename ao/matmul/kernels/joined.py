"""One launch for the products of a few tokens with several weights, such as those of queries, keys and values.

A product of few tokens ends before the memory is busy with it, and starts anew for the next weight: three launches take twice as
long as one over all their rows. And what a product does to the tokens first, to quantize them, to split them or to put them in
order, and to sum parts of K at last, is a launch each. Eager code calls layer after layer. But where Inductor makes a graph of
them, it asks how to lower each operator, and the first product is lowered to one of all that need nothing else.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

AT_ONCE = 3
"""Weights of one launch, at most."""

_FIELDS = {"gemv": 3, "few": 6, "fused": 3, "dynamic_product": 2}
"""The operators of which `ao::gemv_joined` and so on are several, and how many fields of the weight come after x."""

MOST = 64
"""Tokens that one launch takes. Beyond, quantize_in_graphs.py shares what is made of the tokens first."""

VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)

_lowered: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""By graph: the products that an earlier one brought along."""

_registered = False


def join_in_compiled_graphs() -> None:
    """Tell Inductor, where it is loaded, how our operators of a few tokens are lowered: no other code sees them."""
    global _registered
    if _registered or "torch._inductor.graph" not in sys.modules:
        return
    from torch._inductor.lowering import register_lowering

    for name in _FIELDS.keys() - {"dynamic_product"}:  # which quantize_in_graphs.py lowers
        register_lowering(getattr(torch.ops.ao, name).default, type_promotion_kind=None)(lower)
    _registered = True


def lower(x: Any, *weight: Any) -> Any:
    """The product, as the compiler knows it."""
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import fallback_handler
    from torch._inductor.virtualized import V

    graph = V.graph
    node = graph.current_node
    found = _lowered.setdefault(graph, {})
    if node in found:
        return found.pop(node)
    x = ExternKernel.require_contiguous(ExternKernel.realize_input(x))
    nodes = products_of_same_tokens(node, graph.env)
    if len(nodes) == 1:
        return fallback_handler(node.target, add_to_fallback_set=False)(x, *weight)

    fields = [[value(arg) for arg in each if arg is not None] for each in zip(*map(_fields, nodes))]
    joined = getattr(torch.ops.ao, f"{_name(node)}_joined").default
    rest = weight[len(fields) :][: len(joined._schema.arguments) - 1 - len(fields)]  # without a bias
    out = fallback_handler(joined, add_to_fallback_set=False)(x, *fields, *rest)
    found |= zip(nodes, parts_of(out, x.get_size()[0], list(map(_rows, nodes))))
    return found.pop(node)


def value(arg: Any) -> Any:
    """Of a field, which may be a view that is not lowered yet."""
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    there = V.graph.env
    return there[arg] if arg in there else lowerings[arg.target](value(arg.args[0]), *arg.args[1:])


def parts_of(out: Any, tokens: Any, rows: Sequence[int]) -> Iterator[Any]:
    """The products (tokens, n) of weights with so many rows, which stand in `out` one after the other."""
    from torch._inductor.lowering import lowerings

    start = 0
    for n in rows:
        part = lowerings[torch.ops.aten.slice.Tensor](out, 0, start, start + tokens * n)
        yield lowerings[torch.ops.aten.view.default](part, [tokens, n])
        start = start + tokens * n


def products_of_same_tokens(node: torch.fx.Node, there: Any) -> list[torch.fx.Node]:
    """This product and those of the same tokens after it that one launch can do. there: the nodes that are computed already."""
    form, nodes = _form(node), []
    if form is None or not is_ready(_fields(node), there):
        return [node]
    for other in users_of(viewed(node.args[0]), node.target):
        if _form(other) == form and is_ready(_fields(other), there) and other not in there:
            nodes.append(other)
    first = nodes.index(node)
    return nodes[first : first + AT_ONCE]


def is_ready(fields: Iterable[Any], there: Any) -> bool:
    """Whether the fields of a product are there, or what they are views of."""
    for field in fields:
        while field is not None and field not in there:
            if field.target != torch.ops.aten.view.dtype:
                return False
            field = field.args[0]
    return True


def viewed(node: Any) -> torch.fx.Node:
    """What a view shows."""
    while node.target in VIEWS:
        node = node.args[0]
    return node


def users_of(tokens: torch.fx.Node, product: Any) -> list[torch.fx.Node]:
    """The products of tokens by an operator, through their views, in the order of the graph."""
    found = []
    for user in tokens.users:
        if user.target in VIEWS:
            found += users_of(user, product)
        elif user.target == product and user.args[0] is tokens:
            found.append(user)
    return sorted(found, key=operator.attrgetter("_sort_key"))


def _name(node: torch.fx.Node) -> str:
    return node.target.overloadpacket.__name__  # type: ignore[union-attr]


def _fields(node: torch.fx.Node) -> tuple[Any, ...]:
    return node.args[1 : 1 + _FIELDS[_name(node)]]


def _rows(node: torch.fx.Node) -> int:
    return int(node.args[1].meta["val"].shape[0])  # type: ignore[union-attr]


def _form(node: torch.fx.Node) -> list[Any] | None:
    """What the products of one launch have in common; None for one that stays alone."""
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    fields = [arg if arg is None else arg.meta["val"] for arg in _fields(node)]
    tokens, rest = x.shape[0], list(node.args[1 + len(fields) :])
    name, one = _name(node), isinstance(tokens, int) and tokens == 1  # a symbol is any number of tokens but one
    many = isinstance(tokens, int) and tokens > MOST
    if _rows(node) % 8 or (one and name == "fused") or many:
        return None
    if name != "gemv" and any(isinstance(arg, torch.fx.Node) for arg in rest):
        return None  # a bias
    if name == "few":
        from .reading import reading_from

        reading = reading_from(str(rest[0]))
        if not reading.by_template or (one and not reading.for_one_token):
            return None
        rest = [reading._replace(n=0)]
    return [*(None if t is None else (t.dtype, t.shape[1:], t.device) for t in (x, *fields)), *rest]
