// The k-th largest of many non-negative floats, by radix select over their bits.
#pragma once

#include <cstring>

#include "common.h"

namespace lrqk {
namespace LRQK_ISA {

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Index of the bucket that holds the k-th largest, counted from the last bucket; k becomes its place in there.
inline int bucket_of(const uint32_t* histogram, int buckets, int64_t& k) {
  int b = buckets - 1;
  for (; b > 0 && k > histogram[b]; --b) k -= histogram[b];
  return b;
}

// Negative values do not take part; with fewer than k others the result is 0.
inline float kth_largest(const float* values, int64_t n, int64_t k) {
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  uint32_t histogram[2][kBuckets];
  std::memset(histogram, 0, sizeof(histogram));
  int64_t valid = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = bits_of(values[i]);
    const int32_t is_valid = bits >= 0;
    // Neighbours often share a bucket: two tables keep their increments independent.
    histogram[i & 1][(bits >> 20) & (kBuckets - 1)] += is_valid;
    valid += is_valid;
  }
  if (valid < k) return 0.0f;
  for (int b = 0; b < kBuckets; ++b) histogram[0][b] += histogram[1][b];
  int32_t prefix = bucket_of(histogram[0], kBuckets, k);
  for (int shift = 10; shift >= 0; shift -= 10) {
    std::memset(histogram[0], 0, sizeof(histogram[0]));
    for (int64_t i = 0; i < n; ++i) {
      const int32_t bits = bits_of(values[i]);
      if (bits >> (shift + 10) == prefix) ++histogram[0][(bits >> shift) & 1023];
    }
    prefix = prefix << 10 | bucket_of(histogram[0], 1024, k);
  }
  float result;
  std::memcpy(&result, &prefix, 4);
  return result;
}

}  // namespace LRQK_ISA
}  // namespace lrqk
