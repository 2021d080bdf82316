"""One launch for the products of one token with several weights, such as those of queries, keys and values.

A product of one token ends before the memory is busy with it, and starts anew for the next weight: three launches take twice as
long as one over all their rows. Eager code calls layer after layer. But where Inductor makes a graph of them, it asks how to
lower each operator, and the first product of a token is lowered to one of all that need nothing else.
"""

from __future__ import annotations

import operator
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch

AT_ONCE = 3
"""Weights of one launch, at most."""

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)

_lowered: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""By graph: the products that an earlier one brought along."""

_registered = False


def join_in_compiled_graphs() -> None:
    """Tell Inductor, where it is loaded, how `ao::gemv` is lowered: an operator of ours, so that no other code sees it."""
    global _registered
    if _registered or "torch._inductor.graph" not in sys.modules:
        return
    from torch._inductor.lowering import register_lowering

    register_lowering(torch.ops.ao.gemv.default, type_promotion_kind=None)(_lower)
    _registered = True


def _lower(x: Any, qdata: Any, scale: Any, zero_point: Any, offset: int, act: bool) -> Any:
    """The product, as the compiler knows it."""
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import fallback_handler, lowerings
    from torch._inductor.virtualized import V

    graph = V.graph
    node = graph.current_node
    found = _lowered.setdefault(graph, {})
    if node in found:
        return found.pop(node)
    x = ExternKernel.require_contiguous(ExternKernel.realize_input(x))
    nodes = products_of_one_token(node, lambda other: other in graph.env)
    if len(nodes) == 1:
        call = fallback_handler(torch.ops.ao.gemv.default, add_to_fallback_set=False)
        return call(x, qdata, scale, zero_point, offset, act)
    args: list[Any] = [n.args for n in nodes]
    fields = [[graph.env[arg[i]] for arg in args if arg[i] is not None] for i in (1, 2, 3)]
    call = fallback_handler(torch.ops.ao.gemv_joined.default, add_to_fallback_set=False)
    out, start = call(x, *fields, offset, act), 0
    narrow = lowerings[torch.ops.aten.slice.Tensor]
    for other in nodes:
        end = start + _rows(other)
        found[other] = narrow(out, 1, start, end)
        start = end
    return found.pop(node)


def products_of_one_token(node: torch.fx.Node, there: Any) -> list[torch.fx.Node]:
    """This product and those of the same token after it that one launch can do. there: whether a node is computed already."""
    if any(not there(arg) for arg in node.args[1:4] if isinstance(arg, torch.fx.Node)) or _rows(node) % 8:
        return [node]
    form, nodes = _form(node), []
    for other in _users(_token(node.args[0])):
        fields = [arg for arg in other.args[1:4] if isinstance(arg, torch.fx.Node)]
        if _form(other) == form and _rows(other) % 8 == 0 and all(map(there, fields)) and not there(other):
            nodes.append(other)
    first = nodes.index(node)
    return nodes[first : first + AT_ONCE]


def _token(node: Any) -> torch.fx.Node:
    """What a view shows."""
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def _users(token: torch.fx.Node) -> list[torch.fx.Node]:
    """The products of a token, through its views, in the order of the graph."""
    found = []
    for user in token.users:
        if user.target in _VIEWS:
            found += _users(user)
        elif user.target == torch.ops.ao.gemv.default and user.args[0] is token:
            found.append(user)
    return sorted(found, key=operator.attrgetter("_sort_key"))


def _rows(node: torch.fx.Node) -> int:
    return int(node.args[1].meta["val"].shape[0])  # type: ignore[union-attr]


def _form(node: torch.fx.Node) -> list[Any]:
    """What the products of one launch have in common."""
    shown = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else None for arg in node.args[:4]]
    each = [None if t is None else (t.dtype, t.shape[1:], t.device) for t in shown]
    return [*each, *node.args[4:]]
