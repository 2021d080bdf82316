"""How long one linear layer takes in a model, for several formats of its weight, measured side by side.

A weight is rarely in the cache when a model comes to it. So each format gets as many copies of the weight as exceed the
last-level cache (or as the whole model would have, if that is less), and they take turns. The copies of several formats
are measured in interleaved rounds, of which the median counts. On a CUDA device a turn of compiled code is the replay of a
CUDA graph between two events, so that nothing of Python is measured. Eager code is timed with its Python, as a model pays it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..benchmark import interleave, synchronize
from ..compiled import Compiler, Function


@dataclass(frozen=True)
class Product:
    """One call of `F.linear`, as far as its speed depends on it.

    tokens, out_features, in_features: M, N, K of x (M, K) @ w (N, K).T.
    dtype: of the activation. weight_dtype: of the weight, before it is quantized.
    bias: whether there is one.
    autocast: the dtype that autocast computes in, or None.
    device: of all of them.
    sharing: how many weights meet this x one after the other, as those of queries, keys and values do.
    after: what computes x, as far as a compiled graph may quantize it there: a key of `BEFORE`.
    """

    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    bias: bool
    autocast: torch.dtype | None
    device: torch.device
    sharing: int = 1
    after: str = ""


BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "activation": F.silu,
}
"""What is timed with a product."""


def time_products(
    product: Product,
    rows: Tensor,
    variants: Mapping[str, Callable[[], Tensor]],
    compiler: Compiler,
    model_bytes: int,
) -> dict[str, float | str]:
    """Seconds per call of each variant of the weight; for one that cannot be used, a sentence that says why.

    rows: (any, K), activations of the model, repeated or cut to M rows.
    variants: label -> a function that makes the weight (N, K), plain or quantized.
    model_bytes: of all linear weights of the model in its own dtype, which bounds the number of copies.
    """
    result: dict[str, float | str] = {}
    timers: dict[str, Callable[[], float]] = {}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(product.device.type, product.autocast or torch.bfloat16, enabled=product.autocast is not None),
    ):
        x = rows[torch.arange(product.tokens, device=rows.device) % rows.shape[0]].to(product.dtype)  # (M, K)
        for label, make in variants.items():
            try:
                timers[label] = _timer(product, x, make(), compiler, model_bytes)
            except Exception as error:
                result[label] = reason(error)
        samples = interleave(timers, limit=0.3 * len(timers))
    return result | {label: statistics.median(times) for label, times in samples.items()}


def reason(error: Exception) -> str:
    """An error in one line."""
    error = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _linears(
    xs: list[Tensor], ws: list[list[Tensor]], bias: Tensor | None, before: Callable[[Tensor], Tensor]
) -> list[list[Tensor]]:
    made = [before(x) for x in xs]
    return [[F.linear(x, w, bias) for w in each] for x, each in zip(made, ws)]


_number = itertools.count()


def _timer(product: Product, x: Tensor, weight: Tensor, compiler: Compiler, model_bytes: int) -> Callable[[], float]:
    """A function that times one turn through the copies of `weight`, in seconds per product."""
    # A call of compiled code costs some 50 us of Python, which a layer within a model does not pay. A CUDA graph has none
    # of it; elsewhere several small layers, each with an input of its own, share a call.
    together = 4 if product.device.type != "cuda" and weight.numel() < 2**22 else 1
    sharing = product.sharing
    copies = _copies(weight.nbytes, product, model_bytes)
    copies = together * sharing * math.ceil(copies / (together * sharing))
    data = weight.detach()
    weights = [data, *(data.clone() for _ in range(copies - 1))]
    xs = [x.clone() for _ in range(together)]
    bias = torch.zeros(product.out_features, dtype=product.weight_dtype, device=x.device) if product.bias else None
    # The compiler keeps what it compiled by code object, and a few results for each: a new one for each format.
    code = _linears.__code__.replace(co_name=f"linears_{next(_number)}")
    function: Function = compiler.compile(types.FunctionType(code, _linears.__globals__, code.co_name))

    def turn() -> None:
        for i in range(0, copies, together * sharing):
            groups = [weights[j : j + sharing] for j in range(i, i + together * sharing, sharing)]
            function(xs, groups, bias, BEFORE[product.after])

    turn()  # compiles
    replays = product.device.type == "cuda" and not compiler.is_eager
    run = (_graph_replay if replays else _host_clock)(turn, product.device)
    once = run(1)
    repeats = max(1, min(1000, math.ceil(1e-3 / max(once, 1e-9))))  # a millisecond at least, for the clock's sake
    return lambda: run(repeats) / copies


def _host_clock(turn: Callable[[], None], device: torch.device) -> Callable[[int], float]:
    turn()

    def run(repeats: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            turn()
        synchronize(device)
        return (time.perf_counter() - start) / repeats

    return run


def _graph_replay(turn: Callable[[], None], device: torch.device) -> Callable[[int], float]:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set up their workspaces before anything is captured
            for _ in range(2):
                turn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            turn()
        # A graph reads weights and inputs where they lay, and does not keep them: `turn` does.
        kept = recorded, turn
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(repeats: int) -> float:
        graph, _ = kept
        with torch.cuda.device(device):
            graph.replay()  # keeps the device busy while the host queues the rest
            start.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats

    return run


def _copies(weight_bytes: int, product: Product, model_bytes: int) -> int:
    """How many copies take turns: so many that they exceed the cache (a GPU keeps part of what is loaded to leave it first),
    but no more than the model has of such weights, nor 64."""
    dense_bytes = product.out_features * product.in_features * product.weight_dtype.itemsize
    cold = math.ceil((6 if product.device.type == "cuda" else 3) * cache_bytes(product.device) / weight_bytes)
    owned = math.ceil(model_bytes / dense_bytes)
    return max(1, min(cold, owned, 64))


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache; 32 MiB where nothing tells, and at most 128 MiB of a CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size") if device.type == "cpu" else ()
    kib = [int(text[:-1]) for path in sizes if (text := path.read_text().strip()).endswith("K")]
    return min(1024 * max(kib), 2**27) if kib else 2**25
