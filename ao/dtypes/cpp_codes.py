"""Quantizing rows of blocks on a CPU by C++: one pass that finds the ends of each block, and one that makes and packs the codes.

In between, a block's qparams are chosen by the Spec, of the two ends as if they were all of the block. The code of a number is
printed from the Spec's own formula (cpp_vectors.py), so that the bits are those of its `encode`.

It is for much data. A compiler needs a second, in which PyTorch's operators quantize some hundred million numbers; so it is asked
after the first of them, and works in the background while they go on.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cpp import cpp_compiler, cpp_instructions, cpp_library
from .cpp_vectors import CPP_VECTORS, cpp_function
from .operand import Element

WORTH = 2**26
"""After so many elements of a kind, a compiler is asked."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


_SOURCE = r"""
typedef uint64_t word;

// Ask for what comes long after n numbers, which a CPU by itself does too late.
INLINE void fetch(const char* x, int64_t at, int n) {
  const int size = FROM == F32 ? 4 : 2;
  for (int i = 0; i < n * size; i += 64) __builtin_prefetch(x + at * size + i + 3072);
}

// 32 codes of BITS bits each, planar (bits.py).
INLINE void pack(uint8_t* out, const vi* q) {
  if (BITS == 8) return to_bytes<32 / W>(out, q);
  uint8_t bytes[32];
  to_bytes<32 / W>(bytes, q);
  const int b4 = BITS & 4, b2 = BITS & 2, b1 = BITS & 1;
  word a[4];
  memcpy(a, bytes, 32);
  if (b4) {
    const word m = 0x0F0F0F0F0F0F0F0Full;
    store(out, (a[0] & m) | (a[2] & m) << 4);
    store(out + 8, (a[1] & m) | (a[3] & m) << 4);
  }
  if (b2) {
    const word m = 0x0303030303030303ull;
    word two = 0;
    UNROLL for (int i = 0; i < 4; i++) two |= (a[i] >> b4 & m) << 2 * i;
    store(out + 4 * b4, two);
  }
  if (b1) {
    const word m = 0x0101010101010101ull;
    word one = 0;  // half of it to each of four bytes
    UNROLL for (int i = 0; i < 4; i++) one |= (a[i] >> (b4 + b2) & m) << 2 * i;
    store(out + 4 * (b4 + b2), (uint32_t)(one | one >> 31));
  }
}

#if FROM == BF16 && defined(__AVX2__)
// Of bfloat16 in integers of 16 bits. With all but the sign turned over where it is set, they are in the order of the numbers,
// and NaN is beyond these.
typedef int16_t vs __attribute__((vector_size(4 * W), aligned(2), may_alias));

INLINE float end(vs found, bool low) {
#if W == 16
  const __m256i a = _mm512_castsi512_si256((__m512i)found), b = _mm512_extracti64x4_epi64((__m512i)found, 1);
  const __m256i half = low ? _mm256_min_epi16(a, b) : _mm256_max_epi16(a, b);
#else
  const __m256i half = (__m256i)found;
#endif
  const __m128i c = _mm256_castsi256_si128(half), d = _mm256_extracti128_si256(half, 1);
  const int turn = low ? 0x8000 : 0x7FFF;  // to numbers without a sign, of which the least is the end
  const __m128i eight = _mm_xor_si128(low ? _mm_min_epi16(c, d) : _mm_max_epi16(c, d), _mm_set1_epi16((short)turn));
  const int16_t least = (int16_t)(_mm_extract_epi16(_mm_minpos_epu16(eight), 0) ^ turn);
  const uint32_t bits = (uint32_t)(least ^ (least >> 15 & 0x7FFF)) << 16;
  return load<float>(&bits);
}

INLINE void ends(const char* x, int64_t at, int64_t g, float& low, float& high) {
  vs lows = 0x7FFF - vs{}, highs = ~lows;
  for (int64_t c = 0; c < g; c += 2 * W) {
    fetch(x, at + c, 2 * W);
    vs v = load<vs>(x + 2 * (at + c));
    v ^= v >> 15 & 0x7FFF;
    lows = v < lows ? v : lows, highs = v > highs ? v : highs;
  }
  low = end(lows, true), high = end(highs, false);
}
#else
// The lanes from n on, and those before.
INLINE vf turned(vf v, int n) {
#if W == 16
#define EACH(n) n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8, n + 9, n + 10, n + 11, n + 12, n + 13, n + 14, n + 15
  if (n == 8) return __builtin_shufflevector(v, v, EACH(8));
#else
#define EACH(n) n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7
#endif
  if (n == 4) return __builtin_shufflevector(v, v, EACH(4));
  if (n == 2) return __builtin_shufflevector(v, v, EACH(2));
  return __builtin_shufflevector(v, v, EACH(1));
}

INLINE void ends(const char* x, int64_t at, int64_t g, float& low, float& high) {
  vf least[2], most[2];
  UNROLL for (int i = 0; i < 2; i++) least[i] = most[i] = floats(x, at + i * W, FROM);
  for (int64_t c = 0; c < g; c += 2 * W) {
    fetch(x, at + c, 2 * W);
    UNROLL for (int i = 0; i < 2; i++) {
      vf v = floats(x, at + c + i * W, FROM);
      least[i] = smaller(least[i], v), most[i] = larger(most[i], v);
    }
  }
  vf lows = smaller(least[0], least[1]), highs = larger(most[0], most[1]);
  UNROLL for (int width = W / 2; width; width /= 2) {
    lows = smaller(lows, turned(lows, width)), highs = larger(highs, turned(highs, width));
  }
  low = lows[0], high = highs[0];
}
#endif

// The ends of each block of g numbers: row 2 i of `out` has the smallest of the blocks of row i, row 2 i + 1 the largest.
extern "C" void ao_ends(const char* x, float* out, int64_t rows, int64_t groups, int64_t g, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t group = 0; group < groups; group++)
      ends(x, (row * groups + group) * g, g, out[2 * row * groups + group], out[(2 * row + 1) * groups + group]);
}


extern "C" void ao_codes(const char* x, const float* const* reads, uint8_t* out, int64_t blocks, int64_t g, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) {
    vf r[READS];
    UNROLL for (int i = 0; i < READS; i++) r[i] = same(reads[i][block]);
    for (int64_t c = 0; c < g; c += 32) {
      fetch(x, block * g + c, 32);
      vi q[32 / W];
      UNROLL for (int i = 0; i < 32 / W; i++) coded(floats(x, block * g + c + i * W, FROM), r, q[i]);
      pack(out + (block * g + c) / 8 * BITS, q);
    }
  }
}
"""


class Coder:
    """The compiled passes of one Spec and dtype. `library` is None until it is there."""

    def __init__(self, element: Element, dtype: torch.dtype) -> None:
        self.element, self.dtype = element, dtype
        self.library: Any = None
        self.seen = 0
        self.thread: threading.Thread | None = None

    def ready(self, x: Tensor) -> bool:
        """Whether it can quantize `x` now."""
        if self.library is None and self.thread is None:
            self.seen += x.numel()
            if self.seen > WORTH:
                text = self._source()
                self.thread = threading.Thread(target=self._compile, args=(text,))
                self.thread.start()
        return self.library is not None

    def _source(self) -> str:
        element = self.element
        count = element.code.__code__.co_argcount - 1
        printed = cpp_function("code", element.code, [torch.float32] * (1 + count))
        given = ", ".join(f"r[{i}]" for i in range(count))
        return "".join(
            [
                CPP_VECTORS,
                printed,
                f"#define BITS {element.bits}\n#define READS {count}\n#define FROM {_DTYPES[self.dtype]}\n",
                f"INLINE void coded(vf x, const vf* r, vi& q) {{ code(x, {given}, q); }}\n",
                _SOURCE,
            ]
        )

    def _compile(self, text: str) -> None:
        library = cpp_library(text, (*cpp_instructions(), "-ffp-contract=off", "-fwrapv", "-fno-math-errno"))
        if library is not None:
            pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
            library.ao_ends.argtypes = [pointer, pointer, long, long, long, integer]
            library.ao_codes.argtypes = [pointer, ctypes.POINTER(pointer), pointer, long, long, integer]
            library.ao_ends.restype = library.ao_codes.restype = None
            self.library = library

    def quantize(self, spec: Any, x: Tensor, grid: tuple[int, ...], qdata: Tensor) -> dict[str, Tensor | None]:
        """Write the codes to `qdata`; returns the other fields. x: (N, K), contiguous. grid: (N, K / g)."""
        (n, k), groups, threads = x.shape, grid[1], torch.get_num_threads()
        g = k // groups
        ends = x.new_empty(2 * n, groups, dtype=torch.float32)
        self.library.ao_ends(x.data_ptr(), ends.data_ptr(), n, groups, g, threads)
        qparams = spec.choose_qparams(ends, grid)
        reads = [t.float().expand(grid).contiguous() for t in self.element.reads(**qparams)]
        where = (ctypes.c_void_p * len(reads))(*(t.data_ptr() for t in reads))
        self.library.ao_codes(x.data_ptr(), where, qdata.data_ptr(), n * groups, g, threads)
        return self.element.fields(**qparams)


_coders: dict[Any, Coder | None] = {}


def coder(spec: Any, x: Tensor, grid: Sequence[int]) -> Coder | None:
    """The passes for rows of `x` in `grid` blocks; None where there are none."""
    if (
        x.device.type != "cpu"
        or x.dim() != 2
        or x.dtype not in _DTYPES
        or not x.is_contiguous()
        or cpp_compiler() is None
    ):
        return None
    (n, k), (rows, groups) = x.shape, grid
    if rows != n or (k // groups) % 32:
        return None
    key = (spec, x.dtype)
    if key not in _coders:
        element = spec.element()
        _coders[key] = None if element is None else Coder(element, x.dtype)
    return _coders[key]
