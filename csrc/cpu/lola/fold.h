// Taking tokens into the slope state; SlopeState.fold of vllm_lrqk/methods/lola/state.py has the formulas.
#pragma once

#include "cpu/lola/memory.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

constexpr int kFoldDirections = 8;

// out [d] = mean of rows[0] ... rows[count - 1].
template <class T>
inline void mean_of_rows(const T* const* rows, int64_t count, int64_t head_size, float* out) {
  const F inverse = set(1.0f / static_cast<float>(count));
  for (int64_t c = 0; c < head_size; c += W) {
    F total = zero();
    for (int64_t i = 0; i < count; ++i) total = add(total, load(rows[i] + c));
    store(out + c, mul(total, inverse));
  }
}

// Working memory of a fold.
struct FoldMemory {
  float* projected;              // [r, stride], the folded tokens along each direction
  int64_t stride;                // a multiple of W
  float* projected_mean;         // [r]
  float *key_mean, *value_mean;  // [d]
};

// cross[j] = cross[j] * has_old + sum_i projected[j][i] (value_i - value_mean) + step[j] * value_step, for `kHere`
// directions from `first` on.
template <int kHere, class T>
inline void add_cross_moment(const FoldMemory& m, int first, const T* const* values, int64_t count, int64_t head_size,
                             bool has_old, float weight, const float* old_value_mean, float* cross_moment) {
  for (int64_t c = 0; c < head_size; c += W) {
    const F mean = load(m.value_mean + c);
    F acc[kHere];
    LRQK_UNROLL
    for (int j = 0; j < kHere; ++j) acc[j] = zero();
    for (int64_t i = 0; i < count; ++i) {
      const F value = sub(load(values[i] + c), mean);
      LRQK_UNROLL
      for (int j = 0; j < kHere; ++j) acc[j] = mul_add(set(m.projected[(first + j) * m.stride + i]), value, acc[j]);
    }
    for (int j = 0; j < kHere; ++j) {
      float* out = cross_moment + (first + j) * head_size + c;
      if (has_old) {
        const F step = sub(mean, load(old_value_mean + c));
        acc[j] = mul_add(set(weight * m.projected_mean[first + j]), step, add(acc[j], load(out)));
      }
      store(out, acc[j]);
    }
  }
}

// Folds `count` tokens into the state of `folded`. `m.projected` holds their keys along the directions, relative to the
// state's mean key (to zero where nothing is folded).
template <class T>
inline void fold_rows(const LolaArgs& a, const HeadMemory<T>& state, const Rows<T>& rows, int64_t count, int64_t folded,
                      FoldMemory& m) {
  const int r = a.memory.rank;
  const int64_t d = a.tokens.head_size, stride = m.stride;
  const float share = static_cast<float>(count) / static_cast<float>(folded + count);
  const float weight = static_cast<float>(folded) * share;
  for (int j = 0; j < r; ++j) {
    float* projected = m.projected + j * stride;
    F total = zero();
    for (int64_t i = count; i < stride; ++i) projected[i] = 0.0f;
    for (int64_t i = 0; i < stride; i += W) total = add(total, load(projected + i));
    m.projected_mean[j] = reduce_sum(total) / static_cast<float>(count);
    for (int64_t i = 0; i < count; ++i) projected[i] -= m.projected_mean[j];
  }
  mean_of_rows(rows.keys, count, d, m.key_mean);
  mean_of_rows(rows.values, count, d, m.value_mean);
  int first = 0;
  for (; first + kFoldDirections <= r; first += kFoldDirections) {
    add_cross_moment<kFoldDirections>(m, first, rows.values, count, d, folded > 0, weight, state.value_mean,
                                      state.cross_moment);
  }
  for (; first < r; ++first) {
    add_cross_moment<1>(m, first, rows.values, count, d, folded > 0, weight, state.value_mean, state.cross_moment);
  }
  for (int j = 0; j < r; ++j) {
    for (int k = 0; k <= j; ++k) {
      F total = zero();
      for (int64_t i = 0; i < stride; i += W) {
        total = mul_add(load(m.projected + j * stride + i), load(m.projected + k * stride + i), total);
      }
      float sum = reduce_sum(total);
      if (folded > 0) sum += state.second_moment[j * r + k] + weight * m.projected_mean[j] * m.projected_mean[k];
      state.second_moment[j * r + k] = state.second_moment[k * r + j] = sum;
    }
  }
  const auto move_mean = [&](float* mean, const float* added) {
    for (int64_t c = 0; c < d; c += W) {
      const F old = folded > 0 ? load(mean + c) : load(added + c);
      store(mean + c, mul_add(set(share), sub(load(added + c), old), old));
    }
  };
  move_mean(state.key_mean, m.key_mean);
  move_mean(state.value_mean, m.value_mean);
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
