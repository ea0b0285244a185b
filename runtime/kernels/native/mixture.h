// The mixture of experts of one token: which experts, with which weight, and what they add.
// y[o] += sum_p weight[p] * scale * sum_r (A_p x)[r] * B_p[o, r], experts used in place where they lie in memory.
// It knows nothing of layers beyond the columns that it is given; no expert that a token does not use is touched.
#pragma once
#include "simd.h"

enum Target : int { Q, K, V, O, GATE, UP, DOWN, NUM_TARGETS };
constexpr int MAX_K = 8;  // experts of one token at most

struct Update {
  const void* a;  // [rank, inputs]
  const void* b;  // [rank, outputs]: B transposed
  int64_t rank;   // 0: this linear has no update
};

struct Column {
  Update updates[NUM_TARGETS];
  double scale;
  int64_t halves;  // 1 where its matrices are bfloat16, 0 where they are float
};

// One layer of a mixture: the router's columns and the experts that they choose.
struct MixtureLayer {
  const float* router;    // [count, D]
  const Column* columns;  // [count]
  int64_t count;          // 0: no experts in this layer
};

struct Mixture {
  const MixtureLayer* layers;  // [L]; null is the plain base model
  int64_t top_k;               // at most MAX_K
  int64_t absolute;            // 1 where the size of a logit counts and not its sign (Arrow)
};

// The mixtures of a step.
struct Stage {
  const Mixture* rows;
  int64_t max_rank;
  int64_t attention;  // 1 where any column updates q, k, v or o
};

struct Pairs {
  int32_t count;
  int32_t column[MAX_K];
  float weight[MAX_K];
};

// The k largest logits, softmax over them; ties go to the earlier column.
inline void route(const Mixture& mixture, const MixtureLayer& layer, const float* x, int64_t width, Pairs* pairs) {
  int32_t count = 0;
  const int32_t k = int32_t(mixture.top_k);
  for (int32_t c = 0; c < layer.count; ++c) {
    float logit = dot(x, layer.router + c * width, width);
    if (mixture.absolute) logit = __builtin_fabsf(logit);
    int32_t at = count < k ? count++ : (logit > pairs->weight[k - 1] ? k - 1 : -1);
    if (at < 0) continue;
    for (; at > 0 && pairs->weight[at - 1] < logit; --at) {
      pairs->weight[at] = pairs->weight[at - 1];
      pairs->column[at] = pairs->column[at - 1];
    }
    pairs->weight[at] = logit;
    pairs->column[at] = c;
  }
  float total = 0;
  const float top = count ? pairs->weight[0] : 0;
  for (int32_t p = 0; p < count; ++p) total += pairs->weight[p] = __builtin_expf(pairs->weight[p] - top);
  for (int32_t p = 0; p < count; ++p) pairs->weight[p] /= total;
  pairs->count = count;
}

// The A of the pairs' experts for one target.
inline void fetch_a(const MixtureLayer& layer, const Pairs& pairs, Target target, int64_t width) {
  for (int32_t p = 0; p < pairs.count; ++p) {
    const Column& column = layer.columns[pairs.column[p]];
    const Update& update = column.updates[target];
    fetch(update.a, size_t(update.rank * width) * (column.halves ? 2 : 4));
  }
}

// What an expand of `count` vectors from output o on will read.
inline void fetch_b(const MixtureLayer& layer, const Pairs& pairs, Target target, int64_t o, int64_t outputs, int count) {
  for (int32_t p = 0; p < pairs.count; ++p) {
    const Column& column = layer.columns[pairs.column[p]];
    const Update& update = column.updates[target];
    const size_t size = column.halves ? 2 : 4;
    const char* b = static_cast<const char*>(update.b) + o * size;
    for (int64_t r = 0; r < update.rank; ++r) fetch(b + r * outputs * size, count * LANES * size);
  }
}

template <class W>
inline void shrink(const Update& update, float weight, const float* x, int64_t width, float* inner) {
  const W* a = static_cast<const W*>(update.a);
  int64_t r = 0;
  for (; r + 4 <= update.rank; r += 4, a += 4 * width) {  // four rows share the loads of x
    __m512 sum[4] = {};
    for (int64_t i = 0; i < width; i += LANES) {
      const __m512 value = load(x + i);
      for (int k = 0; k < 4; ++k) sum[k] = _mm512_fmadd_ps(load(a + k * width + i), value, sum[k]);
    }
    for (int k = 0; k < 4; ++k) inner[r + k] = weight * _mm512_reduce_add_ps(sum[k]);
  }
  for (; r < update.rank; ++r, a += width) inner[r] = weight * dot(x, a, width);
}

// inner[p, r] = weight[p] * scale * (A_p x)[r] for one target; inner is [MAX_K, max_rank].
inline void shrink(const MixtureLayer& layer, const Pairs& pairs, Target target, const float* x, int64_t width,
                   float* inner, int64_t max_rank) {
  for (int32_t p = 0; p < pairs.count; ++p) {
    const Column& column = layer.columns[pairs.column[p]];
    const float weight = pairs.weight[p] * float(column.scale);
    if (column.halves) shrink<bf16>(column.updates[target], weight, x, width, inner + p * max_rank);
    else shrink<float>(column.updates[target], weight, x, width, inner + p * max_rank);
  }
}

// y[0 .. 16 n - 1] += sum_r inner[r] * B[r, o ..]
template <class W, int N>
inline void expand(const Update& update, const float* inner, int64_t o, int64_t outputs, float* const y[]) {
  const W* b = static_cast<const W*>(update.b) + o;
  __m512 sum[N];
  for (int i = 0; i < N; ++i) sum[i] = load(y[i]);
  for (int64_t r = 0; r < update.rank; ++r, b += outputs) {
    const __m512 factor = _mm512_set1_ps(inner[r]);
    for (int i = 0; i < N; ++i) sum[i] = _mm512_fmadd_ps(load(b + i * LANES), factor, sum[i]);
  }
  for (int i = 0; i < N; ++i) store(y[i], sum[i]);
}

template <class W>
inline void expand(const Update& update, const float* inner, int64_t o, int64_t outputs, float* const y[], int count) {
  if (count == 4) return expand<W, 4>(update, inner, o, outputs, y);
  for (int i = 0; i < count; ++i) expand<W, 1>(update, inner, o + i * LANES, outputs, y + i);
}

// Add to `count` vectors y of 16 outputs from o on what the pairs' experts give; `outputs` is the width of a row of B.
inline void expand(const MixtureLayer& layer, const Pairs& pairs, Target target, const float* inner, int64_t max_rank,
                   int64_t o, int64_t outputs, float* const y[], int count) {
  for (int32_t p = 0; p < pairs.count; ++p) {
    const Column& column = layer.columns[pairs.column[p]];
    const Update& update = column.updates[target];
    if (column.halves) expand<bf16>(update, inner + p * max_rank, o, outputs, y, count);
    else expand<float>(update, inner + p * max_rank, o, outputs, y, count);
  }
}
