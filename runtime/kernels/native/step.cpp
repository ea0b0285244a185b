// A range of layers of a Llama-family model over the tokens of one step, on a CPU: one call, one team of threads.
// It knows nothing of requests, tasks or Python objects; callers own every pointer that they pass.
// Read first: `gr_layers`. From one meeting to the next every thread takes items of one phase: tokens, heads or blocks of 16
// outputs. What a token gets depends on nothing but its own sequence, so a batch and a single request agree bit for bit.
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "inspect.h"
#include "mixture.h"
#include "multiply.h"
#include "pool.h"

namespace {

struct Config {
  int64_t layers, width, ffn, heads, kv_heads, head_width, vocabulary, context;
  int64_t threads;
  double epsilon;
};

struct Layer {
  Matrix qkv, out, gate_up, down;
  std::vector<float> attention_norm, ffn_norm;
  std::vector<float> qkv_bias, q_norm, k_norm;  // empty where the model has none
};

struct Cache {
  void* keys;  // [L, slots, kv heads, context, head width]
  void* values;
  int64_t slots, context, halves;
};

// Memory for the tokens of a step; grows, never shrinks.
struct Scratch {
  int64_t tokens = 0;
  std::unique_ptr<Pages> pages;
  Input normed, attended, gated;  // of width D, heads * head width, F
  float *qkv, *mixed, *inner, *shrunk;
  Pairs* pairs;
  int64_t max_rank = 0, max_k = 0;
};

constexpr int PHASES = 10;
constexpr int64_t FEW = 4 * TILE;  // tokens, up to which experts come from memory for every token
constexpr int RUN = 4;  // blocks of one matrix that are computed together at most: so they share an expert's lines

// Adds up how long each phase took, on the first thread.
struct Clock {
  double* total_s;
  bool runs;
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();

  void mark(int phase) {
    if (!runs) return;
    const auto now = std::chrono::steady_clock::now();
    total_s[phase] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

// What a thread of the team has for itself.
struct alignas(64) Desk {
  std::vector<float> scores;
  std::vector<bf16> halves;
  std::vector<float> normed;  // [FEW, D]
  Upcoming upcoming;
  std::vector<Use> uses[3];            // of the experts, for each linear of a phase
  std::vector<int32_t> tile_begin[3];  // where those of each tile begin, and the end
  std::vector<const Column*> columns;  // what few tokens use, each once
};

// The linears of a layer that read the same input, with the widths of input and outputs.
struct Linears {
  struct One {
    Target target;
    int64_t outputs;
  };
  int64_t width;
  std::vector<One> targets;

  // Whether one of them has its first output in begin .. end - 1.
  bool begins(int64_t begin, int64_t end, bool alternate) const {
    int64_t at = 0;
    for (const One& each : targets) {
      if (begin <= at && at < end) return true;
      at += alternate ? 0 : each.outputs;
    }
    return false;
  }
};

struct Model {
  Config c;
  Linears for_qkv, for_out, for_gate_up, for_down;
  Team team;
  std::vector<Layer> layers;
  Arena arena;  // of all matrices
  Matrix head;
  std::vector<float> final_norm, cos, sin;
  Cache cache{};
  Scratch s;
  std::vector<Share> shares;
  std::vector<Desk> desks;
  double phase_s[PHASES] = {};

  explicit Model(const Config& config)
      : c(config), team(int(config.threads)), layers(config.layers), desks(config.threads) {
    const int64_t kv_width = c.kv_heads * c.head_width;
    for_qkv = {c.width, {{Q, attention_width()}, {K, kv_width}, {V, kv_width}}};
    for_out = {attention_width(), {{O, c.width}}};
    for_gate_up = {c.width, {{GATE, c.ffn}, {UP, c.ffn}}};
    for_down = {c.ffn, {{DOWN, c.width}}};
    shares.reserve(config.layers * PHASES + 1);
    while (shares.size() < shares.capacity()) shares.emplace_back(int(config.threads));
    for (Desk& desk : desks) {
      desk.halves.resize(std::max({c.width, c.ffn, attention_width()}));
      desk.normed.resize(FEW * c.width);
    }
  }

  int64_t attention_width() const { return c.heads * c.head_width; }
  int64_t qkv_width() const { return (c.heads + 2 * c.kv_heads) * c.head_width; }
};

void accumulate(float* y, const float* x) { store(y, add(load(y), load(x))); }

// Up to 16 values to y[o ..], as far as y goes.
void put(float* y, int64_t o, int64_t end, const float* x) {
  std::memcpy(y + o, x, size_t(std::min<int64_t>(LANES, end - o)) * 4);
}

void norm(const float* x, const std::vector<float>& weight, double epsilon, float* y) {
  const int64_t n = int64_t(weight.size());
  const float factor = 1.0f / std::sqrt(dot(x, x, n) / float(n) + float(epsilon));
  for (int64_t i = 0; i < n; i += LANES) {
    store(y + i, mul(mul(load(x + i), all(factor)), load(weight.data() + i)));
  }
}

template <class T>
T* take(uint8_t*& at, int64_t count) {
  T* got = reinterpret_cast<T*>(at);
  at += up(count * int64_t(sizeof(T)), 64);
  return got;
}

Input take_input(uint8_t*& at, int64_t tokens, int64_t cols) {
  Input in;
  in.stride = up(cols, GROUP);
  in.words = take<uint32_t>(at, tokens * in.stride);
  in.scales = take<float>(at, tokens * in.stride / GROUP);
  in.shift = take<int32_t>(at, tokens * in.stride / GROUP * 2);
  return in;
}

void reserve(Model& m, int64_t tokens, int64_t max_rank, int64_t max_k) {
  Scratch& s = m.s;
  const auto begin = [&](int64_t rows) { s.normed.rows = s.attended.rows = s.gated.rows = rows; };
  begin(tokens);
  if (tokens <= s.tokens && max_rank <= s.max_rank && max_k <= s.max_k) return;
  const int64_t rows = tokens;
  tokens = std::max(up(tokens, 16), s.tokens);
  max_rank = std::max(up(max_rank, 8), s.max_rank);
  max_k = std::max(max_k, s.max_k);
  auto lay_out = [&](uint8_t* at) {
    s.normed = take_input(at, tokens, m.c.width);
    s.attended = take_input(at, tokens, m.attention_width());
    s.gated = take_input(at, tokens, m.c.ffn);
    s.qkv = take<float>(at, tokens * m.qkv_width());
    s.mixed = take<float>(at, tokens * m.attention_width());
    s.inner = take<float>(at, tokens * m.c.ffn);
    s.shrunk = take<float>(at, tokens * 3 * max_k * max_rank);
    s.pairs = take<Pairs>(at, tokens);
    return at;
  };
  const size_t bytes = size_t(lay_out(nullptr) - static_cast<uint8_t*>(nullptr));
  s.pages.reset();
  s.pages = std::make_unique<Pages>(bytes);
  lay_out(s.pages->data);
  s.tokens = tokens;
  s.max_rank = max_rank;
  s.max_k = max_k;
  begin(rows);
}

// The step of one call, with what its phases share.
struct Step {
  Model& m;
  float* hidden;
  int64_t tokens;
  const int32_t *positions, *slots, *rows;
  const Stage* stage;
  Pairs* record;  // [L, tokens] or null: the experts that each token used
  bool alone;     // no two tokens of the same slot

  // Wait for the end of a phase.
  void meet(const Share& share) const { m.team.meet(share); }

  float* shrunk(int64_t t, int which) const { return m.s.shrunk + (t * 3 + which) * m.s.max_k * m.s.max_rank; }

  // Whether experts come from memory for every token; with many tokens the caches hold them anyway.
  bool few() const { return tokens <= FEW; }

  // Whether a thread comes to the next outputs so soon that what it asks for now is still in its caches.
  bool in_a_tile() const { return tokens <= TILE; }

  // Make every token's row(t) the input of a matrix, and call then(t). Threads share tiles if that deals them out
  // evenly; else each takes some columns of all tokens, since the tokens of a tile share the lines that are written.
  template <class Row, class Then>
  void feed(Share& share, int rank, const Matrix& matrix, const Input& in, Row&& row, Then&& then) const {
    const int64_t tiles = up(tokens, TILE) / TILE;
    if (const int size = m.team.size(); few() && tiles % size) {
      // Of the items of each thread the first are columns, the others tokens.
      const int64_t items = tokens + size;
      bool has_rows = false;
      share.each(items, rank, [&](int64_t item) {
        int whose = size - 1;
        while (item < Share::begin(items, whose, size)) --whose;
        if (item > Share::begin(items, whose, size)) {
          const int64_t t = item - whose - 1;
          if (!has_rows) row(t);
          then(t);
          return;
        }
        const int64_t first = Share::begin(matrix.groups, whose, size), last = Share::begin(matrix.groups, whose + 1, size);
        for (int64_t t = 0; t < tokens; ++t) prepare(matrix.kind, in, t, row(t), matrix.cols, first, last);
        has_rows = true;
      });
      return;
    }
    share.each(tiles, rank, [&](int64_t tile) {
      for (int64_t t = tile * TILE; t < std::min((tile + 1) * TILE, tokens); ++t) {
        prepare(matrix.kind, in, t, row(t), matrix.cols, 0, matrix.groups);
        then(t);
      }
    });
  }

  // Where this thread has its copy of a token's normed row.
  float* normed(int rank, int64_t t) const { return m.desks[rank].normed.data() + t % FEW * m.c.width; }

  // Norms rows of `from` [tokens, D].
  auto norming(int rank, const float* from, const std::vector<float>& weight) const {
    return [this, rank, from, &weight](int64_t t) {
      norm(from + t * m.c.width, weight, m.c.epsilon, normed(rank, t));
      return normed(rank, t);
    };
  }

  // The experts of token t in a layer, or null.
  const MixtureLayer* experts(int64_t index, int64_t t) const {
    const MixtureLayer* layers = stage ? stage->rows[rows[t]].layers : nullptr;
    return layers && layers[index].count ? &layers[index] : nullptr;
  }

  // Whether x may be rounded to multiply it with experts of 16 bits.
  bool rounds() const { return m.head.kind != FLOAT32; }

  // Route token t by its normed input x and shrink it for up to three targets.
  void choose(int64_t index, int64_t t, int rank, const float* x, std::initializer_list<Target> targets) const {
    if (const MixtureLayer* layer = experts(index, t)) {
      route(*layer, x, m.c.width, &m.s.pairs[t]);
      reduce(index, t, rank, x, m.c.width, targets);
    }
  }

  void reduce(int64_t index, int64_t t, int rank, const float* x, int64_t width,
              std::initializer_list<Target> targets) const {
    const MixtureLayer* layer = experts(index, t);
    if (!layer) return;
    const Pairs& pairs = m.s.pairs[t];
    if (few() && !layer->all) {  // until now nobody knew which
      for (int32_t p = 0; p < pairs.count; ++p) {
        for (Target target : targets) {
          const Column& column = layer->columns[pairs.column[p]];
          ::fetch(column.updates[target].a, size_t(bytes_of_a(column, target, width)));
        }
      }
    }
    bf16* halves = rounds() ? m.desks[rank].halves.data() : nullptr;
    if (halves) round_to(halves, x, width);
    int which = 0;
    for (Target target : targets) shrink(*layer, pairs, target, {x, halves}, width, shrunk(t, which++), m.s.max_rank);
  }

  // Whether tokens t and u use the same experts.
  bool same(int64_t index, int64_t t, int64_t u) const {
    const Pairs &one = m.s.pairs[t], &other = m.s.pairs[u];
    if (experts(index, t) != experts(index, u) || one.count != other.count) return false;
    return std::equal(one.column, one.column + one.count, other.column);
  }

  // Note which experts each tile of tokens uses in the linears that come next; all are routed. Tokens that follow each
  // other in a tile and use the same experts share the loads of these.
  void sort_out(int64_t index, int rank, const Linears& linears) const {
    Desk& desk = m.desks[rank];
    for (auto& uses : desk.uses) uses.clear();
    for (auto& begin : desk.tile_begin) begin.clear();
    for (int64_t tile = 0; tile < tokens; tile += TILE) {
      for (auto [which, end] = std::pair{size_t(0), linears.targets.size()}; which < end; ++which) {
        desk.tile_begin[which].push_back(int32_t(desk.uses[which].size()));
      }
      for (int64_t t = tile, next, end = std::min(tile + TILE, tokens); t < end; t = next) {
        next = t + 1;
        const MixtureLayer* layer = experts(index, t);
        if (!layer) continue;
        while (next < end && same(index, t, next)) ++next;
        const Pairs& pairs = m.s.pairs[t];
        for (int32_t p = 0; p < pairs.count; ++p) {
          const Column& column = layer->columns[pairs.column[p]];
          int which = 0;
          for (const auto& [target, outputs] : linears.targets) {
            const Update& update = column.updates[target];
            const float* inner = shrunk(t, which) + p * m.s.max_rank;
            if (update.rank) {
              desk.uses[which].push_back(
                  {update.b, update.rank, inner, int32_t(next - t), int32_t(t - tile), column.halves != 0});
            }
            ++which;
          }
        }
      }
    }
    for (size_t which = 0; which < linears.targets.size(); ++which) {
      desk.tile_begin[which].push_back(int32_t(desk.uses[which].size()));
    }
    desk.columns.clear();
    if (few()) used(index, 0, tokens, BOTH, [&](const Column& column) { desk.columns.push_back(&column); });
  }

  // Add to `count` vectors of 16 outputs from o on, of the tile of tokens at t, what their experts give to a linear;
  // `outputs` is the width of a row of B.
  void add(const Desk& desk, int64_t t, int which, int64_t o, int64_t outputs, float (*y)[TILE][LANES], int count) const {
    const int32_t begin = desk.tile_begin[which][t / TILE], end = desk.tile_begin[which][t / TILE + 1];
    const Use* uses = desk.uses[which].data() + begin;
    const int64_t stride = 3 * m.s.max_k * m.s.max_rank;
    constexpr int64_t apart = TILE * LANES;
    const auto by = [&]<int N>() {
      if (in_a_tile()) expand<N, true>(uses, end - begin, o, stride, outputs, y[0][0], apart);
      else expand<N, false>(uses, end - begin, o, stride, outputs, y[0][0], apart);
    };
    switch (count) {
      case 4: return by.template operator()<4>();
      case 3: return by.template operator()<3>();
      case 2: return by.template operator()<2>();
      default: return by.template operator()<1>();
    }
  }

  // Of which tokens the experts are meant: of those without a choice, or of all, which are routed.
  enum Known { FIXED, BOTH };

  // Calls work(column) for the experts of tokens begin .. end - 1 in a layer, once for each.
  template <class F>
  void used(int64_t index, int64_t begin, int64_t end, Known known, F&& work) const {
    const Column* seen[2 * TILE];
    int count = 0;
    for (int64_t t = begin; t < end; ++t) {
      const MixtureLayer* layer = experts(index, t);
      if (!layer) continue;
      const bool fixed = layer->all != 0;
      if (known == FIXED && !fixed) continue;
      const Pairs& pairs = m.s.pairs[t];
      for (int64_t p = 0; p < (fixed ? layer->count : pairs.count); ++p) {
        const Column* column = &layer->columns[fixed ? p : pairs.column[p]];
        if (std::find(seen, seen + count, column) != seen + count) continue;
        if (count < 2 * TILE) seen[count++] = column;
        work(*column);
      }
    }
  }

  // Ask for what says where the experts of a layer lie; `near` once it is known where that is.
  void foresee(int64_t index, bool near) const {
    if (!few() || !stage || index >= m.c.layers) return;
    for (int64_t t = 0; t < tokens; ++t) {
      const MixtureLayer* layers = stage->rows[rows[t]].layers;
      if (!layers) continue;
      const MixtureLayer& layer = layers[index];
      if (!near) {
        _mm_prefetch(reinterpret_cast<const char*>(&layer), _MM_HINT_T0);
      } else if (layer.count) {
        ::fetch(layer.columns, sizeof(Column) * size_t(std::min<int64_t>(layer.count, 8)));
        ::fetch(layer.parts, sizeof(Part) * size_t(std::min<int64_t>(layer.num_parts, 2)));
      }
    }
  }

  // Want the routers of this thread's tokens.
  void expect_routers(int64_t index, int rank) const {
    if (!few() || !stage || index >= m.c.layers) return;
    const int size = m.team.size();
    for (int64_t t = Share::begin(tokens, rank, size); t < Share::begin(tokens, rank + 1, size); ++t) {
      const MixtureLayer* layer = experts(index, t);
      for (int64_t i = 0; layer && i < layer->num_parts; ++i) {
        const Part& part = layer->parts[i];
        const int64_t columns = part.weighing == CONSTANT ? 0 : part.end - part.begin;
        if (columns > 1) m.desks[rank].upcoming.phase.add(part.weight, columns * m.c.width * 4);
      }
    }
  }

  // Want the A of this thread's tokens for the linears that come next.
  void expect(int64_t index, int rank, Known known, const Linears& linears) const {
    if (!few() || !stage || index >= m.c.layers) return;
    const int size = m.team.size();
    used(index, Share::begin(tokens, rank, size), Share::begin(tokens, rank + 1, size), known, [&](const Column& c) {
      for (const auto& [target, outputs] : linears.targets) {
        m.desks[rank].upcoming.phase.add(c.updates[target].a, bytes_of_a(c, target, linears.width));
      }
    });
  }

  // Want the B of outputs begin .. end - 1 of linears, which follow each other, or alternate.
  void expect_b(int rank, const Linears& linears, int64_t begin, int64_t end, bool alternate) const {
    Desk& desk = m.desks[rank];
    desk.upcoming.item.clear();
    int64_t at = 0;
    for (const auto& [target, outputs] : linears.targets) {
      const int64_t first = std::max<int64_t>(begin - at, 0), last = std::min(end - at, outputs);
      if (first < last) {
        for (const Column* column : desk.columns) want_b(desk.upcoming.item, *column, target, first, last, outputs);
      }
      at += alternate ? 0 : outputs;
    }
  }

  // For every run of up to RUN blocks of 16 outputs and every tile of tokens: done(first output, token, tokens,
  // products, blocks).
  // What it gets does not cross a multiple of `border` outputs. With `parts` 2 two matrices alternate block by block;
  // the products of the second then follow those of the first, RUN later. before() comes before a thread's first item.
  template <class Before, class Done>
  void product(Share& share, int rank, const Matrix& matrix, const Input& in, int64_t border, int parts,
               const Linears* linears, Before&& before, Done&& done) const {
    const int64_t blocks = matrix.blocks / parts, per_border = std::max<int64_t>(1, border / LANES);
    const bool even = blocks % (RUN * m.team.size()) == 0;  // fewer pieces, but no thread with one more than another
    const int64_t run = linears && even ? RUN : 2, items = up(blocks, run) / run, tiles = up(tokens, TILE) / TILE;
    const int64_t asks = tiles * parts * (run / 2) * (up(matrix.groups, GROUPS) / GROUPS);  // in an item
    Upcoming& upcoming = m.desks[rank].upcoming;
    int64_t expected = -1;  // the item whose experts are asked for already
    const auto begin = [&] {
      before();
      upcoming.phase.spread(items / m.team.size() * asks);
      upcoming.item.clear();
    };
    share.each(items, rank, begin, [&](int64_t item) {
      const int64_t first = item * run, last = std::min(first + run, blocks);
      const bool begins = linears && linears->begins(first * LANES, last * LANES, parts == 2);
      if (linears && few() && (begins || item != expected)) {
        expect_b(rank, *linears, first * LANES, last * LANES, parts == 2);
        upcoming.item.spread(asks - asks / 4);
      }
      if (in_a_tile()) expected = item + 1;
      const auto pieces = [&](auto&& each) {
        for (int64_t block = first, end; block < last; block = end) {
          end = std::min(last, (block / per_border + 1) * per_border);
          each(block, int(end - block));
        }
      };
      alignas(64) float out[2 * RUN][TILE][LANES];
      for (int64_t t = 0; t < tokens; t += TILE) {
        const int64_t count = std::min(TILE, tokens - t);
        const int64_t bytes = (last - first) * parts * int64_t(matrix.block_bytes);
        const Ahead ahead = ahead_of(t / TILE, tiles, bytes);
        for (int64_t block = first * parts; block < last * parts; block += 2) {
          const int together = int(std::min<int64_t>(2, last * parts - block));
          float(*to[2])[LANES];
          for (int64_t k = block - first * parts, j = 0; j < together; ++k, ++j) to[j] = out[k % parts * RUN + k / parts];
          multiply_tile(matrix, block, together, in, t, ahead, upcoming, to);
        }
        pieces([&](int64_t block, int n) { done(block * LANES, t, count, out + (block - first), n); });
      }
    });
  }

  // Where the keys or values of an item of the attention begin: one token's heads of one group.
  int64_t plane(int64_t index, int64_t item) const {
    const int64_t t = item / m.c.kv_heads, head = item % m.c.kv_heads;
    return ((index * m.cache.slots + slots[t]) * m.c.kv_heads + head) * m.cache.context * m.c.head_width;
  }

  template <class C>
  void attend_head(int64_t index, int64_t item, float* scratch) const {
    const Config& c = m.c;
    const int64_t group = c.heads / c.kv_heads, t = item / c.kv_heads, head = item % c.kv_heads;
    const C *keys = static_cast<C*>(m.cache.keys), *values = static_cast<C*>(m.cache.values);
    NextRows<C> next{};
    if (alone && item + 1 < tokens * c.kv_heads) {  // the machine itself sees where one token's rows go on
      const int64_t after = plane(index, item + 1);
      next = {keys + after, values + after, positions[(item + 1) / c.kv_heads]};
    }
    attend<C>(group, m.s.qkv + t * m.qkv_width() + head * group * c.head_width, keys + plane(index, item),
              values + plane(index, item), positions[t] + 1, c.head_width, next, scratch,
              m.s.mixed + t * m.attention_width() + head * group * c.head_width);
  }

  // Ask for the first rows that this thread will attend to.
  template <class C>
  void fetch_cache(int64_t index, int64_t item) const {
    if (!alone || item >= tokens * m.c.kv_heads) return;
    const size_t bytes = size_t(std::min<int64_t>(positions[item / m.c.kv_heads], 16) * m.c.head_width) * sizeof(C);
    ::fetch(static_cast<C*>(m.cache.keys) + plane(index, item), bytes);
    ::fetch(static_cast<C*>(m.cache.values) + plane(index, item), bytes);
  }

  // Rotate the heads of one group and write its key and value.
  template <class C>
  void place(int64_t index, int64_t t, int64_t head) const {
    const Config& c = m.c;
    const int64_t group = c.heads / c.kv_heads, w = c.head_width;
    const float *cos = m.cos.data() + positions[t] * w, *sin = m.sin.data() + positions[t] * w;
    float* row = m.s.qkv + t * m.qkv_width();
    float* key = row + (c.heads + head) * w;
    const Layer& l = m.layers[index];
    for (int64_t g = 0; g < group; ++g) {
      float* query = row + (head * group + g) * w;
      if (!l.q_norm.empty()) norm(query, l.q_norm, c.epsilon, query);
      rotate(query, cos, sin, w);
    }
    if (!l.k_norm.empty()) norm(key, l.k_norm, c.epsilon, key);
    rotate(key, cos, sin, w);
    const int64_t begin = plane(index, t * c.kv_heads + head);
    C* to_key = static_cast<C*>(m.cache.keys) + begin + positions[t] * w;
    C* to_value = static_cast<C*>(m.cache.values) + begin + positions[t] * w;
    for (int64_t i = 0; i < w; i += LANES) {
      store(to_key + i, load(key + i));
      store(to_value + i, load(row + (c.heads + c.kv_heads + head) * w + i));
    }
  }

  // before() comes before a thread's first item.
  template <class C, class Before>
  void attention(int64_t index, Share& first, Share& second, int rank, Before&& before) const {
    const Config& c = m.c;
    float* scratch = m.desks[rank].scores.data();
    const int64_t items = tokens * c.kv_heads;
    const auto begin = [&] {
      before();
      fetch_cache<C>(index, Share::begin(items, rank, m.team.size()));
    };
    first.each(items, rank, begin, [&](int64_t item) {
      m.desks[rank].upcoming.ask();
      place<C>(index, item / c.kv_heads, item % c.kv_heads);
      if (alone) attend_head<C>(index, item, scratch);
    });
    meet(first);
    if (alone) return;
    second.each(items, rank, [&](int64_t item) {
      attend_head<C>(index, item, scratch);
    });
    meet(second);
  }

  void layer(int64_t index, int rank) const {
    const Config& c = m.c;
    Clock clock{m.phase_s, rank == 0};
    const Layer& l = m.layers[index];
    Share* share = &m.shares[index * PHASES];
    const bool in_attention = stage && stage->attention;
    Scratch& s = m.s;
    const int64_t q_width = m.attention_width(), kv_width = c.kv_heads * c.head_width;

    feed(share[0], rank, l.qkv, s.normed, norming(rank, hidden, l.attention_norm), [&](int64_t t) {
      if (in_attention) choose(index, t, rank, normed(rank, t), {Q, K, V});
    });
    meet(share[0]);
    clock.mark(0);
    const auto part_of = [&](int64_t o) { return o < q_width ? 0 : o < q_width + kv_width ? 1 : 2; };
    const int64_t begins[] = {0, q_width, q_width + kv_width}, widths[] = {q_width, kv_width, kv_width};
    Desk& desk = m.desks[rank];
    Stretches& wanted = desk.upcoming.phase;
    const auto before_qkv = [&] {
      wanted.clear();
      if (!in_attention) return;
      sort_out(index, rank, m.for_qkv);
      expect(index, rank, BOTH, m.for_out);
    };
    product(share[1], rank, l.qkv, s.normed, c.head_width, 1, in_attention ? &m.for_qkv : nullptr, before_qkv,
            [&](int64_t o, int64_t t, int64_t n, float (*y)[TILE][LANES], int count) {
      const int part = part_of(o);
      if (in_attention) add(desk, t, part, o - begins[part], widths[part], y, count);
      for (int64_t i = 0; i < n; ++i) {
        float* to = s.qkv + (t + i) * m.qkv_width() + o;
        for (int k = 0; k < count; ++k) {
          const Floats bias = l.qkv_bias.empty() ? zeros() : load(l.qkv_bias.data() + o + k * LANES);
          store(to + k * LANES, ::add(load(y[k][i]), bias));
        }
      }
    });
    meet(share[1]);
    clock.mark(1);
    const auto before_attention = [&] {
      foresee(index + 1, false);
      expect_routers(index, rank);
      expect(index, rank, FIXED, m.for_gate_up);  // experts of the FFN are half of all: it begins early
      wanted.spread(2 * up(tokens * c.kv_heads, m.team.size()) / m.team.size());
    };
    if (m.cache.halves) attention<bf16>(index, share[2], share[3], rank, before_attention);
    else attention<float>(index, share[2], share[3], rank, before_attention);
    clock.mark(2);

    const auto mixed = [&](int64_t t) { return s.mixed + t * q_width; };
    feed(share[4], rank, l.out, s.attended, mixed, [&](int64_t t) {
      if (in_attention) reduce(index, t, rank, mixed(t), q_width, {O});
    });
    meet(share[4]);
    clock.mark(4);
    const auto before_out = [&] {
      if (in_attention) sort_out(index, rank, m.for_out);
    };
    product(share[5], rank, l.out, s.attended, c.width, 1, in_attention ? &m.for_out : nullptr, before_out,
            [&](int64_t o, int64_t t, int64_t n, float (*y)[TILE][LANES], int count) {
      if (in_attention) add(desk, t, 0, o, c.width, y, count);
      for (int64_t i = 0; i < n; ++i) {
        for (int k = 0; k < count; ++k) accumulate(hidden + (t + i) * c.width + o + k * LANES, y[k][i]);
      }
    });
    meet(share[5]);
    clock.mark(5);
    feed(share[6], rank, l.gate_up, s.normed, norming(rank, hidden, l.ffn_norm), [&](int64_t t) {
      choose(index, t, rank, normed(rank, t), {GATE, UP});
      if (record && experts(index, t)) record[index * tokens + t] = s.pairs[t];
    });
    meet(share[6]);
    clock.mark(6);
    const auto before_gate_up = [&] {
      wanted.clear();
      if (stage) sort_out(index, rank, m.for_gate_up);
      foresee(index + 1, true);
      expect(index, rank, BOTH, m.for_down);
    };
    product(share[7], rank, l.gate_up, s.normed, c.ffn, 2, stage ? &m.for_gate_up : nullptr, before_gate_up,
            [&](int64_t o, int64_t t, int64_t n, float (*y)[TILE][LANES], int count) {
      if (stage) add(desk, t, 0, o, c.ffn, y, count);
      if (stage) add(desk, t, 1, o, c.ffn, y + RUN, count);
      for (int64_t i = 0; i < n; ++i) {
        float* to = s.inner + (t + i) * c.ffn + o;
        for (int k = 0; k < count; ++k) store(to + k * LANES, mul(silu16(load(y[k][i])), load(y[RUN + k][i])));
      }
    });
    meet(share[7]);
    clock.mark(7);
    const auto inner = [&](int64_t t) { return s.inner + t * c.ffn; };
    feed(share[8], rank, l.down, s.gated, inner, [&](int64_t t) { reduce(index, t, rank, inner(t), c.ffn, {DOWN}); });
    meet(share[8]);
    clock.mark(8);
    const auto before_down = [&] {
      wanted.clear();
      if (in_attention) {
        expect_routers(index + 1, rank);
        expect(index + 1, rank, FIXED, m.for_qkv);
      }
      if (stage) sort_out(index, rank, m.for_down);
    };
    product(share[9], rank, l.down, s.gated, c.width, 1, stage ? &m.for_down : nullptr, before_down,
            [&](int64_t o, int64_t t, int64_t n, float (*y)[TILE][LANES], int count) {
      if (stage) add(desk, t, 0, o, c.width, y, count);
      for (int64_t i = 0; i < n; ++i) {
        for (int k = 0; k < count; ++k) accumulate(hidden + (t + i) * c.width + o + k * LANES, y[k][i]);
      }
    });
    meet(share[9]);
    clock.mark(9);
  }
};

}  // namespace

extern "C" {

// 1 where this machine runs what this file was compiled for.
int gr_supported() {
  __builtin_cpu_init();
  if (DOT_PRODUCTS) return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") ? 1 : 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 1 : 0;
}

void* gr_create(const Config* config) {
  try {
    return new Model(*config);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void gr_destroy(void* model) { delete static_cast<Model*>(model); }

// Take over rows first .. first + count - 1 of one weight, given as float32: which = 0 qkv, 1 out, 2 gate and up, 3 down,
// 4 head (matrices [rows, cols], from row 0 on; gate and up at once); 5 attention norm, 6 FFN norm, 7 final norm, 8 cos,
// 9 sin, 10 qkv bias, 11 q norm, 12 k norm (vectors, at once). Returns 0, or 1 without memory.
int gr_set(void* handle, int which, int64_t layer, const float* w, int64_t rows, int64_t cols, int kind, int64_t first,
           int64_t count) {
  Model& m = *static_cast<Model*>(handle);
  if (which >= 5) {
    Layer& l = m.layers[layer];
    std::vector<float>* vectors[] = {&l.attention_norm, &l.ffn_norm, &m.final_norm, &m.cos, &m.sin,
                                     &l.qkv_bias, &l.q_norm, &l.k_norm};
    vectors[which - 5]->assign(w, w + rows * cols);
    return 0;
  }
  Layer& l = m.layers[layer];
  Matrix* matrices[] = {&l.qkv, &l.out, &l.gate_up, &l.down, &m.head};
  Matrix& matrix = *matrices[which];
  if (first == 0) {
    try {
      matrix = view(Kind(kind), rows, cols, m.arena.take(matrix_bytes(Kind(kind), rows, cols)));
    } catch (const std::bad_alloc&) {
      return 1;
    }
  }
  const int64_t half = rows / 2;
  const auto source = [&](int64_t r) {  // gate and up alternate, block by block
    return (which != 2 ? r : r % 32 < 16 ? r / 32 * 16 + r % 16 : half + r / 32 * 16 + r % 16) - first;
  };
  const int64_t share = up((count + m.team.size() - 1) / m.team.size(), LANES);
  m.team.run([&](int rank) {
    pack(matrix, w, first + std::min(rank * share, count), first + std::min((rank + 1) * share, count), source);
  });
  return 0;
}

void gr_cache(void* handle, void* keys, void* values, int64_t slots, int64_t context, int64_t halves) {
  Model& m = *static_cast<Model*>(handle);
  m.cache = Cache{keys, values, slots, context, halves};
  for (Desk& desk : m.desks) desk.scores.resize(4 * up(context, LANES));
}

// Run layers begin .. end - 1 over `hidden` [tokens, D] float32, in place; the tokens' keys and values enter the cache.
// `stage` and `rows` [tokens] are null where no token has experts; `record` may be null. Returns 1 without memory.
int gr_layers(void* handle, float* hidden, int64_t tokens, int64_t begin, int64_t end, const int32_t* positions,
              const int32_t* slots, const Stage* stage, const int32_t* rows, int alone, Pairs* record) {
  Model& m = *static_cast<Model*>(handle);
  try {
    reserve(m, tokens, stage ? stage->max_rank : 0, stage ? stage->max_k : 0);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  for (auto& share : m.shares) share.reset();
  const Step step{m, hidden, tokens, positions, slots, rows, stage, record, alone != 0};
  m.team.run([&](int rank) {
    for (int64_t index = begin; index < end; ++index) step.layer(index, rank);
  });
  return 0;
}

// Seconds spent in each phase of the layers since the last call, PHASES of them; phase 3 counts into phase 2.
void gr_phases(void* handle, double* seconds) {
  Model& m = *static_cast<Model*>(handle);
  for (int i = 0; i < PHASES; ++i) seconds[i] = m.phase_s[i], m.phase_s[i] = 0;
}

// logits [tokens, V] = head(norm(hidden)).
int gr_logits(void* handle, const float* hidden, int64_t tokens, float* logits) {
  Model& m = *static_cast<Model*>(handle);
  try {
    reserve(m, tokens, 0, 0);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  for (auto& share : m.shares) share.reset();
  const Step step{m, nullptr, tokens, nullptr, nullptr, nullptr, nullptr, nullptr, true};
  m.team.run([&](int rank) {
    m.desks[rank].upcoming.phase.clear();
    step.feed(m.shares[0], rank, m.head, m.s.normed, step.norming(rank, hidden, m.final_norm), [](int64_t) {});
    step.meet(m.shares[0]);
    step.product(m.shares[1], rank, m.head, m.s.normed, m.c.vocabulary, 1, nullptr, [] {},
                 [&](int64_t o, int64_t t, int64_t n, float (*y)[TILE][LANES], int count) {
      for (int64_t i = 0; i < n; ++i) {
        for (int k = 0; k < count; ++k) put(logits + (t + i) * m.c.vocabulary, o + k * LANES, m.c.vocabulary, y[k][i]);
      }
    });
  });
  return 0;
}

// Look at `count` pieces, see inspect.h; where there is a model, and no disk to wait for, its team does the work between
// phases while it computes.
int64_t gr_inspect(void* handle, int file, int wait, int64_t place, uint8_t* const* data, const int64_t* sizes,
                   int64_t count, uint32_t mask, uint8_t* digests, uint8_t* finite) {
  const Pieces all{file, wait, place, data, sizes, mask, digests, finite};
  if (!handle || wait) return inspect(all, count);
  constexpr int64_t TOGETHER = 2;
  try {
    std::vector<int64_t> places{place}, done(up(count, TOGETHER) / TOGETHER);
    for (int64_t i = 0; i < count; ++i) places.push_back(places.back() + sizes[i]);
    static_cast<Model*>(handle)->team.aside(int64_t(done.size()), [&](int64_t pair) {
      const int64_t first = pair * TOGETHER;
      const Pieces some{file, wait, places[first], data + first, sizes + first, mask, digests + 32 * first, finite + first};
      done[pair] = inspect(some, std::min(TOGETHER, count - first));
    });
    int64_t whole = 0;
    for (size_t pair = 0; pair < done.size(); ++pair) {
      if (done[pair] < 0) return done[pair];
      whole += done[pair];
      if (whole < std::min(int64_t(pair + 1) * TOGETHER, count)) break;
    }
    return whole;
  } catch (const std::bad_alloc&) {
    return inspect(all, count);
  }
}

// y [tokens, rows] = W x [tokens, cols] for one matrix of a layer (as in gr_set), or the head.
int gr_linear(void* handle, int which, int64_t layer, const float* x, int64_t tokens, float* y) {
  Model& m = *static_cast<Model*>(handle);
  try {
    reserve(m, tokens, 0, 0);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  Layer& l = m.layers[layer];
  const Matrix& matrix = *(const Matrix*[]){&l.qkv, &l.out, &l.gate_up, &l.down, &m.head}[which];
  const Input& in = which == 1 ? m.s.attended : which == 3 ? m.s.gated : m.s.normed;
  for (auto& share : m.shares) share.reset();
  const Step step{m, nullptr, tokens, nullptr, nullptr, nullptr, nullptr, nullptr, true};
  m.team.run([&](int rank) {
    m.desks[rank].upcoming.phase.clear();
    step.feed(m.shares[0], rank, matrix, in, [&](int64_t t) { return x + t * matrix.cols; }, [](int64_t) {});
    step.meet(m.shares[0]);
    const int parts = which == 2 ? 2 : 1;
    const int64_t rows = matrix.rows / parts;
    step.product(m.shares[1], rank, matrix, in, rows, parts, nullptr, [] {},
                 [&](int64_t o, int64_t t, int64_t n, float (*x)[TILE][LANES], int count) {
      for (int64_t i = 0; i < n; ++i) {
        for (int k = 0; k < parts * count; ++k) {
          const int part = k / count, at = k % count;
          put(y + (t + i) * matrix.rows + part * rows, o + at * LANES, rows, x[part * RUN + at][i]);
        }
      }
    });
  });
  return 0;
}

}  // extern "C"
