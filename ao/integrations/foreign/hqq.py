"""HQQ: integers of 1 to 8 bits in groups, with a zero point that has a fraction.

W_q    codes, packed along the rows of the matrix of groups: the first half of the rows in the high nibbles (4 bits), quarters
       from high to low (2), eighths (1); ten values of 3 bits in an int32, from bit 27 down
scale, zero    of the groups
nbits, shape, axis, ... as tensors of one element, or bytes

W = (q - zero) * scale, of groups along K (axis 1)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...dtypes import Intx, QTensor, pack, pack_dim
from .reader import Reader, Source

_SETTINGS = frozenset({
    "group_size", "packing", "view_as_float", "unpack_view_dtype", "quant_scale", "quant_zero", "compute_dtype",
    "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
})  # fmt: skip
"""What is stored of a layer besides, for its own library."""


class HQQ(Reader):
    """See the module."""

    methods = ("hqq",)
    main = "W_q"
    others = ("scale", "zero", "nbits", "shape", "axis")
    integers = ("nbits", "shape")
    floats = ("scale", "zero")

    def ignored(self, names: Collection[str]) -> set[str]:
        layers = {name.removesuffix("W_q") for name in names if name.endswith(".W_q")}
        stems = {name: name.rpartition(".")[0] + "." for name in names}
        return {name for name, stem in stems.items() if stem in layers and name.removeprefix(stem) in _SETTINGS}

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        bits = int(_number(parts["nbits"]))
        size = tuple(int(n) for n in parts["shape"])
        if "axis" in parts and int(_number(parts["axis"])) != 1:
            raise ValueError("groups along N (axis 0); only those along K are read")
        packed = parts["W_q"]
        if packed.is_floating_point():  # bytes that were stored as if they were numbers
            packed = packed.view(torch.uint8 if bits != 3 else torch.int32)
        return hqq(packed, parts["scale"], parts["zero"], bits, size, dtype)


def _number(t: Tensor) -> Any:
    return t.flatten()[0].item()


def hqq_codes(packed: Tensor, bits: int) -> Tensor:
    """(rows / n, G) packed -> (rows, G) uint8 codes; of 3 bits some rows more at the end than were packed."""
    if bits == 8:
        return packed.to(torch.uint8)
    if bits == 3:
        return torch.cat([(packed >> (27 - 3 * k)) & 7 for k in range(10)]).to(torch.uint8)
    return torch.cat([(packed >> (8 - bits * (k + 1))) & (2**bits - 1) for k in range(8 // bits)]).to(torch.uint8)


def hqq(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> QTensor:
    """Groups along K: packed (groups / n, group_size), scale and zero (groups, 1)."""
    groups = scale.numel()
    codes = hqq_codes(packed, bits)[:groups].reshape(shape)
    block = shape[0] * shape[1] // groups
    if shape[1] % block:
        raise ValueError(f"groups of {block} do not fit rows of {shape[1]}")
    scale_dtype = str(scale.dtype).removeprefix("torch.")
    grid = (shape[0], shape[1] // block)
    spec = Intx(bits, (1, block), signed=False, symmetric=False, zero_point="float", scale_dtype=scale_dtype)
    fields = {
        "qdata": pack(codes, bits, pack_dim(shape, bits)),
        "scale": scale.reshape(grid),
        "zero_point": zero.to(scale.dtype).reshape(grid),
    }
    return spec.wrap(fields, dtype, shape)
