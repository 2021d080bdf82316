"""The C++ of a product in 16-bit fixed point, a part of cpu_source.py: half the instructions of one in floats.

CPUs multiply 16-bit integers twice as many at a time as floats, and codes need not become floats. So the activation is cut into
blocks along K, of at most 128 elements and no more than a group of the weight; a block is integers times a step, its largest
magnitude / 32767. The error, 2**-16 of that magnitude, is below the rounding of bfloat16 and float16 for which this is done. The
sum of integers of a block is exact; the step and the scale of the weight meet it as floats.

For float32 an integer is two: what is left of 16 bits is 16 more, as if it were another token.

Numbers of a table are integers as well, its values times the power of two that leaves room for the sum.
"""

FIXED_POINT = r"""
#define LOOKED_UP (KIND == TABLE || KIND == MINIFLOAT)
#if defined(__AVX2__)
#define HAS_FIXED (KIND == UNSIGNED || KIND == SIGNED || (LOOKED_UP && BITS <= (W == 16 ? 6 : 4)))
#else
#define HAS_FIXED 0
#endif

#define LARGEST 32767
#define MOST_BLOCK 128
#define SHORTS (PER_CHUNK / 2)  // vectors of a chunk

typedef int16_t vs __attribute__((vector_size(4 * W), aligned(2), may_alias));

// An activation, (m, planes, k). Units are what has one step and one scale: a block, or a group of 16 elements.
struct Fixed {
  int16_t* x;
  float* step;  // (m, planes, units)
  int64_t planes, unit, units;
};

struct Shorts {
  float factor;  // what the integers are to be multiplied with
#if HAS_FIXED && W == 16
  __m512i values[2];
#elif HAS_FIXED
  __m256i planes[2];
#endif
};

INLINE Shorts shorts_of(const float* given, int64_t unit) {
  Shorts table = {1};
#if HAS_FIXED
  if (LOOKED_UP) {
    float most = 0;
    for (int i = 0; i < 1 << BITS; i++) {
      const float size = given[i] < 0 ? -given[i] : given[i];
      most = size > most ? size : most;
    }
    const float room = 0x1p31f / LARGEST / ((unit < 32 ? 32 : unit) / W);  // a lane of the sum adds so many products
    float times = 1;
    if (most > 0) {
      while (most * times * 2 < room && most * times * 2 <= LARGEST) times *= 2;
      while (most * times >= room || most * times > LARGEST) times /= 2;
    }
    table.factor = 1 / times;
    int16_t values[64];
    for (int i = 0; i < 64; i++) values[i] = (int16_t)__builtin_rintf(given[i % (1 << BITS)] * times);
#if W == 16
    table.values[0] = _mm512_loadu_si512(values), table.values[1] = _mm512_loadu_si512(values + 32);
#else
    for (int b = 0; b < 2; b++) {
      uint8_t plane[32];
      for (int i = 0; i < 32; i++) plane[i] = ((const uint8_t*)values)[2 * (i % 16) + b];
      table.planes[b] = _mm256_loadu_si256((const __m256i*)plane);
    }
#endif
  }
#endif
  return table;
}

#if HAS_FIXED
INLINE vi dot(vi total, vs a, vs b) {
#if W == 16 && defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif W == 16
  return total + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return total + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// A chunk, with vectors of 32 lanes in its order. Of vectors of 16 lanes the first holds elements 0 to 7 and 16 to 23.
INLINE void decode(const uint8_t* p, const Shorts& table, vs* out) {
  __m256i c = (__m256i)codes_of(p);
#if W == 16
  __m512i q = KIND == SIGNED ? _mm512_cvtepi8_epi16(c) : _mm512_cvtepu8_epi16(c);
  if (LOOKED_UP && BITS <= 5) q = _mm512_permutexvar_epi16(q, table.values[0]);
  else if (LOOKED_UP) q = _mm512_permutex2var_epi16(table.values[0], q, table.values[1]);
  out[0] = (vs)q;
#else
  __m256i zero = _mm256_setzero_si256();
  if (LOOKED_UP) {
    __m256i low = _mm256_shuffle_epi8(table.planes[0], c), high = _mm256_shuffle_epi8(table.planes[1], c);
    out[0] = (vs)_mm256_unpacklo_epi8(low, high), out[1] = (vs)_mm256_unpackhi_epi8(low, high);
  } else if (KIND == SIGNED) {
    out[0] = (vs)_mm256_srai_epi16(_mm256_unpacklo_epi8(zero, c), 8);
    out[1] = (vs)_mm256_srai_epi16(_mm256_unpackhi_epi8(zero, c), 8);
  } else {
    out[0] = (vs)_mm256_unpacklo_epi8(c, zero), out[1] = (vs)_mm256_unpackhi_epi8(c, zero);
  }
#endif
}

// a for the first half of a chunk and b for the second, as they meet the sums of pairs.
INLINE vf by_half(float a, float b) {
#if W == 16
  return vf{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
#else
  return vf{a, a, a, a, b, b, b, b};
#endif
}
#endif

// x (m, k) in fixed point; sums (m, groups), or null, of what it then stands for. whole: x holds small integers. False: it
// cannot be done, as something is not finite, or too small for its step.
static bool to_fixed(const Weight& w, const float* x, int64_t m, int64_t planes, bool whole, Fixed& out, float* sums) {
  const int64_t k = w.k, group = k / w.groups, halves = group < 32 ? 2 : 1;
  int64_t block = MOST_BLOCK;
  while (block > 32 && group % block) block /= 2;
  out.planes = planes, out.unit = block / halves, out.units = k / out.unit;
  for (int64_t t = 0; t < m; t++) {
    for (int64_t at = 0; at < k; at += block) {
      const float* from = x + t * k + at;
      int32_t largest = 0;  // bits of magnitudes are ordered as they are
      for (int64_t i = 0; i < block; i++) {
        int32_t size = load<int32_t>(from + i) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
      }
      const float most = load<float>(&largest);
      if (largest >= 0x7F800000 || (largest && most < 0x1p-80f)) return false;
      const float step = whole ? 1 : most / LARGEST, inverse = step > 0 ? 1 / step : 0;
      for (int64_t plane = 0; plane < planes; plane++) {
        int16_t* to = out.x + (t * planes + plane) * k + at;
        float* of = out.step + (t * planes + plane) * out.units + at / out.unit;
        for (int64_t h = 0; h < halves; h++) of[h] = plane ? step * 0x1p-15f : step;
        // Rounded, half to even.
        for (int64_t i = 0; i < block; i++) {
          float v = from[i];
          if (plane) v = (v - to[i - k] * step) * 0x1p15f;
          to[i] = (int16_t)(int32_t)(v * inverse + 0x1.8p23f - 0x1.8p23f);
        }
      }
    }
  }
  if (sums) {
    for (int64_t i = 0; i < m * w.groups; i++) {
      const int64_t t = i / w.groups, start = i % w.groups * group;
      float total = 0;
      for (int64_t row = t * planes; row < (t + 1) * planes; row++) {
        for (int64_t at = start; at < start + group; at += out.unit) {
          int32_t of_unit = 0;
          for (int64_t j = 0; j < out.unit; j++) of_unit += out.x[row * k + at + j];
          total += of_unit * out.step[row * out.units + at / out.unit];
        }
      }
      sums[i] = total;
    }
  }
  if (W == 8) {
    for (int64_t at = 0; at < m * planes * k; at += 32) {
      int16_t middle[8];
      memcpy(middle, out.x + at + 8, 16);
      memcpy(out.x + at + 8, out.x + at + 16, 16);
      memcpy(out.x + at + 16, middle, 16);
    }
  }
  return true;
}

#if HAS_FIXED
// A block of EACH chunks times T tokens, added to their sums. It has one unit or, of two groups of 16, two.
template <int T, int EACH, int UNITS>
INLINE void block(const uint8_t*& p, const Shorts& table, const int16_t*& x, int64_t k, const float* scales, int64_t units,
                  vf* total) {
  vi part[T] = {};
  UNROLL for (int c = 0; c < EACH; c++, p += 4 * BITS, x += 32) {
    if (c * 4 * BITS % 64 < 4 * BITS) __builtin_prefetch(p + AHEAD);
    vs d[SHORTS];
    decode(p, table, d);
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int i = 0; i < SHORTS; i++)
      part[t] = dot(part[t], d[i], ((const vs*)(x + t * k))[i]);
  }
  UNROLL for (int t = 0; t < T; t++) {
    const float* s = scales + t * units;
    total[t] += __builtin_convertvector(part[t], vf) * (UNITS == 2 ? by_half(s[0], s[1]) : same(s[0]));
  }
}

// One row, T tokens. scales: (T, units). Two sums of each token, so that neither waits for the other.
template <int T, int EACH, int UNITS>
NOT_INLINE void in_fixed_point(const Weight& w, const Shorts& table, const uint8_t* p, const int16_t* x, int64_t units,
                               const float* scales, float* y) {
  const int64_t k = w.k;
  vf total[2][T] = {};
  int64_t u = 0;
  for (; u + 2 * UNITS <= units; u += 2 * UNITS) {
    block<T, EACH, UNITS>(p, table, x, k, scales + u, units, total[0]);
    block<T, EACH, UNITS>(p, table, x, k, scales + u + UNITS, units, total[T <= 2]);
  }
  if (u < units) block<T, EACH, UNITS>(p, table, x, k, scales + u, units, total[0]);
  UNROLL for (int t = 0; t < T; t++) y[t] = sum(total[0][t] + total[1][t]);
}

template <int EACH, int UNITS>
NOT_INLINE void slices(const Weight& w, const Shorts& table, int64_t n, const Fixed& x, const float* scales, int64_t rows,
                       float* y) {
  const uint8_t* p = w.codes + n * w.row_bytes;
  for (int64_t t = 0; t < rows;) {
    const int64_t left = rows - t;
    const int16_t* from = x.x + t * w.k;
    const float* of = scales + t * x.units;
#define SOME(T) in_fixed_point<T, EACH, UNITS>(w, table, p, from, x.units, of, y + t), t += T
    if (W == 16 && left >= 8) SOME(8);
    else if (left >= 4) SOME(4);
    else if (left >= 2) SOME(2);
    else SOME(1);
#undef SOME
  }
}

// One row, m tokens. scratch: (m, planes, units + 1).
INLINE void row_in_fixed_point(const Weight& w, const Shorts& table, int64_t n, const Row& row, const Fixed& x, int64_t m,
                               const float* sums, float* scratch, float* y) {
  const int64_t rows = m * x.planes, units = x.units, each = units / w.groups;
  const float* scales = x.step;
  float* of_rows = x.planes == 1 ? y : scratch + rows * units;
  if (!by_row(w) || LOOKED_UP) {
    scales = scratch;
    for (int64_t t = 0; t < rows; t++) {
      const float* step = x.step + t * units;
      float* to = scratch + t * units;
      if (each == 1) {
        for (int64_t u = 0; u < units; u++) to[u] = row.scale[u] * step[u] * table.factor;
      } else {
        for (int64_t g = 0; g < w.groups; g++)
          for (int64_t u = g * each; u < (g + 1) * each; u++) to[u] = row.scale[g] * step[u] * table.factor;
      }
    }
  }
  switch (x.unit) {
    case 16: slices<1, 2>(w, table, n, x, scales, rows, of_rows); break;
    case 32: slices<1, 1>(w, table, n, x, scales, rows, of_rows); break;
    case 64: slices<2, 1>(w, table, n, x, scales, rows, of_rows); break;
    default: slices<MOST_BLOCK / 32, 1>(w, table, n, x, scales, rows, of_rows);
  }
  if (x.planes == 2) for (int64_t t = 0; t < m; t++) y[t] = of_rows[2 * t] + of_rows[2 * t + 1];
  if (w.shifted) for (int64_t t = 0; t < m; t++) y[t] += row_shift(w, row, sums + t * w.groups);
}
#endif
"""
