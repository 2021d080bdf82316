"""Time layers whose columns are stored in another order, as GPTQ's `desc_act` has them, beside the same layers without.

Each call is of the next of several copies, so that no weight is in the cache. Ways: "eager", as calls that follow each other;
"alone", compiled by itself, "norm", compiled with a norm before it, and "three", a norm and three layers of its output, N, N / 4
and N / 4 wide, in one order, all as CUDA graphs. An order is that of columns which are spread over groups at random: in a group
it ascends. Printed are microseconds in order, and how many times longer the same takes in another order.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
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
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 16, 64, 1024], metavar="M")
    parser.add_argument("--ways", nargs="+", choices=["eager", "alone", "norm", "three"], default=["eager", "norm"])
    parser.add_argument("--copies", type=int, default=16, help="of a weight; default: 16")
    return parser.parse_args(argv)


def layer_of(w: QTensor) -> nn.Module:
    """A linear layer with the weight `w` (N, K)."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    set_parameter(layer, "weight", nn.Parameter(w, requires_grad=False))
    return layer


def order_of(k: int, group: int, device: torch.device) -> Tensor:
    """The order of k columns, each in a group that is drawn, as the reader of GPTQ finds it: (k,) int32."""
    groups = torch.arange(k, device=device)[torch.randperm(k, device=device)] // group
    return torch.argsort(groups, stable=True).int()


def both(spec: Intx, rows: Sequence[int], k: int, copies: int, device: torch.device) -> dict[str, list[nn.ModuleList]]:
    """Layers of one input, with `rows` outputs each: in order, and with the same numbers in another."""
    weights = [spec.quantize(torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5) for n in rows]
    found: dict[str, list[nn.ModuleList]] = {"in order": [], "in another": []}
    for _ in range(copies):
        order = order_of(k, spec.block[1], device)
        found["in order"].append(nn.ModuleList(layer_of(copy.deepcopy(w)) for w in weights))
        found["in another"].append(
            nn.ModuleList(
                layer_of(Permuted(spec).wrap({"qdata": copy.deepcopy(w), "order": order.clone()}, w.dtype, w.shape))
                for w in weights
            )
        )
    return found


def alone(layers: nn.ModuleList, x: Tensor, scale: Tensor) -> list[Tensor]:
    """Layers by themselves."""
    return [layer(x) for layer in layers]


def norm(layers: nn.ModuleList, x: Tensor, scale: Tensor) -> list[Tensor]:
    """Layers after a norm."""
    return alone(layers, F.rms_norm(x, x.shape[-1:], scale, 1e-5), scale)


@torch.no_grad()
def seconds(way: str, found: dict[str, list[nn.ModuleList]], x: Tensor, scale: Tensor) -> dict[str, float]:
    """Of a call, in order and not."""
    if way == "eager":
        runs = {key: partial(_call_all, [each[0] for each in layers], x) for key, layers in found.items()}
        times = measure.calls_in_turns(runs, x.device, seconds=0.5)
    else:
        function = alone if way == "alone" else norm
        graphs = {}
        for key, each in found.items():
            call = torch.compile(measure.own_code(function, f"{key} {x.shape[0]}"), fullgraph=True, dynamic=False)
            calls = [partial(call, layers, x, scale) for layers in each]
            for run in calls:
                run()
            graphs[key] = measure.capture(calls, torch.cuda.graph_pool_handle())
        times = measure.replays_in_turns(graphs)
    return {key: time / len(found[key]) for key, time in times.items()}


def _call_all(layers: Sequence[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def main(args: argparse.Namespace) -> None:
    """Measure, and print a table of each format and shape."""
    device = torch.device("cuda")
    for name in args.formats:
        for shape in args.shapes:
            n, k = sides(shape)
            scale = torch.ones(k, device=device, dtype=torch.bfloat16)
            rows = []
            for way in args.ways:
                widths = [n, n // 4, n // 4] if way == "three" else [n]
                found = both(FORMATS[name], widths, k, args.copies, device)
                cells = [way]
                for m in args.tokens:
                    torch.compiler.reset()
                    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
                    plain, other = seconds(way, found, x, scale).values()
                    cells.append(f"{plain * 1e6:.1f} ({other / plain:.2f})")
                rows.append(cells)
            measure.show(["us", *(f"{m} tokens" for m in args.tokens)], rows, f"{name}, {shape}")


if __name__ == "__main__":
    main(parse())
