// The product of a tile with one block of a matrix, or two, by AVX2 with FMA.
// It knows nothing of models; multiply_avx512.h does the same on newer processors.
// Read first: twelve of sixteen registers of 8 floats hold the sums of six inputs and one block. So of two blocks one comes
// after the other, stretch by stretch, unless there are few inputs: then every line of weights is read in turn.
#pragma once
#include "matrix.h"

inline __m256i broadcast(const uint32_t* word) { return _mm256_set1_epi32(int32_t(*word)); }

// out[b][i][0..15] += rows of the b-th of B blocks times the i-th row of x's tile, i < N, for groups begin .. end - 1 of the
// columns; the first group starts from zero. The blocks' lines begin at `w` and follow each other `apart` bytes from one
// another; `block` is the first one's number.
template <int N, int B>
__attribute__((noinline)) void multiply_run(const Matrix& m, int64_t block, const uint8_t* w, int64_t apart, int64_t begin,
                                            int64_t end, const Input& in, int64_t t, const Ahead ahead,
                                            float (*const out[B])[LANES]) {
  const uint32_t* x = in.tile(m.kind, t) + begin * (in.words_of(m.kind) / m.groups) * N;
  const auto fetch_ahead = [&] {
    const char* next = reinterpret_cast<const char*>(w) + ahead.bytes;
    if (ahead.first) _mm_prefetch(next, _MM_HINT_T0);
    if (ahead.second && B == 2) _mm_prefetch(next + 64, _MM_HINT_T0);
  };
  const auto line = [&](int b, int half) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(w + b * 64) + half);
  };
  if (m.kind == FLOAT32 || m.kind == BFLOAT16) {
    __m256 f[B][N][2];
    for (int b = 0; b < B; ++b)
      for (int i = 0; i < N; ++i)
        for (int h = 0; h < 2; ++h) f[b][i][h] = begin ? _mm256_loadu_ps(out[b][i] + 8 * h) : _mm256_setzero_ps();
    const auto add = [&](const __m256 (&row)[B][2]) __attribute__((always_inline)) {
      for (int i = 0; i < N; ++i) {
        const __m256 value = _mm256_castsi256_ps(broadcast(x + i));
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) f[b][i][h] = _mm256_fmadd_ps(row[b][h], value, f[b][i][h]);
      }
      x += N;
    };
    if (m.kind == FLOAT32) {
#pragma GCC unroll 2
      for (int64_t j = (end - begin) * GROUP; j > 0; --j, w += apart) {
        __m256 row[B][2];
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) row[b][h] = _mm256_castsi256_ps(line(b, h));
        fetch_ahead();
        add(row);
      }
    } else {
      for (int64_t j = (end - begin) * (GROUP / 2); j > 0; --j, w += apart) {
        __m256 row[B][2];
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) row[b][h] = _mm256_castsi256_ps(_mm256_slli_epi32(line(b, h), 16));
        fetch_ahead();
        add(row);
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) {
            row[b][h] = _mm256_castsi256_ps(_mm256_and_si256(line(b, h), _mm256_set1_epi32(int(0xffff0000))));
          }
        add(row);
      }
    }
    for (int b = 0; b < B; ++b)
      for (int i = 0; i < N; ++i)
        for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out[b][i] + 8 * h, f[b][i][h]);
    return;
  }
  const int64_t parts = num_scales(m.kind);
  const uint16_t* scales = m.scales + block * m.groups * parts * LANES;
  const float* in_scales = in.scales + in.begin(t) * m.groups + begin * N;
  const int32_t* shift = in.shift + (in.begin(t) * m.groups + begin * N) * 2;
  if (begin == 0) {
    for (int b = 0; b < B; ++b)
      for (int i = 0; i < N; ++i) store(out[b][i], zeros());
  }
  const auto add = [&](int b, int i, const __m256i (&sum)[2], int64_t g, int part) __attribute__((always_inline)) {
    const uint16_t* from = scales + (b * m.groups * parts + g * parts + part) * LANES;
    const __m256i start = _mm256_set1_epi32(shift[part * N + i]);
    const __m256 scale = _mm256_set1_ps(in_scales[i]);
    for (int h = 0; h < 2; ++h) {
      float* to = out[b][i] + 8 * h;
      const __m256 both = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + h)), scale);
      const __m256 whole = _mm256_cvtepi32_ps(_mm256_add_epi32(sum[h], start));
      _mm256_storeu_ps(to, _mm256_fmadd_ps(whole, both, _mm256_loadu_ps(to)));
    }
  };
  for (int64_t g = begin; g < end; ++g, shift += 2 * N, in_scales += N) {
    if (m.kind == INT8) {
      // Codes of 16 bits by pairs: the even ones of every four, then the odd ones.
      __m256i sum[B][N][2] = {};
      const auto pairs = [&](const __m256i (&row)[B][2]) __attribute__((always_inline)) {
        for (int i = 0; i < N; ++i) {
          const __m256i value = broadcast(x + i);
          for (int b = 0; b < B; ++b)
            for (int h = 0; h < 2; ++h) sum[b][i][h] = _mm256_add_epi32(sum[b][i][h], _mm256_madd_epi16(row[b][h], value));
        }
        x += N;
      };
      for (int j = 0; j < 16; ++j, w += apart) {
        __m256i row[B][2];
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) row[b][h] = _mm256_and_si256(line(b, h), _mm256_set1_epi16(0xff));
        fetch_ahead();
        pairs(row);
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) row[b][h] = _mm256_srli_epi16(line(b, h), 8);
        pairs(row);
      }
      for (int b = 0; b < B; ++b)
        for (int i = 0; i < N; ++i) add(b, i, sum[b][i], g, 0);
      continue;
    }
    for (int part = 0; part < 2; ++part) {
      // Sums of 16 bits: eight times two products of at most 15 * 127 are below 2^15.
      __m256i sum[B][N][2] = {};
      if (part) w -= 8 * apart;
      for (int j = 0; j < 8; ++j, x += N, w += apart) {
        __m256i row[B][2];
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) {
            const __m256i both = line(b, h);
            row[b][h] = _mm256_and_si256(part ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
          }
        if (!part) fetch_ahead();
        for (int i = 0; i < N; ++i) {
          const __m256i value = broadcast(x + i);
          for (int b = 0; b < B; ++b)
            for (int h = 0; h < 2; ++h) {
              sum[b][i][h] = _mm256_add_epi16(sum[b][i][h], _mm256_maddubs_epi16(row[b][h], value));
            }
        }
      }
      for (int b = 0; b < B; ++b)
        for (int i = 0; i < N; ++i) {
          for (int h = 0; h < 2; ++h) sum[b][i][h] = _mm256_madd_epi16(sum[b][i][h], _mm256_set1_epi16(1));
          add(b, i, sum[b][i], g, part);
        }
    }
  }
}

// out[b][i][0..15] += rows of block `block + b` times the i-th row of x's tile, i < N, b < M, for groups begin .. end - 1
// of the columns; the first group starts from zero.
template <int N, int M>
inline void multiply(const Matrix& m, int64_t block, int64_t begin, int64_t end, const Input& in, int64_t t,
                     const Ahead ahead, float (*const out[M])[LANES]) {
  const uint8_t* w = m.codes + block * m.block_bytes + begin * (m.block_bytes / m.groups) * M;
  if constexpr (M == 1 || N <= 3) {
    multiply_run<N, M>(m, block, w, 64 * M, begin, end, in, t, ahead, out);
  } else {
    multiply_run<N, 1>(m, block, w, 128, begin, end, in, t, {ahead.bytes, ahead.first, false}, out);
    multiply_run<N, 1>(m, block + 1, w + 64, 128, begin, end, in, t, {ahead.bytes, ahead.second, false}, out + 1);
  }
}
