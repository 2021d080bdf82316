"""The C++ around PyTorch's product of integers on a CPU: it makes bytes of an activation, and numbers of the sums.

It is compiled once for all shapes, in a third of a second: there is no header of instructions, which alone takes longer. Where a
compiler makes kernels of expressions instead, it makes them for every shape and for every place in a model.

The bits are those of the expressions (`int_mm` and `split` in cpu.py): each operator rounds, and none is fused with the next.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

from ...dtypes.cpp import CPP_TYPES, cpp_instructions, cpp_library
from .cpu_byte_tiles import BYTE_TILES
from .device import tile_instructions

_SOURCE = r"""
#define INLINE_METHOD inline __attribute__((always_inline))
#define NOT_INLINE static __attribute__((noinline))
#include <stdlib.h>
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(W), aligned(1), may_alias));

#define F32 0
#define BF16 1

// Numbers from place i of x on, of which there are n; zeros after them.
INLINE vf numbers(const void* x, int64_t i, int64_t n, int dtype) {
  const char* p = (const char*)x + i * (dtype == F32 ? 4 : 2);
  if (n >= W) return dtype == F32 ? load<vf>(p) : (vf)(__builtin_convertvector(load<vh>(p), vi) << 16);
  vf few = {};
  for (int64_t j = 0; j < n; j++) {
    const uint32_t bits = dtype == F32 ? load<uint32_t>(p + 4 * j) : (uint32_t)load<uint16_t>(p + 2 * j) << 16;
    few[j] = load<float>(&bits);
  }
  return few;
}

template <class T> INLINE void put(void* p, T v, int64_t n) { memcpy(p, &v, n >= W ? sizeof(T) : n * sizeof(v[0])); }

INLINE vf rounded(vf v) { return v + 0x1.8p23f - 0x1.8p23f; }  // half to even, of less than 2**22
INLINE vb bytes_of(vi q) { return __builtin_convertvector(q, vb); }

// The largest magnitude of a token, its bits, which are ordered as magnitudes are with NaN above all, and its ends or 0.
struct Range {
  int32_t most;
  float low, high;
};

static Range range_of(const void* x, int64_t at, int64_t k, int dtype) {
  vi most = {};
  vf low = {}, high = {};
  for (int64_t i = 0; i < k; i += W) {
    const vf v = numbers(x, at + i, k - i, dtype);
    const vi size = (vi)v & 0x7FFFFFFF;
    most = size > most ? size : most;
    low = v < low ? v : low, high = v > high ? v : high;
  }
  Range out = {0, 0, 0};
  for (int i = 0; i < W; i++) {
    out.most = most[i] > out.most ? most[i] : out.most;
    out.low = low[i] < out.low ? low[i] : out.low, out.high = high[i] > out.high ? high[i] : out.high;
  }
  return out;
}

// How an activation becomes bytes.
struct Act {
  int32_t halves;  // 1: two bytes, x = step * (256 * high + low); the rest says nothing then
  int32_t whole;   // one scale for all tokens
  int32_t zero;    // there is a zero point
  float low, high, factor;  // scale = range * factor
};

// How x (m, k), F32 or BF16, becomes bytes. given: the scale, or null.
struct Bytes {
  const Act& act;
  const void* x;
  int64_t m, k;
  const float* given;
  int32_t dtype;
  Range all;  // where there is one scale for all tokens

  Bytes(const Act& act, const void* x, int32_t dtype, int64_t m, int64_t k, const float* given)
      : act(act), x(x), m(m), k(k), given(given), dtype(dtype), all{0, 0, 0} {
    if (act.halves || !act.whole || given) return;
    for (int64_t t = 0; t < m; t++) {
      const Range one = range_of(x, t * k, k, dtype);
      all.most = one.most > all.most ? one.most : all.most;
      all.low = one.low < all.low ? one.low : all.low, all.high = one.high > all.high ? one.high : all.high;
    }
  }

  // Token t: its bytes, or the high and the low ones, its scale and, where there is one, its zero point.
  void token(int64_t t, int8_t* row, int8_t* lower, float* scale, float* zero) const {
    Range range = all;
    if (act.halves || (!act.whole && !given)) range = range_of(x, t * k, k, dtype);
    const float most = load<float>(&range.most);
    if (act.halves) {
      const float step = most / 32512, inverse = 1 / step;
      for (int64_t i = 0; i < k; i += W) {
        const vi q = __builtin_convertvector(rounded(numbers(x, t * k + i, k - i, dtype) * inverse), vi);
        const vi low = ((q + 128) & 255) - 128;
        put(row + i, bytes_of((q - low) >> 8), k - i);
        put(lower + i, bytes_of(low), k - i);
      }
      *scale = step;
      return;
    }
    float s, z = 0;
    if (given) s = given[0];
    else s = (act.zero && range.most <= 0x7F800000 ? range.high - range.low : most) * act.factor;
    const float inverse = (s < 0 ? -s : s) < 0x1p-126f ? 0 : 1 / s;
    if (act.zero) {
      z = act.low - __builtin_rintf(range.low * inverse);
      z = z < act.low ? act.low : z > act.high ? act.high : z;
      *zero = z;
    }
    const vf low = same(act.low - z), high = same(act.high - z);
    for (int64_t i = 0; i < k; i += W) {
      vf v = numbers(x, t * k + i, k - i, dtype) * inverse;
      v = v < low ? low : v;
      v = v > high ? high : v;
      put(row + i, bytes_of(__builtin_convertvector(rounded(v) + z, vi)), k - i);
    }
    *scale = s;
  }
};

// x -> scale (m,), zero (m,) where there is one, and out (rows, k): a row for each token; then, of halves, the low bytes, or,
// with zero points, a row of ones.
extern "C" void ao_bytes(const Act* act, const void* x, int32_t dtype, int64_t m, int64_t k, const float* given, int8_t* out,
                         float* scale, float* zero, int32_t threads) {
  const Bytes bytes(*act, x, dtype, m, k, given);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t t = 0; t < m; t++) bytes.token(t, out + t * k, out + (m + t) * k, scale + t, zero + t);
  if (act->zero && !act->halves) memset(out + m * k, 1, k);
}

// Rounded to bfloat16, to even; NaN stays NaN.
INLINE vh to_bf16(vf x) {
  const vi w = (vi)x, up = (vi)((w + 0x7FFF + (w >> 16 & 1)) >> 16), nan = w >> 16 | 0x40;
  return __builtin_convertvector(x != x ? nan : up, vh);
}

INLINE vi picked(vi a, vi b, vi places) {
#if defined(__clang__)
  vi out;
  UNROLL for (int i = 0; i < W; i++) out[i] = places[i] < W ? a[places[i]] : b[places[i] - W];
  return out;
#else
  return __builtin_shuffle(a, b, places);
#endif
}

// W rows of W integers become their columns: halves of each two rows are exchanged, then quarters, and so on.
INLINE void turn(vi* v) {
  vi lane;
  UNROLL for (int i = 0; i < W; i++) lane[i] = i;
  UNROLL for (int h = W / 2; h; h /= 2) {
    const vi odd = -((lane & h) != 0), keep = lane + odd * (W - h), other = lane + h + odd * (W - h);
    UNROLL for (int i = 0; i < W; i++) {
      if (i & h) continue;
      const vi a = v[i], b = v[i + h];
      v[i] = picked(a, b, keep), v[i + h] = picked(a, b, other);
    }
  }
}

// The columns of W rows of W integers, `stride` apart.
INLINE void columns_of(const int32_t* p, vi* v, int64_t stride = W) {
  UNROLL for (int i = 0; i < W; i++) v[i] = load<vi>(p + i * stride);
  turn(v);
}

// What the sums of a product become.
struct Scaled {
  const Act& act;
  const float *scale, *zero;  // of tokens
  const float* of_rows;       // scales of the weight, (n,) or, `one`, (1,)
  int32_t one, dtype;
  int64_t n;
  void* y;

  INLINE_METHOD vf weight(int64_t at, int64_t left) const { return one ? same(of_rows[0]) : numbers(of_rows, at, left, F32); }

  // Of token t and rows from `at` on, of which there are `left`, whose scales are w. second: the sums of the low bytes, or of the
  // row of ones.
  INLINE_METHOD void put_at(int64_t t, int64_t at, int64_t left, vf w, vi first, vi second) const {
    vf v = __builtin_convertvector(first, vf);
    if (act.halves) {
      v = (v * 256 + __builtin_convertvector(second, vf)) * w * scale[t];
    } else {
      if (act.zero) v -= zero[t] * __builtin_convertvector(second, vf);
      v = v * scale[t] * w;
    }
    if (dtype == F32) put((float*)y + t * n + at, v, left);
    else put((uint16_t*)y + t * n + at, to_bf16(v), left);
  }
};

// One number of each of `left` rows.
INLINE vi column(const int32_t* p, int64_t stride, int64_t left) {
  vi out = {};
  if (left == W) UNROLL for (int i = 0; i < W; i++) out[i] = p[i * stride];
  else for (int i = 0; i < left; i++) out[i] = p[i * stride];
  return out;
}

// Sums (n, rows) of the rows of `ao_bytes` -> y (m, n), F32 or BF16.
extern "C" void ao_scaled(const Act* act, const int32_t* sums, int64_t n, int64_t m, int64_t rows, const float* scale,
                          const float* zero, const float* of_rows, int32_t one, void* y, int32_t dtype, int32_t threads) {
  const Scaled scaled = {*act, scale, zero, of_rows, one, dtype, n, y};
  const bool halves = act->halves;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t start = 0; start < n; start += 2 * W) {  // a line of the cache
    vi ones[2] = {};
    if (act->zero) for (int h = 0; h < 2; h++) {
      const int64_t at = start + h * W, left = n - at < W ? n - at : W;
      if (left > 0) ones[h] = column(sums + at * rows + m, rows, left);
    }
    for (int64_t t = 0; t < m;) {
      const int64_t tokens = t + W <= m && start + 2 * W <= n ? W : 1;
      for (int64_t at = start, h = 0; h < 2 && at < n; at += W, h++) {
        const int32_t* p = sums + at * rows + t;
        if (tokens == W) {
          vi first[W], second[W] = {};
          columns_of(p, first, rows);
          if (halves) columns_of(p + m, second, rows);
          const vf w = scaled.weight(at, W);
          for (int i = 0; i < W; i++) scaled.put_at(t + i, at, W, w, first[i], halves ? second[i] : ones[h]);
        } else {
          const int64_t left = n - at < W ? n - at : W;
          const vf w = scaled.weight(at, left);
          scaled.put_at(t, at, left, w, column(p, rows, left), halves ? column(p + m, rows, left) : ones[h]);
        }
      }
      t += tokens;
    }
  }
}
"""


_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class ByteAct(ctypes.Structure):
    """`Act` of the source."""

    _fields_ = [
        *((name, _INT) for name in ("halves", "whole", "zero")),
        *((name, _FLOAT) for name in ("low", "high", "factor")),
    ]


class Integers(NamedTuple):
    """bytes(act, x, dtype, m, k, given_scale, out, scale, zero, threads),
    scaled(act, sums, n, m, rows, scale, zero, of_rows, one, y, dtype, threads), and where there are units for it
    tiles(act, x, dtype, m, k, given_scale, codes, stride, n, of_rows, one, y, threads)."""

    bytes: Any
    scaled: Any
    tiles: Any


@functools.cache
def integers() -> Integers | None:
    """The compiled functions, compiled now if no process has done so; None where that fails."""
    flags = cpp_instructions()
    flags = *flags, *tile_instructions(flags), "-ffp-contract=off", "-fwrapv", "-fno-math-errno"
    loaded = cpp_library(CPP_TYPES + _SOURCE + BYTE_TILES, flags)
    if loaded is None:
        return None
    act, p, long, i = ctypes.POINTER(ByteAct), _POINTER, _LONG, _INT
    loaded.ao_bytes.argtypes = [act, p, i, long, long, p, p, p, p, i]
    loaded.ao_scaled.argtypes = [act, p, long, long, long, p, p, p, i, p, i, i]
    loaded.ao_bytes.restype = loaded.ao_scaled.restype = None
    tiles = getattr(loaded, "ao_byte_tiles", None)
    if tiles is not None:
        tiles.argtypes, tiles.restype = [act, p, i, long, long, p, p, long, long, p, i, p, i], None
    return Integers(loaded.ao_bytes, loaded.ao_scaled, tiles)
