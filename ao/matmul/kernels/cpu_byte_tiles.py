"""The C++ of a product of int8 on a CPU whose units multiply tiles of it (AMX): a part of cpu_integers.py.

The weight is the first operand of the units, read where it lies, 16 rows of 64 bytes at a time; nothing is decoded or copied. Tokens
become bytes, four along K beside each other. Quantization, product and scaling are one call, with the bits of `ao_bytes`, an exact
sum and `ao_scaled`.

An activation in two bytes has two tiles for 16 tokens, of the high and of the low ones, whose sums meet in registers. Where there
are zero points, the first column is a token of ones, whose sums are those of the weight.
"""

from .cpu_tile_units import TILE_UNITS

BYTE_TILES = (
    TILE_UNITS
    + r"""
#if HAS_TILES && W == 16
// What units multiply with, of the rows that `ao_bytes` made: columns of tiles, 16 in each.
struct Columns {
  const int8_t* q;  // (rows, k)
  int64_t m, k, zero, halves;
  int64_t tiles() const { return halves ? 2 * ((m + 15) / 16) : (m + zero + 15) / 16; }
  // The row of q that is column c of a tile, or null where there is none.
  const int8_t* at(int64_t tile, int64_t c) const {
    if (halves) {
      const int64_t t = tile / 2 * 16 + c;
      return t < m ? q + (tile % 2 * m + t) * k : 0;
    }
    const int64_t t = 16 * tile + c - zero;
    return t < 0 ? q + m * k : t < m ? q + t * k : 0;
  }
};

// Elements [start, stop) of a tile's columns, words of four bytes beside each other.
NOT_INLINE void pack_columns(const Columns& columns, int64_t tile, int64_t start, int64_t stop, int8_t* out) {
  const int8_t* from[16];
  for (int c = 0; c < 16; c++) from[c] = columns.at(tile, c);
  for (; start < stop; start += 64, out += 1024) {
    vi v[16];
    UNROLL for (int c = 0; c < 16; c++) v[c] = from[c] ? load<vi>(from[c] + start) : vi{};
    turn(v);
    memcpy(out, v, 1024);
  }
}

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
NOT_INLINE void store_scaled(const Scaled& scaled, const Columns& columns, int64_t tile, int64_t at, const int32_t* sums, vi& ones) {
  const int64_t left = scaled.n - at;
  vi first[16], second[16];
  columns_of(sums, first);
  if (columns.halves) columns_of(sums + 256, second);
  if (columns.zero && tile == 0) ones = first[0];
  const int64_t token = columns.halves ? tile / 2 * 16 : 16 * tile - columns.zero;
  for (int64_t c = 0; c < 16 && token + c < columns.m; c++)
    if (token + c >= 0) scaled.put_at(token + c, at, left < 16 ? left : 16, first[c], columns.halves ? second[c] : ones);
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

template <int T> NOT_INLINE void bytes_times(const Tiles& w, const Tiles& x, int64_t steps, bool begin, int64_t ahead, int32_t* sums) {
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
  const int64_t made = act->halves ? 2 * m : m + act->zero;
  int8_t* q = (int8_t*)aligned_alloc(64, (made * k + 63) / 64 * 64);
  float* scales = (float*)aligned_alloc(64, (2 * m * 4 + 63) / 64 * 64);
  ao_bytes(act, x, dtype, m, k, given, q, scales, scales + m, threads);
  const Columns columns = {q, m, k, act->halves ? 0 : act->zero, act->halves};
  const Scaled scaled = {*act, scales, scales + m, of_rows, one, dtype, n, y};
  const int64_t tiles = columns.tiles(), pairs = (tiles + 1) / 2;
  const bool few = pairs == 1, copied = pairs >= BYTE_COPY_FROM;
  int64_t height = few ? 32 : tiles < 16 ? BYTE_HEIGHT / 2 : BYTE_HEIGHT;
  while (height > 32 && n < 3 * height * threads) height /= 2;
  const int64_t depth = few && !copied ? k : BYTE_DEPTH, step = few ? depth : BYTE_STEP, blocks = (k + depth - 1) / depth;
  int8_t* packed = (int8_t*)aligned_alloc(64, tiles * 16 * k);  // (blocks, tiles, 16 x depth)
  const int64_t piece = 512, pieces = (k + piece - 1) / piece;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t p = 0; p < pieces; p++) {
        const int64_t at = p * piece, start = at / depth * depth, wide = least(depth, k - start);
        pack_columns(columns, t, at, least(at + piece, k), packed + 16 * (start * tiles + t * wide + at - start));
      }
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
              const int64_t steps = least(stop - start - at, step) / 64, ahead = BYTE_AHEAD && t == 0 && r < whole ? 32 * stride : 0;
              int32_t* to = sums + (t * height + r) * 32;
              if (2 * t + 1 < tiles) bytes_times<2>(a, b, steps, start + at == 0, ahead, to);
              else bytes_times<1>(a, b, steps, start + at == 0, ahead, to);
            }
      }
      vi ones[BYTE_HEIGHT / 16] = {};
      for (int64_t t = 0; t < tiles; t += 1 + columns.halves)
        for (int64_t r = 0; r < count; r += 16)
          store_scaled(scaled, columns, t, from + r, sums + (t / 2 * height + r / 32 * 32) * 32 + r / 16 % 2 * 512 + t % 2 * 256,
                       ones[r / 16]);
    }
    TILES_END();
    free(panel);
    free(sums);
  }
  free(packed);
  free(scales);
  free(q);
}
#endif
"""
)
