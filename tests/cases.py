"""The registry of dtypes: one line each, and every shared test runs on it.

`rmse` is the pinned root mean square error of quantizing `weight()`, relative to its own; a change of numerics is a change
of one number here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ao.dtypes import (
    FP6,
    MXFP4,
    MXFP6,
    MXFP8,
    MXINT8,
    NF4,
    NVFP4,
    Codebook,
    DynamicTree,
    Float8,
    FloatX,
    Intx,
    MXInt,
    PositiveSteps,
    Shifted,
    Sparse24,
    Spec,
    Ternary,
)

SHAPE = (128, 256)


@dataclass(frozen=True)
class Case:
    """A Spec and what is known of it."""

    spec: Spec
    rmse: float

    def __str__(self) -> str:
        name = repr(self.spec).replace(" ", "")
        return name if len(name) < 120 else f"{name[:30]}...{name[-20:]}"

    @property
    def weight_only(self) -> bool:
        """Whether the activation stays in floating point."""
        return self.spec.act is None


def weight(shape: tuple[int, ...] = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A normal weight, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_random(precision: str) -> bool:
    """Whether gradients are rounded at random in a training precision, so that other data next to them changes them."""
    return "stochastic" in precision or precision in ("mxfp4", "nvfp4")


SIXTEENTHS = tuple((i - 8) / 8 for i in range(17) if i != 8)
BYTES = tuple((i - 127.5) / 127.5 for i in range(256))
BYTE_SCALES = Intx(8, (1, 2), signed=False, symmetric=True, scale_dtype="float16")

CASES = [
    Case(Intx(8), 0.00696),
    Case(Intx(8, (1, 32)), 0.00556),
    Case(Intx(8, (-1, -1)), 0.00985),
    Case(Intx(8, signed=False, symmetric=False), 0.00643),
    Case(Intx(8, narrow=True), 0.00694),
    Case(Intx(7, (1, 64)), 0.01064),
    Case(Intx(6, (32, 32)), 0.03002),
    Case(Intx(5), 0.05279),
    Case(Intx(4, (1, 32)), 0.08099),
    Case(Intx(4, (1, 128), signed=False), 0.10056),
    Case(Intx(4, (1, 64), symmetric=True, clip=False), 0.10181),
    Case(Intx(4, (1, 32), zero_point="float", scale_dtype="bfloat16"), 0.07840),
    Case(Intx(4, (1, 64), zero_point="float"), 0.08930),
    Case(Intx(4, (1, 32), signed=False, zero_point="joint"), 0.08031),
    Case(Intx(2, (1, 32), zero_point="joint"), 0.39316),
    Case(Intx(3, (1, 64)), 0.19390),
    Case(Intx(2, (1, 32), symmetric=True), 0.40567),
    Case(Intx(2, (-1, -1), symmetric=True, narrow=True), 0.51213),
    Case(Intx(1, (1, 32), symmetric=True), 0.59332),
    Case(Float8(), 0.02621),
    Case(Float8("e5m2", (-1, -1)), 0.05280),
    Case(Float8(block=(32, 64)), 0.02649),
    Case(Float8(block=(-1, -1), power_of_two=True), 0.02649),
    Case(Codebook(), 0.09204),
    Case(NF4, 0.09204),
    Case(Codebook(SIXTEENTHS, (1, 32)), 0.11271),
    Case(Codebook(BYTES, (1, -1)), 0.00697),
    Case(Codebook(scale_spec=Codebook(BYTES, (1, -1), offset=True)), 0.09203),
    Case(DynamicTree(8, True, (1, 64)), 0.00949),
    Case(DynamicTree(4, True, (1, 32)), 0.12950),
    Case(PositiveSteps(4, (1, 32)), 0.80139),
    Case(Intx(8, act=Intx(8)), 0.00696),
    Case(Intx(8, act=Intx(8, symmetric=False)), 0.00696),
    Case(Intx(4, (1, 32), symmetric=True, act=Intx(8, symmetric=False)), 0.09474),
    Case(Float8(act=Float8()), 0.02621),
    Case(MXFP4, 0.11506),
    Case(FloatX(2, 1, (1, 32), scale_rule="rceil"), 0.11539),
    Case(MXFP6, 0.02829),
    Case(MXFP8, 0.02937),
    Case(MXINT8, 0.00825),
    Case(MXInt(scale_rule="rceil"), 0.00829),
    Case(NVFP4, 0.09521),
    Case(FloatX(2, 1, (1, 16), "float32", scale_spec=Float8(block=(-1, -1)), four_over_six=True), 0.08728),
    Case(FP6, 0.05180),
    Case(Ternary(), 0.51213),
    Case(Ternary((1, 64), "bits", "bfloat16"), 0.50800),
    Case(Ternary(act=Intx(8, narrow=True)), 0.51213),
    Case(Shifted(4, (1, 32), scale_dtype="float16"), 0.07836),
    Case(Shifted(4, (1, 32), centered=True, scale_dtype="bfloat16"), 0.07837),
    Case(Shifted(6, (1, 16), symmetric=True, scale_spec=Intx(8, (1, 2), narrow=True, scale_dtype="float16")), 0.02192),
    Case(Shifted(5, (1, 32), scale_spec=BYTE_SCALES, shift_spec=BYTE_SCALES), 0.03790),
    Case(Sparse24(prune=True), 0.36407),
    Case(Sparse24(Intx(4, (1, 64), symmetric=True), prune=True), 0.37152),
]
