"""torchao.dtypes.uintx.uintx_layout: packed integers of 1 to 7 bits, without qparams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ao.dtypes import pack, pack_dim, unpack

from ..utils import UintxLayout

__all__ = ["UintxLayout", "UintxTensor", "to_uintx"]


class UintxTensor:
    """Codes of a dtype such as torch.uint3, packed as all of `ao` packs them.

    packed: the bytes. get_plain(): the codes, uint8.
    """

    def __init__(self, packed: Tensor, shape: torch.Size, dtype: torch.dtype, dim: int) -> None:
        self.packed, self.shape, self.dtype, self.dim = packed, shape, dtype, dim

    @property
    def bit_width(self) -> int:
        """Bits per code."""
        return int(str(self.dtype).removeprefix("torch.uint"))

    def get_plain(self) -> Tensor:
        """The codes, uint8 of the shape."""
        return unpack(self.packed, self.bit_width, self.dim)

    def get_shards(self) -> list[Tensor]:
        """The bytes."""
        return [self.packed]

    def to(self, *args: Any, **kwargs: Any) -> UintxTensor:
        """On another device."""
        return UintxTensor(self.packed.to(*args, **kwargs), self.shape, self.dtype, self.dim)


def to_uintx(int_data: Tensor, dtype: torch.dtype, pack_dim_: int = -1) -> UintxTensor:
    """Pack codes (uint8). Raises ValueError where no dim is a multiple of 8."""
    bits = int(str(dtype).removeprefix("torch.uint"))
    dim = pack_dim(int_data.shape, bits, "to_uintx")
    return UintxTensor(pack(int_data.to(torch.uint8), bits, dim), int_data.shape, dtype, dim)
