"""From the words of configs to the fields of a Spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ao import Granularity, Intx, MappingType, PerBlock

from .quant_primitives import TorchAODType, as_dtype, bounds

FLOAT8: dict[torch.dtype, Literal["e4m3", "e5m2"]] = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""The formats of float8 by torch's dtype."""

INT4: torch.dtype = vars(torch)["int4"]
UINT4: torch.dtype = vars(torch)["uint4"]  # which torch's stubs do not name


def mapped(mapping: MappingType) -> dict[str, Any]:
    """The fields of `Intx` that a MappingType stands for."""
    return {
        "symmetric": mapping is not MappingType.ASYMMETRIC,
        "clip": mapping is not MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    }


def block_of(granularity: Granularity) -> tuple[int, ...]:
    """The block of a granularity; of a PerBlock, one per index of the dims before those it names."""
    block = granularity.block()
    return tuple(block) if isinstance(granularity, PerBlock) else block


def block_in(block_size: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """A block with -1 for a whole dim, of a block size that names its length."""
    return tuple(-1 if b == n else b for b, n in zip(block_size, shape))


def intx(
    target_dtype: torch.dtype | TorchAODType,
    block: tuple[int, ...],
    mapping: MappingType,
    quant_min: float | None = None,
    quant_max: float | None = None,
    **fields: Any,
) -> Intx:
    """The integers of a range of codes: those of the dtype, or from quant_min to quant_max.

    Raises NotImplementedError for a range that no number of bits has.
    """
    low, high = bounds(as_dtype(target_dtype), quant_min, quant_max)
    bits = int(high).bit_length() + (low < 0)
    signed = low < 0
    full = -(2 ** (bits - 1)) if signed else 0
    narrow = signed and low == full + 1
    if bits > 8 or high != (2 ** (bits - 1) - 1 if signed else 2**bits - 1) or low not in (full, full + narrow):
        raise NotImplementedError(
            f"codes from {low:.0f} to {high:.0f}: ao has integers of 1 to 8 bits, of which all codes, or all but the lowest, are "
            "used; give quant_min and quant_max of such a range"
        )
    kind = mapped(mapping)
    return Intx(bits, block, signed=signed, narrow=narrow and kind["symmetric"], **kind, **fields)


def bits_of(dtype: torch.dtype | TorchAODType, who: str) -> int:
    """The bits of torch.int1 to torch.int8. Raises ValueError for another dtype."""
    name = str(as_dtype(dtype)).removeprefix("torch.int")
    if name not in "12345678":
        raise ValueError(f"{who}: weight_dtype must be torch.int1 to torch.int8, got {dtype}")
    return int(name)


def not_here(what: str, instead: str) -> NotImplementedError:
    """What using a format raises that `ao` does not have."""
    return NotImplementedError(f"{what}: ao does not have this format; use {instead}")
