"""The product of two quantized matrices, a @ b.T: what a training step is made of.

Where the chip multiplies the codes, it does: float8 by `torch._scaled_mm`, int8 by `torch._int_mm` or a Triton kernel that
applies the scales. Elsewhere, and with `emulate`, the same codes are multiplied in floating point: float32 on a CPU,
bfloat16 with a float32 sum on a GPU. Each code is exact in bfloat16, so that only the order of a sum differs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import QTensor, Spec
from ..dtypes.blocks import expand, in_blocks, to_blocks
from ..dtypes.float8 import Float8, Float8Tensor
from ..dtypes.intx import Intx, IntxTensor
from .kernels.device import cuda_capability, has_float8

_TRITON = find_spec("triton") is not None
_VNNI = torch.cpu._is_vnni_supported()


class Codes(NamedTuple):
    """A quantized matrix as a product reads it: x = values * scale. Unlike a QTensor it is nothing to a compiler.

    values: (M, K), int8, float8_e4m3fn or float8_e5m2. scale: one per block.
    """

    values: Tensor
    scale: Tensor

    def t(self) -> Codes:
        """The transpose."""
        return Codes(self.values.t(), self.scale.t())

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The numbers, computed in float32."""
        blocks = to_blocks(self.values, self.scale.shape).float() * in_blocks(self.scale.float())
        return blocks.to(dtype).reshape(self.values.shape)

    @property
    def by_row(self) -> bool:
        """Whether each row, or the whole matrix, has one scale."""
        return self.scale.shape[1] == 1 and self.scale.shape[0] in (1, self.values.shape[0])


def codes_of(x: Tensor, spec: Spec | None = None) -> Codes | Tensor:
    """The codes of a matrix: quantized by `spec`, or already a QTensor, whose Spec counts. x: (M, K).

    What has codes of its own, float8 and signed integers without a zero point, comes back as `Codes`; any other format as
    the numbers that its codes stand for, a plain tensor.
    """
    q = x if isinstance(x, QTensor) else spec.quantize(x) if spec is not None else None
    spec = x.spec if isinstance(x, QTensor) else spec
    if q is None or spec is None:
        return x
    if isinstance(spec, Float8):
        assert isinstance(q, Float8Tensor)
        return Codes(q.qdata, q.scale)
    if isinstance(spec, Intx) and spec.symmetric and spec.signed and not spec.is_binary:
        assert isinstance(q, IntxTensor)
        return Codes(spec.codes(q.qdata, q.shape), q.scale)
    return q.dequantize()


def codes_of_transposed(x: Tensor, spec: Spec | None = None) -> Codes | Tensor:
    """`codes_of(x.t(), spec)`. x: (M, K)."""
    if isinstance(x, QTensor):
        return _turned(codes_of(x))
    if spec is None:
        return x.t()
    square = is_square(spec)
    if not _casts(x, spec):
        return codes_of(x, spec).t() if square else codes_of(x.t(), spec)
    from .kernels import cast

    n, m = x.shape[1], x.shape[0]
    if square:
        scale = _scale(x, spec).t()
    else:
        scale = spec.choose_qparams(x.t().float(), spec.grid((n, m)))["scale"]
    rows = scale if scale.shape[0] in (1, n) else expand(scale, (n, scale.shape[1]))
    return Codes(cast.cast_transposed(x, rows, *_range(spec)), scale)


def codes_both(x: Tensor, spec: Spec) -> tuple[Codes | Tensor, Codes | Tensor]:
    """`codes_of(x, spec)` and `codes_of_transposed(x, spec)`, for a Spec that `is_square`, from one cast."""
    if isinstance(x, QTensor) or not (_casts(x, spec) and spec.block == (-1, -1)):
        codes = codes_of(x, spec)
        return codes, _turned(codes)
    from .kernels import cast

    scale = _scale(x, spec)
    same, turned = cast.cast_both(x, scale, *_range(spec))
    return Codes(same, scale), Codes(turned, scale.t())


def cast_whole(x: Tensor, spec: Spec, scale: Tensor, inverse: Tensor) -> QTensor:
    """`spec.quantize(x, scale=scale, inverse=inverse)`, eagerly, for one scale of all of x: on a GPU in a single kernel.

    x: any shape. scale, inverse: one number each, (1, ..., 1).
    """
    if not _casts(x, spec):
        return spec.quantize(x, scale=scale, inverse=inverse)
    from .kernels import cast

    return spec.wrap({"qdata": cast.cast(x, scale, *_range(spec)), "scale": scale}, x.dtype, x.shape)


def is_square(spec: Spec | None) -> bool:
    """Whether quantizing by `spec` and transposing commute."""
    block = () if spec is None else spec.block
    return len(block) == 2 and block[0] == block[1] and getattr(spec, "rounding", "nearest") == "nearest"


def _scale(x: Tensor, spec: Spec) -> Tensor:
    return spec.choose_qparams(x.float(), spec.grid(x.shape))["scale"]


def _range(spec: Spec) -> tuple[torch.dtype, float, float]:
    """The dtype of the codes, the lowest and the highest."""
    if isinstance(spec, Float8):
        return spec.dtype, -spec.max, spec.max
    assert isinstance(spec, Intx)
    return torch.int8, float(spec.qmin), float(spec.qmax)


def _turned(codes: Codes | Tensor) -> Codes | Tensor:
    if not isinstance(codes, Codes) or not _has_kernels(codes.values.device, codes.values.dtype):
        return codes.t()
    from .kernels import cast

    return Codes(cast.transposed(codes.values), codes.scale.t())


def _casts(x: Tensor, spec: Spec) -> bool:
    """Whether the Triton kernels cast `x` by `spec`."""
    if isinstance(spec, Float8):
        dtype = spec.dtype
    elif isinstance(spec, Intx) and spec.bits == 8 and spec.signed and spec.symmetric and spec.rounding == "nearest":
        dtype = torch.int8
    else:
        return False
    return spec.block in ((-1, -1), (1, -1), (1, 128), (128, 128)) and _has_kernels(x.device, dtype)


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return _TRITON and cuda_capability(device) >= ((8, 0) if dtype == torch.int8 else (8, 9))


def scaled_product(
    a: Codes | Tensor, b: Codes | Tensor, dtype: torch.dtype, *, fast_accum: bool = False, emulate: bool = False
) -> Tensor:
    """a @ b.T as `dtype`. a: (M, K), b: (N, K), each codes or plain -> (M, N).

    fast_accum: let float8 tensor cores keep fewer bits of the running sum, which is faster.
    emulate: do not use the float8 units of the chip.

    The codes are multiplied if both are float8 or both int8 and every row or the whole matrix has one scale (float8 also:
    blocks of 1 x 128 or 128 x 128, not the latter on both sides); all else is decoded first.
    """
    kind = (a.values if isinstance(a, Codes) else a).device.type
    if torch.is_autocast_enabled(kind):
        # Sums over codes are larger than float16 holds, and need more bits than bfloat16 has.
        with torch.autocast(kind, enabled=False):
            return scaled_product(a, b, dtype, fast_accum=fast_accum, emulate=emulate)
    if isinstance(a, Codes) and isinstance(b, Codes):
        if a.values.dtype == b.values.dtype == torch.int8:
            if a.by_row and b.by_row:
                return _int8_product(a, b, dtype)
        elif a.values.dtype != torch.int8 and b.values.dtype != torch.int8:
            emulate = emulate or not has_float8(a.values.device)
            if a.by_row and b.by_row:
                return _float_product(a, b, dtype) if emulate else _float8_product(a, b, dtype, fast_accum)
            if not emulate and _has_blocks(a, b):
                return _blocks_product(a, b, dtype)
        # Numbers that were quantized may be more than bfloat16 holds: a CPU, where speed is no matter, keeps them whole.
        wide = torch.float32 if a.values.device.type == "cpu" else dtype
        return torch.mm(a.decode(wide), b.decode(wide).t()).to(dtype)
    x, y = (t.decode(dtype) if isinstance(t, Codes) else t.to(dtype) for t in (a, b))
    return torch.mm(x, y.t())


def _scaled(total: Tensor, a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    """The sum over the codes, (M, N), times the scales: (M, 1) or (1, 1), and (N, 1) or (1, 1)."""
    return (total.float() * a.scale.float() * b.scale.float().t()).to(dtype)


def _float_product(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    wide = torch.float32 if a.values.device.type == "cpu" else torch.bfloat16
    return _scaled(torch.mm(a.values.to(wide), b.values.to(wide).t()), a, b, dtype)


def _float8_product(a: Codes, b: Codes, dtype: torch.dtype, fast_accum: bool) -> Tensor:
    if a.scale.shape[0] == b.scale.shape[0] == 1:
        rows, columns = a.scale.reshape(()), b.scale.reshape(())
        out_dtype = dtype
    else:
        rows = a.scale.expand(a.values.shape[0], 1).contiguous()
        columns = b.scale.expand(b.values.shape[0], 1).contiguous().t()
        out_dtype = torch.bfloat16  # the only one that a scale per row can have on every chip
    x, y = a.values.contiguous(), b.values.contiguous().t()
    return torch._scaled_mm(x, y, rows, columns, out_dtype=out_dtype, use_fast_accum=fast_accum).to(dtype)


def _has_blocks(a: Codes, b: Codes) -> bool:
    """Whether `_scaled_mm` takes these blocks: on Hopper, since CUDA 12.9."""
    device, k = a.values.device, a.values.shape[1]
    rows = [t.scale.shape[0] == t.values.shape[0] for t in (a, b)]
    return (
        cuda_capability(device)[0] == 9
        and tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) >= (12, 9)
        and a.values.dtype == b.values.dtype == torch.float8_e4m3fn
        and all(t.scale.shape[1] * 128 == k for t in (a, b))
        and all(by_row or t.scale.shape[0] * 128 == t.values.shape[0] for by_row, t in zip(rows, (a, b)))
        and any(rows)
        and (all(rows) or k % 512 == 0)  # rows of scales of squares are aligned to 16 bytes
        and a.values.shape[0] % 16 == b.values.shape[0] % 16 == 0
    )


def _blocks_product(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    def scales(t: Codes) -> Tensor:
        # Those of rows of 128 lie column by column, those of squares row by row.
        return t.scale.t().contiguous().t() if t.scale.shape[0] == t.values.shape[0] else t.scale.contiguous()

    x, y = a.values.contiguous(), b.values.contiguous().t()
    return torch._scaled_mm(x, y, scales(a), scales(b).t(), out_dtype=torch.bfloat16).to(dtype)


def _int8_product(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    x, y = a.values.contiguous(), b.values.contiguous()
    (m, k), n = x.shape, y.shape[0]
    if x.device.type == "cuda" and m > 0 and k % 8 == 0 and n % 8 == 0:
        if _has_kernels(x.device, x.dtype):
            from .kernels import operators

            rows, columns = (t.scale.float().expand(t.values.shape[0], 1).contiguous() for t in (a, b))
            return operators.scaled_product(x, rows, y, columns, dtype)
        padded = F.pad(x, (0, 0, 0, max(32 - m, 0)))  # torch._int_mm takes more than 16 rows
        return _scaled(torch._int_mm(padded, y.t())[:m], a, b, dtype)
    if x.device.type == "cpu" and _VNNI and m > 0:
        return _scaled(torch._int_mm(x, y.t()), a, b, dtype)
    # In float32, exact up to 2**24: without integer dot products many times faster on a CPU.
    return _scaled(torch.mm(x.float(), y.float().t()), a, b, dtype)
