"""torchao.quantization.observer: modules that see numbers pass, and give the qparams for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .granularity import Granularity
from .quant_primitives import (
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine_with_min_max,
    dequantize_affine,
    quantize_affine,
)
from .utils import get_block_size

__all__ = [
    "AffineQuantizedFixedQParamObserver",
    "AffineQuantizedMSEObserver",
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedObserverBase",
    "get_block_size",
]


class AffineQuantizedObserverBase(ABC, nn.Module):
    """Sees tensors, each of which it returns as it is, and gives the qparams for them.

    mapping_type ... zero_point_domain: as of `choose_qparams_affine`. keepdim: keep the dims that one block spans.
    """

    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
        keepdim: bool = False,
    ) -> None:
        super().__init__()
        if granularity is None:
            raise ValueError(f"{type(self).__name__}: granularity is missing; give PerTensor(), PerAxis(0) or the like")
        self.mapping_type, self.target_dtype, self.granularity = mapping_type, target_dtype, granularity
        self.quant_min, self.quant_max, self.eps = quant_min, quant_max, eps
        self.scale_dtype, self.zero_point_dtype = scale_dtype, zero_point_dtype
        self.preserve_zero, self.zero_point_domain, self.keepdim = preserve_zero, zero_point_domain, keepdim

    @classmethod
    def with_args(cls, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """What makes such an observer, with these arguments."""
        return partial(cls, *args, **kwargs)

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """See `input`."""

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Any]:
        """Scale and zero point of what was seen."""

    def ends(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of each block, in the shape of the qparams."""
        block = get_block_size(input.shape, self.granularity)
        self.block = block
        view: list[int] = []
        inside: list[int] = []
        for size, b in zip(input.shape, block):
            if b == size or b == 1:
                inside += [len(view)] if b != 1 else []
                view.append(size)
            else:
                inside.append(len(view) + 1)
                view += [size // b, b]
        blocks = input.detach().reshape(view)
        if not inside:
            return blocks, blocks
        lo, hi = blocks.amin(inside), blocks.amax(inside)
        if self.keepdim:
            grid = [size // b for size, b in zip(input.shape, block)]
            lo, hi = lo.reshape(grid), hi.reshape(grid)
        return lo, hi

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Any]:
        """Scale and zero point for a range."""
        return choose_qparams_affine_with_min_max(
            lo, hi, self.mapping_type, [], self.target_dtype, self.quant_min, self.quant_max, self.eps,
            self.scale_dtype, self.zero_point_dtype, self.preserve_zero, self.zero_point_domain,
        )  # fmt: skip


class AffineQuantizedMinMaxObserver(AffineQuantizedObserverBase):
    """Keeps the smallest and the largest number of each block."""

    min_val: Tensor
    max_val: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """See `input`. Raises AssertionError for one that has another number of blocks than those before."""
        if input.numel() == 0:
            return input
        lo, hi = self.ends(input)
        if hasattr(self, "min_val"):
            if lo.shape != self.min_val.shape:
                raise AssertionError(f"the ranges have shape {tuple(lo.shape)}, and before {tuple(self.min_val.shape)}")
            lo, hi = torch.minimum(lo, self.min_val), torch.maximum(hi, self.max_val)
            del self._buffers["min_val"], self._buffers["max_val"]
        self.register_buffer("min_val", lo)
        self.register_buffer("max_val", hi)
        return input

    def calculate_qparams(self) -> tuple[Tensor, Any]:
        """Scale and zero point of the range. Raises AssertionError where nothing was seen."""
        if not hasattr(self, "min_val"):
            raise AssertionError("the observer has seen nothing; run data through it before calculate_qparams")
        return self.qparams(self.min_val, self.max_val)


class AffineQuantizedFixedQParamObserver(AffineQuantizedObserverBase):
    """Gives qparams that are known."""

    def __init__(
        self, *args: Any, scale: Tensor | None = None, zero_point: Tensor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_qparams(torch.ones(1, dtype=torch.float32) if scale is None else scale, zero_point)

    def set_qparams(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Know these."""
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros_like(scale) if zero_point is None else zero_point)

    def forward(self, input: Tensor) -> Tensor:
        """`input`."""
        return input

    def calculate_qparams(self) -> tuple[Tensor, Any]:
        """What is known."""
        return self.scale, self.zero_point  # type: ignore[return-value]


class AffineQuantizedMSEObserver(AffineQuantizedObserverBase):
    """Keeps the range of each block, cut so that the mean squared error is least.

    steps: fractions of the range that are tried. run_once: only the first tensor counts.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, *args: Any, steps: int = 100, run_once: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps, self.run_once, self.calibrated = steps, run_once, False

    def loss_fn(self, x: Tensor, new_min: Tensor, new_max: Tensor) -> Tensor:
        """The mean squared error of each block under a range."""
        scale, zero = self.qparams(new_min, new_max)
        block = get_block_size(x.shape, self.granularity)
        codes = (block, scale, zero, self.target_dtype, self.quant_min, self.quant_max, self.zero_point_domain)
        q = quantize_affine(x, *codes)
        error = (dequantize_affine(q, *codes, output_dtype=x.dtype) - x).square()
        lo, _ = self.ends(error)
        total = _block_sum(error, block)
        return total.reshape(lo.shape)

    def line_search(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The best range of each block."""
        lo, hi = self.ends(input)
        best_lo, best_hi = lo, hi
        least = torch.full_like(lo, torch.inf)
        reach = torch.maximum(lo.abs(), hi)
        symmetric = self.mapping_type is not MappingType.ASYMMETRIC
        for step in range(1, self.steps + 1):
            share = step / self.steps
            a, b = (-reach * share, reach * share) if symmetric else (lo * share, hi * share)
            loss = self.loss_fn(input, a, b)
            better = loss < least
            least = torch.where(better, loss, least)
            best_lo, best_hi = torch.where(better, a, best_lo), torch.where(better, b, best_hi)
        return best_lo, best_hi

    def forward(self, input: Tensor) -> Tensor:
        """See `input`."""
        if input.numel() == 0 or (self.calibrated and self.run_once):
            return input
        lo, hi = self.line_search(input.detach())
        if self.calibrated:
            lo, hi = torch.minimum(lo, self.min_val), torch.maximum(hi, self.max_val)
            del self._buffers["min_val"], self._buffers["max_val"]
        self.register_buffer("min_val", lo)
        self.register_buffer("max_val", hi)
        self.calibrated = True
        return input

    def calculate_qparams(self) -> tuple[Tensor, Any]:
        """Scale and zero point of the range. Raises AssertionError where nothing was seen."""
        if not self.calibrated:
            raise AssertionError("the observer has seen nothing; run data through it before calculate_qparams")
        return self.qparams(self.min_val, self.max_val)


def _block_sum(x: Tensor, block: tuple[int, ...]) -> Tensor:
    view = [n for size, b in zip(x.shape, block) for n in (size // b, b)]
    return x.reshape(view).sum(tuple(range(1, len(view), 2)))
