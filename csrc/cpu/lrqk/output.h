// What a decode step writes: attention over the selected rows and the pages, or the selection itself.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/attend.h"
#include "cpu/lrqk/item.h"
#include "cpu/lrqk/residual_values.h"

namespace lrqk {
namespace LRQK_ISA {

// Part `part` of an item's partials: first those of rows, then those of pages.
template <class Scorer>
inline void attend_part(const DecodeArgs& a, const ScoredItem<Scorer>& item, int64_t part) {
  const Partial& out = item.partials[part];
  if (part >= item.row_parts) {
    const int64_t first = (part - item.row_parts) * kPartPages;
    attend_pages(a, item, max(first, item.first_page), min(first + kPartPages, item.num_pages), out);
    return;
  }
  float scores[kMaxGroup * kChunkRows], rescale[kMaxGroup];
  const int32_t* positions = item.positions + part * kPartRows;
  const int64_t available = item.num_positions - part * kPartRows;
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* host = static_cast<const T*>(a.host.data) + item.kv_head * a.host.head_stride;
    const auto row = [&](int64_t i) {
      const int64_t position = positions[i];
      return host + item.block_table[position >> a.page_shift] * a.host.page_stride +
             (position & (a.page_size - 1)) * 2 * a.head_size;
    };
    attend_rows<T>(item.query, group_of(a), a.head_size, row, min(kPartRows, available), available, scores, rescale,
                   out, a.logits.cap * kLog2e);
  });
}

inline void write_output(const DecodeArgs& a, const Item& item) {
  float total[kMaxHeadSize];
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* out = static_cast<T*>(a.output) + item.request * a.output_request_stride +
             item.kv_head * group_of(a) * a.output_head_stride;
    merge_partials(item.partials, item.row_parts + item.page_parts, group_of(a), a.head_size, out, a.output_head_stride,
                   total, a.logits.sinks ? a.logits.sinks + item.kv_head * group_of(a) : nullptr);
  });
}

template <class Scorer>
inline void write_selection(const DecodeArgs& a, const ScoredItem<Scorer>& item) {
  const int64_t group = group_of(a), rank = a.layout.value_rank;
  int32_t* positions = a.positions + (item.request * a.kv_heads + item.kv_head) * a.capacity;
  for (int64_t i = 0; i < a.capacity; ++i) positions[i] = i < item.num_positions ? item.positions[i] : -1;
  if (!a.residual) return;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t first = (item.request * a.heads + item.kv_head * group + g) * a.residual_pages;
    for (int64_t p = 0; p < a.residual_pages; ++p) {
      const bool is_counted = item.has_residual && p >= item.first_page && p < item.num_pages;
      const float left = is_counted ? item.page_sum[g * item.padded_pages + p] : 0.0f;
      a.residual[first + p] =
          left > 0.0f ? item.reference[g * item.padded_pages + p] / kLog2e + __builtin_logf(left) : -__builtin_inff();
      if (!a.moment) continue;
      float* out = a.moment + (first + p) * rank;
      if (left > 0.0f) {
        Scorer::mean_factor(a, item, item.scorer, p, static_cast<int>(g), out);
      } else {
        std::memset(out, 0, rank * sizeof(float));
      }
    }
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
