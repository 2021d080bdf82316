"""Clip: qparams for a range that is cut where that makes the error of the whole block least, without any data.

Round-to-nearest lays the codes from the smallest number of a block to the largest, which leaves most numbers wide steps for
the sake of two. Here the scale of each block is tried at fractions of that one, with the zero points around the one that
keeps the middle of the range where it is, and the best is kept, block by block:

    argmin over f, move of  sum |W - D(Q(W))|**2
    scale' = f * scale,    zero_point' = zero_point + m / scale - m / scale' + move

where m is the middle of the range. Codes and qparams take the bits that they took, and any format with a scale per block can
be cut. It gains the more, the fewer bits there are and the larger the blocks are.

Cost: some thirty roundings of the weight. They are done in pieces, so that memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...dtypes import Spec, dense, in_blocks, to_blocks
from ..calibration.statistics import Statistics
from .hqq import Qparams, check_scaled, magnitude
from .recipe import Recipe, Rounded, RoundToNearest

PIECES = {"cpu": 2**19}
"""The elements that are searched at a time, by kind of device: on a CPU, temporaries then stay in cache."""

LARGE_PIECE = 2**24
"""The same on other devices, where a launch costs more."""

CUTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
WIDER = (1.2, 1.5, 2.0)
"""Formats whose scale is less than the largest number asks for, such as a mean or a power of two below, may want a larger one."""


@dataclass(frozen=True)
class Clip(Recipe):
    """Qparams of the least squared error per block, found from the weight alone.

    Raises ValueError for a format without a scale.
    """

    name: ClassVar[str] = "clip"

    def check(self, spec: Spec, shape: tuple[int, ...]) -> None:  # type: ignore[override]
        check_scaled(spec, shape, "Clip")

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        if weight.numel() == 0:
            return RoundToNearest().quantize(weight, spec, seen)
        found = [_search(part.float(), spec) for part in _parts(weight, spec)]
        qparams = spec.stored(**{name: torch.cat([each[name] for each in found]) for name in found[0]})
        return Rounded(spec.round(weight.float(), **qparams), qparams)


def _parts(weight: Tensor, spec: Spec) -> Iterator[Tensor]:
    """A weight in pieces along its first dim that cut no block."""
    tile = weight.shape[0] // spec.grid(weight.shape)[0]
    long = weight.shape[0] * PIECES.get(weight.device.type, LARGE_PIECE) // weight.numel()  # the first dim of a piece
    yield from weight.split(max(long // tile, 1) * tile)


def _search(weight: Tensor, spec: Spec) -> Qparams:
    """The best qparams of each block. weight: float32."""
    grid = spec.grid(weight.shape)
    blocks = to_blocks(weight, grid)
    inside = tuple(range(1, blocks.dim(), 2))
    unit = in_blocks(1 / magnitude(weight, grid))  # squares then stay within the range of float32
    start = {name: dense(t).clone() for name, t in spec.choose_qparams(weight, grid).items()}
    best = dict(start)
    scale, zero = start["scale"].float(), start.get("zero_point")
    middle = (blocks.amin(inside) + blocks.amax(inside)) / 2
    middle = torch.where(scale == 0, 0.0, middle / scale)
    least = torch.full(grid, torch.inf, dtype=torch.float32, device=weight.device)
    factor, moved = torch.ones_like(least), torch.zeros_like(least)

    def attempt(f: Tensor, move: Tensor) -> None:
        nonlocal least, factor, moved
        wanted = {"scale": scale * f}
        if zero is not None:
            wanted["zero_point"] = zero.float() + middle * (1 - 1 / f) + move
        tried = {name: dense(t) for name, t in spec.stored(**wanted).items()}
        error = to_blocks(spec.round(weight, **tried).sub_(weight), grid).mul_(unit).square_().sum(inside)
        better = error < least  # not where it is NaN
        least = torch.where(better, error, least)
        factor, moved = torch.where(better, f, factor), torch.where(better, move, moved)
        for name, t in tried.items():
            best[name] = torch.where(better, t, best[name])

    def around(changes: tuple[float, ...], moves: tuple[float, ...]) -> None:
        """Other scales and zero points than the best ones so far."""
        f, move = factor, moved
        for change in changes:
            for more in moves:
                attempt(f + change, move + more)

    step = 0.25 if zero is None or zero.is_floating_point() else 1.0
    moves = () if zero is None else (-step, step)
    for f in CUTS if zero is not None else CUTS + WIDER:
        attempt(torch.full_like(least, f), moved)
    around((0.0,), moves)
    around((-0.05, 0.05), (0.0, *moves))
    around((-0.075, 0.075), (0.0, *moves))
    around((-0.025, 0.025), (0.0, *moves))
    return best
