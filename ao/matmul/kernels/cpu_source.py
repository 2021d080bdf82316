"""The C++ of a product on a CPU: an activation and packed codes that are decoded in registers, for any shape and any M.

One source serves every format: macros say what a code is (KIND, BITS, EXPONENT), and all else, shapes, groups, dtypes of scale
and zero point, is an argument. A compiler needs a second for it, where one that gets an expression per shape needs many for each.

Vectors are those of GCC and Clang (`vector_size`), so that the same text runs on any CPU; instructions are named only where the
compiler finds none, to widen bytes and to look up a small table. There are two loops:

- `few`, up to four tokens: a chunk of 32 elements is decoded into registers and multiplied with all tokens. It reads the
  weight once, and stores nothing.
- `tiles`, for more: three rows are decoded into the first-level cache, a thousand elements at a time, and multiplied in tiles
  of three rows and four tokens, whose sums stay in registers.

`rows` decodes rows into memory, for a product of PyTorch's.
"""

SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// What a code is.
#define UNSIGNED 0
#define SIGNED 1
#define E4M3 2
#define E5M2 3
#define TABLE 4
#define MINIFLOAT 5

#if defined(__AVX512F__)
#define W 16
#else
#define W 8
#endif
#define PER_HALF (16 / W)
#define PER_CHUNK (32 / W)

typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint8_t u8x16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t u16x8 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint32_t u32x4 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint64_t u64x2 __attribute__((vector_size(16), aligned(1), may_alias));

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

template <class T> INLINE T load(const void* p) { T t; memcpy(&t, p, sizeof(T)); return t; }
INLINE vf same(float f) { return f - vf{}; }

// 16 bytes as 32-bit integers.
INLINE void widen(u8x16 c, vi* out) {
  const bool is_signed = KIND == SIGNED || KIND == E4M3 || KIND == E5M2;
#if defined(__AVX512F__)
  out[0] = (vi)(is_signed ? _mm512_cvtepi8_epi32((__m128i)c) : _mm512_cvtepu8_epi32((__m128i)c));
#elif defined(__AVX2__)
  __m128i low = (__m128i)c, high = _mm_unpackhi_epi64(low, low);
  out[0] = (vi)(is_signed ? _mm256_cvtepi8_epi32(low) : _mm256_cvtepu8_epi32(low));
  out[1] = (vi)(is_signed ? _mm256_cvtepi8_epi32(high) : _mm256_cvtepu8_epi32(high));
#else
  for (int i = 0; i < 16; i++) out[i / W][i % W] = is_signed ? (int32_t)(int8_t)c[i] : (int32_t)c[i];
#endif
}

// What codes stand for before zero point and scale.
INLINE vf value(vi q, const float* table) {
  if (KIND == UNSIGNED || KIND == SIGNED) return __builtin_convertvector(q, vf);
  if (KIND == E4M3 || KIND == E5M2) {
    // Sign, exponent and mantissa to their places in a float32, whose exponent has more bits and another bias.
    const int shift = KIND == E4M3 ? 20 : 21;
    const float bias = KIND == E4M3 ? 0x1p120f : 0x1p112f;
    return (vf)((q << shift) & (int32_t)(0x80000000u | (0x7Fu << shift))) * bias;
  }
  if (KIND == MINIFLOAT) {
    // The bits of the magnitude to their places, then a power of two for the difference of the biases.
    vf size = (vf)((q & ((1 << (BITS - 1)) - 1)) << (24 - BITS + EXPONENT)) * BIAS;
    return (vf)((vi)size | ((q >> (BITS - 1)) << 31));
  }
#if defined(__AVX512F__)
  if (BITS <= 4) return (vf)_mm512_permutexvar_ps((__m512i)q, _mm512_loadu_ps(table));
  return (vf)_mm512_i32gather_ps((__m512i)q, table, 4);
#elif defined(__AVX2__)
  if (BITS <= 4) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)q);
    if (BITS < 4) return (vf)low;
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)q);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(q << 28));
  }
  return (vf)_mm256_i32gather_ps(table, (__m256i)q, 4);
#else
  vf out;
  UNROLL for (int i = 0; i < W; i++) out[i] = table[q[i]];
  return out;
#endif
}

INLINE u8x16 field(u8x16 bytes, int shift, int size, int start) {
  u16x8 codes = ((u16x8)bytes >> shift) & (uint16_t)(0x0101 * ((1 << size) - 1));
  return (u8x16)(codes << start);
}

// A chunk: 32 codes in 4 * BITS bytes, planar (bits.py). out: PER_CHUNK vectors, in the order of the elements.
INLINE void decode(const uint8_t* p, const float* table, vf* out) {
  vi q[PER_CHUNK];
  if (BITS == 8) {
    widen(load<u8x16>(p), q);
    widen(load<u8x16>(p + 16), q + PER_HALF);
  } else {
    // Of each section 16 bytes, of which the low nibbles belong to the first half of the chunk and the high ones to the second.
    u8x16 four = {}, two = {}, one = {};
    const int b4 = BITS & 4, b2 = BITS & 2, b1 = BITS & 1;
    if (b4) four = load<u8x16>(p);
    if (b2) {
      uint64_t v = load<uint64_t>(p + 4 * b4);
      two = (u8x16)(u64x2{v, v} >> u64x2{0, 2});
    }
    if (b1) {
      uint32_t v = load<uint32_t>(p + 4 * (b4 + b2));
      one = (u8x16)(u32x4{v, v, v, v} >> u32x4{0, 1, 2, 3});
    }
    UNROLL for (int half = 0; half < 2; half++) {
      u8x16 codes = {};
      if (b4) codes = field(four, 4 * half, 4, 0);
      if (b2) codes |= field(two, 4 * half, 2, b4);
      if (b1) codes |= field(one, 4 * half, 1, b4 + b2);
      widen(codes, q + half * PER_HALF);
    }
  }
  UNROLL for (int i = 0; i < PER_CHUNK; i++) out[i] = value(q[i], table);
}

INLINE float sum(vf v) {
  float s[W], total = 0;
  memcpy(s, &v, sizeof(v));
  for (int width = W / 2; width; width /= 2) UNROLL for (int i = 0; i < width; i++) s[i] += s[i + width];
  return total + s[0];
}

// dtypes of arguments
#define F32 0
#define BF16 1
#define I8 2
#define U8 3

INLINE float bf16(uint16_t h) { uint32_t w = (uint32_t)h << 16; return load<float>(&w); }
INLINE uint16_t to_bf16(float f) {
  uint32_t w = load<uint32_t>(&f);
  if ((w & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(w >> 16 | 0x40);
  return (uint16_t)((w + 0x7FFF + (w >> 16 & 1)) >> 16);
}
static void to_floats(const void* p, int64_t start, int64_t n, int dtype, float* out) {
  switch (dtype) {
    case F32: memcpy(out, (const float*)p + start, n * sizeof(float)); break;
    case BF16: for (int64_t i = 0; i < n; i++) out[i] = bf16(((const uint16_t*)p)[start + i]); break;
    case I8: for (int64_t i = 0; i < n; i++) out[i] = ((const int8_t*)p)[start + i]; break;
    default: for (int64_t i = 0; i < n; i++) out[i] = ((const uint8_t*)p)[start + i];
  }
}

// A weight (n, k). scale, zero: (n or 1, groups), scale_rows and zero_rows of them; groups of 16 elements or of whole chunks.
struct Weight {
  const uint8_t* codes;
  const void* scale;
  const void* zero;
  const float* table;
  int64_t n, k, row_bytes, groups, scale_rows, zero_rows;
  int32_t scale_dtype, zero_dtype;
  float offset;
  int32_t shifted;  // there is a zero point or an offset
};

// Scale, and what is added to code * scale, of each group of a row.
struct Row {
  float *scale, *shift;
  int64_t last_scale, last_zero;
};

static void read_row(const Weight& w, int64_t n, Row& row) {
  int64_t s = w.scale_rows > 1 ? n : 0, z = w.zero_rows > 1 ? n : 0;
  if (s == row.last_scale && z == row.last_zero) return;
  to_floats(w.scale, s * w.groups, w.groups, w.scale_dtype, row.scale);
  if (w.shifted) {
    if (w.zero) to_floats(w.zero, z * w.groups, w.groups, w.zero_dtype, row.shift);
    else memset(row.shift, 0, w.groups * sizeof(float));
    for (int64_t i = 0; i < w.groups; i++) row.shift[i] = -(row.shift[i] + w.offset) * row.scale[i];
  }
  row.last_scale = s;
  row.last_zero = z;
}

INLINE float* floats(int64_t n) { return (float*)aligned_alloc(64, (n * sizeof(float) + 127) / 64 * 64); }

// A thread's memory.
struct Scratch {
  Row row;
  float* buffer;
  Scratch(const Weight& w, int64_t more) {
    float* p = buffer = floats(2 * w.groups + 16 + more);
    row = Row{p, p + w.groups, -1, -1};
  }
  ~Scratch() { free(buffer); }
  float* rest(const Weight& w) { return buffer + (2 * w.groups + 15) / 16 * 16; }
};

// A chunk times T tokens, added to the sums of its first and of its second half. a, b: their scales.
template <int T>
INLINE void step(const uint8_t* p, const float* table, vf a, vf b, const float* x, int64_t k, vf* first, vf* second) {
  vf d[PER_CHUNK];
  decode(p, table, d);
  if (T == 1) {
    const vf* xs = (const vf*)x;
    vf u = d[0] * xs[0], v = d[PER_HALF] * xs[PER_HALF];
    UNROLL for (int i = 1; i < PER_HALF; i++) u += d[i] * xs[i];
    UNROLL for (int i = PER_HALF + 1; i < PER_CHUNK; i++) v += d[i] * xs[i];
    first[0] += u * a;
    second[0] += v * b;
    return;
  }
  UNROLL for (int i = 0; i < PER_CHUNK; i++) d[i] *= i < PER_HALF ? a : b;
  UNROLL for (int t = 0; t < T; t++) {
    const vf* xs = (const vf*)(x + t * k);
    UNROLL for (int i = 0; i < PER_HALF; i++) first[t] += d[i] * xs[i];
    UNROLL for (int i = PER_HALF; i < PER_CHUNK; i++) second[t] += d[i] * xs[i];
  }
}

// One row, T tokens. sums: of each group of the tokens.
template <int T> INLINE void few(const Weight& w, int64_t n, const Row& row, const float* x, const float* sums, float* y) {
  const uint8_t* p = w.codes + n * w.row_bytes;
  const int64_t k = w.k, each = k / 32 / w.groups;
  const float* table = w.table;
  vf first[T] = {}, second[T] = {};
  if (each) {
    for (int64_t g = 0; g < w.groups; g++) {
      vf a = same(row.scale[g]);
      for (int64_t c = 0; c < each; c++, p += 4 * BITS, x += 32) step<T>(p, table, a, a, x, k, first, second);
    }
  } else {
    for (int64_t g = 0; g < w.groups; g += 2, p += 4 * BITS, x += 32)
      step<T>(p, table, same(row.scale[g]), same(row.scale[g + 1]), x, k, first, second);
  }
  UNROLL for (int t = 0; t < T; t++) y[t] = sum(first[t] + second[t]);
  if (!w.shifted) return;
  UNROLL for (int t = 0; t < T; t++) {
    vf total = {};
    const float* of = sums + t * w.groups;
    int64_t g = 0;
    for (; g + W <= w.groups; g += W) total += *(const vf*)(row.shift + g) * *(const vf*)(of + g);
    y[t] += sum(total);
    for (; g < w.groups; g++) y[t] += row.shift[g] * of[g];
  }
}

// Elements [start, stop) of a row, in full.
INLINE void dense(const Weight& w, int64_t n, const Row& row, int64_t start, int64_t stop, float* out) {
  const int64_t group = w.k / w.groups;
  const uint8_t* p = w.codes + n * w.row_bytes + start / 8 * BITS;
  int64_t g = start / group, end = (g + 1) * group;
  const int64_t next = group < 32;
  vf s[2] = {}, z[2] = {};
  bool fresh = true;
  for (int64_t at = start; at < stop; at += 32, p += 4 * BITS, out += 32) {
    if (at >= end) { g += next + 1; end += (next + 1) * group; fresh = true; }
    if (fresh) {
      s[0] = same(row.scale[g]), s[1] = same(row.scale[g + next]);
      if (w.shifted) z[0] = same(row.shift[g]), z[1] = same(row.shift[g + next]);
      fresh = false;
    }
    vf d[PER_CHUNK];
    decode(p, w.table, d);
    UNROLL for (int i = 0; i < PER_CHUNK; i++) ((vf*)out)[i] = d[i] * s[i / PER_HALF] + z[i / PER_HALF];
  }
}

#define STEP 1024

template <int R, int T> INLINE void tile(const float* w, const float* x, int64_t k, int64_t len, vf* sums) {
  vf s[T][R];
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int r = 0; r < R; r++) s[t][r] = sums[t * R + r];
  for (int64_t i = 0; i < len; i += W) {
    vf a[R];
    UNROLL for (int r = 0; r < R; r++) a[r] = *(const vf*)(w + r * STEP + i);
    UNROLL for (int t = 0; t < T; t++) {
      vf b = *(const vf*)(x + t * k + i);
      UNROLL for (int r = 0; r < R; r++) s[t][r] += a[r] * b;
    }
  }
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int r = 0; r < R; r++) sums[t * R + r] = s[t][r];
}

// R rows from n on, M tokens. scratch: M * R vectors and R * STEP floats.
template <int R>
INLINE void tiles(const Weight& w, int64_t n, Row& row, const float* x, int64_t m, float* scratch, float* y, int64_t stride) {
  vf* sums = (vf*)scratch;
  float* decoded = scratch + m * R * W;
  memset(scratch, 0, m * R * sizeof(vf));
  for (int64_t start = 0; start < w.k; start += STEP) {
    int64_t stop = start + STEP < w.k ? start + STEP : w.k;
    UNROLL for (int r = 0; r < R; r++) {
      read_row(w, n + r, row);
      dense(w, n + r, row, start, stop, decoded + r * STEP);
    }
    int64_t t = 0;
    for (; t + 4 <= m; t += 4) tile<R, 4>(decoded, x + t * w.k + start, w.k, stop - start, sums + t * R);
    for (; t < m; t++) tile<R, 1>(decoded, x + t * w.k + start, w.k, stop - start, sums + t * R);
  }
  for (int64_t t = 0; t < m; t++) UNROLL for (int r = 0; r < R; r++) y[t * stride + r] = sum(sums[t * R + r]);
}

INLINE void store(float f, void* y, int64_t i, int dtype) {
  if (dtype == F32) ((float*)y)[i] = f; else ((uint16_t*)y)[i] = to_bf16(f);
}

// y (m, n) = x (m, k) @ w.T; x and y of one dtype, F32 or BF16.
extern "C" void ao_product(const Weight* weight, const void* x, void* y, int64_t m, int32_t dtype, int32_t threads) {
  const Weight w = *weight;
  float* own = dtype == F32 ? 0 : floats(m * w.k);
  if (own) to_floats(x, 0, m * w.k, dtype, own);
  const float* rows = own ? own : (const float*)x;
  float* sums = 0;
  if (w.shifted && m <= 4) {
    const int64_t group = w.k / w.groups;
    sums = floats(m * w.groups);
    for (int64_t g = 0; g < m * w.groups; g++) {
      vf total = {};
      for (int64_t i = 0; i < group; i += W) total += *(const vf*)(rows + g * group + i);
      sums[g] = sum(total);
    }
  }
  const int64_t block = m <= 4 ? 8 : 3, blocks = (w.n + block - 1) / block;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch(w, m <= 4 ? 0 : 3 * (m * W + STEP + m) + 64);
    float* rest = scratch.rest(w);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t n = b * block, end = n + block < w.n ? n + block : w.n;
      if (m <= 4) {
        for (; n < end; n++) {
          read_row(w, n, scratch.row);
          float out[4];
          switch (m) {
            case 1: few<1>(w, n, scratch.row, rows, sums, out); break;
            case 2: few<2>(w, n, scratch.row, rows, sums, out); break;
            case 3: few<3>(w, n, scratch.row, rows, sums, out); break;
            default: few<4>(w, n, scratch.row, rows, sums, out);
          }
          for (int64_t t = 0; t < m; t++) store(out[t], y, t * w.n + n, dtype);
        }
      } else {
        float* out = rest + 3 * (m * W + STEP);
        if (end - n == 3) {
          tiles<3>(w, n, scratch.row, rows, m, rest, out, 3);
          for (int64_t t = 0; t < m; t++) UNROLL for (int r = 0; r < 3; r++) store(out[t * 3 + r], y, t * w.n + n + r, dtype);
        } else {
          for (; n < end; n++) {
            tiles<1>(w, n, scratch.row, rows, m, rest, out, 1);
            for (int64_t t = 0; t < m; t++) store(out[t], y, t * w.n + n, dtype);
          }
        }
      }
    }
  }
  free(own);
  free(sums);
}

// Rows [start, stop) of the weight as (stop - start, k) of a dtype, F32 or BF16.
extern "C" void ao_rows(const Weight* weight, int64_t start, int64_t stop, void* out, int32_t dtype, int32_t threads) {
  const Weight w = *weight;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch(w, STEP);
    float* rest = scratch.rest(w);
#pragma omp for schedule(static)
    for (int64_t n = start; n < stop; n++) {
      read_row(w, n, scratch.row);
      int64_t at = (n - start) * w.k;
      if (dtype == F32) {
        dense(w, n, scratch.row, 0, w.k, (float*)out + at);
        continue;
      }
      for (int64_t from = 0; from < w.k; from += STEP) {
        int64_t to = from + STEP < w.k ? from + STEP : w.k;
        dense(w, n, scratch.row, from, to, rest);
        for (int64_t i = 0; i < to - from; i++) ((uint16_t*)out)[at + from + i] = to_bf16(rest[i]);
      }
    }
  }
}
"""
