// The product of a tile with all columns of one block of a matrix, or two.
// It knows nothing of models.
#pragma once
#include "matrix.h"
#include "upcoming.h"

#if defined(GR_AVX512)
#include "multiply_avx512.h"
#else
#include "multiply_avx2.h"
#endif

constexpr int64_t GROUPS = 3;  // between two calls of `Upcoming::ask`

// out[b][i][0..15] = rows of block `block + b` times the i-th of N rows of x's tile at t, over all groups, b < blocks.
template <int N>
inline void multiply_blocks(const Matrix& m, int64_t block, int blocks, const Input& in, int64_t t, Ahead ahead,
                            Upcoming& upcoming, float (*const out[])[LANES]) {
  for (int64_t begin = 0; begin < m.groups; begin += GROUPS) {
    const int64_t end = std::min(begin + GROUPS, m.groups);
    upcoming.ask();
    if (blocks == 2) multiply<N, 2>(m, block, begin, end, in, t, ahead, out);
    else multiply<N, 1>(m, block, begin, end, in, t, ahead, out);
  }
}

inline void multiply_tile(const Matrix& m, int64_t block, int blocks, const Input& in, int64_t t, Ahead ahead,
                          Upcoming& upcoming, float (*const out[])[LANES]) {
  switch (in.lanes(t)) {  // at most TILE; so many are also compiled
    case 8: return multiply_blocks<std::min<int>(8, TILE)>(m, block, blocks, in, t, ahead, upcoming, out);
    case 7: return multiply_blocks<std::min<int>(7, TILE)>(m, block, blocks, in, t, ahead, upcoming, out);
    case 6: return multiply_blocks<6>(m, block, blocks, in, t, ahead, upcoming, out);
    case 5: return multiply_blocks<5>(m, block, blocks, in, t, ahead, upcoming, out);
    case 4: return multiply_blocks<4>(m, block, blocks, in, t, ahead, upcoming, out);
    case 3: return multiply_blocks<3>(m, block, blocks, in, t, ahead, upcoming, out);
    case 2: return multiply_blocks<2>(m, block, blocks, in, t, ahead, upcoming, out);
    default: return multiply_blocks<1>(m, block, blocks, in, t, ahead, upcoming, out);
  }
}
