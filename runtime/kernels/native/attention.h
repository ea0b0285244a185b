// Attention of one new token to the cache of its own sequence, for the query heads that share a key/value head.
// It knows nothing of layers or batches. Cache rows [context, width] are float or bfloat16; arithmetic is float.
#pragma once
#include "simd.h"

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

// out[h] = softmax(q[h] K^T / sqrt(width)) V for G heads; q, out [G, width]; scores: scratch [G, up(length, 16)].
template <int G, class C>
inline void attend(const float* q, const C* keys, const C* values, int64_t length, int64_t width, float* scores,
                   float* out) {
  const int64_t padded = (length + LANES - 1) / LANES * LANES;
  const float scale = 1.0f / __builtin_sqrtf(float(width));
  __m512 top[G];
  for (int g = 0; g < G; ++g) top[g] = _mm512_set1_ps(-1e30f);
  for (int64_t j = 0; j < padded; j += LANES) {
    __m512 parts[G][LANES];
    const int64_t count = length - j < LANES ? length - j : LANES;
    for (int64_t i = 0; i < LANES; ++i) {
      __m512 sum[G];
      for (int g = 0; g < G; ++g) sum[g] = _mm512_setzero_ps();
      if (i < count) {
        const C* key = keys + (j + i) * width;
        for (int64_t c = 0; c < width; c += LANES) {
          const __m512 k = load(key + c);
          for (int g = 0; g < G; ++g) sum[g] = _mm512_fmadd_ps(k, load(q + g * width + c), sum[g]);
        }
      }
      for (int g = 0; g < G; ++g) parts[g][i] = sum[g];
    }
    const __mmask16 seen = count == LANES ? 0xffff : uint16_t((1u << count) - 1);
    for (int g = 0; g < G; ++g) {
      const __m512 s = _mm512_mask_mul_ps(_mm512_set1_ps(-1e30f), seen, sum_each(parts[g]), _mm512_set1_ps(scale));
      top[g] = _mm512_max_ps(top[g], s);
      store(scores + g * padded + j, s);
    }
  }
  float inverse[G];
  for (int g = 0; g < G; ++g) {
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top[g]));
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += LANES) {
      const __mmask16 seen = length - j >= LANES ? 0xffff : uint16_t((1u << (length - j)) - 1);
      const __m512 p = _mm512_maskz_mov_ps(seen, exp16(_mm512_sub_ps(load(scores + g * padded + j), most)));
      store(scores + g * padded + j, p);
      total = _mm512_add_ps(total, p);
    }
    inverse[g] = 1.0f / _mm512_reduce_add_ps(total);
  }
  for (int64_t c = 0; c < width; c += LANES) {
    __m512 sum[G];
    for (int g = 0; g < G; ++g) sum[g] = _mm512_setzero_ps();
    for (int64_t j = 0; j < length; ++j) {
      const __m512 v = load(values + j * width + c);
      for (int g = 0; g < G; ++g) sum[g] = _mm512_fmadd_ps(v, _mm512_set1_ps(scores[g * padded + j]), sum[g]);
    }
    for (int g = 0; g < G; ++g) store(out + g * width + c, _mm512_mul_ps(sum[g], _mm512_set1_ps(inverse[g])));
  }
}

// The same for a number of heads known at run time.
template <class C>
inline void attend(int64_t heads, const float* q, const C* keys, const C* values, int64_t length, int64_t width,
                   float* scores, float* out) {
  while (heads > 0) {
    const int64_t now = heads >= 4 ? 4 : heads;
    switch (now) {
      case 4: attend<4>(q, keys, values, length, width, scores, out); break;
      case 3: attend<3>(q, keys, values, length, width, scores, out); break;
      case 2: attend<2>(q, keys, values, length, width, scores, out); break;
      default: attend<1>(q, keys, values, length, width, scores, out);
    }
    heads -= now;
    q += now * width;
    out += now * width;
  }
}

// Rotary position, in place: x[i] and x[i + width/2] turned by their angle, as in `transformers`' Llama.
inline void rotate(float* x, const float* cos, const float* sin, int64_t width) {
  for (int64_t i = 0, half = width / 2; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}
