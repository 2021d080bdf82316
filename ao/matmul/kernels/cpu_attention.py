"""Attention to quantized keys and values on a CPU: its C++, compiled once per kind of code. One call gives the scores of all
heads, and one their softmax and the sum of values.

Codes have one scale per position, so a score is a product with codes, times a number; and the sum of values is one of codes, each
times the probability of its position and its scale. Heads that share keys are rows of one product, up to eight of them at a time.
Threads share pieces of positions, each with its own largest score (softmax_pieces.py), which are put together at the end.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

from .built import Kind, functions
from .cpu_source import READING

SOURCE = (
    READING
    + r"""
// Keys or values (batch, heads, positions, width). zero: of the dtype and the strides of its own, or null.
struct Heads {
  const uint8_t* codes;
  const void *scale, *zero;
  int64_t batch, heads, width, row_bytes;
  int64_t batch_bytes, head_bytes;      // from one to the next, of the codes
  int64_t batch_numbers, head_numbers;  // likewise, of scales and zero points
  int32_t scale_dtype, zero_dtype;
};

#define PIECE 2048  // positions of a task
#define SPAN 64     // positions whose scales and probabilities are at hand at a time

// The positions [start, stop) of one head.
struct Task {
  const uint8_t* codes;
  int64_t number, start, stop;
};

INLINE int64_t pieces(int64_t begin, int64_t end) { return (end - begin + PIECE - 1) / PIECE; }

INLINE Task task_of(const Heads& a, int64_t i, int64_t begin, int64_t end) {
  const int64_t each = pieces(begin, end), head = i / each, b = head / a.heads, h = head % a.heads;
  const int64_t start = begin + i % each * PIECE, stop = start + PIECE < end ? start + PIECE : end;
  return {a.codes + b * a.batch_bytes + h * a.head_bytes, b * a.batch_numbers + h * a.head_numbers, start, stop};
}

// Lane j becomes the sum of the j-th of W vectors, whose number is halved as each takes in another.
#if W == 16
template <int HALF> INLINE void fold(vf* v) {
  vi from;
  uint16_t second = 0;
  UNROLL for (int j = 0; j < W; j++) {
    from[j] = j & HALF ? W + j - HALF : j + HALF;
    if (j & HALF) second |= 1 << j;
  }
  UNROLL for (int i = 0; i < HALF; i++) {
    __m512 a = (__m512)v[i], b = (__m512)v[i + HALF];
    v[i] = (vf)_mm512_mask_blend_ps(second, a, b) + (vf)_mm512_permutex2var_ps(a, (__m512i)from, b);
  }
}
#endif

INLINE vf sums(vf* v) {
#if W == 16
  fold<8>(v), fold<4>(v), fold<2>(v), fold<1>(v);
  return v[0];
#elif defined(__AVX2__)
  __m256 four[2];
  UNROLL for (int i = 0; i < 2; i++)
    four[i] = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[4 * i], (__m256)v[4 * i + 1]),
                             _mm256_hadd_ps((__m256)v[4 * i + 2], (__m256)v[4 * i + 3]));
  return (vf)_mm256_blend_ps(four[0], four[1], 0xF0) + (vf)_mm256_permute2f128_ps(four[0], four[1], 0x21);
#else
  vf out;
  for (int i = 0; i < W; i++) out[i] = sum(v[i]);
  return out;
#endif
}

// T rows of x times the codes of `count` positions, into T rows of SPAN.
template <int T>
INLINE void products(const uint8_t* codes, int64_t row_bytes, int64_t width, int64_t count, const Table& table, const float* x,
                     float* out) {
  const int P = W / T;
  for (int64_t p = 0; p < count; p += P) {
    const uint8_t* row[P];
    UNROLL for (int i = 0; i < P; i++) row[i] = codes + (p + i < count ? p + i : count - 1) * row_bytes;
    vf total[W] = {};
    for (int64_t c = 0; c < width / 32; c++) {
      UNROLL for (int i = 0; i < P; i++) {
        const uint8_t* from = row[i] + c * 4 * BITS;
        __builtin_prefetch(from + AHEAD);
        vf d[PER_CHUNK];
        decode(from, table, d);
        UNROLL for (int t = 0; t < T; t++) UNROLL for (int j = 0; j < PER_CHUNK; j++)
          total[t * P + i] += d[j] * ((const vf*)(x + t * width + c * 32))[j];
      }
    }
    vf got = sums(total);
    UNROLL for (int t = 0; t < T; t++) memcpy(out + t * SPAN + p, (const float*)&got + t * P, 4 * P);
  }
}

// q (batch, heads, rows, width) of a dtype -> scores (batch, heads, rows, end - begin): q k^T times `factor`.
extern "C" void ao_scores(const Heads* keys, const void* q, int32_t q_dtype, float factor, int64_t rows, int64_t begin,
                          int64_t end, float* scores, int32_t threads) {
  const Heads k = *keys;
  const int64_t each = pieces(begin, end), heads = k.batch * k.heads, lines = (rows + 7) / 8 * 8, size = lines * k.width;
  float* x = floats(heads * size);  // of each head the rows, and such as fill up eight
  float* q_sums = floats(heads * rows);
  memset(x, 0, heads * size * sizeof(float));
  for (int64_t i = 0; i < heads * rows; i++) {
    float* row = x + i / rows * size + i % rows * k.width;
    to_floats(q, i * k.width, k.width, q_dtype, row);
    q_sums[i] = 0;
    for (int64_t j = 0; j < k.width; j++) {
      row[j] *= factor;
      q_sums[i] += row[j];
    }
    for (int64_t j = 0; j < k.width; j += 32) arrange(row + j);
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < heads * each; i++) {
    const Table table = table_of(0);
    const Task task = task_of(k, i, begin, end);
    const int64_t head = i / each, first = head * rows;
    for (int64_t at = task.start; at < task.stop; at += SPAN) {
      const int64_t n = task.stop - at < SPAN ? task.stop - at : SPAN;
      const uint8_t* codes = task.codes + at * k.row_bytes;
      float scale[SPAN], zero[SPAN] = {}, raw[8 * SPAN];
      to_floats(k.scale, task.number + at, n, k.scale_dtype, scale);
      if (k.zero) to_floats(k.zero, task.number + at, n, k.zero_dtype, zero);
      for (int64_t r = 0, some; r < rows; r += some) {
        some = rows - r >= 6 ? 8 : rows - r >= 3 ? 4 : 1;
        const float* from = x + head * size + r * k.width;
        if (some == 8) products<8>(codes, k.row_bytes, k.width, n, table, from, raw);
        else if (some == 4) products<4>(codes, k.row_bytes, k.width, n, table, from, raw);
        else products<1>(codes, k.row_bytes, k.width, n, table, from, raw);
        for (int64_t t = 0; t < some && r + t < rows; t++) {
          float* to = scores + (first + r + t) * (end - begin) + at - begin;
          const float of_row = q_sums[first + r + t], *of_codes = raw + t * SPAN;
          for (int64_t p = 0; p < n; p++) to[p] = (of_codes[p] - zero[p] * of_row) * scale[p];
        }
      }
    }
  }
  free(x);
  free(q_sums);
}

// exp(x) of x <= 0: 2**n exp(f) with x = n log(2) + f. Of what is below float32's normal numbers it is 0.
INLINE vf exp_of(vf x) {
  const vf n = x * 0x1.715476p0f + 0x1.8p23f - 0x1.8p23f, f = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  vf series = same(1 / 720.0f);
  const float factors[] = {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1, 1};
  UNROLL for (int i = 0; i < 6; i++) series = series * f + factors[i];
  const vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
  return (vf)((vi)(series * power) & ~(vi)(x < -87.0f));
}

// The 32 columns from `codes` on, of `count` positions, each times its weight, added to T rows of `out`. weights: (T, SPAN).
template <int T>
INLINE void weighted(const uint8_t* codes, int64_t row_bytes, int64_t width, int64_t count, const Table& table,
                     const float* weights, float* out) {
  vf total[T][PER_CHUNK];
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int j = 0; j < PER_CHUNK; j++) total[t][j] = ((vf*)(out + t * width))[j];
  for (int64_t p = 0; p < count; p++, codes += row_bytes) {
    vf d[PER_CHUNK];
    __builtin_prefetch(codes + AHEAD);
    decode(codes, table, d);
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int j = 0; j < PER_CHUNK; j++) total[t][j] += d[j] * weights[t * SPAN + p];
  }
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int j = 0; j < PER_CHUNK; j++) ((vf*)(out + t * width))[j] = total[t][j];
}

INLINE float exp_of(float x) { return exp_of(same(x))[0]; }
INLINE float finite(float top) { return top == -__builtin_inff() ? 0 : top; }  // of a row that sees nothing

// Of the scores of a row the largest. What is no number is passed over.
INLINE float largest(const float* scores, int64_t count) {
  vf top = same(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const vf s = *(const vf*)(scores + i);
    const vi more = (vi)(s > top);
    top = (vf)(((vi)s & more) | ((vi)top & ~more));
  }
  float found = top[0];
  for (int j = 1; j < W; j++) found = top[j] > found ? top[j] : found;
  for (; i < count; i++) found = scores[i] > found ? scores[i] : found;
  return found;
}

// The softmax of scores (batch, heads, rows, end - begin) times values -> out (batch, heads, rows, width), F32 or BF16, and the
// logarithm of the sum of exp, (batch, heads, rows). sinks (heads, rows): a score more, of no value; or null.
extern "C" void ao_values(const Heads* values, const float* scores, const float* sinks, int64_t rows, int64_t begin, int64_t end,
                          void* out, int32_t dtype, float* logs, int32_t threads) {
  const Heads v = *values;
  const int64_t heads = v.batch * v.heads, each = pieces(begin, end), lines = (rows + 7) / 8 * 8;
  // Of each piece the sums of values (lines, width), and the largest score, the total and the shift of each of `lines`.
  const int64_t size = lines * (v.width + 3);
  float* found = floats(heads * each * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < heads * each; i++) {
    const Table table = table_of(0);
    const Task task = task_of(v, i, begin, end);
    float *sum_of = found + i * size, *top = sum_of + lines * v.width, *total = top + lines, *shift = total + lines;
    float* weights = floats(lines * SPAN);
    memset(sum_of, 0, size * sizeof(float));
    memset(weights, 0, lines * SPAN * sizeof(float));
    const float* from = scores + i / each * rows * (end - begin) + task.start - begin;
    for (int64_t r = 0; r < rows; r++) top[r] = largest(from + r * (end - begin), task.stop - task.start);
    for (int64_t at = task.start; at < task.stop; at += SPAN) {
      const int64_t n = task.stop - at < SPAN ? task.stop - at : SPAN;
      const uint8_t* codes = task.codes + at * v.row_bytes;
      float scale[SPAN] = {}, zero[SPAN] = {};
      to_floats(v.scale, task.number + at, n, v.scale_dtype, scale);
      if (v.zero) to_floats(v.zero, task.number + at, n, v.zero_dtype, zero);
      for (int64_t r = 0; r < rows; r++) {
        float s[SPAN];
        for (int64_t p = n; p < SPAN; p++) s[p] = -__builtin_inff();
        memcpy(s, from + r * (end - begin) + at - task.start, n * sizeof(float));
        const float base = finite(top[r]);
        vf of_total = {}, of_shift = {};
        for (int64_t p = 0; p < SPAN; p += W) {
          const vf e = exp_of(*(const vf*)(s + p) - base), weight = e * *(const vf*)(scale + p);
          *(vf*)(weights + r * SPAN + p) = weight;
          of_total += e, of_shift += weight * *(const vf*)(zero + p);
        }
        total[r] += sum(of_total);
        shift[r] += sum(of_shift);
      }
      const int T = W / 4;  // so that the sums stay in registers
      for (int64_t c = 0; c < v.width; c += 32, codes += 4 * BITS) {
        for (int64_t r = 0, some; r < rows; r += some) {
          some = rows - r > T ? 2 * T : rows - r > 1 ? T : 1;
          float* to = sum_of + r * v.width + c;
          if (some == 2 * T) weighted<2 * T>(codes, v.row_bytes, v.width, n, table, weights + r * SPAN, to);
          else if (some == T) weighted<T>(codes, v.row_bytes, v.width, n, table, weights + r * SPAN, to);
          else weighted<1>(codes, v.row_bytes, v.width, n, table, weights + r * SPAN, to);
        }
      }
    }
    free(weights);
  }
  // All pieces as if they had the largest score in common.
  float* row = floats(v.width);
  for (int64_t i = 0; i < heads * rows; i++) {
    const int64_t r = i % rows;
    const float* first = found + i / rows * each * size;
    const float* of_lines = first + lines * v.width + r;
    const float sink = sinks ? sinks[i % (v.heads * rows)] : -__builtin_inff();
    float top = sink;
    for (int64_t p = 0; p < each; p++) top = of_lines[p * size] > top ? of_lines[p * size] : top;
    top = finite(top);
    float total = exp_of(sink - top), shift = 0;
    memset(row, 0, v.width * sizeof(float));
    for (int64_t p = 0; p < each; p++) {
      const float *of_piece = of_lines + p * size, factor = exp_of(of_piece[0] - top);
      total += factor * of_piece[lines];
      for (int64_t c = 0; c < v.width; c++) row[c] += factor * first[p * size + r * v.width + c];
      shift += factor * of_piece[2 * lines];
    }
    for (int64_t c = 0; c < v.width; c++) {
      // In the order that vectors hold them.
      const int64_t in = c % 32, from = W == 16 ? in : in % 4 + in / 16 * 4 + in % 16 / 4 * 8;
      const float found = total == 0 ? 0 : (row[c - in + from] - shift) / total;
      if (dtype == F32) ((float*)out)[i * v.width + c] = found;
      else ((uint16_t*)out)[i * v.width + c] = to_bf16(found);
    }
    logs[i] = top + __builtin_logf(total);
  }
  free(row);
  free(found);
}
"""
)


_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Heads(ctypes.Structure):
    """`Heads` of the source."""

    _fields_ = [
        *((name, _POINTER) for name in ("codes", "scale", "zero")),
        *((name, _LONG) for name in ("batch", "heads", "width", "row_bytes")),
        *((name, _LONG) for name in ("batch_bytes", "head_bytes", "batch_numbers", "head_numbers")),
        *((name, _INT) for name in ("scale_dtype", "zero_dtype")),
    ]


class Attention(NamedTuple):
    """scores(keys, q, q_dtype, factor, rows, begin, end, scores, threads),
    values(values, scores, sinks, rows, begin, end, out, dtype, logs, threads)."""

    scores: Any
    values: Any


@functools.cache
def attention(kind: Kind) -> Attention | None:
    """The compiled functions, compiled now if no process has done so; None where that fails."""
    heads = ctypes.POINTER(Heads)
    arguments = {
        "ao_scores": [heads, _POINTER, _INT, _FLOAT, _LONG, _LONG, _LONG, _POINTER, _INT],
        "ao_values": [heads, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _INT, _POINTER, _INT],
    }
    found = functions(kind, SOURCE, arguments)
    return None if found is None else Attention(*found)
