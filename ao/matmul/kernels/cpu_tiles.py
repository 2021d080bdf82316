"""The C++ of a product on a CPU whose units multiply tiles of bfloat16 (AMX): a part of cpu_source.py.

The weight is the first operand of the units, whose tiles are rows as `dense_bf16` decodes them, and the tokens are the second. So
the weight is read once, packed, and what is put in another order is the activation, which is small.

What a thread decodes at a time, a panel, stays in its caches until all tokens have met it. Up to 32 tokens it is 32 rows and 512
elements, in the first-level cache, and the sums stay in tiles from one panel to the next. Beyond, it is up to 256 rows and 1024
elements in the second-level cache, which meet 32 tokens after 32, in steps of 256 elements, of which tokens stay in the first.
"""

from .cpu_tile_units import TILE_UNITS

TILES = (
    TILE_UNITS
    + r"""
#if HAS_TILES && defined(__AVX512BW__)
// 16 vectors of 16 words of 32 bits as their columns.
INLINE void transpose(__m512i* v) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
    v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
    v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
  }
  // Column 4 l + j of rows 4 i to 4 i + 3 is lane l of v[4 i + j].
  UNROLL for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xDD), d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xDD);
    t[j] = _mm512_shuffle_i32x4(a, b, 0x88), t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xDD);
    t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88), t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xDD);
  }
  UNROLL for (int i = 0; i < 16; i++) v[i] = t[i];
}

// Elements [start, stop) of 16 tokens of x (m, k) from `first` on, as the second operand of tiles. Those beyond the last
// token are zeros.
NOT_INLINE void pack_tokens(const uint16_t* x, int64_t m, int64_t k, int64_t first, int64_t start, int64_t stop, uint16_t* out) {
  for (; start < stop; start += 32, out += 512) {
    __m512i v[16];
    UNROLL for (int t = 0; t < 16; t++)
      v[t] = first + t < m ? _mm512_loadu_si512(x + (first + t) * k + start) : _mm512_setzero_si512();
    transpose(v);
    UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 32 * i, v[i]);
  }
}

// Sums of 16 rows and of `tokens` tokens to y (m, stride), of `left` rows from the first on.
NOT_INLINE void store_sums(const float* sums, int64_t tokens, int64_t left, uint16_t* y, int64_t stride) {
  const __mmask16 there = left < 16 ? (1 << left) - 1 : 0xFFFF;
  __m512i v[16];
  UNROLL for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(sums + 16 * i);
  transpose(v);
  alignas(64) vf by_token[16];
  UNROLL for (int i = 0; i < 16; i++) by_token[i] = (vf)v[i];
  for (int64_t t = 0; t < tokens; t++) _mm256_mask_storeu_epi16(y + t * stride, there, to_bf16s(by_token[t]));
}

// Scales and shifts of rows [first, first + count): (2, groups) of each.
static void read_rows(const Weight& w, int64_t first, int64_t count, float* out) {
  for (int64_t r = 0; r < count; r++) {
    Row row = {out + 2 * r * w.groups, out + (2 * r + 1) * w.groups, -1};
    if (by_row(w)) read_scale(w, first + r, row.scale);
    else read_row(w, first + r, row);
  }
}

#if !defined(RUN)
#define RUN 512  // elements of a row that are decoded before the next row is
#endif

// Elements [start, stop) of rows [first, first + count), as tiles of 16 rows, one after the other along K. Sixteen rows fill a
// tile together, while it is in the first-level cache. ahead: rows from what is read to what is asked for.
static void decode_panel(Scratch& scratch, const Table& table, float* of_rows, int64_t first, int64_t count, int64_t start,
                         int64_t stop, int64_t ahead, uint16_t* out) {
  const Weight& w = scratch.weight;
  for (int64_t r = 0; r < count; r += 16, out += 16 * (stop - start))
    for (int64_t at = start; at < stop; at += RUN) {
      const Run run(w, at, least(at + RUN, stop));
      for (int64_t i = r; i < least(r + 16, count); i++) {
        float* scale = of_rows + 2 * i * w.groups;
        scratch.meet(first + i, run.start, run.stop);
        dense_bf16(w, table, first + i, {scale, scale + w.groups, -1}, run, out + 16 * (at - start) + i % 16 * 32, 512,
                   ahead * w.row_bytes);
      }
    }
}

#if !defined(TILE_HEIGHT)
#define TILE_HEIGHT 256
#endif
#if !defined(TILE_DEPTH)
#define TILE_DEPTH 1024
#endif
#if !defined(TILE_STEP)
#define TILE_STEP 256
#endif

// The sums of a panel of `steps` tiles along K with 16 T tokens, added to `sums`; of the first tiles of a row if `begin`.
template <int T> NOT_INLINE void panel_times(const Tiles& w, const Tiles& x, int64_t steps, bool begin, float* sums) {
  if (begin) sums_zero<T>();
  else sums_load<T>(sums);
  sums_add<T, false>(w, x, steps, 0);
  sums_store<T>(sums);
}

// y (m, n) = x (m, k) times the weight, both in bfloat16, by units that multiply tiles.
extern "C" void ao_tiles(const Weight* weight, const uint16_t* x, int64_t m, uint16_t* y, int32_t threads) {
  const int64_t k = weight->k, rows = weight->n, token_tiles = (m + 15) / 16, pairs = (m + 31) / 32;
  const bool few = pairs == 1;
  int64_t height = few ? 32 : m < TILE_HEIGHT ? TILE_HEIGHT / 2 : TILE_HEIGHT;
  while (height > 32 && rows < 3 * height * threads) height /= 2;
  const int64_t depth = few ? RUN : TILE_DEPTH, blocks = (k + depth - 1) / depth;
  uint16_t* packed = (uint16_t*)floats(token_tiles * 8 * k);  // (blocks, token_tiles, 16 x depth)
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t t = 0; t < token_tiles; t++) {
        const int64_t start = b * depth, stop = least(start + depth, k);
        pack_tokens(x, m, k, 16 * t, start, stop, packed + 16 * (start * token_tiles + t * (stop - start)));
      }
    const Table table = table_of(weight->table);
    Scratch scratch(*weight, 0);
    uint16_t* panel = (uint16_t*)floats(height * depth / 2);
    float* sums = floats(pairs * height * 32);  // (pairs, height / 32, 2, 2, 16, 16)
    float* of_rows = floats(2 * height * weight->groups);
    memset(panel, 0, height * depth * 2);
    TILES_BEGIN();
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < rows; first += height) {
      const int64_t count = least(rows - first, height);
      read_rows(scratch.weight, first, count, of_rows);
      for (int64_t start = 0; start < k; start += depth) {
        const int64_t stop = least(start + depth, k), tall = 32 * (stop - start);
        decode_panel(scratch, table, of_rows, first, count, start, stop, few ? 32 : 16, panel);
        const uint8_t* tokens = (const uint8_t*)(packed + 16 * start * token_tiles);
        if (few) {
          // Sums stay in tiles.
          const Tiles a = {(const uint8_t*)panel, 64, 1024, tall}, b = {tokens, 64, 1024, tall};
          if (token_tiles == 2) {
            if (start == 0) sums_zero<2>();
            sums_add<2, false>(a, b, (stop - start) / 32, 0);
            if (stop == k) sums_store<2>(sums);
          } else {
            if (start == 0) sums_zero<1>();
            sums_add<1, false>(a, b, (stop - start) / 32, 0);
            if (stop == k) sums_store<1>(sums);
          }
        } else {
          for (int64_t t = 0; t < pairs; t++)
            for (int64_t at = 0; at < stop - start; at += TILE_STEP)
              for (int64_t r = 0; r < count; r += 32) {
                const Tiles a = {(const uint8_t*)panel + r * (tall / 16) + 32 * at, 64, 1024, tall};
                const Tiles b = {tokens + 2 * t * tall + 32 * at, 64, 1024, tall};
                const int64_t steps = least(stop - start - at, TILE_STEP) / 32;
                float* to = sums + (t * height + r) * 32;
                if (2 * t + 1 < token_tiles) panel_times<2>(a, b, steps, start + at == 0, to);
                else panel_times<1>(a, b, steps, start + at == 0, to);
              }
        }
      }
      for (int64_t t = 0; t < token_tiles; t++)
        for (int64_t r = 0; r < count; r += 16)
          store_sums(sums + (t / 2 * height + r / 32 * 32) * 32 + r / 16 % 2 * 512 + t % 2 * 256, least(m - 16 * t, 16),
                     count - r, y + 16 * t * rows + first + r, rows);
    }
    TILES_END();
    free(panel);
    free(sums);
    free(of_rows);
  }
  free(packed);
}
#endif
"""
)
