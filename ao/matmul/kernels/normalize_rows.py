"""A Triton kernel that normalizes the rows of an activation and quantizes what comes of it to int8 or float8 e4m3, on Hopper.

A compiler's own kernel reads rows that are long once for each sum over them, writes the norm, and another reads it: 7 bytes a
number and more where this one moves 3. It holds a row, as the kernel in quantize_rows.py does, in registers.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .launch import Launch, cdiv
from .quantize_rows import _codes_asm, _largest, _store_codes, _words, share_of


@triton.jit
def _both(word, HALF: tl.constexpr):
    """The two numbers of 16 bits in a word, as float32."""
    if HALF:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = ((word >> 16) << 16).to(tl.float32, bitcast=True)
    return low, high


@triton.jit(do_not_specialize=["M", "EACH"])
def normalize_kernel(
    words_ptr, weight_ptr, bias_ptr, codes_ptr, scale_ptr, M, EACH, EPS: tl.constexpr, CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BIASED: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, BIAS_STRIDE: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, FLOAT: tl.constexpr, HALF: tl.constexpr,
    PACK_ASM: tl.constexpr, CODES_ASM: tl.constexpr,
):  # fmt: skip
    """ROWS rows of norm(x) * weight + bias, rounded to x's dtype, as `Intx(8)` or `Float8()` quantize them: codes
    (M, K), scale (M,).

    A row has WORDS words of two numbers, WIDTH of which are loaded at a time. EACH rows have a weight and a bias, which are
    STRIDE words apart. CENTERED: the norm of x less its mean. ADDED: 1 + weight instead of weight.
    """
    PIECES: tl.constexpr = (WORDS + WIDTH - 1) // WIDTH
    gdc_launch_dependents()
    m = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), M - 1)[:, None]  # the last row may be done twice
    at = tl.arange(0, WIDTH)[None, :]
    words = _words(words_ptr + m.to(tl.int64) * WORDS, at, 0, WORDS, WORDS, WIDTH)
    weights = words
    if WEIGHTED:
        weights = _words(weight_ptr + m // EACH * WEIGHT_STRIDE, at, 0, WORDS, WORDS, WIDTH)
    biases = words
    if BIASED:
        biases = _words(bias_ptr + m // EACH * BIAS_STRIDE, at, 0, WORDS, WORDS, WIDTH)

    mean = tl.zeros((ROWS, 1), tl.float32)
    if CENTERED:
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for i in tl.static_range(PIECES):
            low, high = _both(words[i], HALF)
            total += low + high
        mean = (tl.sum(total, 1) / (2 * WORDS))[:, None]
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in tl.static_range(PIECES):
        low, high = _both(words[i], HALF)
        low -= mean
        high -= mean
        square = low * low + high * high
        if CENTERED and WIDTH * (i + 1) > WORDS:
            square = tl.where(at < WORDS - WIDTH * i, square, 0.0)
        squares += square
    inverse = tl.rsqrt(tl.sum(squares, 1) / (2 * WORDS) + EPS)[:, None]

    normed = ()
    for i in tl.static_range(PIECES):
        low, high = _both(words[i], HALF)
        low = (low - mean) * inverse
        high = (high - mean) * inverse
        if WEIGHTED:
            first, second = _both(weights[i], HALF)
            if ADDED:
                first += 1.0
                second += 1.0
            low *= first
            high *= second
        if BIASED:
            first, second = _both(biases[i], HALF)
            low += first
            high += second
        word = tl.inline_asm_elementwise(PACK_ASM, "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)
        if WIDTH * (i + 1) > WORDS:
            word = tl.where(at < WORDS - WIDTH * i, word, 0)
        normed += (word,)  # type: ignore[assignment]
    _store_codes(
        normed, _largest(normed, ROWS, WIDTH), codes_ptr, scale_ptr, M, WORDS, ROWS, WIDTH, FLOAT, HALF, CODES_ASM
    )  # fmt: skip


def normalized(
    x: Tensor, dtype: torch.dtype, eps: float, centered: bool, weight: Tensor | None, added: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """norm(x) * weight + bias, quantized to int8 or float8 e4m3, as `Intx(8)` or `Float8()` do.

    x: (M, K) of 16 bits, K % 8 == 0. weight, bias: (B, K) of x's dtype, M % B == 0, each for M / B rows; or None, which leaves
    them out. added: 1 + weight instead of weight. -> the codes (M, K) and the scales (M, 1).

    norm: with c = x - mean(x) if it is `centered` (LayerNorm), else x (RMSNorm): c / sqrt(mean(c^2) + eps), in float32, and
    rounded to x's dtype once, at the end.
    """
    m, k = x.shape
    x = x.contiguous()
    x, weight, bias = (x if x.data_ptr() % 16 == 0 else x.clone()), _in_words(weight), _in_words(bias)
    device = x.device.index
    codes = torch.empty(m, k, dtype=dtype, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    batch = max(1 if t is None else t.shape[0] for t in (weight, bias))
    strides = [0 if t is None or t.shape[0] == 1 else t.stride(0) // 2 for t in (weight, bias)]
    run = _launch(m, k, dtype, x.dtype, eps, centered, weight is not None, added, bias is not None, *strides, device)
    run(device, x, x if weight is None else weight, x if bias is None else bias, codes, scale, m, m // batch)
    return codes, scale


def _in_words(t: Tensor | None) -> Tensor | None:
    """`t` as a kernel reads it, 16 bytes at a time: copied, where its rows do not lie so."""
    if t is None or (t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0):
        return t
    return t.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(4096)
def _launch(
    m: int, k: int, dtype: torch.dtype, x: torch.dtype, eps: float, centered: bool, weighted: bool, added: bool, biased: bool,
    weight_stride: int, bias_stride: int, device: int,
) -> Launch:  # fmt: skip
    half, float8, share = x == torch.float16, dtype.is_floating_point, share_of(k // 2)
    return Launch(
        normalize_kernel, (cdiv(m, share.rows),), num_warps=share.warps,
        views={0: torch.int32, 1: torch.int32, 2: torch.int32, 3: torch.int16}, EPS=eps, CENTERED=centered, WEIGHTED=weighted,
        ADDED=added, BIASED=biased, WEIGHT_STRIDE=weight_stride, BIAS_STRIDE=bias_stride, WORDS=k // 2, ROWS=share.rows,
        WIDTH=share.width, FLOAT=float8, HALF=half,
        PACK_ASM=f"cvt.rn.{'f16x2' if half else 'bf16x2'}.f32 $0, $2, $1;", CODES_ASM=_codes_asm(half, float8),
    )  # fmt: skip
