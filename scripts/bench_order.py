"""Time layers whose columns are stored in another order, as GPTQ's `desc_act` has them, beside the same layers without.

Each call is of the next of several copies, so that no weight is in the cache. Three ways: eager, as calls that follow each other;
"alone", compiled by itself, and "norm", compiled with a norm before it, both as CUDA graphs. Printed are microseconds of a layer
in order, and how many times longer the other takes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial

import measure
import torch
import torch.nn.functional as F
from bench_linear import sides
from torch import Tensor, nn

from ao.dtypes import Intx, QTensor
from ao.dtypes.permuted import Permuted
from ao.matmul.layers import set_parameter

FORMATS = {
    "int4-g128": Intx(4, (1, 128), signed=False, symmetric=False, scale_dtype="float16"),
    "int8-g128": Intx(8, (1, 128), signed=False, symmetric=False, scale_dtype="float16"),
    "int3-g128": Intx(3, (1, 128), signed=False, symmetric=False, scale_dtype="float16"),
}
"""As the reader of GPTQ makes them."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_order.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["int4-g128"])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336", "28672x4096"], metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 16, 64, 256, 1024], metavar="M")
    parser.add_argument("--ways", nargs="+", choices=["eager", "alone", "norm"], default=["eager", "alone", "norm"])
    parser.add_argument("--copies", type=int, default=16, help="of a weight; default: 16")
    return parser.parse_args(argv)


def layer_of(w: QTensor) -> nn.Module:
    """A linear layer with the weight `w` (N, K)."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    set_parameter(layer, "weight", nn.Parameter(w, requires_grad=False))
    return layer


def both(spec: Intx, n: int, k: int, copies: int, device: torch.device) -> dict[str, list[nn.Module]]:
    """Layers in order, and with the same numbers in another."""
    w = spec.quantize(torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5)
    found: dict[str, list[nn.Module]] = {"in order": [], "in another": []}
    for _ in range(copies):
        fields = {"qdata": copy.deepcopy(w), "order": torch.randperm(k, device=device).int()}
        found["in order"].append(layer_of(copy.deepcopy(w)))
        found["in another"].append(layer_of(Permuted(spec).wrap(fields, w.dtype, w.shape)))
    return found


def alone(layer: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """A layer by itself."""
    return layer(x)


def norm(layer: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """A layer after a norm."""
    return layer(F.rms_norm(x, x.shape[-1:], scale, 1e-5))


@torch.no_grad()
def seconds(way: str, found: dict[str, list[nn.Module]], x: Tensor, scale: Tensor) -> dict[str, float]:
    """Of a call, in order and not."""
    function = norm if way == "norm" else alone
    if way == "eager":
        runs = {key: partial(_call_all, function, each, x, scale) for key, each in found.items()}
        times = measure.calls_in_turns(runs, x.device, seconds=1)
    else:
        graphs = {}
        for key, each in found.items():
            call = torch.compile(measure.own_code(function, f"{key} {x.shape[0]}"), fullgraph=True, dynamic=False)
            calls = [partial(call, layer, x, scale) for layer in each]
            for run in calls:
                run()
            graphs[key] = measure.capture(calls, torch.cuda.graph_pool_handle())
        times = measure.replays_in_turns(graphs)
    return {key: time / len(found[key]) for key, time in times.items()}


def _call_all(function: Callable[..., Tensor], layers: Sequence[nn.Module], x: Tensor, scale: Tensor) -> None:
    for layer in layers:
        function(layer, x, scale)


def main(args: argparse.Namespace) -> None:
    """Measure, and print a table of each format and way."""
    device = torch.device("cuda")
    for name in args.formats:
        rows: dict[str, list[list[str]]] = {way: [] for way in args.ways}
        for shape in args.shapes:
            n, k = sides(shape)
            found = both(FORMATS[name], n, k, args.copies, device)
            scale = torch.ones(k, device=device, dtype=torch.bfloat16)
            for way in args.ways:
                cells = [shape]
                for m in args.tokens:
                    torch.compiler.reset()
                    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
                    plain, other = seconds(way, found, x, scale).values()
                    cells.append(f"{plain * 1e6:.1f} ({other / plain:.2f})")
                rows[way].append(cells)
        for way in args.ways:
            measure.show(["us", *(f"{m} tokens" for m in args.tokens)], rows[way], f"{name}, {way}")


if __name__ == "__main__":
    main(parse())
