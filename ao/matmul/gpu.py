"""The products of an activation and a quantized weight that are fast on a GPU (see anywhere.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import QTensor, blank
from ..dtypes.bits import CHUNK, packed_dim
from ..dtypes.operand import Cast, Operand
from ..dtypes.tracing import known
from .anywhere import (
    act_numbers,
    compiling,
    emulates,
    float8_operand,
    int8_operand,
    is_int8,
    quantize_act,
    quantized_act,
    row_cast,
)
from .block_scaled import block_scaled_product, has_block_scaled, multiplies, numbers, times
from .integers import integer_product, takes
from .kernels.device import has_float8, has_kernels, is_hopper, on_its_device
from .path import Path, Product


def _linear_codes(w: QTensor, words: bool = False) -> Operand | None:
    """The operand of a weight (N, K) with codes of 4 or 8 bits, along K, whose numbers are codes less a zero point.

    words: whether scale and zero point may be in one word.
    """
    operand = w.spec.operand(w)
    if operand is None or operand.kind not in ("affine", "float") or operand.bits not in (4, 8) or w.dim() != 2:
        return None
    plain = not isinstance(operand.scale, QTensor) or (words and operand.words is not None)
    if operand.offset not in (0, 8 if operand.bits == 4 else 0) or not plain:
        return None
    return operand if packed_dim(operand.codes.shape, w.shape) == 1 else None


def _packed(w: QTensor, words: bool = False, ends: bool = False) -> Operand | None:
    """The operand of a weight that the Triton kernels read: contiguous 4- or 8-bit codes, scales per row or group. words: as of
    `_linear_codes`. ends: also rows of bytes that end within a step of 128."""
    operand = _linear_codes(w, words) if has_kernels(w.device) and w.numel() < 2**31 else None
    if operand is None:
        return None
    n, k = (int(size) for size in w.shape)  # int: a graph may have any number of tokens, but one shape of the weight
    groups = operand.scale.shape[1]
    group = 128 if groups == 1 else k // groups
    step = 16 if ends and groups == 1 and operand.bits == 8 else group
    fits = (
        group in (32, 64, 128, 256)
        and k % step == 0
        and operand.scale.shape[0] == n
        and all(t.is_contiguous() for t in w.fields().values())
    )
    return operand if fits else None


def _weight(operand: Operand | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """What the kernels read of a weight."""
    assert operand is not None
    if operand.words is not None:
        both = operand.words.view(torch.int16)  # by which dtype the kernels know them
        return operand.codes, both, both, int(operand.offset)
    return operand.codes, operand.scale, operand.zero_point, int(operand.offset)


def gemv_accepts(x: Tensor, w: QTensor) -> bool:
    if not (known(x.shape[0] == 1) and x.dtype in (torch.bfloat16, torch.float16)):
        return False
    # Without an activation to quantize, slices_of_k.py is for rows that end within a step.
    operand = _packed(w, words=True, ends=w.spec.act is not None)
    return (
        operand is not None
        and (w.spec.act is None or row_cast(w) is not None)
        and not (operand.kind == "float" and operand.scale.shape[1] > 1)
    )


def gemv(x: Tensor, w: QTensor) -> Tensor:
    """sum over groups of (sum over the group of x * (q - z)) * scale, with the weights read once and nothing stored.

    For integer weights x becomes 16-bit fixed point, relative to the largest of each group (an error of 1.5e-5 of that,
    against 4e-3 of bfloat16 itself), and the sum over the group is exact. An activation that is quantized by the defaults is
    quantized in the kernel; any other goes in as its codes, of which bfloat16 has every one.
    """
    from .kernels import operators  # Triton is there only with a GPU build of PyTorch

    operand = w.spec.operand(w)
    if w.spec.act is None or _quantized_in_kernel(w, operand):
        return operators.gemv(x.contiguous(), *_weight(operand), w.spec.act is not None)
    codes, scale = _codes(x, w)
    return (operators.gemv(codes, *_weight(operand), False).float() * scale).to(x.dtype)


def _codes(x: Tensor, w: QTensor) -> tuple[Tensor, Tensor]:
    """The codes of an activation (1, K) less its zero point, bfloat16, and its scale, float32."""
    act = quantize_act(x, w)
    codes = act.codes.float()
    if act.zero_point is not None:
        codes = codes - act.zero_point.float()
    return codes.to(torch.bfloat16), act.scale.float()


def gemv_launch(x: Tensor, w: QTensor) -> Product:
    """`gemv` for eager mode, with all that depends on the form of the weight decided."""
    from .kernels import ampere

    n, k = w.shape
    operand = w.spec.operand(w)
    in_kernel = w.spec.act is not None and _quantized_in_kernel(w, operand)
    codes_of_x = w.spec.act is not None and not in_kernel
    dtype = torch.bfloat16 if codes_of_x else x.dtype
    run = _launched(w, ampere.gemv_launch(dtype, n, k, *_weight(operand), in_kernel))
    if not codes_of_x:
        return run

    def of_codes(x: Tensor, w: QTensor) -> Tensor:
        codes, scale = _codes(x.reshape(1, k), w)
        return (run(codes, w).float() * scale).to(x.dtype).view(*x.shape[:-1], n)

    return of_codes


OrderedProduct = Callable[[Tensor, QTensor, Tensor], Tensor]
"""Of x (..., K), a weight as it is stored and the order of its columns, (K,) integers -> x[..., order] @ w.T (..., N)."""

LONGEST = 32768
"""Columns that a kernel puts in another order at once."""

GATHERED = 64
"""Tokens up to which a compiler's own gather, in the kernel that makes the activation, is the faster: it reads each number from
the cache by itself, and saves a launch."""


ONE_PROGRAM = 8192
"""Columns up to which a compiler computes a norm of one token in one program, which takes longer for numbers from all over a row
than all programs of the product do. Beyond, it cuts the sum in parts, and what comes after it is a kernel of many programs."""


ARRANGED = 16
"""Tokens beyond which x is arranged before a product of few tokens on Hopper, in order at once."""


def has_gather(x: Tensor) -> bool:
    """Whether a kernel takes the columns of `x` in another order."""
    return has_kernels(x.device) and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] <= LONGEST


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """x[..., order] in a graph that is traced. order: (K,) integers."""
    tokens = x.numel() // order.shape[0]
    few = isinstance(tokens, int) and tokens <= GATHERED
    if few or not compiling() or torch.compiler.is_exporting() or not has_gather(x):
        return x.index_select(-1, order.int())
    from .kernels import operators

    return operators.gathered(x.contiguous(), order)


def ordered_launch(x: Tensor, order: Tensor, product: Product) -> OrderedProduct:
    """`product` of x[..., order] in eager mode, for an order like this."""
    if not has_gather(x):
        return lambda x, w, order: product(x.index_select(-1, order.int()), w)
    from .kernels import column_order

    gathered = column_order.gather_launch(x, order)
    return on_its_device(lambda x, w, order: product(gathered(x.contiguous(), order), w))


def gemv_ordered_accepts(x: Tensor, w: QTensor) -> bool:
    """Whether `gemv` of x[:, order], x (1, K), takes the numbers of x in order itself."""
    operand = w.spec.operand(w)
    if operand is None or operand.kind == "float" or w.spec.act is not None or w.pre_scale is not None:
        return False
    return gemv_accepts(x, w) and has_gather(x)


def gemv_ordered_launch(x: Tensor, w: QTensor, order: Tensor) -> OrderedProduct | None:
    """`gemv_launch` of x[..., order], gathered in the kernel, for an order like this; None where it is not for that."""
    if not gemv_ordered_accepts(x, w):
        return None
    from .kernels import ampere

    n, k = w.shape
    return _launched(w, ampere.gemv_launch(x.dtype, n, k, *_weight(w.spec.operand(w)), False, order.dtype))


def fused_ordered_launch(x: Tensor, w: QTensor, order: Tensor) -> OrderedProduct | None:
    """`fused_launch` of x[..., order] for a few tokens, in one launch, for an order like this; None where it is not for that."""
    (m, k), n = x.shape, w.shape[0]
    if n * k > LARGE or w.pre_scale is not None or not (fused_accepts(x, w) and has_gather(x)):
        return None  # as in `fused_launch`
    from .kernels import ampere

    run = ampere.fused_ordered_launch(m, n, k, *_weight(w.spec.operand(w)))
    if run is None:
        return None
    soon, at_once, records = (
        _launched(w, run),
        ordered_launch(x, order, fused_launch(x, w)),
        torch._C._cuda_isCurrentStreamCapturing,
    )
    return lambda x, w, order: at_once(x, w, order) if records() else soon(x, w, order)


def ordered(x: Tensor, w: QTensor, order: Tensor) -> Tensor | None:
    """x[:, order] @ w.T in a graph that is traced, x (M, K), by a product that takes the numbers of x in order itself; None where
    none does, or the compiler's own gather is the faster."""
    if not compiling() or torch.compiler.is_exporting() or not has_gather(x):
        return None
    from .kernels import operators

    if x.shape[-1] <= ONE_PROGRAM and gemv_ordered_accepts(x, w):
        return operators.gemv(x.contiguous(), *_weight(w.spec.operand(w)), False, order)
    arranged = known(x.shape[0] > ARRANGED) and known(x.shape[0] <= GATHERED) and is_hopper(x.device)
    if not arranged or w.spec.act is not None or w.pre_scale is not None or (read := _read(w)) is None:
        return None
    reading, fields = read
    if reading.kind == "trits" or reading.bits == 8:
        return None
    return operators.few_ordered(x.contiguous(), order, *fields, reading.text)


def _launched(w: QTensor, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` of x, the codes, scale and zero point of a weight like `w`, and an order or a bias that is given, on its device."""
    operand = w.spec.operand  # of the same Spec: the choice is one of the form

    def launched(x: Tensor, w: QTensor, *more: Tensor) -> Tensor:
        codes, scale, zero_point, *_ = operand(w)  # type: ignore[misc]
        return run(x.contiguous(), codes, scale, zero_point, *more)

    def launched_words(x: Tensor, w: QTensor, *more: Tensor) -> Tensor:
        codes, scale, zero_point, _ = _weight(operand(w))
        return run(x.contiguous(), codes, scale, zero_point, *more)

    form = operand(w)
    return on_its_device(launched if form is None or form.words is None else launched_words)


def _quantized_in_kernel(w: QTensor, operand: Operand | None) -> bool:
    """Whether `gemv` quantizes the activation itself: per row or whole, which is the same for one token."""
    return operand is not None and operand.bits == 8 and is_default_act(w, operand)


def fused_accepts(x: Tensor, w: QTensor) -> bool:
    operand = _packed(w) if x.dtype == torch.bfloat16 and w.spec.act is None else None
    if operand is None or (operand.zero_point is not None and operand.zero_point.is_floating_point()):
        return False  # q - z would not be exact in bfloat16
    return known(x.shape[0] > 1, otherwise=True)


def fused(x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """x @ decode(w).T. Up to 64 tokens (512 on Hopper, for most formats) the weights are decoded to bfloat16 in registers, a
    tile at a time; beyond, to memory, by one kernel.

    On Hopper, 17 tokens and more meet an 8-bit weight as a sum of two 8-bit numbers: two products at twice the rate, and no
    decoding. Its error is that of x in 16-bit fixed point (int8), or of a sum of 14 bits (float8).
    """
    from .kernels import operators

    return operators.fused(x.contiguous(), *_weight(w.spec.operand(w)), bias)


def fused_launch(x: Tensor, w: QTensor) -> Product:
    """`fused` for eager mode.

    There the GPU waits for the host, unless a weight is large: so one launch for up to 128 tokens, which is the fastest way too
    for up to 16 and 4 bits; beyond, for 8 bits and up to 512 tokens, a decoder and the dense product, which the host is done with
    sooner than with the three launches of a faster one.
    While a CUDA graph records, the time of the host does not count.
    """
    from .kernels import ampere, operators

    (m, k), n = x.shape, w.shape[0]
    qdata, scale, zero_point, offset = _weight(w.spec.operand(w))
    records = torch._C._cuda_isCurrentStreamCapturing
    of_hopper = operators.is_for_hopper(m, k, qdata, scale, zero_point)

    def at_once(
        x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        return operators.fused_at_once(x, qdata, scale, zero_point, offset, of_hopper, bias)

    of_nibbles = of_hopper and qdata.shape[1] < k
    sliced = operators.nibbles_launch(m, n, k, qdata, scale, zero_point, offset)
    if sliced is not None:
        return _launched(w, sliced)
    if m > operators.SOME or n * k > LARGE or (m > ONE_LAUNCH and of_nibbles):
        return _launched(w, at_once)
    if m <= ONE_LAUNCH:
        soon = ampere.fused_launch(m, n, k, qdata, scale, zero_point, offset)
    else:
        soon = ampere.decode_launch(x.dtype, n, k, qdata, scale, zero_point, offset)
    return _launched(w, lambda *args: at_once(*args) if records() else soon(*args))


ONE_LAUNCH = 128
"""Tokens up to which eager mode decodes a weight on its way to the tensor cores, in one launch."""

FEW = 64
"""The same in a graph, at most; of so few tokens a compiler adds the bias in whatever comes next."""


def adds_bias(x: Tensor) -> bool:
    """Whether a product of x (M, K) is to add a bias: of any number of tokens that is not known to be small."""
    return not isinstance(x.shape[0], int) or x.shape[0] > FEW


def fused_adds_bias(x: Tensor) -> bool:
    """`adds_bias`, of `fused`."""
    return adds_bias(x) if compiling() else x.shape[0] > ONE_LAUNCH


LARGE = 2**26
"""Elements of a weight beyond which the GPU takes longer for a product of few tokens than the host for its launches."""


def _read(w: QTensor) -> tuple[Any, Any] | None:
    """How the kernels for any format read a weight, and its fields; None where they do not."""
    if not has_kernels(w.device):
        return None
    from .kernels.reading import reading_of

    return reading_of(w)


def _reading(w: QTensor) -> tuple[Any, Any]:
    """`_read` of a weight that they read."""
    read = _read(w)
    assert read is not None
    return read


def gemv_codes_accepts(x: Tensor, w: QTensor) -> bool:
    read = _read(w) if known(x.shape[0] == 1) and x.dtype in (torch.bfloat16, torch.float16) else None
    return read is not None and read[0].for_one_token


def gemv_codes(x: Tensor, w: QTensor) -> Tensor:
    """As `gemv`, for integers of any width, tables and floats of 4 bits or more, with scales of any kind, and for trits."""
    return few(x, w)


def gemv_codes_launch(x: Tensor, w: QTensor) -> Product:
    """`gemv_codes` for eager mode."""
    from .kernels import one_token, trits

    read = _reading(w)
    return _read_anew(w, (trits if read[0].kind == "trits" else one_token).gemv_launch(*read))


def _read_anew(w: QTensor, run: Callable[..., Tensor]) -> Product:
    """`run` of x, the fields of a weight like `w`, and a bias that is given, on its device."""
    from .kernels.reading import fields_of

    if w.spec.act is None:
        return on_its_device(lambda x, w, *bias: run(x.contiguous(), fields_of(w), *bias))
    return on_its_device(lambda x, w, *bias: run(_rows_quantized(x, w), fields_of(w), *bias))


def _rows_quantized(x: Tensor, w: QTensor) -> Tensor:
    return quantized_act(x.reshape(-1, x.shape[-1]), w).view(x.shape)


def few_accepts(x: Tensor, w: QTensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and _read(w) is not None


def few(x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """x @ decode(w).T, in any format. Up to 64 tokens (512 of bfloat16 on Hopper, in graphs) the weights are decoded in
    registers, a tile at a time; beyond, to memory, by one kernel. In registers their numbers become bfloat16, with x in float16
    too: 51 dB against float64."""
    from .kernels import operators

    reading, fields = _reading(w)
    return operators.few(quantized_act(x, w).contiguous(), *fields, reading.text, bias)


def few_launch(x: Tensor, w: QTensor) -> Product:
    """`few` for eager mode: up to 16 tokens in one launch, and beyond `FEW` by the weight in memory, as in `fused_launch`; of
    trits in the two that they take."""
    from .kernels import few_tokens, operators, slices_of_k, template

    reading, fields = _reading(w)
    m, records = x.shape[0], torch._C._cuda_isCurrentStreamCapturing

    def at_once(x: Tensor, fields: Any, bias: Tensor | None = None) -> Tensor:
        return operators.few_at_once(x, fields, reading, bias)

    one_launch = w.numel() <= LARGE or slices_of_k.takes(reading, m, x.dtype == torch.float16)
    if reading.kind != "trits" and m > FEW:
        soon: Callable[..., Tensor] = template.decode_launch(x.dtype, reading, fields)
    elif reading.kind != "trits" and m <= 16 and one_launch:
        soon = few_tokens.few_launch(m, x.dtype, reading, fields)
    else:
        return _read_anew(w, at_once)
    return _read_anew(w, lambda x, *given: at_once(x, *given) if records() else soon(x, *given))


def block_scaled_accepts(x: Tensor, w: QTensor) -> bool:
    if not (emulates(w) and has_block_scaled(x.device) and known(x.numel() > 0, True)):
        return False
    operand, act = w.spec.operand(w), w.spec.act
    like = None if act is None else act.operand(blank(act, (1, w.shape[1])))
    return operand is not None and like is not None and multiplies(like, operand)


def block_scaled(x: Tensor, w: QTensor) -> Tensor:
    """Small floats in blocks on both sides, by the chip's product of them."""
    operand = w.spec.operand(w)
    assert operand is not None
    return block_scaled_product(quantize_act(x, w), operand, x.dtype)


def emulated_accepts(x: Tensor, w: QTensor) -> bool:
    return emulates(w)


def emulated(x: Tensor, w: QTensor) -> Tensor:
    """The same where the chip has none: codes times the scales of their blocks are exact in bfloat16, which is multiplied with a
    sum in float32; what multiplies all of them comes after."""
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    operand = w.spec.operand(w)
    assert operand is not None
    (a, first), (b, second) = act_numbers(x, w), numbers(operand, w.shape)
    return times(F.linear(a.to(dtype), b.to(dtype)), first, second).to(x.dtype)


def decode_accepts(x: Tensor, w: QTensor) -> bool:
    return x.dtype.itemsize == 2 and _packed(w) is not None


def decode(x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """x @ decode(w).T, decoded to memory by one kernel."""
    return F.linear(quantized_act(x, w), decoded(w, x.dtype), None if bias is None else bias.to(x.dtype))


def decoded(w: QTensor, dtype: torch.dtype) -> Tensor:
    """`w.decode_scaled(dtype)`, (N, K), on a GPU by one kernel where it knows the format."""
    if w.pre_scale is not None or dtype.itemsize != 2 or not has_kernels(w.device):
        return w.decode_scaled(dtype)
    from .kernels import operators

    if (operand := _packed(w)) is not None:
        return operators.decoded(*_weight(operand), int(w.shape[1]), dtype)
    if (read := _read(w)) is None:
        return w.decode_scaled(dtype)
    return operators.decoded_codes(*read[1], read[0].text, dtype)


def trits_accepts(x: Tensor, w: QTensor) -> bool:
    act = row_cast(w)
    few = known(x.shape[0] > 0) and known(x.shape[0] <= FEW_BY_TRITS)
    if act is None or act.zero_point or not few or not is_int8(w):
        return False
    read = _read(w) if x.dtype in (torch.bfloat16, torch.float16, torch.float32) else None
    return read is not None and read[0].kind == "trits" and read[0].k <= 65536


FEW_BY_TRITS = 64
"""The largest number of tokens whose codes meet trits that are decoded on their way to the tensor cores."""


def trits(x: Tensor, w: QTensor) -> Tensor:
    """`int_mm`, to the bit, of a weight with five numbers in a byte, which is read as it is: sums of codes are exact in float32.

    An activation that is quantized dynamically, per row, becomes codes in the kernel before.
    """
    from .kernels import operators

    reading, (codes, scale, *_) = _reading(w)
    dtype, cast, act, rows = x.dtype, row_cast(w), [0.0], None
    assert cast is not None
    if _is_cast_in_kernel(x, w):
        act = [float(cast.levels or 0)]
    else:
        quantized = quantize_act(x, w)
        x, rows = quantized.codes, quantized.scale.float().expand(x.shape[0], 1).contiguous()
    return operators.codes_by_trits(
        x.contiguous(), rows, codes, scale, reading.text, [*act, float(cast.low), float(cast.high)], dtype
    )


def _is_cast_in_kernel(x: Tensor, w: QTensor) -> bool:
    """Whether the kernel before makes codes of an activation: per row, or whole, which is the same for one token."""
    cast, act = row_cast(w), w.spec.act
    if cast is None or act is None or cast.levels is None or not cast.nearest or w.act_scale is not None:
        return False
    return x.dtype.itemsize == 2 and (act.block == (1, -1) or known(x.shape[0] == 1))


def trits_launch(x: Tensor, w: QTensor) -> Product:
    """`trits` for eager mode."""
    read, cast = _reading(w), row_cast(w)
    if not (known(x.shape[0] == 1) and read[0].for_one_token and _is_cast_in_kernel(x, w)):
        return lambda x, w: trits(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[0])
    from .kernels import trits as kernels
    from .kernels.reading import fields_of

    assert cast is not None and cast.levels is not None
    run = kernels.gemv_launch(*read, kernels.Act(cast.levels, cast.low, cast.high))
    return on_its_device(lambda x, w: run(x.contiguous(), fields_of(w)))


def _int8_operand(w: QTensor) -> Operand | None:
    """`int8_operand`, which one kernel makes of trits."""
    operand = w.spec.operand(w) if is_int8(w) else None
    if operand is None or operand.kind != "trits" or (read := _read(w)) is None:
        return int8_operand(w)
    from .kernels import operators

    codes = operators.decoded_codes(*read[1], read[0].text, torch.int8)
    return operand._replace(codes=codes, kind="affine", bits=8)


def int_mm_accepts(x: Tensor, w: QTensor) -> bool:
    return is_int8(w) and takes(w.device, w.shape[0], w.shape[1]) and known(x.numel() > 0, True)


def int_mm(x: Tensor, w: QTensor) -> Tensor:
    """((q_x - z) @ q_w.T) * scale_x * scale_w, with the sum over K in int32."""
    operand, act = _int8_operand(w), quantize_act(x, w)
    assert operand is not None
    tokens, q = x.shape[0], act.codes
    if act.zero_point is not None:
        # One more row, of ones, so that the same product gives the column sums that the zero point multiplies.
        q = torch.cat([q, q.new_ones(1, q.shape[1])])
    total = integer_product(q, operand.codes).float()  # (M, N), or one more row
    out = total[:tokens]
    if act.zero_point is not None:
        out = out - act.zero_point.float() * total[tokens:]
    return (out * act.scale.float() * operand.scale.float().t()).to(x.dtype)


def scaled_mm_accepts(x: Tensor, w: QTensor) -> bool:
    operand, act = float8_operand(w), row_cast(w)
    return (
        operand is not None
        and act is not None
        and w.shape[0] % 16 == 0
        and w.shape[1] % 16 == 0
        and torch.float8_e4m3fn in (operand.codes.dtype, act.dtype)
        and known(x.numel() > 0, True)
        and has_float8(x.device)
    )


def scaled_mm(x: Tensor, w: QTensor) -> Tensor:
    """(q_x @ q_w.T) * scale_x * scale_w with float8 operands and a float32 sum."""
    operand, act = float8_operand(w), quantize_act(x, w)
    assert operand is not None
    one = torch.ones((), dtype=torch.float32, device=x.device)
    total = torch._scaled_mm(act.codes, operand.codes.t(), one, one, out_dtype=torch.float32)
    return (total * act.scale * operand.scale.t()).to(x.dtype)


def int4pack_accepts(x: Tensor, w: QTensor) -> bool:
    operand = w.spec.operand(w)
    return operand is not None and operand.kind == "int4pack" and w.spec.act is None and known(x.numel() > 0, True)


def int4pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int4 product on its own layout, in bfloat16."""
    operand = w.spec.operand(w)
    assert operand is not None
    group = x.shape[1] // operand.scale.shape[0]  # scale: (K / group, N, 2)
    return torch._weight_int4pack_mm(x.bfloat16(), operand.codes, group, operand.scale).to(x.dtype)


def scaled_product_accepts(x: Tensor, w: QTensor) -> bool:
    act = row_cast(w)
    return (
        act is not None
        and not act.zero_point
        and has_kernels(x.device)
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(t.is_contiguous() for t in w.fields().values())
        and (scaled_mm_accepts(x, w) or int_mm_accepts(x, w))
    )


def scaled_product(x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """(q_x @ q_w.T) * scale_x * scale_w, of int8 or float8, by the product that is fastest at this number of tokens.

    On Hopper the activation is quantized in the same operator: when the number of tokens is unknown at compile time,
    Inductor's reduction over long rows is ten times slower, and of a known number it computes what comes before it twice.
    """
    from .kernels import operators

    operand, act = _int8_operand(w) or float8_operand(w), w.spec.act
    assert operand is not None and act is not None
    columns = operand.scale.float()
    if columns.shape[0] != w.shape[0]:
        columns = columns.expand(w.shape[0], 1)
    columns = columns.contiguous()
    if is_default_act(w, operand) and w.shape[1] <= 65536 and is_hopper(x.device):
        return operators.dynamic_product(x.contiguous(), operand.codes, columns, act.block == (-1, -1), bias)
    q = quantize_act(x, w)
    rows = q.scale.float().expand(x.shape[0], 1).contiguous()
    return operators.scaled_product(q.codes, rows, operand.codes, columns, x.dtype, bias)


_CASTS = {
    torch.int8: Cast(torch.int8, -128, 127, levels=127.5),
    torch.float8_e4m3fn: Cast(torch.float8_e4m3fn, -448, 448, levels=448),
}
"""What the kernels that quantize an activation do, by the dtype of the weight."""


def is_default_act(w: QTensor, operand: Operand) -> bool:
    """Whether the activation is quantized dynamically, per row or whole, as a kernel does it."""
    cast = row_cast(w)
    return w.act_scale is None and cast is not None and cast == _CASTS.get(operand.codes.dtype)


def sums_accepts(x: Tensor, w: QTensor) -> bool:
    if not (known(x.shape[0] == 1) and compiling() and w.spec.act is None):
        return False
    operand = _linear_codes(w)
    if operand is None or operand.scale.shape[0] not in (1, w.shape[0]):
        return False
    group = _gemv_group(w, operand)
    return x.shape[1] % group == 0 and group % CHUNK == 0


def _gemv_group(w: QTensor, operand: Operand) -> int:
    """The elements that are summed before a scale is applied: a group, or a piece of a row that is a short reduction."""
    groups = operand.scale.shape[1]
    return w.shape[1] // groups if groups > 1 else 128


def sums(x: Tensor, w: QTensor) -> Tensor:
    """sum over groups of (sum over the group of x * (q - z)) * scale: two reductions, of which the first is short.

    One reduction over the whole row would load scale and zero point once per element.
    """
    operand = w.spec.operand(w)
    assert operand is not None
    n, group = w.shape[0], _gemv_group(w, operand)
    xs = x.float().view(-1, group)  # (K / group, group)
    zero: Tensor | int = int(operand.offset)
    if operand.bits == 4:
        # Both halves of a byte from one load: (N, K / group, chunks of a group, 16), see bits.py.
        pairs = operand.codes.view(n, -1, group // CHUNK, CHUNK // 2)
        low, high = xs.view(-1, group // CHUNK, 2, CHUNK // 2).unbind(2)
        sums = ((pairs & 15).float() * low + (pairs >> 4).float() * high).sum((-1, -2))  # (N, K / group)
    else:
        sums = (operand.codes.view(n, -1, group).float() * xs).sum(-1)
    if operand.zero_point is not None:
        zero = operand.zero_point.float() + zero
    if not isinstance(zero, int) or zero:
        sums = sums - zero * xs.sum(-1)
    return (sums * operand.scale.float()).sum(-1).unsqueeze(0).to(x.dtype)


PATHS = (
    Path(trits_accepts, trits, launch=trits_launch, operator=True),
    Path(gemv_accepts, gemv, launch=gemv_launch, operator=True),
    Path(fused_accepts, fused, launch=fused_launch, operator=True, adds_bias=fused_adds_bias),
    Path(gemv_codes_accepts, gemv_codes, launch=gemv_codes_launch, operator=True),
    Path(sums_accepts, sums, few=True),
    Path(scaled_product_accepts, scaled_product, operator=True, adds_bias=adds_bias),
    Path(int_mm_accepts, int_mm),
    Path(scaled_mm_accepts, scaled_mm),
    Path(int4pack_accepts, int4pack),
    Path(block_scaled_accepts, block_scaled),
    Path(emulated_accepts, emulated),
    Path(decode_accepts, decode, operator=True, adds_bias=adds_bias),
    Path(few_accepts, few, launch=few_launch, operator=True, adds_bias=adds_bias),
)
"""In the order in which they are asked."""
