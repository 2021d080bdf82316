"""optimum-quanto: rows of int8 or float8, and groups of 2 or 4 bits.

weight._data          int8 or float8, (N, K); weight._scale (N, 1)
weight._data._data    2 or 4 bits: uint8, the matrix of groups packed along its rows, the first half in the low nibbles;
                      weight._scale and weight._shift of the groups:

W = q * scale - shift, or (q - shift) * scale where shift is an integer
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ...dtypes import Intx, QTensor, Shifted, pack, pack_dim
from .fp8 import float8
from .reader import Reader, Source


class Quanto(Reader):
    """See the module. The shape of a weight of 2 or 4 bits is not stored: it is that of the model's parameter."""

    methods = ("quanto",)
    main = "weight._scale"
    others = ("weight._data", "weight._data._data", "weight._shift")
    integers = ("weight._data._data",)
    floats = ("weight._scale",)

    def sources(self, names: Collection[str]) -> Iterator[Source]:
        for source in super().sources(names):
            if "weight._data" in source.parts or "weight._data._data" in source.parts:
                yield source

    def ignored(self, names: Collection[str]) -> set[str]:
        return {n for n in names if n.endswith((".input_scale", ".output_scale"))}

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        scale = parts["weight._scale"]
        if "weight._data._data" not in parts:
            data = parts["weight._data"]
            if data.is_floating_point():
                return float8(data, scale, dtype)
            spec = Intx(8, (1, -1), narrow=True, scale_dtype=str(scale.dtype).removeprefix("torch."))
            return spec.wrap({"qdata": data, "scale": scale.reshape(-1, 1)}, dtype, data.shape)
        if shape is None:
            raise ValueError("the files do not have the shape of weights of 2 and 4 bits; give `shape`")
        packed = parts["weight._data._data"]
        bits = 8 * packed.numel() // shape.numel()
        told = str(self.config.get("modules", {}).get(source.module, self.config).get("weights", bits))
        if not told.endswith(str(bits)):
            raise ValueError(f"they hold {bits} bits per element, and the config says {told}")
        return quanto(packed, scale, parts["weight._shift"], bits, tuple(shape), dtype)


def quanto(
    packed: Tensor, scale: Tensor, shift: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> QTensor:
    """Groups along K of 2 or 4 bits. packed: (groups / n, group_size) uint8; scale, shift: (groups, 1)."""
    groups, each = scale.numel(), 8 // bits
    codes = torch.cat([(packed >> (bits * k)) & (2**bits - 1) for k in range(each)])[:groups].reshape(shape)
    block = shape[0] * shape[1] // groups
    if shape[1] % block:
        raise ValueError(f"groups of {block} do not fit rows of {shape[1]}")
    grid = (shape[0], shape[1] // block)
    name, qdata = str(scale.dtype).removeprefix("torch."), pack(codes, bits, pack_dim(shape, bits))
    if not shift.is_floating_point():
        spec: Intx | Shifted = Intx(bits, (1, block), signed=False, symmetric=False, scale_dtype=name)
        zero = shift.reshape(grid).to(torch.uint8)
        return spec.wrap({"qdata": qdata, "scale": scale.reshape(grid), "zero_point": zero}, dtype, shape)
    spec = Shifted(bits, (1, block), scale_dtype=name)
    return spec.wrap({"qdata": qdata, "scale": scale.reshape(grid), "shift": shift.reshape(grid)}, dtype, shape)
