// Of the selected tokens as many, in order of weight, as carry the share top_p of all candidates' weight.
#pragma once

#include <cstdint>

#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

// The sum of the values from `least` on. The count is a multiple of W. With a lower `least` it is never min:
// values are not negative, and rounding keeps the order.
inline float sum_from(const float* values, int64_t n, float least) {
  const F bound = set(least);
  F total = zero();
  for (int64_t i = 0; i < n; i += W) {
    const F value = load(values + i);
    total = add(total, if_then_else(ge(value, bound), value, zero()));
  }
  return reduce_sum(total);
}

// The largest number from which on the values sum to `target`, bit by bit; 0 where all together do not.
inline float least_of_share(const float* values, int64_t n, float target) {
  uint32_t result = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t candidate = result | 1u << bit;
    if (sum_from(values, n, float_of(candidate)) >= target) result = candidate;
  }
  return float_of(result);
}

// Shortens `positions`, which select_tokens has filled. Of equal weights the earlier tokens stay.
inline void keep_share(const DecodeArgs& a, Item& item) {
  if (a.top_p >= 1.0f) return;
  float* weights = item.kept_weight;
  int64_t count = 0;
  for (; count < item.num_selected; ++count) weights[count] = item.group_weight[item.positions[count]];
  for (; count % W; ++count) weights[count] = 0.0f;
  // Each head's weights sum to 1.
  const float target = a.top_p * static_cast<float>(group_of(a));
  const float least = least_of_share(weights, count, target);
  if (least == 0.0f) return;
  float missing = target - sum_from(weights, count, float_of(bits_of(least) + 1));
  int64_t kept = 0;
  for (int64_t i = 0; i < item.num_selected; ++i) {
    const bool is_tie = weights[i] == least && missing > 0.0f;
    item.positions[kept] = item.positions[i];
    missing -= is_tie ? least : 0.0f;
    kept += weights[i] > least || is_tie;
  }
  item.num_selected = kept;
  item.num_positions = kept + item.num_always;
  if (a.output) item.row_parts = ceil_div(item.num_positions, kPartRows);
}

}  // namespace LRQK_ISA
}  // namespace lrqk
