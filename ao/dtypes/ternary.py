"""`Ternary`: -1, 0 and 1 times the mean magnitude of a block, as BitNet b1.58 trains them (arXiv:2402.17764).

Five numbers fit in a byte, 1.625 bits per element in chunks of 64, plus the scale; or each has two bits of its own. The values of
both are those of `Intx(bits=2, symmetric=True, narrow=True)`, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Spec
from .bits import CHUNK, TRIT_CHUNK, pack, pack_dim, pack_trits, packed_dim, signed_trits, unpack
from .blocks import in_blocks, mean_abs, to_blocks
from .operand import Operand
from .rounding import narrow, reciprocal, round_to


@dataclass(frozen=True, repr=False)
class Ternary(Spec):
    """Numbers of three values.

        scale = mean|x| over the block,    q = clamp(round(x / scale), -1, 1)

    block: elements that share a scale; BitNet has one for the whole weight.
    packing: "trits", five in a byte, for a last dim that is a multiple of 64, or "bits", two bits each.
    scale_dtype: "float32", "bfloat16" or "float16".

    Raises ValueError for parameters outside these.
    """

    block: tuple[int, ...] = (-1, -1)
    packing: Literal["trits", "bits"] = "trits"
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.packing not in ("trits", "bits"):
            raise ValueError(f"Ternary: packing must be 'trits' or 'bits', got {self.packing!r}")
        if self.scale_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"Ternary: scale_dtype must be float32, bfloat16 or float16, got {self.scale_dtype!r}")

    @property
    def bits(self) -> int:
        """What three values need, by themselves."""
        return 2

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`."""
        return self.stored(scale=mean_abs(x, grid))

    def stored(self, *, scale: Tensor) -> dict[str, Tensor]:
        """The scale in its dtype."""
        return {"scale": round_to(scale.float(), getattr(torch, self.scale_dtype))}

    def encode(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor | None]:
        """The nearest of the three for `x` (float32) under the given scale."""
        # By way of int8, to which a CPU converts faster than to uint8.
        codes = self._codes(x, scale).reshape(x.shape).add_(1).to(torch.int8).view(torch.uint8)
        dim = pack_dim(x.shape, 2, self)
        if self.packing == "bits":
            return {"qdata": pack(codes + 1, 2, dim), "scale": scale}
        if x.shape[dim] % TRIT_CHUNK:
            raise ValueError(
                f"{self}: dim {dim} of shape {tuple(x.shape)} is not a multiple of {TRIT_CHUNK}, in which numbers are packed; "
                "use packing='bits', or leave this tensor out"
            )
        return {"qdata": pack_trits(codes, dim), "scale": scale}

    def round(self, x: Tensor, *, scale: Tensor) -> Tensor:
        """The multiples of the scale that `x` (float32) becomes."""
        return (self._codes(x, scale) * in_blocks(scale.float())).reshape(x.shape)

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """-1, 0 and 1 in float32, in blocks."""
        return (to_blocks(x, scale.shape) * in_blocks(reciprocal(scale))).round_().clamp_(-1, 1)

    def codes(self, qdata: Tensor, shape: torch.Size) -> Tensor:
        """The integers, int8, that `qdata` holds for data of `shape`."""
        dim = packed_dim(qdata.shape, shape)
        if self.packing == "bits":
            return unpack(qdata, 2, dim).to(torch.int8) - 2
        return signed_trits(qdata, dim)

    def operand(self, q: Any) -> Operand:
        """Codes of two bits become a byte each for the integer product with an activation of 8 bits."""
        if self.packing == "trits":
            if packed_dim(q.qdata.shape, q.shape) != len(q.shape) - 1:
                return Operand(self.codes(q.qdata, q.shape), q.scale)
            return Operand(q.qdata, q.scale, None, "trits", 2)
        if self.act is None:
            return Operand(q.qdata, q.scale, None, "affine", 2, 2)
        return Operand(self.codes(q.qdata, q.shape), q.scale)


class TernaryTensor(QTensor, spec=Ternary):
    """x = q * scale.

    qdata: (..., K * 13 / 64) uint8 of trits q + 1, or (..., K / 4) uint8 of q + 2 in two bits each.
    scale: one per block, float32, bfloat16 or float16.
    """

    qdata: Elements
    scale: PerBlock

    spec: Ternary

    @property
    def unit(self) -> int:  # type: ignore[override]
        """The elements at which the packed dim can be cut."""
        return TRIT_CHUNK if self.spec.packing == "trits" else CHUNK

    @property
    def grain(self) -> int:  # type: ignore[override]
        """What the size of the packed dim is a multiple of."""
        return TRIT_CHUNK if self.spec.packing == "trits" else 8

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = to_blocks(self.spec.codes(self.qdata, self.shape), self.scale.shape).float()
        return narrow(codes * in_blocks(self.scale.float()), dtype).reshape(self.shape)
