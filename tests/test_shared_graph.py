"""Layers of one shape share a compiled subgraph: in graphs for inference on a CPU, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from cases import weight
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import ao
from ao.dtypes import Float8, Intx
from ao.matmul import shared_graph

pytestmark = pytest.mark.skipif(shared_graph._invoke is None, reason="invoke_subgraph_infer came with torch 2.13")
SPECS = [Intx(4, (1, 32)), Intx(8), Intx(8, act=Intx(8)), Float8(), Intx(3, (1, 32))]


def model(spec, layers: int = 4, size: int = 128) -> nn.Sequential:
    made = nn.Sequential(*[nn.Linear(size, size) for _ in range(layers)]).to(torch.bfloat16)
    for i, layer in enumerate(made):
        layer.weight = nn.Parameter(spec.quantize(weight((size, size), i, torch.bfloat16)), requires_grad=False)
    return made


def traced(net: nn.Module, x: torch.Tensor, **options) -> tuple[list[torch.fx.GraphModule], torch.Tensor]:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch.compiler.reset()
    return graphs, torch.compile(net, fullgraph=True, backend=aot_autograd(fw_compiler=backend), **options)(x)


def calls(graph: torch.fx.GraphModule) -> int:
    return sum(n.target is torch.ops.higher_order.invoke_subgraph for n in graph.graph.nodes)


def subgraphs(graph: torch.fx.GraphModule) -> int:
    return sum(isinstance(m, torch.fx.GraphModule) for m in graph.children())


QUICK = [[(torch.no_grad, 16)] + [(torch.inference_mode, 16)] * (spec.act is not None) for spec in SPECS]
QUICK[0].append((torch.no_grad, 1))


@pytest.mark.parametrize(
    ("spec", "mode", "tokens"),
    [
        pytest.param(spec, mode, tokens, marks=[] if (mode, tokens) in quick else pytest.mark.slow)
        for spec, quick in zip(SPECS, QUICK)
        for mode in (torch.no_grad, torch.inference_mode)
        for tokens in (1, 16)
    ],
    ids=str,
)
def test_layers_share_a_subgraph(spec, mode, tokens):
    net, x = model(spec), weight((tokens, 128), 9, torch.bfloat16)
    with mode():
        (graph,), out = traced(net, x, dynamic=tokens > 1)
        assert calls(graph) == 4 and subgraphs(graph) == 1
        assert ao.compute_error(net(x), out) > 35
        with shared_graph.inlined():
            (graph,), plain = traced(net, x)
    assert calls(graph) == 0 and torch.equal(plain, out)


def test_what_differs_is_not_shared():
    net = nn.Sequential(*model(Intx(4, (1, 32)), 2), *model(Intx(4, (1, 64)), 1), *model(Intx(8), 1))
    with torch.no_grad():
        (graph,), _ = traced(net, weight((16, 128), 9, torch.bfloat16))
    assert calls(graph) == 4 and subgraphs(graph) == 3


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # of torch.export itself
def test_training_and_export_hold_plain_operators():
    net, x = model(Intx(4, (1, 32))), weight((16, 128), 9, torch.bfloat16)
    graphs, out = traced(net, x.clone().requires_grad_())
    out.sum().backward()
    assert len(graphs) == 2 and not any(map(calls, graphs))
    assert calls(torch.export.export(net, (x,)).graph_module) == 0
    with torch.no_grad():
        assert calls(torch.export.export(net, (x,)).run_decompositions().graph_module) == 0


class Region(nn.Module):
    """A block that the compiler is told to compile once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


@pytest.mark.parametrize("spec", [Intx(8, act=Intx(8)), Intx(4, (1, 32))], ids=str)
def test_nothing_is_shared_in_a_region_of_somebody_else(spec):
    """In a subgraph of a subgraph PyTorch leaves operators as they are, which Inductor does not take. And all regions are one
    subgraph: of more than eight that are not, Dynamo says that something is wrong."""
    net, x = nn.Sequential(*[Region() for _ in range(10)]), weight((4, 64), 9, torch.bfloat16)
    ao.quantize_(net, ao.SpecConfig(spec))
    with torch.no_grad():
        (graph,), out = traced(net, x)
        assert calls(graph) == 10 and subgraphs(graph) == 1
        (region,) = (m for m in graph.children() if isinstance(m, torch.fx.GraphModule))
        assert calls(region) == 0
        assert ao.compute_error(net(x), out) > 30
