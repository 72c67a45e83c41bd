// Attention to what is left of each page: its mean value and, with linear values, what its key factors add to it.
#pragma once

#include <cstdint>

#include "cpu/attend.h"
#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

// Pages [begin, end).
template <class Scorer>
inline void attend_pages(const DecodeArgs& a, const ScoredItem<Scorer>& item, int64_t begin, int64_t end,
                         const Partial& out) {
  float weights[kMaxGroup * kChunkRows], rescale[kMaxGroup];
  const int group = group_of(a);
  clear(out, group, a.head_size);
  for (int g = 0; g < group; ++g) {
    for (int64_t p = begin; p < end; ++p) {
      if (item.page_sum[g * item.padded_pages + p] > 0.0f) {
        out.m[g] = max(out.m[g], item.reference[g * item.padded_pages + p]);
      }
    }
    rescale[g] = 1.0f;
  }
  for (int64_t p = begin; p < end; p += kChunkRows) {
    const bf16* means[kChunkRows];
    const int here = static_cast<int>(min<int64_t>(kChunkRows, end - p));
    for (int i = 0; i < here; ++i) {
      means[i] = factor_page(a, item, p + i).value_mean();
      if (p + i + kChunkRows >= end) continue;
      prefetch(factor_page(a, item, p + i + kChunkRows).value_mean(), a.head_size * sizeof(bf16));
    }
    for (int g = 0; g < group; ++g) {
      float* weight = weights + g * kChunkRows;
      for (int i = 0; i < kChunkRows; ++i) {
        weight[i] = i < here ? item.reference[g * item.padded_pages + p + i] - out.m[g] : kMasked;
      }
      for (int i = 0; i < kChunkRows; i += W) store(weight + i, exp2(load(weight + i)));
      for (int i = 0; i < here; ++i) {
        const float left = item.page_sum[g * item.padded_pages + p + i];
        weight[i] = left > 0.0f ? weight[i] * left : 0.0f;
        out.l[g] += weight[i];
      }
    }
    add_rows<bf16>(means, nullptr, here, weights, rescale, group, a.head_size, out.acc);
    if (item.padded_value_rank) Scorer::add_values(a, item, item.scorer, p, here, weights, out.acc);
  }
  to_natural_order<bf16>(out.acc, group, a.head_size);
}

}  // namespace LRQK_ISA
}  // namespace lrqk
