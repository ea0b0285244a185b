// Vectors of 16 floats, in the instructions of the processor that this is compiled for: exp, sums, roundings.
// It knows nothing of models. A machine without either set of instructions does not compile this; torch serves there.
#pragma once
#if defined(GR_AVX512)
#include "avx512.h"
#elif defined(GR_AVX2)
#include "avx2.h"
#else
#error "say which vectors: -DGR_AVX512 or -DGR_AVX2"
#endif

// exp(x) for x in [-87, 88], relative error below 2e-7: 2^n * p(r), x = n ln 2 + r, Taylor to the sixth power.
inline Floats exp16(Floats x) {
  x = greater(lesser(x, all(88.0f)), all(-87.0f));
  Floats n = nearest(mul(x, all(1.44269504088896f)));
  Floats r = sub_product(x, n, all(0.693359375f));
  r = sub_product(r, n, all(-2.12194440e-4f));
  Floats p = all(1.0f / 720);
  p = mul_add(p, r, all(1.0f / 120));
  p = mul_add(p, r, all(1.0f / 24));
  p = mul_add(p, r, all(1.0f / 6));
  p = mul_add(p, r, all(0.5f));
  p = mul_add(p, r, all(1.0f));
  p = mul_add(p, r, all(1.0f));
  return times_power(p, n);
}

// x / (1 + exp(-x))
inline Floats silu16(Floats x) { return div(x, add(all(1.0f), exp16(sub(zeros(), x)))); }

// sum_i x[i] * y[i], n a multiple of 16; the order of the sum depends on n alone.
template <class X, class Y>
inline float dot(const X* x, const Y* y, int64_t n) {
  Floats a = zeros(), b = zeros();
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    a = mul_add(load(x + i), load(y + i), a);
    b = mul_add(load(x + i + LANES), load(y + i + LANES), b);
  }
  if (i < n) a = mul_add(load(x + i), load(y + i), a);
  return total(add(a, b));
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
