// What the key factors of the tokens that are left add to a page's mean value, with columns of one kind.
#pragma once

#include <cstdint>

#include "cpu/attend.h"
#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int kPagesAhead = 2;  // whose linear values are fetched meanwhile

// The linear part of the values of pages [begin, begin + count), whose heads have the weights [G, kChunkRows], each
// that of all tokens left of a page, to acc [G, d] in load_pair's order. `moments` [num_pages, G, padded_value_rank].
template <class T>
inline void add_linear_values(const DecodeArgs& a, const Item& item, const float* moments, int64_t begin, int count,
                              const float* weights, float* acc) {
  float factors[kMaxGroup * kChunkRows], rescale[kMaxGroup];
  const int group = group_of(a), rank = a.layout.value_rank;
  const int64_t fetched =
      a.layout.key_factor_mean_offset + rank * static_cast<int64_t>(sizeof(float)) - a.layout.value_projection_offset;
  const T* rows[kChunkRows];
  int filled = 0;
  for (int g = 0; g < group; ++g) rescale[g] = 1.0f;
  for (int i = 0; i < count; ++i) {
    const int64_t p = begin + i;
    if (p + kPagesAhead < item.num_pages) {
      prefetch(factor_page(a, item, p + kPagesAhead).value_projection(), fetched);
    }
    const FactorPage page = factor_page(a, item, p);
    const float *mean = page.key_factor_mean(), *scale = page.value_scale();
    for (int first = 0; first < rank;) {
      const int here = min(rank - first, kChunkRows - filled);
      for (int g = 0; g < group; ++g) {
        const float* moment = moments + (p * group + g) * item.padded_value_rank + first;
        const float weight = weights[g * kChunkRows + i];
        const float share = weight > 0.0f ? weight / item.page_sum[g * item.padded_pages + p] : 0.0f;
        float* out = factors + g * kChunkRows + filled;
        for (int j = 0; j < here; ++j) out[j] = (moment[j] * share - mean[first + j] * weight) * scale[first + j];
      }
      for (int j = 0; j < here; ++j) {
        rows[filled + j] = static_cast<const T*>(page.value_projection()) + (first + j) * a.head_size;
      }
      first += here;
      filled += here;
      if (filled < kChunkRows && (first < rank || i + 1 < count)) continue;
      add_rows<T>(rows, nullptr, filled, factors, rescale, group, a.head_size, acc);
      filled = 0;
    }
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
