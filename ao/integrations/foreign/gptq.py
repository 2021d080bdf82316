"""GPTQ (AutoGPTQ, GPTQModel): integers of 2, 3, 4 or 8 bits in groups along K, with zero points.

qweight  (K * bits / 32, N) int32: column n is a stream of codes along K
qzeros   (G, N * bits / 32) int32: a stream along N; `checkpoint_format` "gptq" stores zero points less 1, modulo 2**bits
scales   (G, N) float16
g_idx    (K,) int32: the group of each input; sorted unless `desc_act` was on

W[n, k] = (q - zero_point) * scale[g_idx[k], n]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dtypes.permuted import Permuted, stored_order
from .reader import Reader, Source, affine, transposed
from .words import from_words


class GPTQ(Reader):
    """See the module."""

    methods = ("gptq",)
    main = "qweight"
    others = ("qzeros", "scales", "g_idx")
    integers = ("qweight", "qzeros", "g_idx")
    floats = ("scales",)

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        bits = int(self.config["bits"])
        packed, scales = parts["qweight"], parts["scales"]
        inputs, outputs = packed.shape[0] * 32 // bits, packed.shape[1]
        codes = from_words(transposed(packed), bits, inputs)  # (N, K)
        zeros = from_words(parts["qzeros"], bits, outputs)  # (G, N)
        if self.config.get("checkpoint_format", "gptq") != "gptq_v2":
            zeros = (zeros + 1) & (2**bits - 1)
        scale, zero_point = transposed(scales), transposed(zeros)
        if "g_idx" in parts:
            groups = parts["g_idx"].long()
            order = torch.argsort(groups, stable=True)
            if not torch.equal(order, torch.arange(inputs, device=order.device)):
                values = affine(codes[:, order].contiguous(), scale, zero_point, bits, torch.float32)
                fields = {"qdata": values, "order": stored_order(order)}
                return Permuted(values.spec).wrap(fields, dtype, values.shape)
        return affine(codes, scale, zero_point, bits, dtype)
