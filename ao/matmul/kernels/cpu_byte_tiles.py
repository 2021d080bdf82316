"""The C++ of a product of int8 on a CPU whose units multiply tiles of it (AMX): a part of cpu_integers.py.

The weight is the first operand of the units, read where it lies, 16 rows of 64 bytes at a time; nothing is decoded or copied.
Tokens become bytes, four along K beside each other. Quantization, product and scaling are one call, with the bits of `ao_bytes`,
an exact sum and `ao_scaled`.

An activation in two bytes has two tiles for 16 tokens, of the high and of the low ones, whose sums meet in registers. Where there
are zero points, the first column is a token of ones, whose sums are those of the weight.
"""

from .cpu_tile_units import TILE_UNITS

BYTE_TILES = (
    TILE_UNITS
    + r"""
#if HAS_TILES && W == 16
// The columns of tiles: tokens after one of ones, or none; of halves a tile of high bytes and one of low bytes for each 16.
struct Columns {
  const Bytes& bytes;
  int64_t zero, tiles, depth;
  float *scale, *zeros;

  // Sixteen columns, as bytes and then as tiles along K, words of four bytes beside each other. After `depth` elements of a tile
  // come those of the next. made: memory for 16 rows, of halves 32.
  void pack(int64_t tile, int8_t* made, int8_t* packed) const {
    const int64_t k = bytes.k, first = bytes.act.halves ? tile / 2 * 16 : 16 * tile - zero;
    for (int64_t c = 0; c < 16; c++) {
      const int64_t t = first + c;
      if (t < 0 || t >= bytes.m) memset(made + c * k, t < 0, k), memset(made + (c + 16) * k, 0, bytes.act.halves ? k : 0);
      else bytes.token(t, made + c * k, made + (c + 16) * k, scale + t, zeros + t);
    }
    for (int64_t half = 0; half < 1 + bytes.act.halves; half++)
      for (int64_t at = 0; at < k; at += 64) {
        const int64_t start = at / depth * depth;
        vi v[16];
        UNROLL for (int c = 0; c < 16; c++) v[c] = load<vi>(made + (16 * half + c) * k + at);
        turn(v);
        memcpy(packed + 16 * (start * tiles + (tile + half) * least(depth, k - start) + at - start), v, 1024);
      }
  }
};

// Bytes [start, stop) of rows as tiles of 16 rows, one after the other along K.
NOT_INLINE void copy_panel(const int8_t* rows, int64_t stride, int64_t count, int64_t start, int64_t stop, int8_t* out) {
  const int64_t run = 512;
  for (int64_t r = 0; r < count; r += 16, out += 16 * (stop - start))
    for (int64_t at = start; at < stop; at += run)
      for (int64_t i = r; i < least(r + 16, count); i++)
        for (int64_t j = at; j < least(at + run, stop); j += 64) {
          __builtin_prefetch(rows + (i + 16) * stride + j, 0, 2);
          memcpy(out + 16 * (j - start) + i % 16 * 64, rows + i * stride + j, 64);
        }
}

// Sums of 16 rows and a tile of columns; of halves, of two tiles. ones: the sums of the rows, which the first column gives.
NOT_INLINE void store_scaled(const Scaled& scaled, int64_t m, int64_t tile, int64_t at, const int32_t* sums, vi& ones) {
  const int64_t left = least(scaled.n - at, 16);
  const bool halves = scaled.act.halves, zero = scaled.act.zero;
  vi first[16], second[16];
  columns_of(sums, first);
  if (halves) columns_of(sums + 256, second);
  if (zero && tile == 0) ones = first[0];
  const int64_t token = halves ? tile / 2 * 16 : 16 * tile - zero;
  const vf w = scaled.weight(at, left);
  for (int64_t c = token < 0; c < 16 && token + c < m; c++)
    scaled.put_at(token + c, at, left, w, first[c], halves ? second[c] : ones);
}

#if !defined(BYTE_HEIGHT)
#define BYTE_HEIGHT 256
#endif
#if !defined(BYTE_DEPTH)
#define BYTE_DEPTH 2048
#endif
#if !defined(BYTE_STEP)
#define BYTE_STEP 512
#endif
#if !defined(BYTE_COPY_FROM)
#define BYTE_COPY_FROM (1 << 30)  // pairs of tiles from which on rows are copied into a panel first
#endif
#if !defined(BYTE_AHEAD)
#define BYTE_AHEAD 1
#endif

template <int T>
NOT_INLINE void bytes_times(const Tiles& w, const Tiles& x, int64_t steps, bool begin, int64_t ahead, int32_t* sums) {
  if (begin) sums_zero<T>();
  else sums_load<T>(sums);
  sums_add<T, true>(w, x, steps, ahead);
  sums_store<T>(sums);
}

// y (m, n) = x (m, k) as `act` quantizes it, times the codes (n, k), `stride` apart. x and y: F32 or BF16. k: whole tiles of 64.
// given: the scale of x, or null. of_rows: scales of the weight, (n,) or, `one`, (1,).
extern "C" void ao_byte_tiles(const Act* act, const void* x, int32_t dtype, int64_t m, int64_t k, const float* given,
                              const int8_t* codes, int64_t stride, int64_t n, const float* of_rows, int32_t one, void* y,
                              int32_t threads) {
  const bool halves = act->halves;
  const int64_t zero = halves ? 0 : act->zero, tiles = halves ? 2 * ((m + 15) / 16) : (m + zero + 15) / 16;
  const int64_t pairs = (tiles + 1) / 2;
  const bool few = pairs == 1, copied = pairs >= BYTE_COPY_FROM;
  int64_t height = few ? 32 : tiles < 16 ? BYTE_HEIGHT / 2 : BYTE_HEIGHT;
  while (height > 32 && n < 3 * height * threads) height /= 2;
  const int64_t depth = few && !copied ? k : BYTE_DEPTH, step = few ? depth : BYTE_STEP;
  int8_t* packed = (int8_t*)aligned_alloc(64, tiles * 16 * k);  // (blocks, tiles, 16 x depth)
  float* scales = (float*)aligned_alloc(64, (2 * m * 4 + 63) / 64 * 64);
  const Bytes bytes(*act, x, dtype, m, k, given);
  const Columns columns = {bytes, zero, tiles, depth, scales, scales + m};
  const Scaled scaled = {*act, scales, scales + m, of_rows, one, dtype, n, y};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int8_t* made = (int8_t*)aligned_alloc(64, (1 + halves) * 16 * k);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; t += 1 + halves) columns.pack(t, made, packed);
    free(made);
    int8_t* panel = (int8_t*)aligned_alloc(64, copied ? height * depth : 32 * depth);
    int32_t* sums = (int32_t*)aligned_alloc(64, pairs * height * 128);  // (pairs, height / 32, 2, 2, 16, 16)
    TILES_BEGIN();
#pragma omp for schedule(dynamic)
    for (int64_t from = 0; from < n; from += height) {
      const int64_t count = least(n - from, height);
      const int8_t* rows = codes + from * stride;
      for (int64_t start = 0; start < k; start += depth) {
        const int64_t stop = least(start + depth, k), tall = 16 * (stop - start), whole = copied ? 0 : count / 32 * 32;
        // The last rows, if they are no whole tiles, are copied in any case.
        if (whole < count) {
          memset(panel + (count - whole) / 16 * tall, 0, (count - whole) % 32 ? 2 * tall - (count - whole) % 32 / 16 * tall : 0);
          copy_panel(rows + whole * stride, stride, count - whole, start, stop, panel);
        }
        for (int64_t t = 0; t < pairs; t++)
          for (int64_t at = 0; at < stop - start; at += step)
            for (int64_t r = 0; r < count; r += 32) {
              Tiles a = {(const uint8_t*)rows + r * stride + start + at, stride, 64, 16 * stride};
              if (r >= whole) a = {(const uint8_t*)panel + (r - whole) / 16 * tall + 16 * at, 64, 1024, tall};
              const Tiles b = {(const uint8_t*)packed + 16 * start * tiles + 2 * t * tall + 16 * at, 64, 1024, tall};
              const int64_t steps = least(stop - start - at, step) / 64;
              const int64_t ahead = BYTE_AHEAD && t == 0 && r < whole ? 32 * stride : 0;
              int32_t* to = sums + (t * height + r) * 32;
              if (2 * t + 1 < tiles) bytes_times<2>(a, b, steps, start + at == 0, ahead, to);
              else bytes_times<1>(a, b, steps, start + at == 0, ahead, to);
            }
      }
      vi ones[BYTE_HEIGHT / 16] = {};
      for (int64_t t = 0; t < tiles; t += 1 + halves)
        for (int64_t r = 0; r < count; r += 16)
          store_scaled(scaled, m, t, from + r, sums + (t / 2 * height + r / 32 * 32) * 32 + r / 16 % 2 * 512 + t % 2 * 256,
                       ones[r / 16]);
    }
    TILES_END();
    free(panel);
    free(sums);
  }
  free(packed);
  free(scales);
}
#endif
"""
)
