// The product of a tile with one block of a matrix, or two, by AVX-512 with BF16 and VNNI.
// It knows nothing of models; multiply_avx2.h does the same on older processors.
#pragma once
#include "matrix.h"

// sum += codes of w (unsigned) times codes of x, four by four. As an instruction and not as an intrinsic: the compiler
// copies and spills sixteen running sums otherwise, which costs a quarter of the speed.
inline void dot_codes(__m512i& sum, __m512i w, __m512i x) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

inline __m512i broadcast(const uint32_t* word) { return _mm512_set1_epi32(int32_t(*word)); }

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
