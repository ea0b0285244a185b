// Packed matrices and the product of a few rows with one: y[t] = W x[t].
// It knows nothing of models.
// Read first: W [rows, cols] lies in blocks of 16 rows; a block holds, step by step along the columns, 64 bytes: 16 rows
// times 4 codes, 2 bfloat16 or 1 float. So one load feeds 16 outputs, and inputs are broadcast. Two blocks lie together,
// step by step in turn, since with AVX-512 two of them and eight inputs keep all multipliers busy. Columns are padded to
// whole groups of 64, rows to whole blocks. A result depends on its own row of x alone, whatever else is in the batch.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

constexpr int64_t GROUP = 64;  // columns that share a scale, in inputs and in weights of 8 bits; of 4 bits: half as many

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
  Floats most = zeros();
  for (int64_t c = 0; c < count; c += LANES) most = greater(most, magnitude(load_first(w + c, count - c)));
  return largest(most) / 127;
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
    const Floats by = all(1 / scale), back = all(scale);
    Floats error = zeros();
    for (int64_t c = 0; c < count; c += LANES) {
      const Floats value = load(padded + c);
      const Floats kept = greater(lesser(nearest(mul(value, by)), all(7)), all(-8));
      const Floats off = sub_product(value, kept, back);
      error = mul_add(off, off, error);
    }
    const float sum = total(error);
    if (sum < least) least = sum, best = scale;
  }
  return best;
}

// Codes round(w / scale) + 128 of a whole group, none beyond 127 from the middle.
inline void round_group(const float* w, float scale, uint8_t* codes) {
  for (int64_t c = 0; c < GROUP; c += LANES) {
    const Floats q = scale > 0 ? div(load(w + c), all(scale)) : zeros();
    const Ints code = lesser(greater(nearest_ints(q), all_ints(-127)), all_ints(127));
    store_bytes(codes + c, add(code, all_ints(128)));
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
// Without DOT_PRODUCTS floats stay floats for weights in bfloat16, and for those of 8 bits codes have 16: of each four the
// first and third, then the second and fourth.
struct Input {
  int64_t stride = 0;        // padded columns
  int64_t rows = 0;          // of this step
  uint32_t* words = nullptr;
  float* scales = nullptr;   // by tile, group, row of the tile
  int32_t* shift = nullptr;  // by tile, group, half, row: -middle * sum of codes; of 8 bits the first half holds both

  int64_t begin(int64_t t) const { return t / TILE * TILE; }
  int64_t lanes(int64_t t) const { return std::min(TILE, rows - begin(t)); }
  const uint32_t* tile(Kind kind, int64_t t) const { return words + begin(t) * words_of(kind); }
  int64_t words_of(Kind kind) const {
    switch (kind) {
      case FLOAT32: return stride;
      case BFLOAT16: return DOT_PRODUCTS ? stride / 2 : stride;
      case INT8: return DOT_PRODUCTS ? stride / 4 : stride / 2;
      default: return stride / 4;
    }
  }
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
    for (int64_t c = first_group * GROUP; c < last_group * GROUP; c += LANES) {
      const Floats value = c < cols ? load(x + c) : zeros();
      if (kind == FLOAT32 || !DOT_PRODUCTS) {
        put_words(tile, lanes, lane, c, &value, LANES);
      } else {
        bf16 halves[LANES];
        store(halves, value);
        put_words(tile, lanes, lane, c / 2, halves, LANES / 2);
      }
    }
    return;
  }
  const int64_t groups = in.stride / GROUP;
  const int middle = kind == INT8 ? 128 : 8;
  for (int64_t g = first_group; g < last_group; ++g) {
    const int64_t begin = g * GROUP, end = std::min(begin + GROUP, cols);
    Floats top = zeros();
    for (int64_t c = begin; c < end; c += LANES) top = greater(top, magnitude(load(x + c)));
    const float most = largest(top);
    const Floats inverse = all(most > 0 ? 127.0f / most : 0.0f);
    Ints sums[2] = {all_ints(0), all_ints(0)};
    alignas(64) int8_t codes[GROUP] = {};
    for (int64_t c = begin; c < end; c += LANES) {
      const Ints q = nearest_ints(mul(load(x + c), inverse));
      Ints& sum = sums[(c - begin) / (GROUP / 2)];
      sum = add(sum, q);
      store_bytes(codes + c - begin, q);
    }
    if (kind == INT8 && !DOT_PRODUCTS) {
      int16_t wide[GROUP];
      for (int64_t c = 0; c < GROUP; ++c) wide[c / 4 * 4 + c % 2 * 2 + c % 4 / 2] = codes[c];
      for (int64_t w = 0; w < GROUP / 2; w += LANES) put_words(tile, lanes, lane, g * (GROUP / 2) + w, wide + 2 * w, LANES);
    } else {
      put_words(tile, lanes, lane, g * (GROUP / 4), codes, GROUP / 4);
    }
    in.scales[in.begin(t) * groups + g * lanes + lane] = most / 127.0f;
    int32_t* shift = in.shift + (in.begin(t) * groups + g * lanes) * 2;
    const int32_t first = total(sums[0]), second = total(sums[1]);
    shift[lane] = -middle * (kind == INT8 ? first + second : first);
    shift[lanes + lane] = -middle * second;
  }
}

// How far ahead of the weights in use others are asked for, and which of the two lines of every step.
struct Ahead {
  int64_t bytes;
  bool first, second;
};

constexpr int64_t NEAR = 4096;  // where every line is read once

// For the pass-th of `passes` readings of `bytes` of weights: together they ask for as much again.
inline Ahead ahead_of(int64_t pass, int64_t passes, int64_t bytes) {
  if (passes == 1) return {NEAR, true, true};
  return {bytes, pass == 0, pass == 1};
}
