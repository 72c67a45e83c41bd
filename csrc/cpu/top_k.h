// The k-th largest of many floats, bit by bit: each bit is one vectorised count.
#pragma once

#include <cstdint>

#include "cpu/common.h"

namespace lrqk {
namespace LRQK_ISA {

// The k-th largest, rounded down to its leading `bits` of 31. Negative values do not take part; with fewer than k
// others the result is 0. The count is a multiple of W.
inline float kth_largest(const float* values, int64_t n, int64_t k, int bits) {
  uint32_t result = 0;
  for (int bit = 30; bit > 30 - bits; --bit) {
    const uint32_t candidate = result | 1u << bit;
    const F least = set(float_of(candidate));
    I counts[2] = {zero_int(), zero_int()};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      counts[0] = count_if(counts[0], ge(load(values + i), least));
      counts[1] = count_if(counts[1], ge(load(values + i + W), least));
    }
    if (i < n) counts[0] = count_if(counts[0], ge(load(values + i), least));
    const float count = reduce_sum(add(to_float(counts[0]), to_float(counts[1])));
    if (count >= static_cast<float>(k)) result = candidate;
  }
  return float_of(result);
}

}  // namespace LRQK_ISA
}  // namespace lrqk
