// Attention of some neighbouring tokens that have the same cache and state: all scores, one softmax, all values.
//
// Scores are kept transposed, [rows, queries], as in cpu/prefill.h. Rows are the cache, the window up to the last of the
// tokens and, behind a fresh tile border, the state: its first row is a token with the mean key and a mass of n, the
// others are its directions, whose products with the query weigh the slope of the values.
// What a token gets does not depend on its neighbours: a later row only adds zeros.
#pragma once

#include "cpu/lola/hedgehog_span.h"
#include "cpu/lola/update.h"
#include "cpu/matmul.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

constexpr int kSpanQueries = 192;  // tokens times query heads, at most: a multiple of kMatmulRows and of 2 W
constexpr int kTileRows = 120;     // a multiple of kMatmulRows
static_assert(kSpanQueries % kMatmulRows == 0 && kSpanQueries % (2 * W) == 0 && kTileRows % kMatmulRows == 0);

// What the queries of one span see besides the window.
template <class T>
struct Snapshot {
  Rows<T> cache;
  float *key_mean, *value_mean;  // [d]
  float* slope;                  // [r, d], the cross moment over n
  float* feature_values;         // [D, d]
  float* feature_sum;            // [D]
};

template <class T>
inline Snapshot<T> take_snapshot(const LolaArgs& a, Carver& carver) {
  const int64_t d = a.tokens.head_size;
  Snapshot<T> s;
  s.cache = take_rows<T>(carver, a.memory.cache);
  s.key_mean = carver.take<float>(d);
  s.value_mean = carver.take<float>(d);
  s.slope = carver.take<float>(a.memory.rank * d);
  s.feature_values = carver.take<float>(a.memory.num_features * d);
  s.feature_sum = carver.take<float>(a.memory.num_features);
  return s;
}

template <class T>
inline void snapshot_head(const LolaArgs& a, const HeadMemory<T>& memory, const Candidates<T>& c, int64_t updates,
                          const Snapshot<T>& s) {
  const int64_t d = a.tokens.head_size, cached = cached_after(a.memory, updates);
  const int64_t folded = folded_after(a.memory, updates);
  std::memcpy(s.cache.keys, c.rows.keys, cached * sizeof(T*));
  std::memcpy(s.cache.values, c.rows.values, cached * sizeof(T*));
  if (folded > 0 && a.memory.num_features > 0) {
    std::memcpy(s.feature_values, memory.feature_values, a.memory.num_features * d * sizeof(float));
    std::memcpy(s.feature_sum, memory.feature_sum, a.memory.num_features * sizeof(float));
  }
  if (folded == 0 || a.memory.rank == 0) return;
  std::memcpy(s.key_mean, memory.key_mean, d * sizeof(float));
  std::memcpy(s.value_mean, memory.value_mean, d * sizeof(float));
  const F inverse = set(1.0f / static_cast<float>(folded));
  for (int64_t i = 0; i < a.memory.rank * d; i += W) store(s.slope + i, mul(load(memory.cross_moment + i), inverse));
}

struct SpanMemory {
  float* query;    // [queries / 2 W, d, 2 W], scaled for scores in units of log 2
  float* keys;     // [kTileRows, d]
  float* values;   // [d / 2 W, kTileRows, 2 W]
  float* weights;  // [rows, stride]
  float* output;   // [queries, d]
  float* sum;      // [queries]
  float* token;    // [queries], its row among `rows`
  float* ones;     // [queries]
  int64_t stride;  // an odd number of cache lines: rows do not fall on the same ones
};

inline int64_t padded_rows(int64_t rows) { return ceil_div(rows, kMatmulRows) * kMatmulRows; }

inline SpanMemory take_span_memory(int64_t head_size, int64_t rows, int64_t queries, Carver& carver) {
  const int64_t columns = max(ceil_div(queries, 2 * W) * 2 * W, padded_rows(queries));
  SpanMemory m;
  m.stride = (ceil_div(columns, 16) | 1) * 16;
  m.query = carver.take<float>(columns * head_size);
  m.keys = carver.take<float>(kTileRows * head_size);
  m.values = carver.take<float>(kTileRows * head_size);
  m.weights = carver.take<float>(rows * m.stride);
  m.output = carver.take<float>(columns * head_size);
  m.sum = carver.take<float>(columns);
  m.token = carver.take<float>(columns);
  m.ones = carver.take<float>(columns);
  return m;
}

// Queries of the tokens [from, to) in panels; returns their number, rounded up to 2 W.
template <class T>
inline int64_t load_span_queries(const LolaArgs& a, int64_t head, int64_t from, int64_t to, int64_t first_row,
                                 const SpanMemory& m) {
  const LolaTokens& t = a.tokens;
  const int64_t group = t.heads / t.kv_heads, queries = (to - from) * group, d = t.head_size;
  const int64_t padded = ceil_div(queries, 2 * W) * 2 * W;
  const F factor = set(a.scale * kLog2e);
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t source = min(i, queries - 1), token = from + source / group;
    const T* query = static_cast<const T*>(t.query) + (token - a.context_len) * t.query_token_stride +
                     (head * group + source % group) * t.query_head_stride;
    float* panel = m.query + i / (2 * W) * (2 * W) * d + i % (2 * W);
    for (int64_t c = 0; c < d; c += W) {
      alignas(64) float natural[W];
      store(natural, mul(load(query + c), factor));
      for (int lane = 0; lane < W; ++lane) panel[(c + lane) * 2 * W] = natural[lane];
    }
    m.token[i] = static_cast<float>(first_row + token - from);
  }
  return padded;
}

template <class T>
inline void load_row(const SpanMemory& m, int64_t head_size, int i, const T* key, const T* value) {
  for (int64_t c = 0; c < head_size; c += W) {
    if (key) store(m.keys + i * head_size + c, load(key + c));
    if (value) store(m.values + c / (2 * W) * (2 * W) * kTileRows + i * 2 * W + c % (2 * W), load(value + c));
  }
}

inline void clear_rows(const SpanMemory& m, int64_t head_size, int from, int to) {
  for (int i = from; i < to; ++i) {
    for (int64_t c = 0; c < head_size; c += W) {
      store(m.keys + i * head_size + c, zero());
      store(m.values + c / (2 * W) * (2 * W) * kTileRows + i * 2 * W + c % (2 * W), zero());
    }
  }
}

// Scores of the tile's rows with all queries.
inline void score_tile(const SpanMemory& m, int64_t head_size, int padded, int64_t queries, float* weights) {
  for (int64_t q = 0; q < queries; q += 2 * W) {
    for (int i = 0; i < padded; i += kMatmulRows) {
      multiply_tile<false>(m.keys + i * head_size, head_size, 1, m.query + q * head_size, 2 * W, head_size,
                           weights + i * m.stride + q, m.stride, nullptr);
    }
  }
}

// output += the tile's weights times its values.
inline void add_tile(const SpanMemory& m, int64_t head_size, int padded, int64_t queries, const float* weights) {
  for (int64_t c = 0; c < head_size; c += 2 * W) {
    for (int64_t q = 0; q < queries; q += kMatmulRows) {
      multiply_tile<true>(weights + q, 1, m.stride, m.values + c * kTileRows, 2 * W, padded,
                          m.output + q * head_size + c, head_size, m.ones + q);
    }
  }
}

// Scores to weights, in place, for `queries` of them: rows [0, count), of which a query sees those up to its own, and
// the state's at `state`, if there is one.
inline void softmax_rows(const SpanMemory& m, int64_t window, int64_t count, int64_t queries, float* state, int rank,
                         float log_count) {
  for (int64_t q = 0; q < queries; q += W) {
    float* weights = m.weights + q;
    const F token = load(m.token + q), masked = set(kMasked);
    for (int64_t i = window; i < count; ++i) {
      float* w = weights + i * m.stride;
      store(w, if_then_else(ge(token, set(static_cast<float>(i))), load(w), masked));
    }
    F top[2] = {masked, masked};
    if (state) store(state + q, add(load(state + q), set(log_count)));
    if (state) top[0] = load(state + q);
    for (int64_t i = 0; i < count; ++i) top[i & 1] = max(top[i & 1], load(weights + i * m.stride));
    const F highest = max(top[0], top[1]);
    F total = zero();
    for (int64_t i = 0; i < count; ++i) {
      const F weight = exp2(sub(load(weights + i * m.stride), highest));
      store(weights + i * m.stride, weight);
      total = add(total, weight);
    }
    if (state) {
      const F mass = exp2(sub(load(state + q), highest));
      store(state + q, mass);
      total = add(total, mass);
      const F natural = mul(mass, set(1.0f / kLog2e));  // projections are in units of log 2 too
      for (int j = 1; j <= rank; ++j) {
        float* projected = state + j * m.stride + q;
        store(projected, mul(load(projected), natural));
      }
    }
    store(m.sum + q, total);
  }
}

// Attends the tokens at positions [from, to) of a span; the window's rows before them come from ring and new tokens.
template <class T>
inline void attend_block(const LolaArgs& a, int64_t head, int64_t updates, int64_t from, int64_t to,
                         const HeadMemory<T>& memory, const Snapshot<T>& snapshot) {
  const LolaTokens& t = a.tokens;
  const int64_t d = t.head_size, group = t.heads / t.kv_heads, queries = (to - from) * group;
  const int64_t cached = cached_after(a.memory, updates), folded = folded_after(a.memory, updates);
  const int64_t first = updates * a.memory.chunk, count = cached + to - first;
  const int rank = folded > 0 ? a.memory.rank : 0;
  const bool has_features = folded > 0 && a.memory.num_features > 0;
  const int64_t slope_rows = rank > 0 ? rank + 1 : 0, state_rows = has_features ? 1 : slope_rows;
  const int64_t state_at = padded_rows(count), rows = state_at + padded_rows(state_rows);
  Carver counter(nullptr);
  take_span_memory(d, rows, queries, counter);
  take_hedgehog_span(a, to - from, has_features, counter);
  Carver carver(scratch(Scratch::kTask, counter.used()));
  const SpanMemory m = take_span_memory(d, rows, queries, carver);
  const HedgehogSpan hedgehog = take_hedgehog_span(a, to - from, has_features, carver);
  float* state = state_rows > 0 ? m.weights + state_at * m.stride : nullptr;

  const int64_t padded = load_span_queries<T>(a, head, from, to, cached + from - first, m);
  for (int64_t i = 0; i < padded_rows(queries); ++i) m.ones[i] = 1.0f;
  std::memset(m.output, 0, padded_rows(queries) * d * sizeof(float));

  // call(tile's first row, its rows, its rows padded) with keys or values of each tile in place.
  const auto for_tiles = [&](bool with_keys, const auto& call) {
    for (int64_t begin = 0; begin < count; begin += kTileRows) {
      const int here = static_cast<int>(min<int64_t>(kTileRows, count - begin));
      for (int i = 0; i < here; ++i) {
        const int64_t row = begin + i;
        const T *key, *value;
        if (row < cached) {
          key = snapshot.cache.keys[row];
          value = snapshot.cache.values[row];
        } else {
          find_row(a, head, memory, first + row - cached, key, value);
        }
        load_row<T>(m, d, i, with_keys ? key : nullptr, with_keys ? nullptr : value);
      }
      clear_rows(m, d, here, static_cast<int>(padded_rows(here)));
      call(m.weights + begin * m.stride, static_cast<int>(padded_rows(here)));
    }
    for (int64_t begin = 0; begin < slope_rows; begin += kTileRows) {
      const int here = static_cast<int>(min<int64_t>(kTileRows, slope_rows - begin));
      const float* directions = a.query_directions + head * a.memory.rank * d;
      for (int i = 0; i < here; ++i) {
        const int64_t j = begin + i - 1;
        const float* key = j < 0 ? snapshot.key_mean : directions + j * d;
        const float* value = j < 0 ? snapshot.value_mean : snapshot.slope + j * d;
        load_row<float>(m, d, i, with_keys ? key : nullptr, with_keys ? nullptr : value);
      }
      clear_rows(m, d, here, static_cast<int>(padded_rows(here)));
      call(state + begin * m.stride, static_cast<int>(padded_rows(here)));
    }
  };
  for_tiles(true, [&](float* weights, int tile) { score_tile(m, d, tile, padded, weights); });
  if (has_features) {
    read_span<T>(a, head, from, to, snapshot.feature_values, snapshot.feature_sum, m.weights, m.stride, count, m.token,
                 padded, hedgehog, state);
  }
  const float log_count = rank > 0 ? __builtin_log2f(static_cast<float>(folded)) : 0.0f;
  softmax_rows(m, cached, count, padded, state, rank, log_count);
  // Rows that only pad a tile have values of zero, but their weights must be numbers.
  for_tiles(false, [&](float* weights, int tile) { add_tile(m, d, tile, queries, weights); });
  if (has_features) add_span(hedgehog, queries, d, state, m.output);

  for (int64_t i = 0; i < queries; ++i) {
    T* out = static_cast<T*>(t.output) + (from - a.context_len + i / group) * t.output_token_stride +
             (head * group + i % group) * t.output_head_stride;
    const F inverse = set(1.0f / m.sum[i]);
    for (int64_t c = 0; c < d; c += W) store(out + c, mul(load(m.output + i * d + c), inverse));
  }
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
