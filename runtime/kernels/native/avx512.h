// Sixteen floats in one register: AVX-512 with BF16 and VNNI.
// It knows nothing of models; avx2.h says the same for older processors.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;
using Floats = __m512;    // 16
using Ints = __m512i;     // 16 of 32 bits
using Halves = __m512bh;  // 32 bfloat16

constexpr int LANES = 16;
constexpr int64_t TILE = 8;          // rows of x that are multiplied at once, with two blocks: what the registers hold
constexpr int SUMS = 16;             // of experts, that registers hold beside what is multiplied
constexpr bool DOT_PRODUCTS = true;  // one instruction multiplies and adds pairs of bfloat16, or four codes of 8 bits

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }

inline Floats load(const bf16* p) {
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }

// Rounds to nearest even; subnormals become zero.
inline void store(bf16* p, Floats x) {
  __m256bh y = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &y, sizeof y);
}

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats lesser(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
inline Floats nearest(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }       // a b + c
inline Floats mul_sub(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }       // a b - c
inline Floats sub_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats times_power(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }  // a 2^n, n whole, -126 .. 127
inline float total(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }

inline __mmask16 first_lanes(int64_t count) { return count >= LANES ? __mmask16(0xffff) : __mmask16((1u << count) - 1); }

// The first `count` lanes of x, and those of y behind them.
inline Floats first(int64_t count, Floats x, Floats y) { return _mm512_mask_mov_ps(y, first_lanes(count), x); }

// The first `count` values from p on, then zeros.
inline Floats load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }

inline void store_first(float* p, int64_t count, Floats x) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }

inline Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints nearest_ints(Floats a) { return _mm512_cvtps_epi32(a); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints lesser(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
inline Ints greater(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline int32_t total(Ints a) { return _mm512_reduce_add_epi32(a); }

// The lowest 8 bits of each.
inline void store_bytes(void* p, Ints a) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }

// Lane i of the result is the sum of v[i].
inline Floats sum_each(Floats v[LANES]) {
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
inline Halves load_halves(const bf16* p, bool all) {
  if (all) return (__m512bh)_mm512_loadu_si512(p);
  return (__m512bh)_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The total of the result is that of `sum` and of all products a[i] b[i].
inline Floats add_products(Floats sum, Halves a, Halves b) { return _mm512_dpbf16_ps(sum, a, b); }

// Whether one of 64 bytes' numbers of 32 bits, or of 16 if `narrow`, has all of the bits of `ones`; only the first
// `count` bytes are there.
inline bool any_has(const uint8_t* data, int64_t count, uint32_t ones, bool narrow) {
  const __mmask64 here = count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
  const __m512i wanted = _mm512_set1_epi32(int(ones));
  const __m512i x = _mm512_and_si512(_mm512_maskz_loadu_epi8(here, data), wanted);
  return narrow ? _mm512_cmpeq_epi16_mask(x, wanted) : _mm512_cmpeq_epi32_mask(x, wanted);
}
