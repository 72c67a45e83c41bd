// What the hedgehog state adds to the attention of a span (span.h): one row of weights, and values of each query's own.
#pragma once

#include "cpu/lola/hedgehog.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

struct HedgehogSpan {
  float* query;     // [tokens, G, d], unscaled
  float* features;  // [tokens, G, D]
  float* values;    // [tokens, G, d]
  float* mass;      // [tokens, G]
};

inline HedgehogSpan take_hedgehog_span(const LolaArgs& a, int64_t tokens, bool is_used, Carver& carver) {
  const int64_t d = a.tokens.head_size, group = a.tokens.heads / a.tokens.kv_heads;
  const int64_t rows = (matmul_rows(tokens) + kMatmulRows) * group;
  HedgehogSpan s{};
  if (!is_used) return s;
  s.query = carver.take<float>(rows * d);
  s.features = carver.take<float>(rows * a.memory.num_features);
  s.values = carver.take<float>((rows + kMatmulRows) * d);
  s.mass = carver.take<float>(rows);
  return s;
}

// Reads the state for the tokens [from, to) and writes the log of the mass of each query, in units of log 2, to
// `log_mass` [padded]. weights [count, stride] are scores, of which query i sees the rows up to token[i].
template <class T>
inline void read_span(const LolaArgs& a, int64_t head, int64_t from, int64_t to, const float* feature_values,
                      const float* feature_sum, const float* weights, int64_t stride, int64_t count, const float* token,
                      int64_t padded, const HedgehogSpan& s, float* log_mass) {
  const LolaTokens& t = a.tokens;
  const int64_t d = t.head_size, group = t.heads / t.kv_heads, tokens = to - from, queries = tokens * group;
  const int64_t features = a.memory.num_features;
  for (int64_t i = 0; i < queries; ++i) {
    const T* query = static_cast<const T*>(t.query) + (from + i / group - a.context_len) * t.query_token_stride +
                     (head * group + i % group) * t.query_head_stride;
    for (int64_t c = 0; c < d; c += W) store(s.query + i * d + c, load(query + c));
  }
  std::memset(s.query + queries * d, 0, (matmul_rows(tokens) - tokens) * group * d * sizeof(float));
  for (int64_t g = 0; g < group; ++g) {
    map_rows(s.query + g * d, group * d, tokens, a.query_maps + (head * group + g) * d * (features / 2), d, features,
             s.features + g * features, group * features);
  }
  multiply(s.features, features, 1, queries, feature_values, d, d, features, s.values, d);
  for (int64_t first = 0; first < padded; first += W) {
    F top = set(kMasked);
    const F own = load(token + first);
    for (int64_t i = 0; !a.kappa && i < count; ++i) {
      const F score = load(weights + i * stride + first);
      top = max(top, if_then_else(ge(own, set(static_cast<float>(i))), score, set(kMasked)));
    }
    alignas(64) float highest[W];
    store(highest, top);
    for (int64_t i = first; i < first + W; ++i) {
      if (i >= queries) {
        log_mass[i] = kMasked;
        continue;
      }
      s.mass[i] = dot_floats(s.features + i * features, feature_sum, features);
      log_mass[i] = __builtin_log2f(s.mass[i]) +
                    hedgehog_balance(a, head * group + i % group, s.query + i * d, highest[i - first]);
    }
  }
}

// output[i] += weight[i] of the mean value that query i reads.
inline void add_span(const HedgehogSpan& s, int64_t queries, int64_t head_size, const float* weight, float* output) {
  for (int64_t i = 0; i < queries; ++i) {
    const F factor = set(weight[i] / s.mass[i]);
    for (int64_t c = i * head_size; c < (i + 1) * head_size; c += W) {
      store(output + c, mul_add(load(s.values + c), factor, load(output + c)));
    }
  }
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
