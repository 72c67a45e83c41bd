// New rows into the host pages: keys and values of one token side by side.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common.h"

namespace lrqk {
namespace LRQK_ISA {

inline void append(const AppendArgs& a, const Parallel& parallel) {
  constexpr int64_t kTaskTokens = 64;
  const int64_t bytes = a.head_size * a.element_bytes;
  for_each(parallel, ceil_div(a.tokens, kTaskTokens), [&](int64_t task) {
    for (int64_t t = task * kTaskTokens; t < min((task + 1) * kTaskTokens, a.tokens); ++t) {
      if (a.slot_mapping[t] < 0) continue;
      const int64_t page = a.slot_mapping[t] / a.page_size, offset = a.slot_mapping[t] % a.page_size;
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        const int64_t place = page * a.host_page_stride + h * a.host_head_stride + offset * 2 * a.head_size;
        uint8_t* row = static_cast<uint8_t*>(a.host) + place * a.element_bytes;
        const int64_t key = (t * a.key_token_stride + h * a.key_head_stride) * a.element_bytes;
        const int64_t value = (t * a.value_token_stride + h * a.value_head_stride) * a.element_bytes;
        std::memcpy(row, static_cast<const uint8_t*>(a.key) + key, bytes);
        std::memcpy(row + bytes, static_cast<const uint8_t*>(a.value) + value, bytes);
      }
    }
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
