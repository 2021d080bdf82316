"""bitsandbytes: 4-bit codes into a table, also with double quantization, and LLM.int8's rows.

weight                uint8, flat, two codes in a byte, the first in the high nibble
weight.absmax         a float32 per `blocksize` elements, or with double quantization a uint8 code for each
weight.quant_map      float32 (16,): nf4 or fp4, by code
weight.nested_absmax, weight.nested_quant_map   absmax = nested_quant_map[code] * nested_absmax[block of 256] + nested_offset
weight.quant_state.bitsandbytes__nf4 (or __fp4)   JSON as bytes: shape, dtype, blocksize, nested_blocksize, nested_offset

W = quant_map[code] * absmax

int8: weight (N, K) int8, SCB (N,) float32, the largest of each row: W = q * SCB / 127
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from ...dtypes import Codebook, Intx, pack, pack_dim
from ...dtypes.codebook import TABLES
from .reader import Reader, Source

_STATE = ".quant_state.bitsandbytes__"


class BitsAndBytes(Reader):
    """See the module."""

    methods = ("bitsandbytes",)
    main = "weight"
    integers = ("weight", "state")
    floats = ("quant_map", "nested_absmax", "nested_quant_map", "SCB")

    def sources(self, names: Collection[str]) -> Iterator[Source]:
        for name in sorted(names):
            if _STATE in name:
                weight = name.partition(_STATE)[0]
                ends = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
                parts = {end[1:]: weight + end for end in ends if weight + end in names}
                yield Source(weight, {"weight": weight, "state": name, **parts})
            elif name.endswith(".SCB"):
                stem = name.removesuffix("SCB")
                yield Source(f"{stem}weight", {"weight": f"{stem}weight", "SCB": name})

    def ignored(self, names: Collection[str]) -> set[str]:
        return {name for name in names if name.endswith(".weight_format")}

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        if "SCB" in parts:
            if parts["SCB"].numel() != parts["weight"].shape[0]:
                raise ValueError("SCB has another length than the weight has rows")
            scale = (parts["SCB"].float() * (1 / 127)).reshape(-1, 1)
            return Intx(8, (1, -1), narrow=True).wrap(
                {"qdata": parts["weight"], "scale": scale}, dtype, parts["weight"].shape
            )
        state = json.loads(bytes(parts["state"].tolist()))
        size, block = tuple(state["shape"]), int(state["blocksize"])
        octets = parts["weight"].flatten()
        codes = torch.stack([octets >> 4, octets & 15], -1).reshape(size)
        if size[-1] % block:
            raise ValueError(f"blocks of {block} elements do not fit rows of {size[-1]}")
        grid = (*size[:-1], size[-1] // block)
        name, codes = _table(parts["quant_map"], codes)
        scale, scale_spec = self._scale(parts, state, grid)
        spec = Codebook(name, (1, block), scale_spec)
        table = torch.tensor(spec.values, dtype=torch.float32, device=codes.device)
        fields = {"qdata": pack(codes, 4, pack_dim(size, 4)), "scale": scale, "table": table}
        return spec.wrap(fields, dtype, size)

    def _scale(self, parts: dict[str, Tensor], state: dict[str, Any], grid: tuple[int, ...]) -> tuple[Tensor, Any]:
        if parts["absmax"].is_floating_point() == ("nested_absmax" in parts):
            raise ValueError(f"absmax is of {parts['absmax'].dtype}")
        if "nested_absmax" not in parts:
            return parts["absmax"].float().reshape(grid), None
        size, nested = int(state["nested_blocksize"]), parts["nested_absmax"].float()
        values = parts["nested_quant_map"].float()
        codes = parts["absmax"].flatten()
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device="cpu")
        blocks = _blocks_of(grid, size)
        if blocks is None:  # of 256 neighbours that are no rectangle: as the numbers that they are
            return (values[codes.long()] * nested.repeat_interleave(size)[: codes.numel()] + offset).reshape(grid), None
        name, codes = _table(values, codes)
        spec = Codebook(name, blocks, offset=True)
        second = nested.reshape([g // b if b > 0 else 1 for g, b in zip(grid, blocks)])
        fields = {
            "qdata": codes.reshape(grid),
            "scale": second,
            "offset": offset.reshape((1,) * len(grid)),
            "table": torch.tensor(spec.values, dtype=torch.float32, device=codes.device),
        }
        return spec.wrap(fields, torch.float32, grid), spec


def _table(values: Tensor, codes: Tensor) -> tuple[str | tuple[float, ...], Tensor]:
    """A table in order, by its name if it has one, and the codes into it."""
    order = torch.argsort(values, stable=True)
    ranks = torch.argsort(order)
    table = tuple(values.float()[order].tolist())
    names = [name for name, known in TABLES.items() if known == table]
    return (names[0] if names else table), ranks.to(torch.uint8)[codes.int()]


def _blocks_of(grid: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """Runs of `size` in a grid that is read row by row, as blocks of it; None where they are none."""
    columns, total = grid[-1], 1
    for g in grid:
        total *= g
    if total <= size:
        return (-1,) * len(grid)
    if columns % size == 0:
        return (1,) * (len(grid) - 1) + (size,)
    if len(grid) == 2 and size % columns == 0 and grid[0] % (size // columns) == 0:
        return (size // columns, -1)
    return None
