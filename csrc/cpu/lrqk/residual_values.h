// Attention to what is left of each page: its mean value and, with linear values, what its key factors add to it.
#pragma once

#include <cstdint>

#include "cpu/attend.h"
#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int kPagesAhead = 2;  // whose linear values are fetched meanwhile

// The linear part of the values of pages [begin, begin + count), whose heads have the weights [G, kChunkRows], each
// that of all tokens left of a page. `factors` [G, kChunkRows] is working memory; `rescale` [G] is all ones.
template <class T>
inline void add_linear_values(const DecodeArgs& a, const Item& item, int64_t begin, int count, const float* weights,
                              float* factors, const float* rescale, float* acc) {
  const int group = group_of(a), rank = a.layout.value_rank;
  const int64_t fetched =
      a.layout.key_factor_mean_offset + rank * static_cast<int64_t>(sizeof(float)) - a.layout.value_projection_offset;
  const T* rows[kChunkRows];
  int filled = 0;
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
        const float* moment = item.moment + (p * group + g) * item.padded_value_rank + first;
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

// Pages [begin, end).
inline void attend_pages(const DecodeArgs& a, const Item& item, int64_t begin, int64_t end, const Partial& out) {
  float weights[kMaxGroup * kChunkRows], factors[kMaxGroup * kChunkRows], rescale[kMaxGroup];
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
    if (item.padded_value_rank) {
      const auto add = a.layout.is_int8 ? add_linear_values<i8> : add_linear_values<bf16>;
      add(a, item, p, here, weights, factors, rescale, out.acc);
    }
  }
  to_natural_order<bf16>(out.acc, group, a.head_size);
}

}  // namespace LRQK_ISA
}  // namespace lrqk
