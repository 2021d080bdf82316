"""The C++ of a step on a CPU: all of it but the formulas, which are printed from the rule and the formats (cpu_step.py).

A block of the states at a time: it is decoded, the rule makes the new parameters and states, the largest of these in
magnitude gives the scale, and the codes are made. What lies between stays in the first-level cache: memory is read once and
written once.
"""

SOURCE = r"""
#if !defined(__clang__)
#pragma GCC optimize("schedule-insns", "sched-pressure")  // else each vector waits for its own chain of operators
#endif

#define MOST 2048  // elements of a block

struct Fields {
  uint8_t* codes;  // of a state that is quantized
  float* scale;    // one per block; or the numbers themselves
};

#define SIZE(dtype) (dtype == F32 ? 4 : 2)

// Ask for memory that is soon to be read.
INLINE void fetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// One block, or a piece of full-precision states: n elements, a multiple of 32.
INLINE void block(char* param, const char* grad, const Fields* fields, int64_t row, int64_t n, const vf* h, int32_t seed,
                  int32_t position) {
  alignas(64) float kept[STATES + 1][MOST + 272];
  vi largest[STATES + 1] = {};
  vf scale[STATES + 1], inverse[STATES + 1];
  const int64_t first = row * n;
  const vi lanes = IOTA;
  UNROLL for (int s = 0; s < STATES; s++) scale[s] = BITS[s] ? same(fields[s].scale[row]) : same(0.0f);
  for (int64_t c = 0; c < n; c += 32) {
    vf p[32 / W];
    UNROLL for (int i = 0; i < 32; i += W) {
      vf old[STATES + 1], made[STATES + 1];
      UNROLL for (int s = 0; s < STATES; s++) {
        if (BITS[s] == 0) { old[s] = load<vf>(fields[s].scale + first + c + i); continue; }
        vi q = BITS[s] == 8 ? from_bytes(fields[s].codes + first + c + i)
                            : from_bytes(fields[s].codes + (first + c) / 2 + i % 16);
        if (BITS[s] == 4) q = i < 16 ? q & 15 : (q >> 4) & 15;
        decode(s, q, scale[s], old[s]);
      }
      rule(floats(param, first + c + i, PARAM), floats(grad, first + c + i, GRAD), old, h,
           same(seed), lanes + (int32_t)(position + c + i), p[i / W], made);
      UNROLL for (int s = 0; s < STATES; s++) {
        if (BITS[s] == 0) { store(fields[s].scale + first + c + i, made[s]); continue; }
        store(&kept[s][c + i], made[s]);
        largest[s] = at_least(largest[s], (vi)made[s] & 0x7FFFFFFF);
      }
    }
    put<32 / W>(param, first + c, p, ROUNDED);
  }
  UNROLL for (int s = 0; s < STATES; s++) {
    if (BITS[s] == 0) continue;
    int32_t most = 0;
    UNROLL for (int i = 0; i < W; i++) most = largest[s][i] > most ? largest[s][i] : most;
    scales(s, (vf)same(most), scale[s], inverse[s]);
    fields[s].scale[row] = scale[s][0];
  }
  if (BITS[0] == 0) return;
  for (int64_t c = 0; c < n; c += 32) {
    fetch(param + (first + n + c) * SIZE(PARAM), 32 * SIZE(PARAM));
    fetch(grad + (first + n + c) * SIZE(GRAD), 32 * SIZE(GRAD));
    UNROLL for (int s = 0; s < STATES; s++) {
      vi q[32 / W];
      UNROLL for (int i = 0; i < 32 / W; i++) encode(s, load<vf>(&kept[s][c + i * W]), inverse[s], q[i]);
      if (BITS[s] == 8) { to_bytes<32 / W>(fields[s].codes + first + c, q); continue; }
      UNROLL for (int i = 0; i < 16 / W; i++) q[i] |= q[i + 16 / W] << 4;
      to_bytes<16 / W>(fields[s].codes + (first + c) / 2, q);
    }
  }
}

// n elements of a state in full precision each, fewer than 32.
static void rest(char* param, const char* grad, const Fields* fields, int64_t first, int64_t n, const vf* h, int32_t seed,
                 int32_t position) {
  char p[32 * 4] = {}, g[32 * 4] = {};
  float s[STATES + 1][32] = {};
  Fields mine[STATES + 1] = {};
  memcpy(p, param + first * SIZE(PARAM), n * SIZE(PARAM));
  memcpy(g, grad + first * SIZE(GRAD), n * SIZE(GRAD));
  for (int i = 0; i < STATES; i++) mine[i].scale = s[i], memcpy(s[i], fields[i].scale + first, n * 4);
  block(p, g, mine, 0, 32, h, seed, position);
  memcpy(param + first * SIZE(PARAM), p, n * SIZE(PARAM));
  for (int i = 0; i < STATES; i++) memcpy(fields[i].scale + first, s[i], n * 4);
}

// rows of n elements, and `more` elements, where no state is quantized. hyper: the numbers of the rule. seed, position: of
// random bits, the number of the first element.
extern "C" void ao_step(char* param, const char* grad, const Fields* fields, const float* hyper, int64_t rows, int64_t n,
                        int64_t more, int32_t seed, int32_t position, int32_t threads) {
  vf h[HYPER + 1];
  for (int i = 0; i < HYPER; i++) h[i] = same(hyper[i]);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; row++)
    block(param, grad, fields, row, n, h, seed, (int32_t)((uint32_t)position + (uint32_t)(row * n)));
  for (int64_t i = rows * n; i < rows * n + more; i += 32)
    rest(param, grad, fields, i, rows * n + more - i < 32 ? rows * n + more - i : 32, h, seed,
         (int32_t)((uint32_t)position + (uint32_t)i));
}
"""
