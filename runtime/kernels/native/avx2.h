// Sixteen floats in two registers: AVX2 with FMA, as processors from 2013 on have.
// It knows nothing of models; avx512.h says the same for newer ones, and what is not said here. Unlike there, bfloat16
// keeps subnormals.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

constexpr int LANES = 16;
constexpr int64_t TILE = 6;  // with one block: twelve registers of sums, the others for weights, an input and a product
constexpr int SUMS = 4;
constexpr bool DOT_PRODUCTS = false;

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Halves {  // widened as they are loaded
  Floats low, high;
};

// The same of both registers.
#define BOTH_OF(name, type, of)                                                                \
  inline type name(type a, type b) { return {of(a.low, b.low), of(a.high, b.high)}; }
BOTH_OF(add, Floats, _mm256_add_ps)
BOTH_OF(sub, Floats, _mm256_sub_ps)
BOTH_OF(mul, Floats, _mm256_mul_ps)
BOTH_OF(div, Floats, _mm256_div_ps)
BOTH_OF(lesser, Floats, _mm256_min_ps)
BOTH_OF(greater, Floats, _mm256_max_ps)
BOTH_OF(add, Ints, _mm256_add_epi32)
BOTH_OF(lesser, Ints, _mm256_min_epi32)
BOTH_OF(greater, Ints, _mm256_max_epi32)
#undef BOTH_OF

inline __m256 widen(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

inline Floats load(const bf16* p) {
  const __m128i* raw = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(raw)), widen(_mm_loadu_si128(raw + 1))};
}

inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}

// Rounded to nearest even, as numbers of 32 bits; what is no number stays none.
inline __m256i narrow(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, none), 16);
}

inline void store(bf16* p, Floats x) {
  const __m256i packed = _mm256_packus_epi32(narrow(x.low), narrow(x.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

inline Floats magnitude(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}

inline Floats nearest(Floats a) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, how), _mm256_round_ps(a.high, how)};
}

inline Floats mul_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline Floats mul_sub(Floats a, Floats b, Floats c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}

inline Floats sub_product(Floats c, Floats a, Floats b) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

inline __m256 power(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

inline Floats times_power(Floats a, Floats n) { return mul(a, {power(n.low), power(n.high)}); }

inline float total(Floats a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(Floats a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// All bits of the first `count` lanes, none of the others.
inline Ints first_lanes(int64_t count) {
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  const __m256i limit = _mm256_set1_epi32(int(count));
  return {_mm256_cmpgt_epi32(limit, low), _mm256_cmpgt_epi32(limit, high)};
}

inline Floats first(int64_t count, Floats x, Floats y) {
  const Ints here = first_lanes(count);
  return {_mm256_blendv_ps(y.low, x.low, _mm256_castsi256_ps(here.low)),
          _mm256_blendv_ps(y.high, x.high, _mm256_castsi256_ps(here.high))};
}

inline Floats load_first(const float* p, int64_t count) {
  const Ints here = first_lanes(count);
  return {_mm256_maskload_ps(p, here.low), _mm256_maskload_ps(p + 8, here.high)};
}

inline void store_first(float* p, int64_t count, Floats x) {
  const Ints here = first_lanes(count);
  _mm256_maskstore_ps(p, here.low, x.low);
  _mm256_maskstore_ps(p + 8, here.high, x.high);
}

inline Ints nearest_ints(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }

inline int32_t total(Ints a) {
  const __m256i eight = _mm256_add_epi32(a.low, a.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

inline void store_bytes(void* p, Ints a) {
  const __m256i byte = _mm256_set1_epi32(0xff);
  const __m256i pairs = _mm256_packus_epi32(_mm256_and_si256(a.low, byte), _mm256_and_si256(a.high, byte));
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}

// Lane i of the result is the sum of the lanes of v[i], for eight of them.
inline __m256 sum_eight(const Floats* v) {
  __m256 x[8];
  for (int i = 0; i < 8; ++i) x[i] = _mm256_add_ps(v[i].low, v[i].high);
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

inline Floats sum_each(Floats v[LANES]) { return {sum_eight(v), sum_eight(v + 8)}; }

inline Halves load_halves(const bf16* p, bool all) { return {load(p), all ? load(p + LANES) : zeros()}; }

inline Floats add_products(Floats sum, Halves a, Halves b) { return mul_add(a.high, b.high, mul_add(a.low, b.low, sum)); }

inline bool any_has(const uint8_t* data, int64_t count, uint32_t ones, bool narrow) {
  alignas(32) uint8_t some[64] = {};
  if (count < 64) {
    std::memcpy(some, data, size_t(count));
    data = some;
  }
  const __m256i wanted = _mm256_set1_epi32(int(ones));
  const __m256i* from = reinterpret_cast<const __m256i*>(data);
  const __m256i a = _mm256_and_si256(_mm256_loadu_si256(from), wanted);
  const __m256i b = _mm256_and_si256(_mm256_loadu_si256(from + 1), wanted);
  const __m256i same = narrow ? _mm256_or_si256(_mm256_cmpeq_epi16(a, wanted), _mm256_cmpeq_epi16(b, wanted))
                              : _mm256_or_si256(_mm256_cmpeq_epi32(a, wanted), _mm256_cmpeq_epi32(b, wanted));
  return !_mm256_testz_si256(same, same);
}
