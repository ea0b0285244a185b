// Vectors of 16 floats for one instruction set (AVX-512 with BF16 and VNNI): loads, conversions, exp.
// It knows nothing of models. A machine without these instructions does not compile this; the torch path serves there.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__) || \
    !defined(__AVX512BF16__)
#error "needs AVX-512 F, BW, VL, VNNI and BF16"
#endif

using bf16 = uint16_t;
constexpr int LANES = 16;

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }

inline __m512 load(const bf16* p) {
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }

// Rounds to nearest even; subnormals become zero.
inline void store(bf16* p, __m512 x) {
  __m256bh y = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &y, sizeof y);
}

// exp(x) for x in [-87, 88], relative error below 2e-7: 2^n * p(r), x = n ln 2 + r, Taylor to the sixth power.
inline __m512 exp16(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// x / (1 + exp(-x))
inline __m512 silu16(__m512 x) {
  __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// sum_i x[i] * y[i], n a multiple of 16; the order of the sum depends on n alone.
template <class X, class Y>
inline float dot(const X* x, const Y* y, int64_t n) {
  __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    a = _mm512_fmadd_ps(load(x + i), load(y + i), a);
    b = _mm512_fmadd_ps(load(x + i + LANES), load(y + i + LANES), b);
  }
  if (i < n) a = _mm512_fmadd_ps(load(x + i), load(y + i), a);
  return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
}

// Lane i of the result is the sum of v[i].
inline __m512 sum_each(__m512 v[LANES]) {
  for (int i = 0; i < 16; i += 2) {
    __m512 a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    v[i / 2] = _mm512_add_ps(a, b);
  }
  for (int i = 0; i < 8; i += 2) {
    __m512d x = _mm512_castps_pd(v[i]), y = _mm512_castps_pd(v[i + 1]);
    v[i / 2] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  // v[k], lane 4 q + i: the q-th quarter's share of sum 4 k + i
  __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
  __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x88), _mm512_shuffle_f32x4(v[2], v[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// 32 bfloat16, or the first 16 and zeros.
inline __m512bh load_halves(const bf16* p, bool all) {
  if (all) return (__m512bh)_mm512_loadu_si512(p);
  return (__m512bh)_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// y[i] = x[i] rounded, n a multiple of 16.
inline void round_to(bf16* y, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(y + i, load(x + i));
}

// Ask for all lines of some memory at once, so that their ways from there overlap.
inline void fetch(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
}
