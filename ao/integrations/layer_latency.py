"""How long the largest linear layers of a model take, before and after: `layer_latencies`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ao.dtypes import QTensor
from ao.quant.autoquant.timing import Product, time_products
from ao.quant.compiled import compiler_of

from .html_report import Measure

__all__ = ["LargestLayers", "layer_latencies"]


class LargestLayers:
    """Keeps one weight of each shape and format, before and after, of those that take most bytes in the model together."""

    def __init__(self) -> None:
        self.kept: dict[tuple[tuple[int, ...], str], tuple[Tensor, QTensor]] = {}
        self.bytes: dict[tuple[tuple[int, ...], str], int] = {}

    def add(self, before: Tensor, after: QTensor) -> None:
        """Meet a weight. Only those of two dims count."""
        key = tuple(before.shape), repr(after.spec)
        if before.dim() == 2:
            self.kept.setdefault(key, (before, after))
            self.bytes[key] = self.bytes.get(key, 0) + before.nbytes

    def most(self, count: int) -> list[tuple[Tensor, QTensor]]:
        """The `count` largest."""
        return [self.kept[key] for key in sorted(self.kept, key=lambda key: -self.bytes[key])[:count]]


def layer_latencies(
    layers: Iterable[tuple[Tensor, QTensor]], tokens: Sequence[int] = (1,), device: torch.device | str = "cpu"
) -> tuple[list[Measure], list[str]]:
    """The time of `F.linear(x, weight)`, compiled, with weights that are not in the cache, in microseconds: medians.

    layers: weights (N, K) before, in floating point, and after.
    tokens: of x (tokens, K), which has the dtype of the weight before.
    device: where to measure.

    Returns the measures, and for layers that could not be timed a sentence that says why.
    """
    measures: list[Measure] = []
    notes: list[str] = []
    place = torch.empty(0, device=device).device
    compiler = compiler_of(torch.compile(nn.Identity()))  # type: ignore[arg-type]
    for before, after in layers:
        n, k = before.shape
        for m in tokens:
            product = Product(m, n, k, before.dtype, before.dtype, False, None, place)
            x = torch.randn(m, k, dtype=before.dtype, device=place)
            variants = {"before": lambda w=before: w.to(place), "after": lambda q=after: q.to(place)}
            name = f"{n} x {k}, {m} {'token' if m == 1 else 'tokens'}"
            found = time_products(product, x, variants, compiler, model_bytes=2**40)
            errors = [f"{name}, {when}: {why}" for when, why in found.items() if isinstance(why, str)]
            if errors:
                notes += errors
            else:
                measures.append(Measure(name, 1e6 * float(found["before"]), 1e6 * float(found["after"]), "µs"))
    return measures, notes
