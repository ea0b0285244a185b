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

template <class W>
inline void shrink(const Update& update, float weight, const float* x, int64_t width, float* inner) {
  const W* a = static_cast<const W*>(update.a);
  for (int64_t r = 0; r < update.rank; ++r) inner[r] = weight * dot(x, a + r * width, width);
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

template <class W>
inline __m512 expand(const Update& update, const float* inner, int64_t o, int64_t outputs, __m512 sum) {
  const W* b = static_cast<const W*>(update.b) + o;
  for (int64_t r = 0; r < update.rank; ++r) {
    sum = _mm512_fmadd_ps(load(b + r * outputs), _mm512_set1_ps(inner[r]), sum);
  }
  return sum;
}

// y[0..15] += sum_p,r inner[p, r] * B_p[r, o .. o + 15]; `outputs` is the width of a row of B.
inline void expand(const MixtureLayer& layer, const Pairs& pairs, Target target, const float* inner, int64_t max_rank,
                   int64_t o, int64_t outputs, float* y) {
  __m512 sum = load(y);
  for (int32_t p = 0; p < pairs.count; ++p) {
    const Column& column = layer.columns[pairs.column[p]];
    const Update& update = column.updates[target];
    sum = column.halves ? expand<bf16>(update, inner + p * max_rank, o, outputs, sum)
                        : expand<float>(update, inner + p * max_rank, o, outputs, sum);
  }
  store(y, sum);
}
