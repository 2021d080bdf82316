"""The C++ of units that multiply tiles (AMX), which the products in cpu_tiles.py and cpu_byte_tiles.py have in common.

A tile is 16 rows of 64 bytes: 32 numbers of bfloat16 or 64 of int8. Units multiply a tile of the weight by one of tokens, of
which 4 bytes along K lie side by side, and add 16 x 16 sums of 32 bits to a third tile. That takes 16 cycles, in which a
first-level cache gives two tiles, and the second level less than one. So four tiles of sums, of 32 rows and 32 tokens, meet two
of rows and two of tokens: one tile is read for each multiplication.

Where a CPU has no such units tests write them out, by EMULATED_TILES.
"""

TILE_UNITS = r"""
#if defined(__AMX_TILE__) || defined(EMULATED_TILES)
#define HAS_TILES 1
#if defined(EMULATED_TILES)
static thread_local uint8_t tile_registers[8][16][64];
static void tile_load(int i, const void* p, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(tile_registers[i][r], (const uint8_t*)p + r * stride, 64);
}
static void tile_store(int i, void* p) { memcpy(p, tile_registers[i], 1024); }
template <bool BYTES> static void tile_multiply(int c, int a, int b) {
  for (int r = 0; r < 16; r++)
    for (int n = 0; n < 16; n++) {
      uint8_t* to = tile_registers[c][r] + 4 * n;
      if (BYTES) {
        int32_t sum = load<int32_t>(to);
        for (int k = 0; k < 64; k++) sum += (int8_t)tile_registers[a][r][k] * (int8_t)tile_registers[b][k / 4][4 * n + k % 4];
        memcpy(to, &sum, 4);
        continue;
      }
      float sum = load<float>(to);
      for (int k = 0; k < 32; k++) {
        const uint32_t x = (uint32_t)load<uint16_t>(tile_registers[a][r] + 2 * k) << 16;
        const uint32_t y = (uint32_t)load<uint16_t>(tile_registers[b][k / 2] + 4 * n + 2 * (k % 2)) << 16;
        sum += load<float>(&x) * load<float>(&y);
      }
      memcpy(to, &sum, 4);
    }
}
#define TILES_BEGIN()
#define TILES_END()
#define TILE_ZERO(i) memset(tile_registers[i], 0, 1024)
#define TILE_LOAD(i, p, stride) tile_load(i, p, stride)
#define TILE_STORE(i, p) tile_store(i, p)
#define TILE_MULTIPLY(c, a, b) tile_multiply<BYTES>(c, a, b)
#else
// By name, as the header of instructions has them, which lets a compiler put stores behind a load.
struct alignas(64) TileConfig { uint8_t palette, start, none[14]; uint16_t width[16]; uint8_t rows[16]; };
#define TILES_BEGIN() \
  TileConfig config = {1}; \
  for (int i = 0; i < 8; i++) config.width[i] = 64, config.rows[i] = 16; \
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory")
#define TILES_END() __asm__ volatile("tilerelease" ::: "memory")
#define TILE_ZERO(i) __asm__ volatile("tilezero %%tmm" #i ::: "memory")
#define TILE_LOAD(i, p, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #i ::"r"((const void*)(p)), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(i, p) __asm__ volatile("tilestored %%tmm" #i ", (%0,%1,1)" ::"r"((void*)(p)), "r"((int64_t)64) : "memory")
#define TILE_MULTIPLY(c, a, b) \
  if (BYTES) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory"); \
  else __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")
#endif

// Two tiles beside each other, `second` bytes apart, whose rows are `stride` bytes apart, and the next two along K.
struct Tiles {
  const uint8_t* at;
  int64_t stride, next, second;
};

// The sums of 32 rows of the weight and 16 T tokens: (2, 2, 16, 16), by tiles of rows and of tokens, (row, token) each.
template <int T> INLINE void sums_zero() {
  TILE_ZERO(0);
  TILE_ZERO(2);
  if (T == 2) {
    TILE_ZERO(1);
    TILE_ZERO(3);
  }
}
template <int T> INLINE void sums_load(const void* from) {
  const uint8_t* p = (const uint8_t*)from;
  TILE_LOAD(0, p, 64);
  TILE_LOAD(2, p + 2048, 64);
  if (T == 2) {
    TILE_LOAD(1, p + 1024, 64);
    TILE_LOAD(3, p + 3072, 64);
  }
}
template <int T> INLINE void sums_store(void* to) {
  uint8_t* p = (uint8_t*)to;
  TILE_STORE(0, p);
  TILE_STORE(2, p + 2048);
  if (T == 2) {
    TILE_STORE(1, p + 1024);
    TILE_STORE(3, p + 3072);
  }
}

// Adds the products of `steps` tiles along K. ahead: bytes to rows that are needed later, which are asked for, or 0.
template <int T, bool BYTES> INLINE void sums_add(const Tiles& w, const Tiles& x, int64_t steps, int64_t ahead) {
  const uint8_t *a = w.at, *b = x.at;
  for (int64_t i = 0; i < steps; i++, a += w.next, b += x.next) {
    TILE_LOAD(4, a, w.stride);
    TILE_LOAD(6, b, x.stride);
    TILE_MULTIPLY(0, 4, 6);
    if (T == 2) {
      TILE_LOAD(7, b + x.second, x.stride);
      TILE_MULTIPLY(1, 4, 7);
    }
    TILE_LOAD(5, a + w.second, w.stride);
    TILE_MULTIPLY(2, 5, 6);
    if (T == 2) {
      TILE_MULTIPLY(3, 5, 7);
    }
    if (ahead) for (int r = 0; r < 32; r++) __builtin_prefetch(a + ahead + r * w.stride, 0, 2);
  }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
#endif
"""
