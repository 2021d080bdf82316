"""The C++ of a product on a CPU: an activation and packed codes that are decoded in registers, for any shape and any M.

One source serves every format: macros say what a code is (KIND, BITS, EXPONENT), and all else, shapes, groups, dtypes of scale
and zero point, is an argument. A compiler needs a second for it, where one that gets an expression per shape needs many for each.

Vectors are those of GCC and Clang (`vector_size`), so that the same text runs on any CPU; instructions are named only where the
compiler finds none, to widen bytes and to look up a small table. There are three loops, two of them in floats:

- `few`, up to four tokens: a chunk of 32 elements is decoded into registers and multiplied with all tokens. It reads the
  weight once, and stores nothing.
- `tiles`, for more: three rows are decoded into the first-level cache, a thousand elements at a time, and multiplied in tiles
  of three rows and four tokens, whose sums stay in registers.
- that of cpu_fixed_point.py, in integers, where the activation's dtype has few bits or it is one or two tokens.

`rows` decodes rows into memory, for a product of PyTorch's, and cpu_tiles.py into tiles, where a CPU multiplies these. `READING`
is what attention (cpu_attention.py) begins with as well.
"""

from ...dtypes.cpp import CPP_LANES
from .cpu_fixed_point import FIXED_POINT
from .cpu_tiles import TILES

_READING = r"""
#include <stdlib.h>

// What a code is.
#define UNSIGNED 0
#define SIGNED 1
#define E4M3 2
#define E5M2 3
#define TABLE 4
#define MINIFLOAT 5

#define PER_CHUNK (32 / W)

// What is inlined everywhere takes the compiler twice as long, and is not faster.
#define NOT_INLINE static __attribute__((noinline))

typedef uint8_t bytes __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint8_t u8x16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef int8_t i8x16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint32_t u32x8 __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint64_t u64x4 __attribute__((vector_size(32), aligned(1), may_alias));

#define AHEAD 2048  // bytes from what is read to what is asked for, which a CPU does not do by itself across pages

// The codes of a chunk, 32 in 4 * BITS bytes, a byte each, in their order. They are planar (bits.py): of a section of four bits
// a byte holds one code of the first half and one of the second, of two bits one of each quarter, of one bit one of each eighth.
INLINE bytes codes_of(const uint8_t* p) {
  if (BITS == 8) return load<bytes>(p);
  const int b4 = BITS & 4, b2 = BITS & 2, b1 = BITS & 1;
  bytes out = {};
  if (b4) {
#if defined(__AVX2__)
    u64x4 twice = (u64x4)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#else
    uint64_t low = load<uint64_t>(p), high = load<uint64_t>(p + 8);
    u64x4 twice = {low, high, low, high};
#endif
    out = (bytes)(twice >> u64x4{0, 0, 4, 4}) & (uint8_t)15;
  }
  if (b2) {
    uint64_t v = load<uint64_t>(p + 4 * b4);
    bytes two = (bytes)(u64x4{v, v, v, v} >> u64x4{0, 2, 4, 6}) & (uint8_t)3;
    out |= (bytes)((u16x16)two << b4);
  }
  if (b1) {
    uint32_t v = load<uint32_t>(p + 4 * (b4 + b2));
    bytes one = (bytes)(u32x8{v, v, v, v, v, v, v, v} >> u32x8{0, 1, 2, 3, 4, 5, 6, 7}) & (uint8_t)1;
    out |= (bytes)((u16x16)one << (b4 + b2));
  }
  return out;
}

// What decoding needs beside the codes.
struct Table {
  const float* values;
#if W == 8 && defined(__AVX2__)
  __m256i planes[4];  // the bytes of 16 floats, the first of each, the second, ...
#endif
};

INLINE Table table_of(const float* given) {
  Table table = {given};
#if W == 8 && defined(__AVX2__)
  if (BITS <= 4) {
    float values[16];
    for (int i = 0; i < 16; i++) values[i] = KIND == TABLE ? given[i] : i;
    for (int b = 0; b < 4; b++) {
      uint8_t plane[32];
      for (int i = 0; i < 32; i++) plane[i] = ((const uint8_t*)values)[4 * (i % 16) + b];
      table.planes[b] = _mm256_loadu_si256((const __m256i*)plane);
    }
  }
#endif
  return table;
}

// Vectors of 16 lanes hold a chunk in its order. Of vectors of 8 lanes the i-th holds elements 4 i to 4 i + 3 and 16 more, as
// AVX2 unpacks bytes; what is multiplied with them is arranged likewise.
INLINE void arrange(float* x) {
  if (W == 16) return;
  float chunk[32];
  memcpy(chunk, x, sizeof(chunk));
  UNROLL for (int i = 0; i < 4; i++) {
    memcpy(x + 8 * i, chunk + 4 * i, 16);
    memcpy(x + 8 * i + 4, chunk + 4 * i + 16, 16);
  }
}

// What small floats are multiplied with, as the exponent of a float32 has another bias.
#define UNIT (KIND == E4M3 ? 0x1p120f : KIND == E5M2 ? 0x1p112f : 1.0f)

// Of integers what they stand for before zero point and scale. unit: `UNIT`, or that times a scale.
INLINE vf value(vi q, const float* table, vf unit) {
  if (KIND == UNSIGNED || KIND == SIGNED) return __builtin_convertvector(q, vf);
  if (KIND == E4M3 || KIND == E5M2) {
    // Sign, exponent and mantissa to their places in a float32, whose exponent has more bits.
    const int shift = KIND == E4M3 ? 20 : 21;
    return (vf)((q << shift) & (int32_t)(0x80000000u | (0x7Fu << shift))) * unit;
  }
  if (KIND == MINIFLOAT) {
    // The bits of the magnitude to their places, then a power of two for the difference of the biases.
    vf size = (vf)((q & ((1 << (BITS - 1)) - 1)) << (24 - BITS + EXPONENT)) * BIAS;
    return (vf)((vi)size | ((q >> (BITS - 1)) << 31));
  }
#if defined(__AVX512F__)
  if (BITS <= 4) return (vf)_mm512_permutexvar_ps((__m512i)q, _mm512_loadu_ps(table));
  return (vf)_mm512_i32gather_ps((__m512i)q, table, 4);
#elif W == 8 && defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(table, (__m256i)q, 4);
#else
  vf out;
  UNROLL for (int i = 0; i < W; i++) out[i] = table[q[i]];
  return out;
#endif
}

// The numbers of a chunk before zero point and scale.
INLINE void decode(const uint8_t* p, const Table& table, vf* out, vf unit = same(UNIT)) {
  bytes c = codes_of(p);
  const bool is_signed = KIND == SIGNED || KIND == E4M3 || KIND == E5M2;
#if defined(__AVX512F__)
  UNROLL for (int h = 0; h < 2; h++) {
    __m128i half = _mm256_extracti128_si256((__m256i)c, h);
    out[h] = value((vi)(is_signed ? _mm512_cvtepi8_epi32(half) : _mm512_cvtepu8_epi32(half)), table.values, unit);
  }
#elif W == 8 && defined(__AVX2__)
  __m256i q = (__m256i)c, zero = _mm256_setzero_si256();
  if (BITS <= 4) {
    // Each byte of the floats is looked up on its own. Of small integers only the upper two are not 0.
    __m256i b2 = _mm256_shuffle_epi8(table.planes[2], q), b3 = _mm256_shuffle_epi8(table.planes[3], q);
    __m256i high[2] = {_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3)}, low[2] = {zero, zero};
    if (KIND == TABLE) {
      __m256i b0 = _mm256_shuffle_epi8(table.planes[0], q), b1 = _mm256_shuffle_epi8(table.planes[1], q);
      low[0] = _mm256_unpacklo_epi8(b0, b1), low[1] = _mm256_unpackhi_epi8(b0, b1);
    }
    UNROLL for (int h = 0; h < 2; h++) {
      out[2 * h] = (vf)_mm256_unpacklo_epi16(low[h], high[h]);
      out[2 * h + 1] = (vf)_mm256_unpackhi_epi16(low[h], high[h]);
    }
    return;
  }
  UNROLL for (int h = 0; h < 2; h++) {
    // To the upper byte of 16 bits, and these to the upper half of 32 bits.
    __m256i words = h ? _mm256_unpackhi_epi8(zero, q) : _mm256_unpacklo_epi8(zero, q);
    if (KIND == E4M3 || KIND == E5M2) {
      const int shift = KIND == E4M3 ? 4 : 3;
      words = _mm256_and_si256(_mm256_srai_epi16(words, shift), _mm256_set1_epi16((int16_t)(0x8000 | 0x7F00 >> shift)));
    }
    __m256i pair[2] = {_mm256_unpacklo_epi16(zero, words), _mm256_unpackhi_epi16(zero, words)};
    UNROLL for (int i = 0; i < 2; i++) {
      if (KIND == E4M3 || KIND == E5M2) out[2 * h + i] = (vf)pair[i] * unit;
      else if (is_signed) out[2 * h + i] = value((vi)_mm256_srai_epi32(pair[i], 24), table.values, unit);
      else out[2 * h + i] = value((vi)_mm256_srli_epi32(pair[i], 24), table.values, unit);
    }
  }
#else
  UNROLL for (int i = 0; i < PER_CHUNK; i++) {
    vi q;
    for (int j = 0; j < W; j++) {
      uint8_t code = c[W == 16 ? 16 * i + j : 4 * i + j % 4 + 16 * (j / 4)];
      q[j] = is_signed ? (int32_t)(int8_t)code : (int32_t)code;
    }
    out[i] = value(q, table.values, unit);
  }
#endif
}

INLINE float sum(vf v) {
#if defined(__AVX2__)
#if W == 16
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  __m256 a = (__m256)v;
#endif
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
#else
  float s[W];
  memcpy(s, &v, sizeof(v));
  for (int width = W / 2; width; width /= 2) UNROLL for (int i = 0; i < width; i++) s[i] += s[i + width];
  return s[0];
#endif
}

// a for the first half of a chunk and b for the second, as they meet its i-th vector.
INLINE vf halves(float a, float b, int i) {
#if W == 16
  return same(i ? b : a);
#else
  return vf{a, a, a, a, b, b, b, b};
#endif
}

// dtypes of arguments
#define F32 0
#define BF16 1
#define I8 2
#define U8 3
#define F8 4  // e4m3
#define F16 5
#define JOINT_SCALE 6
#define JOINT_ZERO 7
#define POWER 8  // of two: 2**(byte - 127), and NaN

INLINE float bf16(uint16_t h) { uint32_t w = (uint32_t)h << 16; return load<float>(&w); }
INLINE uint16_t to_bf16(float f) {
  uint32_t w = load<uint32_t>(&f);
  if ((w & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(w >> 16 | 0x40);
  return (uint16_t)((w + 0x7FFF + (w >> 16 & 1)) >> 16);
}
INLINE float e4m3(uint8_t c) {
  uint32_t w = (uint32_t)(c & 0x80) << 24 | (uint32_t)(c & 0x7F) << 20;
  return load<float>(&w) * 0x1p120f;
}
// Sign, exponent and mantissa to their places in a float, and 2**112 for the difference of the biases.
NOT_INLINE float f16(uint16_t h) {
  uint32_t w = (uint32_t)(h & 0x7FFF) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  float value = load<float>(&w) * 0x1p112f;
  w = load<uint32_t>(&value) | ((h & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u) | sign;
  return load<float>(&w);
}
NOT_INLINE void to_floats(const void* p, int64_t start, int64_t n, int dtype, float* out) {
  switch (dtype) {
    case F32: memcpy(out, (const float*)p + start, n * sizeof(float)); break;
    case BF16: for (int64_t i = 0; i < n; i++) out[i] = bf16(((const uint16_t*)p)[start + i]); break;
    case I8: for (int64_t i = 0; i < n; i++) out[i] = ((const int8_t*)p)[start + i]; break;
    case F16: for (int64_t i = 0; i < n; i++) out[i] = f16(((const uint16_t*)p)[start + i]); break;
    case F8: for (int64_t i = 0; i < n; i++) out[i] = e4m3(((const uint8_t*)p)[start + i]); break;
    case POWER:
      for (int64_t i = 0; i < n; i++) {
        uint32_t byte = ((const uint8_t*)p)[start + i], bits = byte ? byte << 23 | (byte == 255) : 1 << 22;
        out[i] = load<float>(&bits);
      }
      break;
    case JOINT_SCALE: for (int64_t i = 0; i < n; i++) out[i] = bf16(((const uint16_t*)p)[start + i] & 0x7FFF); break;
    // The sign and the last four bits, of which a code has 32 / 2**BITS.
    case JOINT_ZERO:
      for (int64_t i = 0; i < n; i++) {
        uint32_t word = ((const uint16_t*)p)[start + i];
        out[i] = (float)(word >> 11 & 16 | word & 15) * ((float)(1 << BITS) / 32);
      }
      break;
    default: for (int64_t i = 0; i < n; i++) out[i] = ((const uint8_t*)p)[start + i];
  }
}

INLINE float* floats(int64_t n) { return (float*)aligned_alloc(64, (n * sizeof(float) + 127) / 64 * 64); }
"""

READING = CPP_LANES + _READING
"""What a code is, and how codes, scales and zero points become floats."""

_LOOPS = r"""
// `n` codes of `bits` bits from `p`, a row of chunks of 32 of which the last may be shorter, as floats.
NOT_INLINE void unpack(const uint8_t* p, int64_t n, int bits, float* out) {
  for (int64_t start = 0; start < n; start += 32) {
    const int64_t chunk = n - start < 32 ? n - start : 32;
    uint8_t codes[32] = {};
    int first = 0;
    for (int size = 4; size; size >>= 1) {
      if (!(bits & size)) continue;
      const int64_t width = chunk * size / 8;
      for (int plane = 0; plane < 8 / size; plane++)
        for (int64_t lane = 0; lane < width; lane++)
          codes[plane * width + lane] |= (p[lane] >> plane * size & ((1 << size) - 1)) << first;
      p += width;
      first += size;
    }
    for (int64_t i = 0; i < chunk; i++) out[start + i] = codes[i];
  }
}

// k numbers of -1, 0 and 1, 64 in 13 bytes, of which each holds five, 13 elements apart: digits of base 3 of byte * 243 / 256.
// What is written beyond 13 and beyond 64 is overwritten; there is room for 16 bytes after the last.
static void unpack_trits(const uint8_t* p, int64_t k, int8_t* out) {
  for (int64_t start = 0; start < k; start += 64, p += 13, out += 64) {
    u8x16 bytes = {};
    if (start + 64 < k) bytes = load<u8x16>(p);
    else memcpy(&bytes, p, 13);
    u16x16 rest = __builtin_convertvector(bytes, u16x16);
    UNROLL for (int i = 0; i < 5; i++) {
      rest *= (uint16_t)3;
      i8x16 trits = __builtin_convertvector((rest >> 8) - (uint16_t)1, i8x16);
      memcpy(out + 13 * i, &trits, 16);
      rest &= (uint16_t)255;
    }
  }
}

// Scales or zero points, (rows, groups), rows being those of the weight or 1. Such that are quantized themselves are
// (value - inner_zero - inner_offset) * inner, with (inner_rows, inner_groups) of these.
struct Level {
  const void* values;
  const void* inner;
  const void* inner_zero;
  int64_t rows, inner_rows, inner_groups;
  int32_t dtype, bits;  // bits: of values that are packed, else 0
  int32_t inner_dtype, inner_zero_dtype;
  float inner_offset;
};

// A weight (n, k), with groups of 16 elements or of whole chunks.
struct Weight {
  const uint8_t* codes;
  const float* table;
  Level scale, zero;
  int64_t n, k, row_bytes, groups;
  float offset;
  int32_t shifted;  // there is a zero point or an offset
  int32_t after;    // the zero point is taken off after the scale is applied
  int32_t trits;    // codes are -1, 0 and 1, five in a byte: a row becomes bytes before it is read
};

// Scale, and what is added to code * scale, of each group of a row.
struct Row {
  float *scale, *shift;
  int64_t last;
};

// One scale for a row, which is applied to the sum: that of integers is then exact up to 2**24.
INLINE bool by_row(const Weight& w) { return w.groups == 1 && !w.shifted; }

NOT_INLINE void read_level(const Level& l, int64_t groups, int64_t n, float* out) {
  const int64_t row = l.rows > 1 ? n : 0;
  if (l.bits) unpack((const uint8_t*)l.values + row * groups * l.bits / 8, groups, l.bits, out);
  else to_floats(l.values, row * groups, groups, l.dtype, out);
  if (!l.inner) return;
  const int64_t first = l.inner_rows > 1 ? n * l.inner_groups : 0, each = groups / l.inner_groups;
  for (int64_t i = 0; i < l.inner_groups; i++, out += each) {
    float scale, zero = 0;
    to_floats(l.inner, first + i, 1, l.inner_dtype, &scale);
    if (l.inner_zero) to_floats(l.inner_zero, first + i, 1, l.inner_zero_dtype, &zero);
    zero += l.inner_offset;
    for (int64_t g = 0; g < each; g++) out[g] = (out[g] - zero) * scale;
  }
}

static void read_scale(const Weight& w, int64_t n, float* out) { read_level(w.scale, w.groups, n, out); }

static void read_row(const Weight& w, int64_t n, Row& row) {
  if (n == row.last) return;
  row.last = n;
  if (by_row(w)) {
    row.scale[0] = 1;
    return;
  }
  read_scale(w, n, row.scale);
  if (!w.shifted) return;
  if (w.zero.values) read_level(w.zero, w.groups, n, row.shift);
  else memset(row.shift, 0, w.groups * sizeof(float));
  for (int64_t i = 0; i < w.groups; i++)
    row.shift[i] = w.after ? -(row.shift[i] + w.offset * row.scale[i]) : -(row.shift[i] + w.offset) * row.scale[i];
}

// A thread's memory, and the weight as it reads it.
struct Scratch {
  Row row;
  float* buffer;
  uint8_t* bytes;  // of a row of trits, else null
  const Weight given;
  Weight weight;
  Scratch(const Weight& w, int64_t more) : bytes(w.trits ? (uint8_t*)floats(w.k / 4 + 4) : 0), given(w), weight(w) {
    float* p = buffer = floats(2 * w.groups + 16 + more);
    row = Row{p, p + w.groups, -1};
    if (bytes) weight.codes = bytes, weight.row_bytes = 0;
  }
  ~Scratch() { free(buffer), free(bytes); }
  // To be called before row n is read, or elements [start, stop) of it.
  void meet(int64_t n, int64_t start, int64_t stop) {
    if (bytes) unpack_trits(given.codes + n * given.row_bytes + start / 64 * 13, stop - start, (int8_t*)bytes + start);
  }
  void meet(int64_t n) { meet(n, 0, given.k); }
  float* rest(const Weight& w) { return buffer + (2 * w.groups + 15) / 16 * 16; }
};

// A chunk times T tokens, added to two sums of each. a: the scales of its first and its last vector.
template <int T>
INLINE void step(const uint8_t* p, const Table& table, const vf* a, const float* x, int64_t k, vf* first, vf* second) {
  const int half = PER_CHUNK / 2;
  vf d[PER_CHUNK];
  __builtin_prefetch(p + AHEAD);
  decode(p, table, d);
  if (T == 1) {
    const vf* xs = (const vf*)x;
    vf u = d[0] * xs[0], v = d[half] * xs[half];
    UNROLL for (int i = 1; i < half; i++) u += d[i] * xs[i], v += d[half + i] * xs[half + i];
    first[0] += u * a[0];
    second[0] += v * a[1];
    return;
  }
  UNROLL for (int i = 0; i < PER_CHUNK; i++) d[i] *= a[i / half];
  UNROLL for (int t = 0; t < T; t++) {
    const vf* xs = (const vf*)(x + t * k);
    UNROLL for (int i = 0; i < half; i++) first[t] += d[i] * xs[i], second[t] += d[half + i] * xs[half + i];
  }
}

// What the shifts of a row add to its product with a token, whose sums over groups these are.
INLINE float row_shift(const Weight& w, const Row& row, const float* sums) {
  vf total = {};
  int64_t g = 0;
  for (; g + W <= w.groups; g += W) total += *(const vf*)(row.shift + g) * *(const vf*)(sums + g);
  float out = sum(total);
  for (; g < w.groups; g++) out += row.shift[g] * sums[g];
  return out;
}

// One row, T tokens. sums: of each group of the tokens.
template <int T>
NOT_INLINE void few(const Weight& w, const Table& table, int64_t n, const Row& row, const float* x, const float* sums, float* y) {
  const uint8_t* p = w.codes + n * w.row_bytes;
  const int64_t k = w.k, each = k / 32 / w.groups;
  vf first[T] = {}, second[T] = {};
  if (each == 1) {
    for (int64_t g = 0; g < w.groups; g++, p += 4 * BITS, x += 32) {
      vf a[2] = {same(row.scale[g]), same(row.scale[g])};
      step<T>(p, table, a, x, k, first, second);
    }
  } else if (each) {
    for (int64_t g = 0; g < w.groups; g++) {
      vf a[2] = {same(row.scale[g]), same(row.scale[g])};
      for (int64_t c = 0; c < each; c++, p += 4 * BITS, x += 32) step<T>(p, table, a, x, k, first, second);
    }
  } else {
    for (int64_t g = 0; g < w.groups; g += 2, p += 4 * BITS, x += 32) {
      vf a[2] = {halves(row.scale[g], row.scale[g + 1], 0), halves(row.scale[g], row.scale[g + 1], 1)};
      step<T>(p, table, a, x, k, first, second);
    }
  }
  UNROLL for (int t = 0; t < T; t++) y[t] = sum(first[t] + second[t]);
  if (w.shifted) UNROLL for (int t = 0; t < T; t++) y[t] += row_shift(w, row, sums + t * w.groups);
}

// Elements [start, stop) of a row, in full, as vectors hold them or in their order.
template <bool ORDERED>
NOT_INLINE void dense(const Weight& w, const Table& table, int64_t n, const Row& row, int64_t start, int64_t stop, float* out) {
  const int64_t group = w.k / w.groups, next = group < 32;
  const uint8_t* p = w.codes + n * w.row_bytes + start / 8 * BITS;
  int64_t g = start / group, end = (g + 1 + next) * group;
  vf s[2] = {}, z[2] = {};
  bool fresh = true;
  for (int64_t at = start; at < stop; at += 32, p += 4 * BITS, out += 32) {
    if (at >= end) g += next + 1, end += (next + 1) * group, fresh = true;
    if (fresh) {
      UNROLL for (int i = 0; i < 2; i++) {
        s[i] = halves(row.scale[g], row.scale[g + next], i);
        if (w.shifted) z[i] = halves(row.shift[g], row.shift[g + next], i);
      }
      fresh = false;
    }
    vf d[PER_CHUNK];
    decode(p, table, d);
    UNROLL for (int i = 0; i < PER_CHUNK; i++) {
      vf v = d[i] * s[2 * i / PER_CHUNK] + z[2 * i / PER_CHUNK];
      if (W == 16 || !ORDERED) {
        ((vf*)out)[i] = v;
      } else {
        memcpy(out + 4 * i, &v, 16);
        memcpy(out + 4 * i + 16, (const float*)&v + 4, 16);
      }
    }
  }
}

#if defined(__AVX512BW__)
// `to_bf16` of 16 numbers. Units make 0 of what is below the normal numbers, as those that multiply do.
INLINE __m256i to_bf16s(vf v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
#endif
  __m512i w = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(w, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(0x7FFF)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_or_epi32(up, nan, w, _mm512_set1_epi32(0x400000)), 16));
}

INLINE __m512i join_halves(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }

INLINE __m512i join_bf16s(vf a, vf b) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#endif
  return join_halves(to_bf16s(a), to_bf16s(b));
}

// a * b + c, rounded once: `dense` has it so from the compiler, which does not see it where only some weights have a shift.
INLINE vf fused(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

// 32 codes from `first` on as the numbers of a group with this scale and shift, of which there may be fewer.
INLINE __m512i numbers_from(int32_t first, const Table& table, float scale, float shift) {
  __m256i half[2] = {};
  UNROLL for (int h = 0; h < 2; h++) {
    vi codes = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (first + 16 * h);
    if (h == 0 || BITS > 4) half[h] = to_bf16s(value(codes, table.values, same(UNIT)) * same(scale) + same(shift));
  }
  return join_halves(half[0], half[1]);
}

// Elements [start, stop) of a row, whole chunks, the first of which is in group `first` of `group` elements.
struct Run {
  int64_t start, stop, group, first;
  Run(const Weight& w, int64_t start, int64_t stop) : start(start), stop(stop), group(w.k / w.groups), first(start / group) {}
};

// A run of row n as bfloat16: what `dense` gives, rounded. Of few bits all numbers of a group are made at once, and then looked
// up. apart: from one chunk of 32 to the next. ahead: bytes from what is read to what is asked for.
NOT_INLINE void dense_bf16(const Weight& w, const Table& table, int64_t n, const Row& row, const Run& run, uint16_t* out,
                           int64_t apart, int64_t ahead) {
  const int64_t group = run.group, stop = run.stop;
  int64_t start = run.start, g = run.first;
  const uint8_t* p = w.codes + n * w.row_bytes + start / 8 * BITS;
  if (group < 32) {
    for (; start < stop; start += 32, g += 2, p += 4 * BITS, out += apart) {
      vf d[2];
      __builtin_prefetch(p + ahead, 0, 2);
      decode(p, table, d);
      UNROLL for (int h = 0; h < 2; h++) {
        const vf scale = same(row.scale[g + h]);
        d[h] = w.shifted ? fused(d[h], scale, same(row.shift[g + h])) : d[h] * scale;
      }
      _mm512_storeu_si512(out, join_bf16s(d[0], d[1]));
    }
    return;
  }
  for (; start < stop; g++) {
    const float scale = row.scale[g], shift = w.shifted ? row.shift[g] : 0;
    const int64_t end = (g + 1) * group, chunks = ((end < stop ? end : stop) - start) / 32;
    start = end;
    if (BITS <= 6) {
      const __m512i low = numbers_from(0, table, scale, shift);
      const __m512i high = BITS == 6 ? numbers_from(32, table, scale, shift) : low;
      for (int64_t i = 0; i < chunks; i++, p += 4 * BITS, out += apart) {
        __builtin_prefetch(p + ahead, 0, 2);
        __m512i codes = _mm512_cvtepu8_epi16((__m256i)codes_of(p));
        _mm512_storeu_si512(out, BITS == 6 ? _mm512_permutex2var_epi16(low, codes, high) : _mm512_permutexvar_epi16(codes, low));
      }
      continue;
    }
    // The power of two that small floats are multiplied with goes with the scale, where both are a float.
    const vf s = same(scale), z = same(shift), unit = same(UNIT), both = s * unit;
    const bool folded = UNIT != 1 && !w.shifted && both[0] - both[0] == 0;
    for (int64_t i = 0; i < chunks; i++, p += 4 * BITS, out += apart) {
      vf d[2];
      __builtin_prefetch(p + ahead, 0, 2);
      if (folded) {
        decode(p, table, d, both);
      } else {
        decode(p, table, d);
        UNROLL for (int h = 0; h < 2; h++) d[h] = w.shifted ? fused(d[h], s, z) : d[h] * s;
      }
      _mm512_storeu_si512(out, join_bf16s(d[0], d[1]));
    }
  }
}
#endif

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
NOT_INLINE void tiles(const Weight& w, const Table& table, int64_t n, Row& row, const float* x, int64_t m, float* scratch,
                      float* y, int64_t stride) {
  vf* sums = (vf*)scratch;
  float* decoded = scratch + m * R * W;
  memset(scratch, 0, m * R * sizeof(vf));
  for (int64_t start = 0; start < w.k; start += STEP) {
    int64_t stop = start + STEP < w.k ? start + STEP : w.k;
    UNROLL for (int r = 0; r < R; r++) {
      read_row(w, n + r, row);
      dense<false>(w, table, n + r, row, start, stop, decoded + r * STEP);
    }
    int64_t t = 0;
    for (; t + 4 <= m; t += 4) tile<R, 4>(decoded, x + t * w.k + start, w.k, stop - start, sums + t * R);
    for (; t < m; t++) tile<R, 1>(decoded, x + t * w.k + start, w.k, stop - start, sums + t * R);
  }
  for (int64_t t = 0; t < m; t++) UNROLL for (int r = 0; r < R; r++) y[t * stride + r] = sum(sums[t * R + r]);
}

"""

_FUNCTIONS = r"""
struct Output {
  void* y;
  int64_t n;
  int32_t dtype;
  const float* token_scale;  // of each token, or null
};

INLINE void store(const Output& out, int64_t t, int64_t n, float total, float scale) {
  if (out.token_scale) total *= out.token_scale[t];
  total *= scale;
  if (out.dtype == F32) ((float*)out.y)[t * out.n + n] = total;
  else ((uint16_t*)out.y)[t * out.n + n] = to_bf16(total);
}

// y (m, n) = x (m, k) @ w.T, times token_scale (m,) where that is given. x and y: F32 or BF16. points: how to compute, in FLOATS,
// in FIXED point of 16 bits or WIDE of 31, or in 16 bits with x as the integers that it holds.
#define FLOATS 0
#define FIXED 1
#define WIDE 2
#define INTEGERS 3

extern "C" void ao_product(const Weight* weight, const void* x, int32_t x_dtype, const float* token_scale, void* y, int32_t dtype,
                           int64_t m, int32_t points, int32_t threads) {
  const Weight& of = *weight;
  const Output out = {y, of.n, dtype, token_scale};
  float* rows = floats(m * of.k);
  to_floats(x, 0, m * of.k, x_dtype, rows);
  float* sums = of.shifted && (points || m <= 4) ? floats(m * of.groups) : 0;
  Fixed fixed = {};
  if (HAS_FIXED && points) {
    const int64_t planes = points == WIDE ? 2 : 1;
    fixed.x = (int16_t*)floats(m * planes * of.k / 2);
    fixed.step = floats(m * planes * of.k / 16);
    if (!to_fixed(of, rows, m, planes, points == INTEGERS, fixed, sums)) fixed.units = 0;
  }
  if (!fixed.units) {
    if (sums && m <= 4) {
      const int64_t group = of.k / of.groups;
      for (int64_t g = 0; g < m * of.groups; g++) {
        vf total = {};
        for (int64_t i = 0; i < group; i += W) total += *(const vf*)(rows + g * group + i);
        sums[g] = sum(total);
      }
    }
    for (int64_t i = 0; i < m * of.k; i += 32) arrange(rows + i);
  }
  const bool tiled = !fixed.units && m > 4;
  const int64_t block = tiled ? 3 : 8, blocks = (of.n + block - 1) / block;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Table table = table_of(of.table);
    const Shorts shorts = shorts_of(of.table, fixed.unit);
    Scratch scratch(of, tiled ? 3 * (m * W + STEP + m) + 64 : m * fixed.planes * (fixed.units + 1) + m);
    const Weight w = scratch.weight;
    Row& row = scratch.row;
    float* rest = scratch.rest(w);
    float* totals = rest + (tiled ? 3 * (m * W + STEP) : m * fixed.planes * (fixed.units + 1));
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t n = b * block, end = n + block < w.n ? n + block : w.n;
      for (int64_t each = tiled && end - n == 3 && !w.trits ? 3 : 1; n < end; n += each) {
        scratch.meet(n);
        float few_totals[4], *got = m > 4 ? totals : few_totals;
        if (tiled) {
          if (each == 3) tiles<3>(w, table, n, row, rows, m, rest, totals, 3);
          else tiles<1>(w, table, n, row, rows, m, rest, totals, 1);
        } else {
          read_row(w, n, row);
          switch (fixed.units ? 0 : m) {
#if HAS_FIXED
            case 0: row_in_fixed_point(w, shorts, n, row, fixed, m, sums, rest, got); break;
#endif
            case 1: few<1>(w, table, n, row, rows, sums, got); break;
            case 2: few<2>(w, table, n, row, rows, sums, got); break;
            case 3: few<3>(w, table, n, row, rows, sums, got); break;
            default: few<4>(w, table, n, row, rows, sums, got);
          }
        }
        for (int64_t r = 0; r < each; r++) {
          float scale = 1;
          if (by_row(w)) read_scale(w, n + r, &scale);
          for (int64_t t = 0; t < m; t++) store(out, t, n + r, got[t * each + r], scale);
        }
      }
    }
  }
  free(rows);
  free(sums);
  free(fixed.x);
  free(fixed.step);
}

// How an activation is quantized: to integers with or without a zero point, or to float8.
struct Act {
  int32_t codes;  // SIGNED without a zero point, UNSIGNED with one, E4M3, E5M2
  int32_t whole;  // one scale for all tokens
  float low, high, factor;  // scale = range * factor
};

// x (m, k), F32 or BF16 -> out (m, k): code less zero point, as floats, and scale (m,). given: the scale, or null.
extern "C" void ao_quantize(const Act* act, const void* x, int32_t dtype, int64_t m, int64_t k, const float* given, float* out,
                            float* scale) {
  to_floats(x, 0, m * k, dtype, out);
  const int64_t tokens = act->whole ? 1 : m, each = act->whole ? m * k : k;
  for (int64_t t = 0; t < tokens; t++) {
    float* row = out + t * each;
    float s, zero = 0;
    if (given) {
      s = given[0];
    } else {
      int32_t largest = 0;  // bits of magnitudes are ordered as they are, with NaN above all
      float low = 0, high = 0;
      for (int64_t i = 0; i < each; i++) {
        int32_t size = load<int32_t>(row + i) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
      }
      if (act->codes == UNSIGNED) {
        for (int64_t i = 0; i < each; i++) {
          low = row[i] < low ? row[i] : low;
          high = row[i] > high ? row[i] : high;
        }
      }
      float range = act->codes == UNSIGNED && largest <= 0x7F800000 ? high - low : load<float>(&largest);
      s = range * act->factor;
      if (act->codes == UNSIGNED) {
        float inverse = s < 0x1p-126f ? 0 : 1 / s;
        zero = act->low - __builtin_rintf(low * inverse);
        zero = zero < act->low ? act->low : zero > act->high ? act->high : zero;
      }
    }
    const float inverse = (s < 0 ? -s : s) < 0x1p-126f ? 0 : 1 / s, low = act->low - zero, high = act->high - zero;
    if (act->codes == SIGNED || act->codes == UNSIGNED) {
      for (int64_t i = 0; i < each; i++) {
        float v = row[i] * inverse;
        v = v < low ? low : v;
        v = v > high ? high : v;
        row[i] = v + 0x1.8p23f - 0x1.8p23f;  // rounded, half to even
      }
    } else {
      // Below the normal numbers the steps are all alike; above, as many bits of the mantissa as there are.
      const int cut = act->codes == E4M3 ? 20 : 21;
      const float least = act->codes == E4M3 ? 0x1p-6f : 0x1p-14f;
      const float coarse = 0x1.8p23f * (act->codes == E4M3 ? 0x1p-9f : 0x1p-16f);
      for (int64_t i = 0; i < each; i++) {
        float v = row[i] * inverse;
        v = v < low ? low : v;
        v = v > high ? high : v;
        int32_t bits = load<int32_t>(&v), odd = bits >> cut & 1;
        bits = (bits + (1 << (cut - 1)) - 1 + odd) & -(1 << cut);
        float size = v < 0 ? -v : v, small = v + coarse - coarse;
        row[i] = size < least ? small : load<float>(&bits);
      }
    }
    for (int64_t i = 0; i < (act->whole ? m : 1); i++) scale[t + i] = s;
  }
}

// Rows [start, stop) of the weight as (stop - start, k) of a dtype, F32 or BF16.
extern "C" void ao_rows(const Weight* weight, int64_t start, int64_t stop, void* out, int32_t dtype, int32_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Table table = table_of(weight->table);
    Scratch scratch(*weight, STEP);
    const Weight w = scratch.weight;
    float* rest = scratch.rest(w);
#pragma omp for schedule(static)
    for (int64_t n = start; n < stop; n++) {
      scratch.meet(n);
      read_row(w, n, scratch.row);
      if (by_row(w)) read_scale(w, n, scratch.row.scale);
      int64_t at = (n - start) * w.k;
      if (dtype == F32) {
        dense<true>(w, table, n, scratch.row, 0, w.k, (float*)out + at);
        continue;
      }
#if defined(__AVX512BW__)
      dense_bf16(w, table, n, scratch.row, Run(w, 0, w.k), (uint16_t*)out + at, 32, AHEAD);
      continue;
#endif
      for (int64_t from = 0; from < w.k; from += STEP) {
        int64_t to = from + STEP < w.k ? from + STEP : w.k;
        dense<true>(w, table, n, scratch.row, from, to, rest);
        for (int64_t i = 0; i < to - from; i++) ((uint16_t*)out)[at + from + i] = to_bf16(rest[i]);
      }
    }
  }
}
"""

SOURCE = READING + _LOOPS + FIXED_POINT + _FUNCTIONS + TILES
