"""torchao.quantization.quant_primitives: quantization as plain functions, by its formulas and in its shapes.

`ao.choose_qparams_affine` and its kin round as the formats of `ao` do; these round as the other library does, so that numbers
that were kept from there come out the same. With n = quant_max - quant_min, and mid = (quant_max + quant_min + 1) / 2:

    SYMMETRIC                  scale = max(-lo, hi) / (n / 2),                      zero_point = mid
    SYMMETRIC_NO_CLIPPING_ERR  scale = max(lo / quant_min, hi / quant_max),         zero_point = mid
    ASYMMETRIC                 scale = (hi - lo) / n,     zero_point = clamp(quant_min - round(lo / scale))
      ... in the FLOAT domain                             zero_point = lo + scale * mid, a number and not a code
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ao import HQQ, Intx, MappingType, ZeroPointDomain

__all__ = [
    "MappingType",
    "TorchAODType",
    "ZeroPointDomain",
    "choose_qparams_affine",
    "choose_qparams_affine_dont_preserve_zero",
    "choose_qparams_affine_float8",
    "choose_qparams_affine_floatx",
    "choose_qparams_affine_tinygemm",
    "choose_qparams_affine_with_min_max",
    "choose_qparams_and_quantize_affine_hqq",
    "dequantize_affine",
    "dequantize_affine_float8",
    "dequantize_affine_floatx",
    "dequantize_affine_no_zero_point",
    "dequantize_affine_tinygemm",
    "fake_quantize_affine",
    "fake_quantize_affine_cachemask",
    "quantize_affine",
    "quantize_affine_float8",
    "quantize_affine_floatx",
    "quantize_affine_no_zero_point",
    "quantize_affine_tinygemm",
]


class TorchAODType(Enum):
    """Names from before torch had `torch.int1` to `torch.int7`."""

    INT1 = "int1"
    INT2 = "int2"
    INT3 = "int3"
    INT4 = "int4"
    INT5 = "int5"
    INT6 = "int6"
    INT7 = "int7"


def as_dtype(dtype: torch.dtype | TorchAODType) -> torch.dtype:
    """The dtype of torch that a name stands for."""
    return getattr(torch, dtype.value) if isinstance(dtype, TorchAODType) else dtype


def bounds(dtype: torch.dtype | TorchAODType, quant_min: float | None, quant_max: float | None) -> tuple[float, float]:
    """The range of codes: that of the dtype, unless given."""
    dtype = as_dtype(dtype)
    if dtype.is_floating_point:
        lo, hi = torch.finfo(dtype).min, torch.finfo(dtype).max
    else:
        name = str(dtype).removeprefix("torch.")
        bits = int(name.removeprefix("u").removeprefix("int"))
        lo, hi = (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    first, last = lo if quant_min is None else quant_min, hi if quant_max is None else quant_max
    if first < lo or last > hi:
        raise ValueError(f"quant_min and quant_max must be within {lo} to {hi} for {dtype}, got {first} and {last}")
    return first, last


def container(dtype: torch.dtype | TorchAODType, low: float) -> torch.dtype:
    """The dtype that codes are kept in: a whole byte for one of fewer bits."""
    dtype = as_dtype(dtype)
    if dtype.is_floating_point or dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        return dtype
    return torch.uint8 if str(dtype).startswith("torch.uint") else torch.int8


def _blocks(shape: Sequence[int], block_size: Sequence[int], who: str) -> tuple[list[int], list[int], list[int]]:
    """The shape in blocks, the dims of it that are inside of one, and the shape of the qparams with every dim kept."""
    if len(block_size) != len(shape):
        raise AssertionError(f"{who}: block_size={tuple(block_size)} must have one entry per dim of {tuple(shape)}")
    view: list[int] = []
    inside: list[int] = []
    grid: list[int] = []
    for size, entry in zip(shape, block_size):
        block = size if entry == -1 else entry
        if block != size and block > 1:
            if size % block:
                raise AssertionError(f"{who}: block_size={tuple(block_size)} does not divide {tuple(shape)}")
            inside.append(len(view) + 1)
            view += [size // block, block]
            grid.append(size // block)
        else:
            if block != 1:
                inside.append(len(view))
            view.append(size)
            grid.append(1 if block == size else size)
    return view, inside, grid


def _floats(t: Tensor, name: str) -> None:
    if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise AssertionError(f"Unsupported input dtype: {name} must be float32, float16 or bfloat16, got {t.dtype}")


def _from_range(
    lo: Tensor,
    hi: Tensor,
    mapping_type: MappingType,
    target_dtype: torch.dtype | TorchAODType,
    quant_min: float | None,
    quant_max: float | None,
    eps: float | None,
    scale_dtype: torch.dtype,
    zero_point_dtype: torch.dtype | None,
    preserve_zero: bool,
    domain: ZeroPointDomain | None,
) -> tuple[Tensor, Tensor | None]:
    first, last = bounds(target_dtype, quant_min, quant_max)
    if not isinstance(mapping_type, MappingType):
        raise AssertionError(f"mapping_type must be a MappingType, got {mapping_type!r}")
    eps = torch.finfo(lo.dtype).smallest_normal if eps is None else eps
    if preserve_zero:
        lo, hi = torch.clamp(lo, max=0), torch.clamp(hi, min=0)
    middle = int((last + first + 1) / 2)
    zero: Tensor | None
    if mapping_type is not MappingType.ASYMMETRIC:
        if not preserve_zero:
            raise ValueError("a symmetric range has 0 in it; preserve_zero=False needs MappingType.ASYMMETRIC")
        if domain is ZeroPointDomain.FLOAT:
            raise ValueError("a symmetric mapping has no zero_point_domain=ZeroPointDomain.FLOAT; use INT or NONE")
        if mapping_type is MappingType.SYMMETRIC:
            scale = torch.max(-lo, hi) / (float(last - first) / 2)
        else:
            scale = torch.max(lo / float(first), hi / float(last))
        scale = scale.clamp(min=eps)
        zero = None if domain is ZeroPointDomain.NONE else torch.full_like(scale, middle)
    else:
        scale = ((hi - lo) / float(last - first)).clamp(min=eps)
        if domain in (None, ZeroPointDomain.NONE):
            zero = None
        elif domain is ZeroPointDomain.FLOAT:
            zero = lo + scale * middle
        else:
            zero = (first - torch.round(lo / scale)).clamp(first, last)
    if zero is not None:
        usual = scale_dtype if domain is ZeroPointDomain.FLOAT else torch.int32
        zero = zero.to(zero_point_dtype or usual)
    return scale.to(scale_dtype), zero


@torch.no_grad()
def choose_qparams_affine(
    input: Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype | TorchAODType,
    quant_min: float | None = None,
    quant_max: float | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
    *,
    keepdim: bool = False,
) -> tuple[Tensor, Any]:
    """Scale and zero point (None in the domain NONE), one per block.

    keepdim: keep the dims that one block spans, as dims of 1. Without it they are gone.
    """
    _floats(input, "input")
    view, inside, grid = _blocks(input.shape, block_size, "choose_qparams_affine")
    blocks = input.reshape(view)
    lo, hi = torch.amin(blocks, inside), torch.amax(blocks, inside)
    if not inside:
        lo = hi = blocks
    scale, zero = _from_range(
        lo, hi, mapping_type, target_dtype, quant_min, quant_max, eps, scale_dtype or input.dtype, zero_point_dtype,
        preserve_zero, zero_point_domain,
    )  # fmt: skip
    if keepdim:
        scale, zero = scale.reshape(grid), None if zero is None else zero.reshape(grid)
    return scale, zero


@torch.no_grad()
def choose_qparams_affine_with_min_max(
    min_val: Tensor,
    max_val: Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype | TorchAODType,
    quant_min: float | None = None,
    quant_max: float | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
) -> tuple[Tensor, Any]:
    """The same for ends of blocks that were observed."""
    if min_val.dtype != max_val.dtype or min_val.device != max_val.device:
        raise AssertionError("min_val and max_val must have one dtype and one device")
    _floats(min_val, "min_val")
    return _from_range(
        min_val, max_val, mapping_type, target_dtype, quant_min, quant_max, eps, scale_dtype or min_val.dtype,
        zero_point_dtype, preserve_zero, zero_point_domain,
    )  # fmt: skip


def _per_block(qparam: Tensor | None, view: list[int], inside: list[int]) -> Tensor | None:
    if qparam is None or qparam.numel() == 0:
        return None
    return qparam.view([1 if i in inside else n for i, n in enumerate(view)])


def _quantize(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    low: float,
    high: float,
    domain: ZeroPointDomain | None,
) -> Tensor:
    """Codes, in the dtype of the arithmetic."""
    _floats(input, "input")
    view, inside, _ = _blocks(input.shape, block_size, "quantize_affine")
    blocks = input.reshape(view)
    s = _per_block(scale, view, inside)
    assert s is not None
    zero = _per_block(zero_point, view, inside)
    if domain is ZeroPointDomain.FLOAT:
        if zero is None:
            raise AssertionError("zero_point_domain=ZeroPointDomain.FLOAT needs a zero_point")
        middle = (high + low + 1) / 2
        codes = torch.round((blocks - (zero - s * middle)) / s)
    else:
        codes = torch.round(blocks * (1.0 / s))
        if zero is not None and domain is ZeroPointDomain.INT:
            codes = codes + zero
    return torch.clamp(codes, low, high).reshape(input.shape)


def _dequantize(
    codes: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    low: float,
    high: float,
    domain: ZeroPointDomain | None,
    output_dtype: torch.dtype,
) -> Tensor:
    view, inside, _ = _blocks(codes.shape, block_size, "dequantize_affine")
    blocks = codes.reshape(view).to(output_dtype)
    s = _per_block(scale, view, inside)
    assert s is not None
    zero = _per_block(zero_point, view, inside)
    if domain is ZeroPointDomain.FLOAT:
        assert zero is not None
        values = (blocks - (high + low + 1) / 2) * s + zero
    else:
        if zero is not None and domain is ZeroPointDomain.INT:
            blocks = blocks - zero.to(output_dtype)
        values = blocks * s
    return values.reshape(codes.shape).to(output_dtype)


@torch.no_grad()
def quantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    output_dtype: torch.dtype | TorchAODType,
    quant_min: float | None = None,
    quant_max: float | None = None,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
) -> Tensor:
    """Codes of the shape of `input`: clamp(round(x * (1 / scale)) + zero_point)."""
    low, high = bounds(output_dtype, quant_min, quant_max)
    codes = _quantize(input, block_size, scale, zero_point, low, high, zero_point_domain)
    return codes.to(container(output_dtype, low))


@torch.no_grad()
def dequantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype | TorchAODType,
    quant_min: float | None = None,
    quant_max: float | None = None,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
    *,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(q - zero_point) * scale in output_dtype. Raises AssertionError for codes of a dtype that input_dtype is not kept in."""
    low, high = bounds(input_dtype, quant_min, quant_max)
    if hasattr(input, "get_plain"):
        input = input.get_plain()
    if input.dtype not in (as_dtype(input_dtype), container(input_dtype, low)):
        raise AssertionError(f"the codes are {input.dtype}, and input_dtype says {input_dtype}")
    return _dequantize(input, block_size, scale, zero_point, low, high, zero_point_domain, output_dtype)


def fake_quantize_affine_cachemask(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    quant_dtype: torch.dtype | TorchAODType,
    quant_min: float | None = None,
    quant_max: float | None = None,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
) -> tuple[Tensor, Tensor]:
    """What quantizing and dequantizing makes of `input`, in its dtype, and where no code clips."""
    low, high = bounds(quant_dtype, quant_min, quant_max)
    inner = (block_size, scale, zero_point)
    free = _quantize(input.float(), *inner, -(2.0**31), 2.0**31, zero_point_domain)
    if zero_point_domain is ZeroPointDomain.FLOAT:  # whose codes count from the middle of the range
        free = free + (high + low + 1) / 2
    codes = _quantize(input, *inner, low, high, zero_point_domain)
    values = _dequantize(codes, *inner, low, high, zero_point_domain, input.dtype)
    return values, (free >= low) & (free <= high)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, *settings: Any) -> Tensor:
        values, mask = fake_quantize_affine_cachemask(input, *settings)
        ctx.save_for_backward(mask)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None, None, None, None, None, None, None


def fake_quantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    quant_dtype: torch.dtype | TorchAODType,
    quant_min: float | None = None,
    quant_max: float | None = None,
    zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
) -> Tensor:
    """The first of `fake_quantize_affine_cachemask`. The gradient passes where no code clips."""
    return _StraightThrough.apply(
        input, block_size, scale, zero_point, quant_dtype, quant_min, quant_max, zero_point_domain
    )


@torch.no_grad()
def choose_qparams_and_quantize_affine_hqq(
    tensor: Tensor,
    nbits: float = 4,
    group_size: int = 64,
    optimize: bool = True,
    axis: int = 1,
    compute_dtype: torch.dtype = torch.float16,
    device: str = "cuda",
    verbose: bool = False,
    raw_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Codes (uint8), scale and zero point of a weight (N, K) by HQQ, and its shape.

    raw_output: the zero point as a code, x = (q - zero) * scale with scale inverted, q = x * scale + zero; otherwise as a
        number, x = (q - 2**(nbits - 1)) * scale + zero.
    compute_dtype, device, verbose: accepted and without effect: it computes in float32 where the tensor is.

    Raises ValueError for an axis other than 1.
    """
    if axis != 1:
        raise ValueError(f"choose_qparams_and_quantize_affine_hqq: axis must be 1, got {axis}")
    spec = Intx(int(nbits), (1, group_size), signed=False, symmetric=False, zero_point="float")
    weight = tensor.float()
    qparams = spec.choose_qparams(weight, spec.grid(weight.shape))
    if optimize:
        qparams = HQQ().quantize(weight, spec, None).qparams
    q: Any = spec.wrap(spec.encode(weight, **qparams), tensor.dtype, weight.shape)
    scale, zero = q.scale, q.zero_point
    if raw_output:
        return q.codes(), 1.0 / scale, zero, tuple(tensor.shape)
    return q.codes(), scale, (2 ** (int(nbits) - 1) - zero) * scale, tuple(tensor.shape)


choose_qparams_affine_tinygemm = partial(
    choose_qparams_affine, preserve_zero=False, zero_point_domain=ZeroPointDomain.FLOAT
)
choose_qparams_affine_dont_preserve_zero = partial(choose_qparams_affine, preserve_zero=False)
quantize_affine_tinygemm = partial(quantize_affine, zero_point_domain=ZeroPointDomain.FLOAT)
dequantize_affine_tinygemm = partial(dequantize_affine, zero_point_domain=ZeroPointDomain.FLOAT)
quantize_affine_no_zero_point = partial(quantize_affine, zero_point_domain=ZeroPointDomain.NONE)
dequantize_affine_no_zero_point = partial(dequantize_affine, zero_point_domain=ZeroPointDomain.NONE)


# float8, and floats of fewer bits


@torch.no_grad()
def choose_qparams_affine_float8(
    tensor: Tensor,
    float8_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """max|x| / max of the format, per tensor, or one per block with every dim kept."""
    most = torch.finfo(float8_dtype).max
    if block_size is None:
        return (tensor.abs().max() / most).to(scale_dtype)
    view, inside, grid = _blocks(tensor.shape, block_size, "choose_qparams_affine_float8")
    blocks = tensor.abs().reshape(view)
    return ((blocks.amax(inside) if inside else blocks) / most).to(scale_dtype).reshape(grid)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """A scale with every dim kept, repeated over its blocks."""
    if scale.dim() != len(shape):
        return scale
    for dim, (n, size) in enumerate(zip(scale.shape, shape)):
        if n not in (1, size):
            scale = scale.repeat_interleave(size // n, dim)
    return scale


@torch.no_grad()
def quantize_affine_float8(tensor: Tensor, scale: Tensor, float8_dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """clamp(x / scale) as float8."""
    most = torch.finfo(float8_dtype).max
    return (tensor.float() / _spread(scale, tensor.shape)).clamp(-most, most).to(float8_dtype)


@torch.no_grad()
def dequantize_affine_float8(tensor: Tensor, scale: Tensor, output_dtype: torch.dtype = torch.float32) -> Tensor:
    """x * scale."""
    return (tensor.float() * _spread(scale, tensor.shape)).to(output_dtype)


def _largest(ebits: int, mbits: int) -> float:
    """The largest number of a float without infinities: bias 2**(ebits - 1) - 1."""
    return float(2 ** (2**ebits - 1 - (2 ** (ebits - 1) - 1)) * (2 - 2.0**-mbits))


@torch.no_grad()
def choose_qparams_affine_floatx(tensor: Tensor, ebits: int, mbits: int) -> Tensor:
    """One scale per row, max|row| / largest number, in float16 as the kernels of this format take it."""
    return (tensor.abs().amax(1).clamp(min=1e-12) / _largest(ebits, mbits)).half()


@torch.no_grad()
def quantize_affine_floatx(tensor: Tensor, scale: Tensor, ebits: int, mbits: int) -> Tensor:
    """Codes (uint8) of floats of one sign, `ebits` exponent and `mbits` mantissa bits; half to even, no infinities."""
    x = tensor.float() / scale.float().view(-1, 1)
    size = x.abs().clamp(max=_largest(ebits, mbits))
    bias = 2 ** (ebits - 1) - 1
    exponent = torch.where(size > 0, torch.frexp(size).exponent - 1, 1 - bias).clamp(min=1 - bias)
    steps = torch.round(torch.ldexp(size, mbits - exponent))  # of 2**(exponent - mbits)
    code = steps.int() + (exponent + bias - 1).int() * 2**mbits  # a carry goes to the next exponent by itself
    return (code + (x < 0).int() * 2 ** (ebits + mbits)).to(torch.uint8)


@torch.no_grad()
def dequantize_affine_floatx(
    tensor: Tensor, scale: Tensor, ebits: int, mbits: int, output_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The numbers of `quantize_affine_floatx`."""
    code = tensor.int()
    exponent = (code >> mbits) & (2**ebits - 1)
    mantissa = (code & (2**mbits - 1)).float()
    normal = exponent > 0
    bias = 2 ** (ebits - 1) - 1
    size = torch.ldexp(mantissa + normal * 2.0**mbits, torch.where(normal, exponent, 1) - bias - mbits)
    values = torch.where(code >> (ebits + mbits) > 0, -size, size)
    return (values * scale.float().view(-1, 1)).to(output_dtype)
