"""The C++ of a product on a CPU whose units multiply tiles of bfloat16 (AMX): a part of cpu_source.py.

The weight is the first operand of the units, whose tiles are rows as `dense_bf16` decodes them, and the tokens are the second. So
the weight is read once, packed, and what is put in another order is the activation, which is small.
"""

TILES = r"""
#if defined(__AMX_BF16__) || defined(EMULATED_TILES)
// A tile is 16 rows of 64 bytes. c += a * b of 16 x 32 and 32 x 16 numbers of bfloat16, of which b has pairs side by side.
#if defined(EMULATED_TILES)
static thread_local uint8_t registers[8][16][64];
static void tile_load(int i, const void* p, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(registers[i][r], (const uint8_t*)p + r * stride, 64);
}
static void tile_store(int i, void* p, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy((uint8_t*)p + r * stride, registers[i][r], 64);
}
static void tile_multiply(int c, int a, int b) {
  for (int r = 0; r < 16; r++)
    for (int n = 0; n < 16; n++) {
      float sum = load<float>(registers[c][r] + 4 * n);
      for (int k = 0; k < 32; k++)
        sum += bf16(load<uint16_t>(registers[a][r] + 2 * k)) * bf16(load<uint16_t>(registers[b][k / 2] + 4 * n + 2 * (k % 2)));
      memcpy(registers[c][r] + 4 * n, &sum, 4);
    }
}
#define TILES_BEGIN()
#define TILES_END()
#define TILE_ZERO(i) memset(registers[i], 0, 1024)
#define TILE_LOAD(i, p) tile_load(i, p, 64)
#define TILE_STORE(i, p) tile_store(i, p, 64)
#define TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b)
#else
struct alignas(64) TileConfig { uint8_t palette, start, none[14]; uint16_t width[16]; uint8_t rows[16]; };
#define TILES_BEGIN() \
  TileConfig config = {1}; \
  for (int i = 0; i < 8; i++) config.width[i] = 64, config.rows[i] = 16; \
  _tile_loadconfig(&config)
#define TILES_END() _tile_release()
#define TILE_ZERO(i) _tile_zero(i)
#define TILE_LOAD(i, p) _tile_loadd(i, p, 64)
#define TILE_STORE(i, p) _tile_stored(i, p, 64)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

// 32 rows of the weight times 16 T tokens: out (2, 2, 16, 16), by tiles of rows and of tokens, (row, token) each.
template <int T> INLINE void tiles_of(const uint16_t* w, const uint16_t* x, int64_t k, float* out) {
  TILE_ZERO(0);
  TILE_ZERO(2);
  if (T == 2) {
    TILE_ZERO(1);
    TILE_ZERO(3);
  }
  for (int64_t at = 0; at < 16 * k; at += 512) {
    TILE_LOAD(4, w + at);
    TILE_LOAD(6, x + at);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(5, w + 16 * k + at);
    TILE_MULTIPLY(2, 5, 6);
    if (T == 2) {
      TILE_LOAD(7, x + 16 * k + at);
      TILE_MULTIPLY(1, 4, 7);
      TILE_MULTIPLY(3, 5, 7);
    }
  }
  TILE_STORE(0, out);
  TILE_STORE(2, out + 512);
  if (T == 2) {
    TILE_STORE(1, out + 256);
    TILE_STORE(3, out + 768);
  }
}

// 16 tokens of x (m, k) from `first` on, as the second operand of tiles; those beyond the last one are zeros.
NOT_INLINE void pack_tokens(const uint16_t* x, int64_t m, int64_t k, int64_t first, uint16_t* out) {
  const __mmask16 there = m - first < 16 ? (1 << (m - first)) - 1 : 0xFFFF;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)(k / 2)));
  for (int64_t pair = 0; pair < k / 2; pair++, out += 32)
    _mm512_storeu_si512(out, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, index, x + first * k + 2 * pair, 4));
}

// y (m, n) = x (m, k) times the weight, both in bfloat16, by units that multiply tiles. Rows are decoded into tiles that stay in
// the second-level cache, and meet all tokens.
extern "C" void ao_tiles(const Weight* weight, const uint16_t* x, int64_t m, uint16_t* y, int32_t threads) {
  const int64_t k = weight->k, rows = weight->n, token_tiles = (m + 15) / 16;
  uint16_t* packed = (uint16_t*)floats(token_tiles * 8 * k);
  int64_t height = 128;
  while (height > 32 && rows < height * threads) height /= 2;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < token_tiles; t++) pack_tokens(x, m, k, 16 * t, packed + t * 16 * k);
    const Table table = table_of(weight->table);
    Scratch scratch(*weight, 0);
    const Weight w = scratch.weight;
    uint16_t* panel = (uint16_t*)floats(height * k / 2);
    memset(panel, 0, height * k * 2);
    alignas(64) float out[1024];
    const __m512i lanes = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    TILES_BEGIN();
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < rows; first += height) {
      const int64_t count = rows - first < height ? rows - first : height;
      for (int64_t r = 0; r < count; r++) {
        const int64_t n = first + r;
        scratch.meet(n);
        read_row(w, n, scratch.row);
        if (by_row(w)) read_scale(w, n, scratch.row.scale);
        dense_bf16(w, table, n, scratch.row, panel + r / 16 * 16 * k + r % 16 * 32, 512);
      }
      for (int64_t t = 0; t < token_tiles; t += 2)
        for (int64_t r = 0; r < count; r += 32) {
          if (t + 1 < token_tiles) tiles_of<2>(panel + r * k, packed + t * 16 * k, k, out);
          else tiles_of<1>(panel + r * k, packed + t * 16 * k, k, out);
          const int64_t last = m - 16 * t < 32 ? m - 16 * t : 32;
          for (int64_t j = 0; j < last; j++)
            for (int64_t half = 0; half < 2 && r + 16 * half < count; half++) {
              const int64_t left = count - r - 16 * half;
              __m512 v = _mm512_i32gather_ps(lanes, out + 512 * half + 256 * (j / 16) + j % 16, 4);
              _mm256_mask_storeu_epi16(y + (16 * t + j) * rows + first + r + 16 * half, left < 16 ? (1 << left) - 1 : 0xFFFF,
                                       to_bf16s((vf)v));
            }
        }
    }
    TILES_END();
    free(panel);
  }
  free(packed);
}
#endif
"""
