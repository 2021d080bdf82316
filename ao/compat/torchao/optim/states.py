"""The states of low-bit optimizers as classes: each is a `FlatTensor` of a format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ao.dtypes import DynamicTree, Flat, FlatTensor, Float8, PositiveSteps, QTensor

from ..kinds import Kind


def _zeros(spec: Any, shape: Sequence[int], device: Any, dtype: torch.dtype | None) -> QTensor:
    return Flat(spec).quantize(torch.zeros(tuple(shape), device=device, dtype=dtype or torch.float32))


def _inner(x: Any) -> Any:
    return x.spec.inner if isinstance(x, FlatTensor) else None


class OptimState8bit(metaclass=Kind):
    """A `FlatTensor` of the 8-bit dynamic map."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(_inner(x), DynamicTree) and _inner(x).bits == 8

    @staticmethod
    def zeros(
        shape: Sequence[int],
        signed: bool = True,
        block_size: int = 256,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> QTensor:
        """A state of zeros."""
        return _zeros(DynamicTree(8, signed, (1, block_size)), shape, device, dtype)


class OptimState4bit(metaclass=Kind):
    """A `FlatTensor` of the 4-bit dynamic map, or, unsigned, of positive steps."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(_inner(x), (DynamicTree, PositiveSteps)) and _inner(x).bits == 4

    @staticmethod
    def zeros(
        shape: Sequence[int],
        signed: bool = True,
        block_size: int = 128,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> QTensor:
        """A state of zeros."""
        spec = DynamicTree(4, True, (1, block_size)) if signed else PositiveSteps(4, (1, block_size))
        return _zeros(spec, shape, device, dtype)


class OptimStateFp8(metaclass=Kind):
    """A `FlatTensor` of float8."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(_inner(x), Float8)

    @staticmethod
    def zeros(
        shape: Sequence[int], block_size: int = 256, device: Any = None, dtype: torch.dtype | None = None
    ) -> QTensor:
        """A state of zeros."""
        return _zeros(Float8("e4m3", (1, block_size)), shape, device, dtype)
