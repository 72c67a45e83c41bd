// One decode step of attention to a sliding window: an item is a request and a KV head, in ranges of its window.
//
// Ranges depend on the request alone, so that a request's output does not depend on the others in the batch.
#pragma once

#include <cstring>

#include "cpu/attend.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int64_t kWindowRangeRows = 128;

struct WindowRange {
  int64_t item, request, kv_head;
  int64_t first, rows;  // positions of the request
  Partial partial;
};

template <class T>
inline void attend_window(const WindowArgs& a, const WindowRange& range) {
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int64_t d = a.head_size;
  const auto carve = [&](Carver& carver, float*& query, float*& scores, float*& rescale) {
    query = carver.take<float>(group * d);
    scores = carver.take<float>(group * kChunkRows);
    rescale = carver.take<float>(group);
  };
  float *query, *scores, *rescale;
  Carver counter(nullptr);
  carve(counter, query, scores, rescale);
  Carver carver(scratch(Scratch::kTask, counter.used()));
  carve(carver, query, scores, rescale);
  for (int g = 0; g < group; ++g) {
    const T* head = static_cast<const T*>(a.query) + range.request * a.query_request_stride +
                    (range.kv_head * group + g) * a.query_head_stride;
    prepare_query(head, d, a.scale, query + g * d);
  }
  const int32_t* pages = a.block_table + range.request * a.block_table_stride;
  const T* head = static_cast<const T*>(a.rows.data) + range.kv_head * a.rows.head_stride;
  const int shift = __builtin_ctzll(a.page_size);
  const auto row = [&](int64_t i) -> const T* {
    const int64_t position = range.first + i;
    return head + pages[position >> shift] * a.rows.page_stride + (position & (a.page_size - 1)) * 2 * d;
  };
  attend_rows<T>(query, group, d, row, range.rows, range.rows, scores, rescale, range.partial, a.logits.cap * kLog2e);
}

inline void window_decode(const WindowArgs& a, const Parallel& parallel) {
  const int64_t group = a.heads / a.kv_heads, num_items = a.requests * a.kv_heads;
  const auto rows_of = [&](int64_t request) { return min<int64_t>(a.window, a.seq_lens[request]); };
  int64_t num_ranges = 0;
  for (int64_t b = 0; b < a.requests; ++b) num_ranges += ceil_div(rows_of(b), kWindowRangeRows) * a.kv_heads;
  WindowRange* ranges = nullptr;
  Partial* partials = nullptr;
  int64_t* first_ranges = nullptr;
  const auto carve_all = [&](Carver& carver) {
    ranges = carver.take<WindowRange>(num_ranges);
    partials = carver.take<Partial>(num_ranges);
    first_ranges = carver.take<int64_t>(num_items + 1);
    int64_t range = 0;
    for (int64_t i = 0; i < num_items; ++i) {
      const int64_t request = i / a.kv_heads, rows = rows_of(request);
      if (!carver.is_counting()) first_ranges[i] = range;
      for (int64_t begin = 0; begin < rows; begin += kWindowRangeRows, ++range) {
        const Partial partial{carver.take<float>(group), carver.take<float>(group),
                              carver.take<float>(group * a.head_size)};
        if (carver.is_counting()) continue;
        partials[range] = partial;
        ranges[range] = {
            i,      request, i % a.kv_heads, a.seq_lens[request] - rows + begin, min(kWindowRangeRows, rows - begin),
            partial};
      }
    }
    if (!carver.is_counting()) first_ranges[num_items] = range;
  };
  Carver counter(nullptr);
  carve_all(counter);
  Carver carver(scratch(Scratch::kCall, counter.used()));
  carve_all(carver);
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto merge = [&](int64_t i) {
      float* total = static_cast<float*>(scratch(Scratch::kTask, a.head_size * sizeof(float)));
      T* out = static_cast<T*>(a.output) + i / a.kv_heads * a.output_request_stride +
               i % a.kv_heads * group * a.output_head_stride;
      merge_partials(partials + first_ranges[i], first_ranges[i + 1] - first_ranges[i], static_cast<int>(group),
                     a.head_size, out, a.output_head_stride, total,
                     a.logits.sinks ? a.logits.sinks + i % a.kv_heads * group : nullptr);
    };
    const auto is_whole = [&](int64_t i) { return first_ranges[i + 1] - first_ranges[i] == 1; };
    bool are_whole = true;
    for (int64_t i = 0; i < num_items; ++i) are_whole = are_whole && is_whole(i);
    for_each(parallel, num_ranges, [&](int64_t range) {
      attend_window<T>(a, ranges[range]);
      if (is_whole(ranges[range].item)) merge(ranges[range].item);
    });
    if (are_whole) return;
    for_each(parallel, num_items, [&](int64_t i) {
      if (!is_whole(i)) merge(i);
    });
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
