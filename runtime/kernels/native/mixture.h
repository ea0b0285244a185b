// The mixture of experts of one token: which experts, with which weight, and what they add.
// y[o] += sum_p weight[p] * scale * sum_r (A_p x)[r] * B_p[o, r], experts used in place where they lie in memory.
// It knows nothing of layers beyond the columns that it is given; no expert that a token does not use is touched.
#pragma once
#include "simd.h"
#include "upcoming.h"

enum Target : int { Q, K, V, O, GATE, UP, DOWN, NUM_TARGETS };
constexpr int MAX_K = 64;  // experts of one token at most

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

enum Weighing : int64_t { TOP_K, ABSOLUTE, GROUPED, CONSTANT };

// How some columns of a layer, one after the other, are weighed; a blend has several of these.
struct Part {
  int64_t weighing;
  int64_t begin, end;     // columns
  int64_t top_k;
  double share;           // what the weights are multiplied by
  const float* weight;    // [end - begin, D], of the router
  const float* bias;      // [end - begin] or null
  const float* constant;  // [end - begin] or null: weights that do not depend on the token
  // where groups are weighed first
  int64_t groups;
  const float* group_weight;      // [groups, D]
  const float* group_bias;        // [groups]
  const int32_t* group_allowed;   // [groups]
  const int32_t* member;          // [end - begin], -1 for none
  double group_share, epsilon;
};

// One layer of a mixture: the experts that its router's parts choose from.
struct MixtureLayer {
  const Part* parts;
  int64_t num_parts;
  const Column* columns;  // [count]
  int64_t count;          // 0: no experts in this layer
  int64_t all;            // 1 where every token uses every column
};

struct Mixture {
  const MixtureLayer* layers;  // [L]; null is the plain base model
};

// The mixtures of a step.
struct Stage {
  const Mixture* rows;
  int64_t max_rank, max_k;  // over all mixtures
  int64_t attention;  // 1 where any column updates q, k, v or o
};

struct Pairs {
  int32_t count;
  int32_t column[MAX_K];
  float weight[MAX_K];
};

inline void take(Pairs* pairs, int64_t column, double weight) {
  if (weight == 0) return;
  pairs->column[pairs->count] = int32_t(column);
  pairs->weight[pairs->count++] = float(weight);
}

inline float logit_of(const Part& part, int64_t c, const float* x, int64_t width) {
  const float logit = dot(x, part.weight + c * width, width) + (part.bias ? part.bias[c] : 0.0f);
  return part.weighing == ABSOLUTE ? __builtin_fabsf(logit) : logit;
}

// The k largest logits, softmax over them; ties go to the earlier column.
inline void choose_top(const Part& part, const float* x, int64_t width, Pairs* pairs) {
  if (part.end - part.begin == 1) return take(pairs, part.begin, float(part.share));  // softmax over one
  int64_t count = 0, column[MAX_K];
  float logits[MAX_K];
  for (int64_t c = 0; c < part.end - part.begin; ++c) {
    const float logit = logit_of(part, c, x, width);
    int64_t at = count < part.top_k ? count++ : (logit > logits[part.top_k - 1] ? part.top_k - 1 : -1);
    if (at < 0) continue;
    for (; at > 0 && logits[at - 1] < logit; --at) logits[at] = logits[at - 1], column[at] = column[at - 1];
    logits[at] = logit, column[at] = c;
  }
  float total = 0;
  const float top = count ? logits[0] : 0;
  for (int64_t p = 0; p < count; ++p) total += logits[p] = __builtin_expf(logits[p] - top);
  for (int64_t p = 0; p < count; ++p) take(pairs, part.begin + column[p], float(part.share) * (logits[p] / total));
}

// Softmax over the allowed groups, 0 where it is below epsilon; times the softmax within each group.
inline void choose_grouped(const Part& part, const float* x, int64_t width, Pairs* pairs) {
  const int64_t count = part.end - part.begin;
  float groups[MAX_K], highest[MAX_K], totals[MAX_K] = {}, logits[MAX_K], top = -1e30f, total = 0;
  for (int64_t g = 0; g < part.groups; ++g) {
    highest[g] = -1e30f;
    if (!part.group_allowed[g]) continue;
    groups[g] = dot(x, part.group_weight + g * width, width) + part.group_bias[g];
    top = groups[g] > top ? groups[g] : top;
  }
  for (int64_t g = 0; g < part.groups; ++g) {
    groups[g] = part.group_allowed[g] ? __builtin_expf(groups[g] - top) : 0.0f;
    total += groups[g];
  }
  for (int64_t g = 0; g < part.groups; ++g) {
    groups[g] = total > 0 ? groups[g] / total : 0.0f;
    if (groups[g] < float(part.epsilon)) groups[g] = 0;
  }
  const auto open = [&](int64_t c) { return part.member[c] >= 0 && part.group_allowed[part.member[c]]; };
  for (int64_t c = 0; c < count; ++c) {
    if (!open(c)) continue;
    logits[c] = logit_of(part, c, x, width);
    float& most = highest[part.member[c]];
    most = logits[c] > most ? logits[c] : most;
  }
  for (int64_t c = 0; c < count; ++c) {
    if (open(c)) totals[part.member[c]] += logits[c] = __builtin_expf(logits[c] - highest[part.member[c]]);
  }
  for (int64_t c = 0; c < count; ++c) {
    float weight = open(c) ? float(part.group_share) * (groups[part.member[c]] * logits[c] / totals[part.member[c]]) : 0.0f;
    if (part.constant) weight += part.constant[c];
    take(pairs, part.begin + c, float(part.share) * weight);
  }
}

// The experts of a token by its normed input x: of each part what its kind says, those of weight 0 left out.
inline void route(const MixtureLayer& layer, const float* x, int64_t width, Pairs* pairs) {
  pairs->count = 0;
  for (int64_t i = 0; i < layer.num_parts; ++i) {
    const Part& part = layer.parts[i];
    if (part.weighing == GROUPED) {
      choose_grouped(part, x, width, pairs);
    } else if (part.weighing == CONSTANT) {
      for (int64_t c = part.begin; c < part.end; ++c) take(pairs, c, float(part.share) * part.constant[c - part.begin]);
    } else {
      choose_top(part, x, width, pairs);
    }
  }
}

// Bytes of the A of a column for one target.
inline int64_t bytes_of_a(const Column& column, Target target, int64_t width) {
  return column.updates[target].rank * width * (column.halves ? 2 : 4);
}

// Want outputs begin .. end - 1 of a column's B.
inline void want_b(Strips& wanted, const Column& column, Target target, int64_t begin, int64_t end, int64_t outputs) {
  const Update& update = column.updates[target];
  const int64_t size = column.halves ? 2 : 4;
  wanted.add(static_cast<const char*>(update.b) + begin * size, (end - begin) * size, update.rank, outputs * size);
}

// A token's input of an update: float, and the same rounded, or null where it must not be.
struct Shrunk {
  const float* x;
  const bf16* halves;
};

// N rows of A at once.
template <int N>
inline void shrink_rows(const bf16* a, float weight, const bf16* x, int64_t width, float* inner) {
  Floats sum[LANES];
  for (int k = 0; k < LANES; ++k) sum[k] = zeros();
  int64_t i = 0;
  for (; i + 2 * LANES <= width; i += 2 * LANES) {
    const Halves value = load_halves(x + i, true);
    for (int k = 0; k < N; ++k) sum[k] = add_products(sum[k], load_halves(a + k * width + i, true), value);
  }
  if (i < width) {
    const Halves value = load_halves(x + i, false);
    for (int k = 0; k < N; ++k) sum[k] = add_products(sum[k], load_halves(a + k * width + i, false), value);
  }
  store_first(inner, N, mul(sum_each(sum), all(weight)));
}

inline void shrink(const Update& update, float weight, const bf16* x, int64_t width, float* inner) {
  const bf16* a = static_cast<const bf16*>(update.a);
  int64_t r = 0;
  for (; r + 8 <= update.rank; r += 8, a += 8 * width) shrink_rows<8>(a, weight, x, width, inner + r);
  for (; r + 4 <= update.rank; r += 4, a += 4 * width) shrink_rows<4>(a, weight, x, width, inner + r);
  for (; r < update.rank; ++r, a += width) shrink_rows<1>(a, weight, x, width, inner + r);
}

template <class W>
inline void shrink(const Update& update, float weight, const float* x, int64_t width, float* inner) {
  const W* a = static_cast<const W*>(update.a);
  int64_t r = 0;
  for (; r + 4 <= update.rank; r += 4, a += 4 * width) {  // four rows share the loads of x
    Floats sum[4] = {};
    for (int64_t i = 0; i < width; i += LANES) {
      const Floats value = load(x + i);
      for (int k = 0; k < 4; ++k) sum[k] = mul_add(load(a + k * width + i), value, sum[k]);
    }
    for (int k = 0; k < 4; ++k) inner[r + k] = weight * total(sum[k]);
  }
  for (; r < update.rank; ++r, a += width) inner[r] = weight * dot(x, a, width);
}

// inner[p, r] = weight[p] * scale * (A_p x)[r] for one target; inner is [max_k, max_rank].
inline void shrink(const MixtureLayer& layer, const Pairs& pairs, Target target, Shrunk in, int64_t width,
                   float* inner, int64_t max_rank) {
  for (int32_t p = 0; p < pairs.count; ++p) {
    const Column& column = layer.columns[pairs.column[p]];
    const Update& update = column.updates[target];
    const float weight = pairs.weight[p] * float(column.scale);
    float* to = inner + p * max_rank;
    if (!column.halves) shrink<float>(update, weight, in.x, width, to);
    else if (in.halves) shrink(update, weight, in.halves, width, to);
    else shrink<bf16>(update, weight, in.x, width, to);
  }
}

// What `tokens` tokens that follow each other add to a linear from one expert.
struct Use {
  const void* b;       // [rank, outputs]
  int64_t rank;
  const float* inner;  // of the first token
  int32_t tokens, at;  // how many, and the first one's place in its tile
  bool halves;
};

// y[t][0 .. 16 N - 1] += sum_r inner[t][r] * b[r, ..] for L tokens. The inner values of a token lie `stride` floats from
// those of the one before, its vectors of 16 outputs `apart` floats from one another. With `ON` the outputs behind these
// are asked for: the product that comes before their turn leaves memory the time.
template <class W, int L, int N, bool ON>
inline void expand(const W* b, int64_t rank, const float* inner, int64_t stride, int64_t outputs, float* y, int64_t apart) {
  Floats sum[L][N];
#pragma GCC unroll 4
  for (int t = 0; t < L; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sum[t][i] = load(y + t * LANES + i * apart);
#pragma GCC unroll 2
  for (int64_t r = 0; r < rank; ++r, b += outputs) {
    if (ON) {
      const char* last = reinterpret_cast<const char*>(b + 2 * N * LANES) - 1;
      for (int64_t byte = 0; byte < int64_t(N * LANES * sizeof(W)); byte += LINE) _mm_prefetch(last - byte, _MM_HINT_T1);
    }
    Floats row[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) row[i] = load(b + i * LANES);
#pragma GCC unroll 4
    for (int t = 0; t < L; ++t) {
      const Floats factor = all(inner[t * stride + r]);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum[t][i] = mul_add(row[i], factor, sum[t][i]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < L; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) store(y + t * LANES + i * apart, sum[t][i]);
}

// The same for all tokens of a use, up to four at a time.
template <class W, int N, bool ON>
inline void expand(const Use& use, int64_t o, int64_t stride, int64_t outputs, float* y, int64_t apart) {
  const W* b = static_cast<const W*>(use.b) + o;
  const float* inner = use.inner;
  int64_t left = use.tokens;
  constexpr int L = std::clamp(SUMS / N, 1, 4);
  for (; left >= L; left -= L, inner += L * stride, y += L * LANES) {
    expand<W, L, N, ON>(b, use.rank, inner, stride, outputs, y, apart);
  }
  for (; left > 0; --left, inner += stride, y += LANES) expand<W, 1, N, ON>(b, use.rank, inner, stride, outputs, y, apart);
}

// What `count` uses add to N vectors of 16 outputs from o on.
template <int N, bool ON>
inline void expand(const Use* uses, int64_t count, int64_t o, int64_t stride, int64_t outputs, float* y, int64_t apart) {
  for (int64_t i = 0; i < count; ++i) {
    float* to = y + uses[i].at * LANES;
    if (uses[i].halves) expand<bf16, N, ON>(uses[i], o, stride, outputs, to, apart);
    else expand<float, N, ON>(uses[i], o, stride, outputs, to, apart);
  }
}
