// The k-th largest of many floats, bit by bit: each bit is one vectorised count.
#pragma once

#include <cstring>

#include "cpu/common.h"

namespace lrqk {
namespace LRQK_ISA {

// The k-th largest, rounded down to its leading `bits` of 31. Negative values do not take part; with fewer than k
// others the result is 0. The count is a multiple of W.
inline float kth_largest(const float* values, int64_t n, int64_t k, int bits) {
  uint32_t result = 0;
  for (int bit = 30; bit > 30 - bits; --bit) {
    const uint32_t candidate = result | 1u << bit;
    const F least = set1(float_of(candidate));
    I counts[2] = {int_zero(), int_zero()};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      counts[0] = count_at_least(counts[0], load(values + i), least);
      counts[1] = count_at_least(counts[1], load(values + i + W), least);
    }
    if (i < n) counts[0] = count_at_least(counts[0], load(values + i), least);
    const float count = sum(add(to_float(counts[0]), to_float(counts[1])));
    if (count >= static_cast<float>(k)) result = candidate;
  }
  return float_of(result);
}

}  // namespace LRQK_ISA
}  // namespace lrqk
