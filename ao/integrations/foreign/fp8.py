"""float8 weights: DeepSeek's and Qwen's blocks ("fp8"), rows (fbgemm), and one scale per tensor (ModelOpt, AutoFP8).

weight            (N, K) float8_e4m3fn
weight_scale_inv  (ceil(N / 128), ceil(K / 128)): multiplies, in spite of its name; float32, or float8_e8m0fnu
weight_scale      one number, or (N, 1)
input_scale       of static activations
input_scale_ub    (fbgemm) what dynamic scales are capped at
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...dtypes import Float8, QTensor
from .reader import Reader, Source, with_activation


class FP8(Reader):
    """See the module."""

    methods = ("fp8", "fbgemm_fp8")
    main = "weight_scale_inv"
    others = ("weight", "input_scale", "activation_scale")
    floats = ("weight", "weight_scale_inv", "weight_scale", "input_scale")

    def __init__(self, config: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(config, metadata)
        self.blocks = config.get("weight_block_size")
        if not self.blocks:
            self.main, self.others = "weight_scale", ("weight", "input_scale", "input_scale_ub")  # type: ignore[misc]

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        static = self.config.get("activation_scheme") == "static"
        act_block = (1, 128) if self.blocks else (-1, -1) if parts[self.main].numel() == 1 else (1, -1)
        made = float8(parts["weight"], parts[self.main], dtype, block=self.blocks)
        act_scale = parts["input_scale"].float().reshape(1, 1) if static else None
        return with_activation(made, Float8("e4m3", (-1, -1) if static else act_block), act_scale)


def float8(weight: Tensor, scale: Tensor, dtype: torch.dtype, block: Sequence[int] | None = None) -> QTensor:
    """A weight in e4m3 or e5m2 and its scales: one, one per row, or one per block, the last of which may be cut off.

    block: (rows, columns) of a block, where there are blocks. Where they do not divide the weight, each is stored as several
    smaller ones with the same scale.
    """
    form = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}.get(weight.dtype)
    if form is None:
        raise ValueError(f"the weight is of {weight.dtype}")
    scale = scale.float()
    if scale.numel() == 1:
        spec, scale = Float8(form, (-1, -1)), scale.reshape(1, 1)  # type: ignore[arg-type]
    elif scale.numel() == weight.shape[0] and not (block and scale.shape != (weight.shape[0], 1)):
        spec, scale = Float8(form, (1, -1)), scale.reshape(-1, 1)  # type: ignore[arg-type]
    else:
        if scale.dim() != 2:
            raise ValueError(f"scales of shape {tuple(scale.shape)}")
        block = block or [n // g for n, g in zip(weight.shape, scale.shape)]
        sizes = []
        for d, (n, b) in enumerate(zip(weight.shape, block)):
            if scale.shape[d] != math.ceil(n / b):
                raise ValueError(f"scales of shape {tuple(scale.shape)} are not those of blocks of {tuple(block)}")
            size = math.gcd(n, b)
            scale = scale.repeat_interleave(b // size, d).narrow(d, 0, n // size)
            sizes.append(size)
        spec = Float8(form, tuple(sizes))  # type: ignore[arg-type]
    return spec.wrap({"qdata": weight, "scale": scale.contiguous()}, dtype, weight.shape)
