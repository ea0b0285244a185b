// Packed matrices and the product of a few rows with one: y[t] = W x[t].
// It knows nothing of models.
// Read first: W [rows, cols] lies in blocks of 16 rows; a block holds, step by step along the columns, 64 bytes: 16 rows
// times 4 codes, 2 bfloat16 or 1 float. So one load feeds 16 outputs, and inputs are broadcast. Two blocks lie together,
// step by step in turn, since two of them and eight inputs keep all multipliers busy. Columns are padded to whole groups
// of 64, rows to whole blocks. A result depends on its own row of x alone, whatever else is in the batch.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"
#include "upcoming.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

constexpr int64_t GROUP = 64;  // columns that share a scale, in inputs and in weights of 8 bits; of 4 bits: half as many
constexpr int64_t TILE = 8;    // rows of x that are multiplied at once, with two blocks

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Zeroed memory in huge pages where the kernel has them: a third more bandwidth when weights are streamed.
struct Pages {
  uint8_t* data = nullptr;
  size_t bytes = 0;

  explicit Pages(size_t wanted) : bytes(up(int64_t(std::max<size_t>(wanted, 1)), 2 << 20)) {
    void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    madvise(got, bytes, MADV_HUGEPAGE);
    data = static_cast<uint8_t*>(got);
  }
  ~Pages() { munmap(data, bytes); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
};

// Pieces of pages, one after the other, so that small matrices share them; given back all at once.
class Arena {
 public:
  uint8_t* take(size_t wanted) {
    wanted = size_t(up(int64_t(wanted), 4096));
    if (chunks_.empty() || used_ + wanted > chunks_.back()->bytes) {
      chunks_.push_back(std::make_unique<Pages>(std::max(wanted, size_t(CHUNK))));
      used_ = 0;
    }
    used_ += wanted;
    return chunks_.back()->data + used_ - wanted;
  }

 private:
  static constexpr int64_t CHUNK = 32 << 20;
  std::vector<std::unique_ptr<Pages>> chunks_;
  size_t used_ = 0;
};

struct Matrix {
  Kind kind;
  int64_t rows, cols;
  int64_t blocks, groups;
  size_t block_bytes;
  uint8_t* codes;      // [blocks][block_bytes]
  uint16_t* scales;    // [blocks][groups, twice as many for INT4][16] float16, for codes
};

inline size_t block_bytes(Kind kind, int64_t cols) {
  const int64_t padded = up(cols, GROUP);
  switch (kind) {
    case FLOAT32: return size_t(padded) * LANES * 4;
    case BFLOAT16: return size_t(padded) * LANES * 2;
    case INT8: return size_t(padded) * LANES;
    default: return size_t(padded) * LANES / 2;
  }
}

// Scales of one row in a group of columns.
inline int64_t num_scales(Kind kind) { return kind == INT4 ? 2 : kind == INT8 ? 1 : 0; }

inline size_t matrix_bytes(Kind kind, int64_t rows, int64_t cols) {
  const size_t blocks = up(rows, LANES) / LANES, groups = up(cols, GROUP) / GROUP;
  return blocks * (block_bytes(kind, cols) + groups * num_scales(kind) * LANES * 2);
}

inline Matrix view(Kind kind, int64_t rows, int64_t cols, uint8_t* data) {
  Matrix m{kind, rows, cols, up(rows, LANES) / LANES, up(cols, GROUP) / GROUP, block_bytes(kind, cols), data, nullptr};
  if (num_scales(kind)) m.scales = reinterpret_cast<uint16_t*>(data + m.blocks * m.block_bytes);
  return m;
}

// Pack w [rows, cols]. INT8: codes round(w / s) + 128, s = max |w| / 127 per row and group. INT4: round(w / s) + 8,
// s from `narrow_scale`; two codes a byte: the low nibbles are the first 32 columns of a group, the high ones the others.
inline float wide_scale(const float* w, int64_t count) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t c = 0; c < count; c += LANES) {
    const __mmask16 there = count - c < LANES ? __mmask16((1u << (count - c)) - 1) : __mmask16(0xffff);
    most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(there, w + c)));
  }
  return _mm512_reduce_max_ps(most) / 127;
}

// The scale with which codes of -8 .. 7 come nearest to w in the sum of squares. It has the sign that gives the largest
// weight the code that the other end lacks; a few sizes are tried: small ones cut the tail and keep the middle.
inline float narrow_scale(const float* w, int64_t count) {
  float padded[GROUP] = {}, largest = 0;
  for (int64_t c = 0; c < count; ++c) {
    padded[c] = w[c];
    if (std::fabs(w[c]) > std::fabs(largest)) largest = w[c];
  }
  if (largest == 0) return 0;
  float best = 0, least = INFINITY;
  for (int step = -2; step <= 12; ++step) {
    const float scale = largest / -8 * (1.0f - 0.04f * float(step));
    const __m512 by = _mm512_set1_ps(1 / scale), back = _mm512_set1_ps(scale);
    __m512 error = _mm512_setzero_ps();
    for (int64_t c = 0; c < count; c += LANES) {
      const __m512 value = load(padded + c);
      const __m512 code = _mm512_roundscale_ps(_mm512_mul_ps(value, by), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m512 kept = _mm512_max_ps(_mm512_min_ps(code, _mm512_set1_ps(7)), _mm512_set1_ps(-8));
      const __m512 off = _mm512_fnmadd_ps(kept, back, value);
      error = _mm512_fmadd_ps(off, off, error);
    }
    const float sum = _mm512_reduce_add_ps(error);
    if (sum < least) least = sum, best = scale;
  }
  return best;
}

// Codes round(w / scale) + 128 of a whole group, none beyond 127 from the middle.
inline void round_group(const float* w, float scale, uint8_t* codes) {
  for (int64_t c = 0; c < GROUP; c += LANES) {
    const __m512 q = scale > 0 ? _mm512_div_ps(load(w + c), _mm512_set1_ps(scale)) : _mm512_setzero_ps();
    const __m512i code = _mm512_min_epi32(_mm512_max_epi32(_mm512_cvtps_epi32(q), _mm512_set1_epi32(-127)),
                                          _mm512_set1_epi32(127));
    _mm_store_si128(reinterpret_cast<__m128i*>(codes + c), _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(128))));
  }
}

// Rows begin .. end - 1; row r of the packed matrix is row source(r) of w.
template <class Source>
inline void pack(const Matrix& m, const float* w, int64_t begin_row, int64_t end_row, Source&& source) {
  for (int64_t row = begin_row; row < end_row; ++row) {
    const int64_t block = row / LANES, pair = block / 2 * 2, together = std::min<int64_t>(2, m.blocks - pair);
    uint8_t* first = m.codes + pair * m.block_bytes + (block - pair) * 64;
    const auto at = [&](int64_t step) { return first + step * together * 64; };  // the 64 bytes of a step
    const int64_t lane = row % LANES;
    const float* x = w + source(row) * m.cols;
    if (m.kind == FLOAT32) {
      for (int64_t c = 0; c < m.cols; ++c) reinterpret_cast<float*>(at(c))[lane] = x[c];
    } else if (m.kind == BFLOAT16) {
      for (int64_t c = 0; c < m.cols; c += LANES) {
        bf16 rounded[LANES];
        store(rounded, load(x + c));
        for (int64_t i = 0; i < LANES; i += 2) {
          std::memcpy(reinterpret_cast<bf16*>(at((c + i) / 2)) + lane * 2, rounded + i, 2 * sizeof(bf16));
        }
      }
    } else {
      const int highest = m.kind == INT8 ? 127 : 7, lowest = m.kind == INT8 ? -127 : -8, middle = highest + 1;
      const int64_t parts = num_scales(m.kind), part = GROUP / parts;
      for (int64_t g = 0; g < m.groups * parts; ++g) {
        const int64_t begin = g * part, end = std::max(begin, std::min(begin + part, m.cols));
        const uint16_t half =
            _cvtss_sh(m.kind == INT8 ? wide_scale(x + begin, end - begin) : narrow_scale(x + begin, end - begin), 0);
        const float scale = _cvtsh_ss(half);
        m.scales[(row / LANES * m.groups * parts + g) * LANES + lane] = half;
        if (m.kind == INT8 && end - begin == GROUP) {
          alignas(64) uint8_t codes[GROUP];
          round_group(x + begin, scale, codes);
          for (int64_t i = 0; i < GROUP / 4; ++i) std::memcpy(at(g * (GROUP / 4) + i) + lane * 4, codes + i * 4, 4);
          continue;
        }
        for (int64_t c = begin; c < begin + part; ++c) {
          const float q = c < end && scale != 0 ? std::nearbyint(x[c] / scale) : 0;
          const int code = std::clamp(int(q), lowest, highest) + middle;
          const int64_t in = c % part, step = c / GROUP * (GROUP / 4 / parts) + in / 4;
          uint8_t& byte = at(step)[lane * 4 + in % 4];
          if (m.kind == INT8) byte = uint8_t(code);
          else byte = uint8_t(g % 2 ? (byte & 0x0f) | code << 4 : (byte & 0xf0) | code);
        }
      }
    }
  }
}

// Rows of x as the products want them, in words of 4 bytes: one float, two bfloat16, or four codes of 8 bits with a scale
// per group. Rows lie in tiles of up to TILE; within a tile word follows word, and each is there once per row.
struct Input {
  int64_t stride = 0;        // padded columns
  int64_t rows = 0;          // of this step
  uint32_t* words = nullptr;
  float* scales = nullptr;   // by tile, group, row of the tile
  int32_t* shift = nullptr;  // by tile, group, half, row: -middle * sum of codes; of 8 bits the first half holds both

  int64_t begin(int64_t t) const { return t / TILE * TILE; }
  int64_t lanes(int64_t t) const { return std::min(TILE, rows - begin(t)); }
  const uint32_t* tile(Kind kind, int64_t t) const { return words + begin(t) * words_of(kind); }
  int64_t words_of(Kind kind) const { return kind == FLOAT32 ? stride : kind == BFLOAT16 ? stride / 2 : stride / 4; }
};

// Sixteen words of one row, from word w on.
inline void put_words(uint32_t* tile, int64_t lanes, int64_t lane, int64_t w, const void* from, int64_t count) {
  uint32_t values[LANES];
  std::memcpy(values, from, size_t(count) * 4);
  for (int64_t i = 0; i < count; ++i) tile[(w + i) * lanes + lane] = values[i];
}

// x[t] -> its form for matrices of this kind, groups first .. last - 1 of it; columns that pad are zero. The tokens of a
// tile share the lines that are written: two threads may do other groups of one tile, or other tiles.
inline void prepare(Kind kind, const Input& in, int64_t t, const float* x, int64_t cols, int64_t first_group,
                    int64_t last_group) {
  const int64_t lanes = in.lanes(t), lane = t - in.begin(t);
  uint32_t* tile = in.words + in.begin(t) * in.words_of(kind);
  if (kind == FLOAT32 || kind == BFLOAT16) {
    const int64_t per = kind == FLOAT32 ? 1 : 2;
    for (int64_t c = first_group * GROUP; c < last_group * GROUP; c += LANES) {
      const __m512 value = c < cols ? load(x + c) : _mm512_setzero_ps();
      if (kind == FLOAT32) {
        put_words(tile, lanes, lane, c, &value, LANES);
      } else {
        bf16 halves[LANES];
        store(halves, value);
        put_words(tile, lanes, lane, c / per, halves, LANES / 2);
      }
    }
    return;
  }
  const int64_t groups = in.stride / GROUP;
  const int middle = kind == INT8 ? 128 : 8;
  for (int64_t g = first_group; g < last_group; ++g) {
    const int64_t begin = g * GROUP, end = std::min(begin + GROUP, cols);
    __m512 top = _mm512_setzero_ps();
    for (int64_t c = begin; c < end; c += LANES) top = _mm512_max_ps(top, _mm512_abs_ps(load(x + c)));
    const float most = _mm512_reduce_max_ps(top);
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    alignas(64) int8_t codes[GROUP] = {};
    for (int64_t c = begin; c < end; c += LANES) {
      __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + c), inverse));
      __m512i& sum = sums[(c - begin) / (GROUP / 2)];
      sum = _mm512_add_epi32(sum, q);
      _mm_store_si128(reinterpret_cast<__m128i*>(codes + c - begin), _mm512_cvtepi32_epi8(q));
    }
    put_words(tile, lanes, lane, g * (GROUP / 4), codes, GROUP / 4);
    in.scales[in.begin(t) * groups + g * lanes + lane] = most / 127.0f;
    int32_t* shift = in.shift + (in.begin(t) * groups + g * lanes) * 2;
    const int32_t first = _mm512_reduce_add_epi32(sums[0]), second = _mm512_reduce_add_epi32(sums[1]);
    shift[lane] = -middle * (kind == INT8 ? first + second : first);
    shift[lanes + lane] = -middle * second;
  }
}

// sum += codes of w (unsigned) times codes of x, four by four. As an instruction and not as an intrinsic: the compiler
// copies and spills sixteen running sums otherwise, which costs a quarter of the speed.
inline void dot_codes(__m512i& sum, __m512i w, __m512i x) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

inline __m512i broadcast(const uint32_t* word) { return _mm512_set1_epi32(int32_t(*word)); }

// How far ahead of the weights in use others are asked for, and which of the two lines of every step.
struct Ahead {
  int64_t bytes;
  bool first, second;
};

constexpr int64_t NEAR = 4096;  // where every line is read once, in turn

// For the pass-th of `passes` readings of `bytes` of weights: together they ask for as much again.
inline Ahead ahead_of(int64_t pass, int64_t passes, int64_t bytes) {
  if (passes == 1) return {NEAR, true, true};
  return {bytes, pass == 0, pass == 1};
}

// out[b][i][0..15] += rows of block `block + b` times the i-th row of x's tile, i < N, b < M, for groups begin .. end - 1
// of the columns; the first group starts from zero. Nothing in it may call another function: its sums fill the registers.
template <int N, int M>
__attribute__((noinline)) void multiply(const Matrix& m, int64_t block, int64_t begin, int64_t end, const Input& in,
                                        int64_t t, const Ahead ahead, float (*const out[M])[LANES]) {
  const uint8_t* w = m.codes + block * m.block_bytes + begin * (m.block_bytes / m.groups) * M;
  const uint32_t* x = in.tile(m.kind, t) + begin * (in.words_of(m.kind) / m.groups) * N;
  const auto fetch_ahead = [&] {
    const char* next = reinterpret_cast<const char*>(w) + ahead.bytes;
    if (ahead.first) _mm_prefetch(next, _MM_HINT_T0);
    if (ahead.second && M == 2) _mm_prefetch(next + 64, _MM_HINT_T0);
  };
  if (m.kind == FLOAT32 || m.kind == BFLOAT16) {
    __m512 f[M][N];
    for (int b = 0; b < M; ++b)
      for (int i = 0; i < N; ++i) f[b][i] = begin ? load(out[b][i]) : _mm512_setzero_ps();
    const int64_t words = (end - begin) * (m.kind == FLOAT32 ? GROUP : GROUP / 2);
    if (m.kind == FLOAT32) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < words; ++j, x += N, w += 64 * M) {
        __m512 row[M];
        for (int b = 0; b < M; ++b) row[b] = _mm512_load_ps(w + b * 64);
        fetch_ahead();
        for (int i = 0; i < N; ++i) {
          const __m512 value = _mm512_castsi512_ps(broadcast(x + i));
          for (int b = 0; b < M; ++b) f[b][i] = _mm512_fmadd_ps(row[b], value, f[b][i]);
        }
      }
    } else {
#pragma GCC unroll 2
      for (int64_t j = 0; j < words; ++j, x += N, w += 64 * M) {
        __m512bh row[M];
        for (int b = 0; b < M; ++b) row[b] = (__m512bh)_mm512_load_si512(w + b * 64);
        fetch_ahead();
        for (int i = 0; i < N; ++i) {
          const __m512bh value = (__m512bh)broadcast(x + i);
          for (int b = 0; b < M; ++b) f[b][i] = _mm512_dpbf16_ps(f[b][i], row[b], value);
        }
      }
    }
    for (int b = 0; b < M; ++b)
      for (int i = 0; i < N; ++i) store(out[b][i], f[b][i]);
    return;
  }
  const int64_t parts = num_scales(m.kind);
  const uint16_t* scales = m.scales + block * m.groups * parts * LANES;
  const float* in_scales = in.scales + in.begin(t) * m.groups + begin * N;
  const int32_t* shift = in.shift + (in.begin(t) * m.groups + begin * N) * 2;
  if (begin == 0) {
    for (int b = 0; b < M; ++b)
      for (int i = 0; i < N; ++i) store(out[b][i], _mm512_setzero_ps());
  }
  const auto add = [&](const __m512i (&sum)[M][N], int64_t g, int half) {
    for (int b = 0; b < M; ++b) {
      const uint16_t* from = scales + (b * m.groups * parts + g * parts + half) * LANES;
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      for (int i = 0; i < N; ++i) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(in_scales[i]));
        store(out[b][i], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[b][i]), both, load(out[b][i])));
      }
    }
  };
  if (N <= 2 && m.kind == INT4) {  // few sums: both halves of a group at once, so that a line is loaded once
    for (int64_t g = begin; g < end; ++g, shift += 2 * N, in_scales += N, x += 8 * N) {
      __m512i low[M][N], high[M][N];
      for (int b = 0; b < M; ++b)
        for (int i = 0; i < N; ++i) low[b][i] = _mm512_set1_epi32(shift[i]), high[b][i] = _mm512_set1_epi32(shift[N + i]);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j, x += N, w += 64 * M) {
        fetch_ahead();
        for (int b = 0; b < M; ++b) {
          const __m512i codes = _mm512_load_si512(w + b * 64), four_bits = _mm512_set1_epi8(15);
          const __m512i first = _mm512_and_si512(codes, four_bits);
          const __m512i second = _mm512_and_si512(_mm512_srli_epi16(codes, 4), four_bits);
          for (int i = 0; i < N; ++i) {
            dot_codes(low[b][i], first, broadcast(x + i));
            dot_codes(high[b][i], second, broadcast(x + 8 * N + i));
          }
        }
      }
      add(low, g, 0);
      add(high, g, 1);
    }
    return;
  }
  for (int64_t g = begin; g < end; ++g, shift += 2 * N, in_scales += N) {
    for (int half = 0; half < parts; ++half) {
      __m512i sum[M][N];
      for (int i = 0; i < N; ++i) {
        const __m512i start = _mm512_set1_epi32(shift[half * N + i]);
        for (int b = 0; b < M; ++b) sum[b][i] = start;
      }
      if (m.kind == INT8) {
#pragma GCC unroll 4
        for (int j = 0; j < 16; ++j, x += N, w += 64 * M) {
          __m512i row[M];
          for (int b = 0; b < M; ++b) row[b] = _mm512_load_si512(w + b * 64);
          fetch_ahead();
          for (int i = 0; i < N; ++i) {
            const __m512i value = broadcast(x + i);
            for (int b = 0; b < M; ++b) dot_codes(sum[b][i], row[b], value);
          }
        }
      } else {
        if (half) w -= 8 * 64 * M;
#pragma GCC unroll 2
        for (int j = 0; j < 8; ++j, x += N, w += 64 * M) {
          __m512i row[M];
          for (int b = 0; b < M; ++b) {
            const __m512i both = _mm512_load_si512(w + b * 64);
            row[b] = _mm512_and_si512(half ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
          }
          if (!half) fetch_ahead();
          for (int i = 0; i < N; ++i) {
            const __m512i value = broadcast(x + i);
            for (int b = 0; b < M; ++b) dot_codes(sum[b][i], row[b], value);
          }
        }
      }
      add(sum, g, half);
    }
  }
}

constexpr int64_t GROUPS = 3;  // between two calls of `Upcoming::ask`

// The same for all groups, for the rows of x's tile at t, and for one or two blocks.
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
  switch (in.lanes(t)) {
    case 8: return multiply_blocks<8>(m, block, blocks, in, t, ahead, upcoming, out);
    case 7: return multiply_blocks<7>(m, block, blocks, in, t, ahead, upcoming, out);
    case 6: return multiply_blocks<6>(m, block, blocks, in, t, ahead, upcoming, out);
    case 5: return multiply_blocks<5>(m, block, blocks, in, t, ahead, upcoming, out);
    case 4: return multiply_blocks<4>(m, block, blocks, in, t, ahead, upcoming, out);
    case 3: return multiply_blocks<3>(m, block, blocks, in, t, ahead, upcoming, out);
    case 2: return multiply_blocks<2>(m, block, blocks, in, t, ahead, upcoming, out);
    default: return multiply_blocks<1>(m, block, blocks, in, t, ahead, upcoming, out);
  }
}
