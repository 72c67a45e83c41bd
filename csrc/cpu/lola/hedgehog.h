// The hedgehog state: linear attention with learned features; HedgehogState of vllm_lrqk/methods/lola/state.py has the
// formulas. D features, D / 2 of them columns of a map.
#pragma once

#include "cpu/lola/memory.h"
#include "cpu/matmul.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

constexpr float kLeastFeature = 1e-12f;  // LEAST_FEATURE of state.py

inline int64_t matmul_rows(int64_t rows) { return ceil_div(rows, kMatmulRows) * kMatmulRows; }

inline float dot_floats(const float* a, const float* b, int64_t count) {
  F total = zero();
  for (int64_t c = 0; c < count; c += W) total = mul_add(load(a + c), load(b + c), total);
  return reduce_sum(total);
}

// y [half] to softmax(y) and, behind it, softmax(-y).
inline void features_of_products(float* y, int64_t half) {
  F top = load(y), low = mul(load(y), set(-1.0f));
  for (int64_t c = W; c < half; c += W) {
    top = max(top, load(y + c));
    low = max(low, mul(load(y + c), set(-1.0f)));
  }
  const F highest = set(reduce_max(top)), lowest = set(reduce_max(low)), factor = set(kLog2e);
  F positive = zero(), negative = zero();
  for (int64_t c = 0; c < half; c += W) {
    const F product = load(y + c);
    const F up = exp2(mul(sub(product, highest), factor));
    const F down = exp2(mul(sub(mul(product, set(-1.0f)), lowest), factor));
    store(y + c, up);
    store(y + half + c, down);
    positive = add(positive, up);
    negative = add(negative, down);
  }
  const F scales[2] = {set(1.0f / reduce_sum(positive)), set(1.0f / reduce_sum(negative))};
  for (int64_t c = 0; c < 2 * half; c += W) {
    store(y + c, max(mul(load(y + c), scales[c >= half]), set(kLeastFeature)));
  }
}

// out[i] = the D features of x[i] [d]. Rows of x are read and rows of out written up to matmul_rows(rows).
inline void map_rows(const float* x, int64_t x_row, int64_t rows, const float* map, int64_t head_size,
                     int64_t num_features, float* out, int64_t out_row) {
  const int64_t half = num_features / 2;
  multiply(x, x_row, 1, rows, map, half, half, head_size, out, out_row);
  for (int64_t i = 0; i < rows; ++i) features_of_products(out + i * out_row, half);
}

// out [columns] = x [depth] matrix [depth, columns].
inline void row_times_matrix(const float* x, const float* matrix, int64_t depth, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += 2 * W) {
    F a = zero(), b = zero();
    for (int64_t k = 0; k < depth; ++k) {
      a = mul_add(set(x[k]), load(matrix + k * columns + c), a);
      b = mul_add(set(x[k]), load(matrix + k * columns + c + W), b);
    }
    store(out + c, a);
    store(out + c + W, b);
  }
}

// Working memory of an update.
struct HedgehogMemory {
  float* rows;      // [most, d], keys, later values of folded tokens
  float* features;  // [most, D]
  float* products;  // [most or D, d]
  float* folded;    // [most, D]
};

inline HedgehogMemory take_hedgehog_memory(const LolaArgs& a, int64_t most, Carver& carver) {
  const int64_t d = a.tokens.head_size, features = a.memory.num_features;
  HedgehogMemory m{};
  if (features == 0) return m;
  const int64_t rows = matmul_rows(most) + kMatmulRows;
  m.rows = carver.take<float>(rows * d);
  m.features = carver.take<float>(rows * features);
  m.products = carver.take<float>(max(rows, matmul_rows(features)) * d);
  m.folded = carver.take<float>(rows * features);
  return m;
}

template <class T>
inline void load_rows(const T* const* rows, int64_t count, int64_t head_size, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < head_size; c += W) store(out + i * head_size + c, load(rows[i] + c));
  }
}

// Features of the candidates' keys.
template <class T>
inline void map_candidates(const LolaArgs& a, int64_t head, const Rows<T>& rows, int64_t count,
                           const HedgehogMemory& m) {
  const int64_t d = a.tokens.head_size, features = a.memory.num_features;
  load_rows(rows.keys, count, d, m.rows);
  std::memset(m.rows + count * d, 0, (matmul_rows(count) - count) * d * sizeof(float));
  map_rows(m.rows, d, count, a.key_maps + head * d * (features / 2), d, features, m.features, features);
}

// scores[i] = |value_i - what the state recalls for key_i|^2, where something is folded.
template <class T>
inline void hedgehog_errors(const LolaArgs& a, const HeadMemory<T>& state, const Rows<T>& rows, int64_t count,
                            const HedgehogMemory& m, float* scores) {
  const int64_t d = a.tokens.head_size, features = a.memory.num_features;
  multiply(m.features, features, 1, count, state.feature_values, d, d, features, m.products, d);
  for (int64_t i = 0; i < count; ++i) {
    const F inverse = set(1.0f / dot_floats(m.features + i * features, state.feature_sum, features));
    F error = zero();
    for (int64_t c = 0; c < d; c += W) {
      const F left = sub(mul(load(m.products + i * d + c), inverse), load(rows.values[i] + c));
      error = mul_add(left, left, error);
    }
    scores[i] = reduce_sum(error);
  }
}

// Folds `count` tokens, the candidates `rest`, into the state of `folded`.
template <class T>
inline void hedgehog_fold(const LolaArgs& a, const HeadMemory<T>& state, const Rows<T>& rows, const int32_t* rest,
                          int64_t count, int64_t folded, const HedgehogMemory& m) {
  const int64_t d = a.tokens.head_size, features = a.memory.num_features;
  load_rows(rows.values, count, d, m.rows);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(m.folded + i * features, m.features + rest[i] * features, features * sizeof(float));
  }
  multiply(m.folded, 1, features, features, m.rows, d, d, count, m.products, d);
  for (int64_t c = 0; c < features * d; c += W) {
    const F old = folded > 0 ? load(state.feature_values + c) : zero();
    store(state.feature_values + c, add(old, load(m.products + c)));
  }
  for (int64_t c = 0; c < features; c += W) {
    F total = folded > 0 ? load(state.feature_sum + c) : zero();
    for (int64_t i = 0; i < count; ++i) total = add(total, load(m.folded + i * features + c));
    store(state.feature_sum + c, total);
  }
}

// What is added to the log of a query's mass, in units of log 2; `highest` is the largest score in window and cache.
inline float hedgehog_balance(const LolaArgs& a, int64_t query_head, const float* query, float highest) {
  const int64_t d = a.tokens.head_size;
  const float bias = a.bias[query_head] * kLog2e;
  return a.kappa ? dot_floats(query, a.kappa + query_head * d, d) * kLog2e + bias : highest + bias;
}

// What the state reads for the queries of one head, unscaled and in natural order; `exact` is window and cache.
template <class T>
inline void read_hedgehog(const LolaArgs& a, int64_t head, const HeadMemory<T>& state, int group, const float* query,
                          float* features, const Partial& exact, const Partial& out) {
  const int64_t d = a.tokens.head_size, count = a.memory.num_features, half = count / 2;
  for (int g = 0; g < group; ++g) {
    const int64_t query_head = head * group + g;
    row_times_matrix(query + g * d, a.query_maps + query_head * d * half, d, half, features);
    features_of_products(features, half);
    row_times_matrix(features, state.feature_values, count, d, out.acc + g * d);
    const float mass = dot_floats(features, state.feature_sum, count);
    const F inverse = set(1.0f / mass);
    for (int64_t c = 0; c < d; c += W) store(out.acc + g * d + c, mul(load(out.acc + g * d + c), inverse));
    out.m[g] = __builtin_log2f(mass) + hedgehog_balance(a, query_head, query + g * d, exact.m[g]);
    out.l[g] = 1.0f;
  }
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
