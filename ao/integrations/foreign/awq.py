"""AWQ (AutoAWQ, "gemm"): integers of 4 bits in groups along K, with zero points.

qweight  (K, N / 8) int32: nibble i of word j, from the low end, is column 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
qzeros   (G, N / 8) int32, in the same order
scales   (G, N) float16

W[n, k] = (q - zero_point) * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reader import Reader, Source, affine, transposed
from .words import from_words

NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQ(Reader):
    """See the module."""

    methods = ("awq",)
    main = "qweight"
    others = ("qzeros", "scales")
    integers = ("qweight", "qzeros")
    floats = ("scales",)

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        version, bits = str(self.config.get("version", "gemm")).lower(), int(self.config.get("bits", 4))
        if version != "gemm" or bits != 4:
            raise ValueError(f"version {version!r} with {bits} bits; 'gemm' with 4 is what is read")
        return affine(_columns(parts["qweight"]), transposed(parts["scales"]), _columns(parts["qzeros"]), bits, dtype)


def _columns(words: Tensor) -> Tensor:
    """(R, N / 8) int32 -> (N, R) uint8."""
    nibbles = from_words(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))  # (R, N / 8, 8)
    return transposed(nibbles[..., list(NIBBLE_OF_COLUMN)].flatten(1))
