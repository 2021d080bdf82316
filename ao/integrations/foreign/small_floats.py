"""MXFP4, MXFP8 and NVFP4 weights, as gpt-oss, ModelOpt and compressed-tensors store them.

gpt-oss ("mxfp4")  <name>_blocks uint8 (E, N, K / 32, 16), low nibble first; <name>_scales uint8 (E, N, K / 32): exponents.
                   The parameter is (E, K, N).
ModelOpt ("modelopt")  NVFP4: weight uint8 (N, K / 2), low nibble first; weight_scale e4m3 (N, K / 16); weight_scale_2, which
                   multiplies; input_scale. FP8: weight e4m3, weight_scale, input_scale
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...dtypes import E8M0, MXFP4, MXFP8, NVFP4, Float8, FloatX, QTensor, pack
from .fp8 import float8
from .reader import Reader, Source, with_activation


class MXFP4Experts(Reader):
    """gpt-oss: see the module."""

    methods = ("mxfp4",)
    main = "_blocks"
    others = ("_scales",)
    integers = ("_blocks", "_scales")

    def parameter_of(self, stem: str) -> str:
        return stem

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        q = mxfp4(parts["_blocks"].flatten(-2), parts["_scales"], dtype)  # (E, N, K)
        return q.transpose(-2, -1)


class ModelOpt(Reader):
    """NVFP4 and FP8 of ModelOpt: see the module."""

    methods = ("modelopt",)
    main = "weight_scale"
    others = ("weight", "weight_scale_2", "input_scale")
    floats = ("weight_scale", "weight_scale_2", "input_scale")

    def __init__(self, config: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        inner = config.get("quantization", config)
        super().__init__(inner, metadata)
        self.algorithm = str(inner.get("quant_algo", ""))
        if self.algorithm not in ("NVFP4", "FP8"):
            raise ValueError(f"modelopt: quant_algo {self.algorithm!r}; NVFP4 and FP8 are read")

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        if "weight_scale_2" in parts:
            return nvfp4(parts["weight"], parts["weight_scale"], parts["weight_scale_2"], dtype)
        made = float8(parts["weight"], parts["weight_scale"], dtype)
        if "input_scale" not in parts:
            return made
        return with_activation(made, Float8("e4m3", (-1, -1)), parts["input_scale"].float().reshape(1, 1))

    def ignored(self, names: Any) -> set[str]:
        return {name for name in names if name.endswith((".k_scale", ".v_scale"))}


def _packed(octets: Tensor) -> Tensor:
    """(..., K / 2) uint8, the first of two codes in the low nibble -> packed as ours, along K."""
    codes = torch.stack([octets & 15, octets >> 4], -1).flatten(-2)  # (..., K)
    return pack(codes, 4)


def mxfp4(octets: Tensor, exponents: Tensor, dtype: torch.dtype, spec: FloatX = MXFP4) -> QTensor:
    """octets: (..., K / 2) uint8. exponents: one per block (..., K / 32), bytes, biased by 127."""
    shape = (*octets.shape[:-1], 2 * octets.shape[-1])
    return _mx(spec, _packed(octets), exponents, dtype, shape)


def mxfp8(weight: Tensor, exponents: Tensor, dtype: torch.dtype, spec: FloatX = MXFP8) -> QTensor:
    """weight: (..., K) float8_e4m3fn or float8_e5m2. exponents: one per block (..., K / 32), bytes, biased by 127."""
    return _mx(spec, weight.view(torch.uint8), exponents, dtype, tuple(weight.shape))


def _mx(spec: FloatX, qdata: Tensor, exponents: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> QTensor:
    _check(shape, exponents, spec.block[-1])
    scale = E8M0().wrap({"qdata": exponents.view(torch.uint8)}, torch.float32, exponents.shape)
    return spec.wrap({"qdata": qdata, "scale": scale}, dtype, shape)


def nvfp4(octets: Tensor, scale: Tensor, per_tensor: Tensor | None, dtype: torch.dtype) -> QTensor:
    """octets: (N, K / 2) uint8. scale: (N, K / 16) float8_e4m3fn. per_tensor: one number, which multiplies, if any."""
    shape = (*octets.shape[:-1], 2 * octets.shape[-1])
    _check(shape, scale, 16)
    if per_tensor is None:
        one_level = replace(NVFP4, scale="e4m3", scale_spec=None)
        return one_level.wrap({"qdata": _packed(octets), "scale": scale}, dtype, shape)
    assert NVFP4.scale_spec is not None
    second = per_tensor.float().reshape((1,) * scale.dim())
    scales = NVFP4.scale_spec.wrap(
        {"qdata": scale.view(torch.float8_e4m3fn), "scale": second}, torch.float32, scale.shape
    )
    return NVFP4.wrap({"qdata": _packed(octets), "scale": scales}, dtype, shape)


def _check(shape: tuple[int, ...], scale: Tensor, block: int) -> None:
    if tuple(scale.shape) != (*shape[:-1], shape[-1] // block):
        raise ValueError(f"scales of shape {tuple(scale.shape)} do not fit a weight of shape {tuple(shape)}")
