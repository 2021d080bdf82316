"""`Int4Prepacked`: 4-bit weights in the private layout of one of ATen's int4 matmuls, on explicit request only.

The canonical `Intx(bits=4)` works on every device. These two are what PyTorch itself ships, tiled for one device, so that a
checkpoint of them is tied to that kind of device:

    kernel="cuda": `torch._weight_int4pack_mm` (tinygemm), bfloat16, tiles of `inner_k_tiles * 16` along K
    kernel="cpu":  `torch._weight_int4pack_mm_for_cpu`, float32, bfloat16 or float16

Both compute x = (q - 8) * scale + zero with q in [0, 15] and scale and zero side by side in one tensor. Cost:
`4 + 2 * 32 / block` bits per element on the CPU, `4 + 2 * 16 / block` on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Opaque, QTensor, Spec
from .intx import Intx
from .operand import Operand


@dataclass(frozen=True, repr=False)
class Int4Prepacked(Spec):
    """Asymmetric int4 in groups along K, for a 2-D weight (N, K).

    kernel: "cuda" or "cpu": whose layout.
    block: (1, g), with g one of 32, 64, 128, 256.
    inner_k_tiles: 2, 4 or 8; only the CUDA layout has it.

    scale and zero point as in `Intx(4, block, signed=False, symmetric=False, zero_point="float")`. Raises ValueError when
    N is no multiple of 16 (CPU) or 8 (CUDA), or K none of the group or of `inner_k_tiles * 16` (CUDA), and TypeError when
    the data is not on that device.
    """

    kernel: Literal["cuda", "cpu"] = "cuda"
    block: tuple[int, ...] = (1, 128)
    inner_k_tiles: int = 8

    def __post_init__(self) -> None:
        if self.kernel not in ("cuda", "cpu"):
            raise ValueError(f"Int4Prepacked: kernel must be 'cuda' or 'cpu', got {self.kernel!r}")
        if len(self.block) != 2 or self.block[0] != 1 or self.block[1] not in (32, 64, 128, 256):
            raise ValueError(f"Int4Prepacked: block must be (1, 32), (1, 64), (1, 128) or (1, 256), got {self.block}")
        if self.inner_k_tiles not in (2, 4, 8):
            raise ValueError(f"Int4Prepacked: inner_k_tiles must be 2, 4 or 8, got {self.inner_k_tiles}")

    @property
    def _affine(self) -> Intx:
        return Intx(4, self.block, signed=False, symmetric=False, zero_point="float")

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """(N, K / group). Raises ValueError for shapes that the kernel does not take."""
        rows, cols = (16, self.block[1]) if self.kernel == "cpu" else (8, max(self.block[1], 16 * self.inner_k_tiles))
        if len(shape) != 2 or shape[0] % rows or shape[1] % cols:
            raise ValueError(
                f"{self} needs a 2-D weight with dim 0 a multiple of {rows} and dim 1 of {cols}, got shape {tuple(shape)}; "
                f"use Intx(bits=4, block={self.block}), which takes any"
            )
        return super().grid(shape)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale and zero_point as of `Intx`."""
        return self._affine.choose_qparams(x, grid)

    def stored(self, *, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor]:
        """As of `Intx`."""
        return self._affine.stored(scale=scale, zero_point=zero_point)

    def round(self, x: Tensor, *, scale: Tensor, zero_point: Tensor) -> Tensor:
        """As of `Intx`: the values before the kernel's layout rounds the qparams."""
        return self._affine.round(x, scale=scale, zero_point=zero_point)

    def operand(self, q: Any) -> Operand:
        """The layout of ATen's product, scale and zero side by side."""
        return Operand(q.qdata, q.scale_and_zero, None, "int4pack", 4)

    def encode(self, x: Tensor, *, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor | None]:
        """Codes and qparams in the kernel's layout."""
        if x.device.type not in (self.kernel, "meta"):
            raise TypeError(
                f"{self} lays out weights for {self.kernel}, and this one is on {x.device}; move it there first, "
                "pass device= to quantize_, or use the default layout, which serves every device"
            )
        fields = self._affine.encode(x, scale=scale, zero_point=zero_point)
        codes = self._affine.wrap(fields, torch.float32, x.shape).codes()  # type: ignore[attr-defined]
        zero = (8 - zero_point) * scale
        scale_and_zero = torch.stack([scale.t(), zero.t()], -1).contiguous()  # (K / group, N, 2)
        if x.device.type == "meta":
            return {
                "qdata": x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8),
                "scale_and_zero": scale_and_zero,
            }
        if self.kernel == "cpu":
            qdata = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            return {"qdata": qdata, "scale_and_zero": scale_and_zero}
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
        qdata = torch._convert_weight_to_int4pack(pairs.contiguous(), self.inner_k_tiles)
        return {"qdata": qdata, "scale_and_zero": scale_and_zero.bfloat16()}


class Int4PrepackedTensor(QTensor, spec=Int4Prepacked):
    """x = (q - 8) * scale + zero.

    qdata: codes in the kernel's layout: (N, K / 2) uint8 (CPU), (N / 8, K / (16 t), 32, t / 2) int32 (CUDA, t inner tiles).
    scale_and_zero: (K / group, N, 2), float32 (CPU) or bfloat16 (CUDA).
    """

    qdata: Opaque
    scale_and_zero: Opaque

    spec: Int4Prepacked

    def matmul(self, x: Tensor) -> Tensor:
        """x: (M, K) -> x @ w.T (M, N) in x's dtype, by ATen's kernel."""
        group = self.spec.block[1]
        if self.spec.kernel == "cpu":
            return torch._weight_int4pack_mm_for_cpu(x, self.qdata, group, self.scale_and_zero.to(x.dtype))
        return torch._weight_int4pack_mm(x.bfloat16(), self.qdata, group, self.scale_and_zero).to(x.dtype)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        # The layout is the kernel's own, so let the kernel read it.
        own = torch.float32 if self.spec.kernel == "cpu" else torch.bfloat16
        return self.matmul(torch.eye(self.shape[1], dtype=own, device=self.qdata.device)).t().to(dtype).contiguous()
