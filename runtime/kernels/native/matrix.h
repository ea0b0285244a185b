// Packed matrices and the product of a few rows with one: y[t] = W x[t].
// It knows nothing of models.
// Read first: W [rows, cols] lies in blocks of 16 rows; a block holds, step by step along the columns, 64 bytes: 16 rows
// times 4 codes, 2 bfloat16 or 1 float. So one load feeds 16 outputs, and inputs are broadcast. Columns are padded to
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
constexpr int AHEAD = 2048;    // bytes from the weights in use to those being fetched
constexpr int64_t TILE = 8;    // rows of x that are multiplied at once

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
// s from `group_scale`; two codes a byte: the low nibbles are the first 32 columns of a group, the high ones the others.
// The scale with which codes of -limit .. limit come nearest to w in the sum of squares; for wide codes the largest
// weight decides, for narrow ones a few smaller scales are tried: they cut the tails and keep the middle.
inline float group_scale(const float* w, int64_t count, int limit) {
  float top = 0;
  if (count % LANES == 0) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t c = 0; c < count; c += LANES) most = _mm512_max_ps(most, _mm512_abs_ps(load(w + c)));
    top = _mm512_reduce_max_ps(most);
  } else {
    for (int64_t c = 0; c < count; ++c) top = std::max(top, std::fabs(w[c]));
  }
  if (limit > 7 || top == 0) return top / limit;
  float best = top / limit, least = INFINITY;
  for (int step = 0; step <= 12; ++step) {
    const float scale = top / limit * (1.0f - 0.04f * step);
    float error = 0;
    for (int64_t c = 0; c < count; ++c) {
      const float code = std::clamp(std::nearbyint(w[c] / scale), float(-limit), float(limit));
      error += (w[c] - code * scale) * (w[c] - code * scale);
    }
    if (error < least) least = error, best = scale;
  }
  return best;
}

// Rows begin .. end - 1; row r of the packed matrix is row source(r) of w.
template <class Source>
inline void pack(const Matrix& m, const float* w, int64_t begin_row, int64_t end_row, Source&& source) {
  for (int64_t row = begin_row; row < end_row; ++row) {
    uint8_t* block = m.codes + row / LANES * m.block_bytes;
    const int64_t lane = row % LANES;
    const float* x = w + source(row) * m.cols;
    if (m.kind == FLOAT32) {
      for (int64_t c = 0; c < m.cols; ++c) reinterpret_cast<float*>(block)[c * LANES + lane] = x[c];
    } else if (m.kind == BFLOAT16) {
      for (int64_t c = 0; c < m.cols; ++c) {
        bf16 rounded[LANES];
        store(rounded, _mm512_set1_ps(x[c]));
        reinterpret_cast<bf16*>(block)[c / 2 * 2 * LANES + lane * 2 + c % 2] = rounded[0];
      }
    } else {
      const int limit = m.kind == INT8 ? 127 : 7, middle = limit + 1;
      const int64_t parts = num_scales(m.kind), part = GROUP / parts;
      for (int64_t g = 0; g < m.groups * parts; ++g) {
        const int64_t begin = g * part, end = std::max(begin, std::min(begin + part, m.cols));
        const uint16_t half = _cvtss_sh(group_scale(x + begin, end - begin, limit), 0);
        const float scale = _cvtsh_ss(half);
        m.scales[(row / LANES * m.groups * parts + g) * LANES + lane] = half;
        for (int64_t c = begin; c < begin + part; ++c) {
          const float q = c < end && scale > 0 ? std::nearbyint(x[c] / scale) : 0;
          const int code = std::clamp(int(q), -limit, limit) + middle;
          const int64_t in = c % part, at = c / GROUP * GROUP / parts;
          uint8_t& byte = block[(at + in / 4 * 4) * LANES + lane * 4 + in % 4];
          if (m.kind == INT8) byte = uint8_t(code);
          else byte = uint8_t(g % 2 ? (byte & 0x0f) | code << 4 : (byte & 0xf0) | code);
        }
      }
    }
  }
}

// Rows of x as the products want them: float, bfloat16, or codes of 8 bits with a scale per group.
struct Input {
  int64_t stride = 0;       // padded columns
  float* floats = nullptr;  // [T, stride]
  bf16* halves = nullptr;   // [T, stride]
  int8_t* codes = nullptr;  // [T, stride]
  float* scales = nullptr;  // [T, groups]
  int32_t* shift = nullptr; // [T, groups, 2], -middle * sum of the codes of the group's halves
};

// x[t] -> its form for matrices of this kind; the padding is zero beforehand and stays so.
inline void prepare(Kind kind, const Input& in, int64_t t, const float* x, int64_t cols) {
  if (kind == FLOAT32) {
    std::memcpy(in.floats + t * in.stride, x, cols * 4);
    return;
  }
  if (kind == BFLOAT16) {
    for (int64_t c = 0; c < cols; c += LANES) store(in.halves + t * in.stride + c, load(x + c));
    return;
  }
  const int64_t groups = in.stride / GROUP;
  const int middle = kind == INT8 ? 128 : 8;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * GROUP, end = std::min(begin + GROUP, cols);
    __m512 top = _mm512_setzero_ps();
    for (int64_t c = begin; c < end; c += LANES) top = _mm512_max_ps(top, _mm512_abs_ps(load(x + c)));
    const float most = _mm512_reduce_max_ps(top);
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t c = begin; c < end; c += LANES) {
      __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + c), inverse));
      __m512i& sum = sums[(c - begin) / (GROUP / 2)];
      sum = _mm512_add_epi32(sum, q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(in.codes + t * in.stride + c), _mm512_cvtepi32_epi8(q));
    }
    in.scales[t * groups + g] = most / 127.0f;
    for (int i = 0; i < 2; ++i) in.shift[(t * groups + g) * 2 + i] = -middle * _mm512_reduce_add_epi32(sums[i]);
  }
}

inline __m512i four(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

inline void ahead(const uint8_t* w) { _mm_prefetch(reinterpret_cast<const char*>(w) + AHEAD, _MM_HINT_T0); }

// out[i][0..15] = rows of `block` times x[t + i], i < N.
template <int N>
inline void multiply(const Matrix& m, int64_t block, const Input& in, int64_t t, float (*out)[LANES]) {
  __m512 f[N];
  for (int i = 0; i < N; ++i) f[i] = _mm512_setzero_ps();
  const uint8_t* w = m.codes + block * m.block_bytes;
  if (m.kind == FLOAT32) {
    const float* x = in.floats + t * in.stride;
#pragma GCC unroll 4
    for (int64_t c = 0; c < m.cols; ++c, w += 64) {
      const __m512 row = _mm512_load_ps(w);
      ahead(w);
      for (int i = 0; i < N; ++i) f[i] = _mm512_fmadd_ps(row, _mm512_set1_ps(x[i * in.stride + c]), f[i]);
    }
  } else if (m.kind == BFLOAT16) {
    const bf16* x = in.halves + t * in.stride;
#pragma GCC unroll 4
    for (int64_t c = 0; c < m.cols; c += 2, w += 64) {
      const __m512bh row = (__m512bh)_mm512_load_si512(w);
      ahead(w);
      for (int i = 0; i < N; ++i) {
        f[i] = _mm512_dpbf16_ps(f[i], row, (__m512bh)four(reinterpret_cast<const int8_t*>(x + i * in.stride + c)));
      }
    }
  } else {
    const uint16_t* scales = m.scales + block * m.groups * num_scales(m.kind) * LANES;
    const auto add = [&](const __m512i* sum, int64_t g) {
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
      scales += LANES;
      for (int i = 0; i < N; ++i) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(in.scales[(t + i) * m.groups + g]));
        f[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), both, f[i]);
      }
    };
    for (int64_t g = 0; g < m.groups; ++g) {
      __m512i sum[N];
      const int8_t* x = in.codes + t * in.stride + g * GROUP;
      const int32_t* shift = in.shift + (t * m.groups + g) * 2;
      if (m.kind == INT8) {
        for (int i = 0; i < N; ++i) sum[i] = _mm512_set1_epi32(shift[i * m.groups * 2] + shift[i * m.groups * 2 + 1]);
#pragma GCC unroll 4
        for (int j = 0; j < 16; ++j, w += 64) {
          const __m512i row = _mm512_load_si512(w);
          ahead(w);
          for (int i = 0; i < N; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], row, four(x + i * in.stride + j * 4));
        }
        add(sum, g);
      } else {
        for (int half = 0; half < 2; ++half, x += GROUP / 2) {
          for (int i = 0; i < N; ++i) sum[i] = _mm512_set1_epi32(shift[i * m.groups * 2 + half]);
          for (int j = 0; j < 8; ++j) {
            const __m512i both = _mm512_load_si512(w + j * 64);
            const __m512i row = _mm512_and_si512(half ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
            if (!half) ahead(w + j * 64);
            for (int i = 0; i < N; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], row, four(x + i * in.stride + j * 4));
          }
          add(sum, g);
        }
        w += 8 * 64;
      }
    }
  }
  for (int i = 0; i < N; ++i) store(out[i], f[i]);
}

// out[i] for `count` <= TILE rows of x from t on.
inline void multiply_tile(const Matrix& m, int64_t block, const Input& in, int64_t t, int64_t count, float (*out)[LANES]) {
  switch (count) {
    case 8: return multiply<8>(m, block, in, t, out);
    case 7: return multiply<7>(m, block, in, t, out);
    case 6: return multiply<6>(m, block, in, t, out);
    case 5: return multiply<5>(m, block, in, t, out);
    case 4: return multiply<4>(m, block, in, t, out);
    case 3: return multiply<3>(m, block, in, t, out);
    case 2: return multiply<2>(m, block, in, t, out);
    default: return multiply<1>(m, block, in, t, out);
  }
}
