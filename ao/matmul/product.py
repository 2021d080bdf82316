"""The product of two quantized matrices, a @ b.T: what a training step is made of.

Where the chip multiplies the codes, it does: float8 by `torch._scaled_mm`, int8 by `torch._int_mm` or a Triton kernel that
applies the scales. Elsewhere, and with `emulate`, the same codes are multiplied in floating point: float32 on a CPU,
bfloat16 with a float32 sum on a GPU. Each code is exact in bfloat16, so that only the order of a sum differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes.base import QTensor, Spec, check_within_float32
from ..dtypes.bits import packed_dim, unpack
from ..dtypes.blocks import expand, in_blocks, to_blocks
from ..dtypes.operand import Cast, Operand
from .block_scaled import block_scaled_product, has_block_scaled, levels, multiplies, numbers, times
from .integers import integer_product
from .kernels.device import has_float8, has_kernels, is_hopper


def decoded(a: Operand, dtype: torch.dtype) -> Tensor:
    """The numbers of `plain` codes, computed in float32."""
    blocks = to_blocks(a.codes, a.scale.shape).float() * in_blocks(a.scale.float())
    return blocks.to(dtype).reshape(a.codes.shape)


def codes_of(x: Tensor, spec: Spec | None = None) -> Operand | Tensor:
    """The codes of a matrix: quantized by `spec`, or already a QTensor, whose Spec counts. x: (M, K).

    What multiplies as its codes do, float8 and signed integers without a zero point, comes back as an operand of a byte each;
    any other format as the numbers that its codes stand for, a plain tensor, on a CPU in float32.
    """
    if not isinstance(x, QTensor) and (spec is None or type(spec).cast is Spec.cast):
        return x if spec is None else _small(x, spec)
    own = x.spec if isinstance(x, QTensor) else spec  # not q.spec, which a compiler that makes q does not know
    assert own is not None
    q = x if isinstance(x, QTensor) else own.quantize(x)
    operand = own.operand(q)
    return (None if operand is None else _bytes(operand, q.shape)) or q.decode_scaled(_whole(q))


def _small(x: Tensor, spec: Spec) -> Operand | Tensor:
    """`spec.quantize(x)` of a format whose codes are no bytes: what the chip multiplies, else the numbers."""
    if has_block_scaled(x.device):
        operand = spec.operand(spec.quantize(x))
        if levels(operand) is not None:
            return operand  # type: ignore[return-value]
    check_within_float32(spec, x)
    wide = x.float()
    return spec.round(wide, **spec.choose_qparams(wide, spec.grid(x.shape))).to(_whole(x))


def _whole(x: Tensor) -> torch.dtype:
    """The dtype of numbers that were quantized: on a CPU, where speed is no matter, the one that holds all of them."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def _bytes(a: Operand, shape: torch.Size) -> Operand | None:
    """`a` with codes that are int8 or float8 and multiply as numbers do; None where there are none. shape: of the data."""
    a = a.in_bytes()
    if a.kind == "affine" and a.bits < 8 and a.zero_point is None and a.offset == 2 ** (a.bits - 1):
        codes = unpack(a.codes, a.bits, packed_dim(a.codes.shape, shape)).to(torch.int8) - int(a.offset)
        a = a._replace(codes=codes, bits=8, offset=0)
    return a if a.plain and a.codes.dtype != torch.uint8 else None


def codes_of_transposed(x: Tensor, spec: Spec | None = None) -> Operand | Tensor:
    """`codes_of(x.t(), spec)`. x: (M, K)."""
    if isinstance(x, QTensor):
        return _turned(codes_of(x))
    if spec is None:
        return x.t()
    square = is_square(spec)
    cast_to = _cast_of(x, spec)
    if cast_to is None:
        same = codes_of(x, spec) if square else None
        # Packed codes cannot be turned.
        return codes_of(x.t(), spec) if same is None or _is_packed(same) else same.t()
    from .kernels import cast

    n, m = x.shape[1], x.shape[0]
    if square:
        scale = _scale(x, spec).t()
    else:
        scale = spec.choose_qparams(x.t().float(), spec.grid((n, m)))["scale"]
    rows = scale if scale.shape[0] in (1, n) else expand(scale, (n, scale.shape[1]))
    return _operand(cast.cast_transposed(x, rows, *cast_to[:3]), scale)


def codes_both(x: Tensor, spec: Spec) -> tuple[Operand | Tensor, Operand | Tensor]:
    """`codes_of(x, spec)` and `codes_of_transposed(x, spec)`, for a Spec that `is_square`, from one cast."""
    cast_to = None if isinstance(x, QTensor) or spec.block != (-1, -1) else _cast_of(x, spec)
    if cast_to is None:
        codes = codes_of(x, spec)
        return codes, _turned(codes)
    from .kernels import cast

    scale = _scale(x, spec)
    same, turned = cast.cast_both(x, scale, *cast_to[:3])
    return _operand(same, scale), _operand(turned, scale.t())


def cast_whole(x: Tensor, spec: Spec, scale: Tensor, inverse: Tensor) -> QTensor:
    """`spec.quantize(x, scale=scale, inverse=inverse)`, eagerly, for one scale of all of x: on a GPU in a single kernel.

    x: any shape. scale, inverse: one number each, (1, ..., 1).
    """
    cast_to = _cast_of(x, spec)
    if cast_to is None:
        return spec.quantize(x, scale=scale, inverse=inverse)
    from .kernels import cast

    return spec.wrap({"qdata": cast.cast(x, scale, *cast_to[:3]), "scale": scale}, x.dtype, x.shape)


def is_square(spec: Spec | None) -> bool:
    """Whether quantizing by `spec` and transposing commute."""
    block = () if spec is None else spec.block
    return len(block) == 2 and block[0] == block[1] and getattr(spec, "rounding", "nearest") == "nearest"


def _is_packed(a: Operand | Tensor) -> bool:
    return isinstance(a, Operand) and a.bits < 8


def _scale(x: Tensor, spec: Spec) -> Tensor:
    return spec.choose_qparams(x.float(), spec.grid(x.shape))["scale"]


def _operand(codes: Tensor, scale: Tensor) -> Operand:
    return Operand(codes, scale, None, "float" if codes.is_floating_point() else "affine")


def _turned(a: Operand | Tensor) -> Operand | Tensor:
    if not isinstance(a, Operand) or not _has_kernels(a.codes.device, a.codes.dtype):
        return a.t()
    from .kernels import cast

    return _operand(cast.transposed(a.codes), a.scale.t())


def _cast_of(x: Tensor, spec: Spec) -> Cast | None:
    """How the Triton kernels cast `x` by `spec`; None where they do not."""
    cast = spec.cast() if spec.block in ((-1, -1), (1, -1), (1, 128), (128, 128)) else None
    if cast is None or cast.zero_point or not cast.nearest or cast.dtype == torch.uint8:
        return None
    return cast if _has_kernels(x.device, cast.dtype) else None


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return has_kernels(device) and (dtype == torch.int8 or has_float8(device))


def scaled_product(
    a: Operand | Tensor, b: Operand | Tensor, dtype: torch.dtype, *, fast_accum: bool = False, emulate: bool = False
) -> Tensor:
    """a @ b.T as `dtype`. a: (M, K), b: (N, K), each codes or plain -> (M, N).

    fast_accum: let float8 tensor cores keep fewer bits of the running sum, which is faster.
    emulate: do not use the float8 units of the chip.

    The codes are multiplied if both are float8 or both int8 and every row or the whole matrix has one scale (float8 also:
    blocks of 1 x 128 or 128 x 128, not the latter on both sides); all else is decoded first.
    """
    kind = (a.codes if isinstance(a, Operand) else a).device.type
    if torch.is_autocast_enabled(kind):
        # Sums over codes are larger than float16 holds, and need more bits than bfloat16 has.
        with torch.autocast(kind, enabled=False):
            return scaled_product(a, b, dtype, fast_accum=fast_accum, emulate=emulate)
    if any(isinstance(t, Operand) and t.kind == "minifloat" for t in (a, b)):
        if isinstance(a, Operand) and isinstance(b, Operand) and not emulate and multiplies(a, b):
            return block_scaled_product(a, b, dtype)
        a, b = (_wide(t) if isinstance(t, Operand) and t.kind == "minifloat" else t for t in (a, b))
    if isinstance(a, Operand) and isinstance(b, Operand):
        if a.codes.dtype == b.codes.dtype == torch.int8:
            if a.by_row and b.by_row:
                return _int8_product(a, b, dtype)
        elif a.codes.dtype != torch.int8 and b.codes.dtype != torch.int8:
            emulate = emulate or not has_float8(a.codes.device)
            if a.by_row and b.by_row:
                return _float_product(a, b, dtype) if emulate else _float8_product(a, b, dtype, fast_accum)
            if not emulate and _has_blocks(a, b):
                return _blocks_product(a, b, dtype)
        # Numbers that were quantized may be more than bfloat16 holds: a CPU, where speed is no matter, keeps them whole.
        wide = torch.float32 if a.codes.device.type == "cpu" else dtype
        return torch.mm(decoded(a, wide), decoded(b, wide).t()).to(dtype)
    plain = (t.dtype for t in (a, b) if isinstance(t, Tensor))
    wide = torch.float32 if kind == "cpu" and torch.float32 in plain else dtype
    x, y = (decoded(t, wide) if isinstance(t, Operand) else t.to(wide) for t in (a, b))
    return torch.mm(x, y.t()).to(dtype)


def _wide(a: Operand) -> Tensor:
    """The numbers of small floats, float32."""
    values, whole = numbers(a, torch.Size([a.codes.shape[0], a.codes.shape[1] * 8 // a.bits]))
    return times(values, whole)


def _scaled(total: Tensor, a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """The sum over the codes, (M, N), times the scales: (M, 1) or (1, 1), and (N, 1) or (1, 1)."""
    return (total.float() * a.scale.float() * b.scale.float().t()).to(dtype)


def _float_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    wide = torch.float32 if a.codes.device.type == "cpu" else torch.bfloat16
    return _scaled(torch.mm(a.codes.to(wide), b.codes.to(wide).t()), a, b, dtype)


def _float8_product(a: Operand, b: Operand, dtype: torch.dtype, fast_accum: bool) -> Tensor:
    if a.scale.shape[0] == b.scale.shape[0] == 1:
        rows, columns = a.scale.reshape(()), b.scale.reshape(())
        out_dtype = dtype
    else:
        rows = a.scale.expand(a.codes.shape[0], 1).contiguous()
        columns = b.scale.expand(b.codes.shape[0], 1).contiguous().t()
        out_dtype = torch.bfloat16  # the only one that a scale per row can have on every chip
    x, y = a.codes.contiguous(), b.codes.contiguous().t()
    return torch._scaled_mm(x, y, rows, columns, out_dtype=out_dtype, use_fast_accum=fast_accum).to(dtype)


def _has_blocks(a: Operand, b: Operand) -> bool:
    """Whether `_scaled_mm` takes these blocks: on Hopper, since CUDA 12.9."""
    device, k = a.codes.device, a.codes.shape[1]
    rows = [t.scale.shape[0] == t.codes.shape[0] for t in (a, b)]
    return (
        is_hopper(device)
        and tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) >= (12, 9)
        and a.codes.dtype == b.codes.dtype == torch.float8_e4m3fn
        and all(t.scale.shape[1] * 128 == k for t in (a, b))
        and all(by_row or t.scale.shape[0] * 128 == t.codes.shape[0] for by_row, t in zip(rows, (a, b)))
        and any(rows)
        and (all(rows) or k % 512 == 0)  # rows of scales of squares are aligned to 16 bytes
        and a.codes.shape[0] % 16 == b.codes.shape[0] % 16 == 0
    )


def _blocks_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    def scales(t: Operand) -> Tensor:
        # Those of rows of 128 lie column by column, those of squares row by row.
        return t.scale.t().contiguous().t() if t.scale.shape[0] == t.codes.shape[0] else t.scale.contiguous()

    x, y = a.codes.contiguous(), b.codes.contiguous().t()
    return torch._scaled_mm(x, y, scales(a), scales(b).t(), out_dtype=torch.bfloat16).to(dtype)


def _int8_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    x, y = a.codes.contiguous(), b.codes.contiguous()
    (m, k), n = x.shape, y.shape[0]
    if m > 0 and k % 8 == 0 and n % 8 == 0 and has_kernels(x.device):
        from .kernels import operators

        rows, columns = (t.scale.float().expand(t.codes.shape[0], 1).contiguous() for t in (a, b))
        return operators.scaled_product(x, rows, y, columns, dtype)
    return _scaled(integer_product(x, y), a, b, dtype)
