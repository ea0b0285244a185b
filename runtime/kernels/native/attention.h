// Attention of one new token to the cache of its own sequence, for the query heads that share a key/value head.
// It knows nothing of layers or batches. Cache rows [context, width] are float or bfloat16; arithmetic is float.
#pragma once
#include <algorithm>

#include "simd.h"

// s[g][i] = q[g] . keys[i] for 16 keys, of which `count` are there. V vectors of 16 make a head; bfloat16 keys are
// multiplied by queries rounded to bfloat16.
template <int G, int V>
inline void score(const float* q, const bf16*, const float* keys, int64_t count, Floats s[G]) {
  Floats parts[G][LANES];
  for (int64_t i = 0; i < LANES; ++i) {
    for (int g = 0; g < G; ++g) parts[g][i] = zeros();
    if (i >= count) continue;
    for (int c = 0; c < V; ++c) {
      const Floats key = load(keys + (i * V + c) * LANES);
      for (int g = 0; g < G; ++g) parts[g][i] = mul_add(key, load(q + (g * V + c) * LANES), parts[g][i]);
    }
  }
  for (int g = 0; g < G; ++g) s[g] = sum_each(parts[g]);
}

template <int G, int V>
inline void score(const float*, const bf16* q, const bf16* keys, int64_t count, Floats s[G]) {
  constexpr int PAIRS = (V + 1) / 2;
  Floats parts[G][LANES];
  Halves query[G][PAIRS];
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < PAIRS; ++c) query[g][c] = load_halves(q + (g * V + 2 * c) * LANES, 2 * c + 1 < V);
  for (int64_t i = 0; i < LANES; ++i) {
    Floats sum[G];
    for (int g = 0; g < G; ++g) sum[g] = zeros();
    if (i < count) {
      for (int c = 0; c < PAIRS; ++c) {
        const Halves key = load_halves(keys + (i * V + 2 * c) * LANES, 2 * c + 1 < V);
        for (int g = 0; g < G; ++g) sum[g] = add_products(sum[g], query[g][c], key);
      }
    }
    for (int g = 0; g < G; ++g) parts[g][i] = sum[g];
  }
  for (int g = 0; g < G; ++g) s[g] = sum_each(parts[g]);
}

// The rows of a cache that will be read after these: asked for row by row meanwhile.
template <class C>
struct NextRows {
  const C *keys, *values;
  int64_t count;  // rows of each

  template <int V>
  static void fetch(const C* row) {
    constexpr int64_t bytes = V * LANES * sizeof(C);
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(row) + i, _MM_HINT_T0);
  }
};

// out[h] = softmax(q[h] K^T / sqrt(width)) V for G heads of V vectors; q, out [G, width]; scores: scratch
// [G, up(length, 16)].
template <int G, int V, class C>
inline void attend(const float* q, const C* keys, const C* values, int64_t length, NextRows<C> next, float* scores,
                   float* out) {
  constexpr int64_t width = V * LANES;
  const int64_t padded = (length + LANES - 1) / LANES * LANES;
  const Floats scale = all(1.0f / __builtin_sqrtf(float(width)));
  bf16 rounded[G * width];
  if (sizeof(C) == sizeof(bf16)) round_to(rounded, q, G * width);
  Floats top[G], s[G];
  for (int g = 0; g < G; ++g) top[g] = all(-1e30f);
  for (int64_t j = 0; j < padded; j += LANES) {
    const int64_t count = length - j < LANES ? length - j : LANES;
    for (int64_t i = j; i < std::min(j + LANES, next.count); ++i) next.template fetch<V>(next.keys + i * width);
    score<G, V>(q, rounded, keys + j * width, count, s);
    for (int g = 0; g < G; ++g) {
      s[g] = first(count, mul(s[g], scale), all(-1e30f));
      top[g] = greater(top[g], s[g]);
      store(scores + g * padded + j, s[g]);
    }
  }
  float inverse[G];
  for (int g = 0; g < G; ++g) {
    const Floats most = all(largest(top[g]));
    Floats whole = zeros();
    for (int64_t j = 0; j < padded; j += LANES) {
      const Floats p = first(length - j, exp16(sub(load(scores + g * padded + j), most)), zeros());
      store(scores + g * padded + j, p);
      whole = add(whole, p);
    }
    inverse[g] = 1.0f / total(whole);
  }
  constexpr int STRIP = V < 4 ? V : 4;  // vectors of a head whose sums are kept in registers
  for (int c = 0; c < V; c += STRIP) {
    const int now = V - c < STRIP ? V - c : STRIP;
    Floats sum[G][STRIP];
    for (int g = 0; g < G; ++g)
      for (int k = 0; k < STRIP; ++k) sum[g][k] = zeros();
    for (int64_t j = 0; j < length; ++j) {
      const C* value = values + j * width + c * LANES;
      if (c == 0 && j < next.count) next.template fetch<V>(next.values + j * width);
      Floats p[G];
      for (int g = 0; g < G; ++g) p[g] = all(scores[g * padded + j]);
      for (int k = 0; k < STRIP; ++k) {
        if (k >= now) break;
        const Floats v = load(value + k * LANES);
        for (int g = 0; g < G; ++g) sum[g][k] = mul_add(v, p[g], sum[g][k]);
      }
    }
    for (int g = 0; g < G; ++g)
      for (int k = 0; k < now; ++k) {
        store(out + g * width + (c + k) * LANES, mul(sum[g][k], all(inverse[g])));
      }
  }
}

// The same for a number of heads known at run time.
template <int V, class C>
inline void attend(int64_t heads, const float* q, const C* keys, const C* values, int64_t length, NextRows<C> next,
                   float* scores, float* out) {
  while (heads > 0) {
    const int64_t now = heads >= 4 ? 4 : heads;
    switch (now) {
      case 4: attend<4, V>(q, keys, values, length, next, scores, out); break;
      case 3: attend<3, V>(q, keys, values, length, next, scores, out); break;
      case 2: attend<2, V>(q, keys, values, length, next, scores, out); break;
      default: attend<1, V>(q, keys, values, length, next, scores, out);
    }
    next.count = 0;
    heads -= now;
    q += now * V * LANES;
    out += now * V * LANES;
  }
}

// And for a width known at run time: one of those that callers know as HEAD_WIDTHS.
template <class C>
inline void attend(int64_t heads, const float* q, const C* keys, const C* values, int64_t length, int64_t width,
                   NextRows<C> next, float* scores, float* out) {
  switch (width / LANES) {
    case 1: return attend<1>(heads, q, keys, values, length, next, scores, out);
    case 2: return attend<2>(heads, q, keys, values, length, next, scores, out);
    case 3: return attend<3>(heads, q, keys, values, length, next, scores, out);
    case 4: return attend<4>(heads, q, keys, values, length, next, scores, out);
    case 5: return attend<5>(heads, q, keys, values, length, next, scores, out);
    case 6: return attend<6>(heads, q, keys, values, length, next, scores, out);
    case 8: return attend<8>(heads, q, keys, values, length, next, scores, out);
    default: return attend<16>(heads, q, keys, values, length, next, scores, out);
  }
}

// Rotary position, in place: x[i] and x[i + width/2] turned by their angle, as in `transformers`' Llama.
inline void rotate(float* x, const float* cos, const float* sin, int64_t width) {
  const int64_t half = width / 2;
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const Floats a = load(x + i), b = load(x + i + half);
    store(x + i, mul_sub(a, load(cos + i), mul(b, load(sin + i))));
    store(x + i + half, mul_add(b, load(cos + i + half), mul(a, load(sin + i + half))));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}
