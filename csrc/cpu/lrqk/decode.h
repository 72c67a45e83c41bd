// One decode step of one layer, and its selection alone.
//
// An item is one (request, KV head). Small items run whole on one thread; an item that would keep one thread busy
// for longer than its share is split by ranges of pages and of rows. Both ways compute the same numbers.
#pragma once

#include "cpu/lrqk/share.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int kPagesAhead = 2;  // whose linear values are fetched meanwhile

// Working memory of one attention task.
struct TaskMemory {
  float scores[kMaxGroup * kChunkRows];   // [G, kChunkRows]
  float factors[kMaxGroup * kChunkRows];  // [G, kChunkRows]
  float keep[kMaxGroup];                  // [G]
  float total[1024];                      // [d]
};

// The linear part of the values of pages [begin, begin + count), whose heads have the weights [G, kChunkRows], each
// that of all tokens left of a page. `factors` [G, kChunkRows] is working memory; keep [G] is all ones.
template <class T>
inline void add_linear_values(const DecodeArgs& a, const Item& item, int64_t begin, int count, const float* weights,
                              float* factors, const float* keep, float* output) {
  const int group = static_cast<int>(a.heads / a.kv_heads), rank = a.layout.value_rank;
  const T* rows[kChunkRows];
  int filled = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t p = begin + i;
    if (p + kPagesAhead < item.num_pages) {
      const FactorPage later = factor_page(a, item, p + kPagesAhead);
      prefetch(later.value_projection(), a.layout.key_factor_mean_offset + rank * 4 - a.layout.value_projection_offset);
    }
    const FactorPage page = factor_page(a, item, p);
    const float *mean = page.key_factor_mean(), *scale = page.value_scale();
    for (int first = 0; first < rank;) {
      const int here = min(rank - first, kChunkRows - filled);
      for (int g = 0; g < group; ++g) {
        const float* moment = item.moment + (p * group + g) * item.value_stride + first;
        const float weight = weights[g * kChunkRows + i];
        const float share = weight > 0.0f ? weight / item.page_sum[g * item.pages + p] : 0.0f;
        float* out = factors + g * kChunkRows + filled;
        for (int j = 0; j < here; ++j) out[j] = (moment[j] * share - mean[first + j] * weight) * scale[first + j];
      }
      for (int j = 0; j < here; ++j) {
        rows[filled + j] = static_cast<const T*>(page.value_projection()) + (first + j) * a.head_size;
      }
      first += here;
      filled += here;
      if (filled < kChunkRows && (first < rank || i + 1 < count)) continue;
      add_rows<T>(rows, nullptr, filled, factors, keep, group, a.head_size, output);
      filled = 0;
    }
  }
}

inline void attend_task(const DecodeArgs& a, Item& item, int64_t task, TaskMemory& memory) {
  float *scores = memory.scores, *factors = memory.factors, *keep = memory.keep;
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const Partial& out = item.partials[task];
  if (task < item.row_tasks) {
    const int32_t* rows = item.rows + task * kTaskRows;
    const int64_t count = min(kTaskRows, item.num_rows - task * kTaskRows);
    with_type(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* host = static_cast<const T*>(a.host.data) + item.kv_head * a.host.head_stride;
      const auto row = [&](int64_t i) {
        const int64_t token = rows[i];
        return host + item.table[token >> a.page_shift] * a.host.page_stride +
               (token & (a.page_size - 1)) * 2 * a.head_size;
      };
      const int64_t available = item.num_rows - task * kTaskRows;
      attend_rows<T>(item.attend_query, group, a.head_size, row, count, available, scores, keep, out);
    });
    return;
  }
  clear(out, group, a.head_size);
  const int64_t first = (task - item.row_tasks) * kTaskPages;
  const int64_t begin = max(first, item.first_page), end = min(first + kTaskPages, item.num_pages);
  for (int g = 0; g < group; ++g) {
    for (int64_t p = begin; p < end; ++p) {
      if (item.page_sum[g * item.pages + p] > 0.0f) {
        out.highest[g] = max(out.highest[g], item.reference[g * item.pages + p]);
      }
    }
    keep[g] = 1.0f;
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
      float* weight = scores + g * kChunkRows;
      for (int i = 0; i < kChunkRows; ++i) {
        weight[i] = i < here ? item.reference[g * item.pages + p + i] - out.highest[g] : kMasked;
      }
      for (int i = 0; i < kChunkRows; i += W) store(weight + i, exp2(load(weight + i)));
      for (int i = 0; i < here; ++i) {
        const float left = item.page_sum[g * item.pages + p + i];
        weight[i] = left > 0.0f ? weight[i] * left : 0.0f;
        out.sum[g] += weight[i];
      }
    }
    add_rows<bf16>(means, nullptr, here, scores, keep, group, a.head_size, out.output);
    if (item.value_stride) {
      const auto add = a.layout.is_int8 ? add_linear_values<i8> : add_linear_values<bf16>;
      add(a, item, p, here, scores, factors, keep, out.output);
    }
  }
  to_natural_order<bf16>(out.output, group, a.head_size);
}

inline void merge_item(const DecodeArgs& a, Item& item, float* total) {
  const int group = static_cast<int>(a.heads / a.kv_heads);
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* out = static_cast<T*>(a.output) + item.request * a.output_request_stride +
             item.kv_head * group * a.output_head_stride;
    merge_partials(item.partials, item.row_tasks + item.residual_tasks, group, a.head_size, out,
                   a.output_head_stride, total);
  });
}

inline void write_selection(const DecodeArgs& a, const Item& item) {
  const int64_t group = a.heads / a.kv_heads;
  int32_t* rows = a.rows + (item.request * a.kv_heads + item.kv_head) * a.row_places;
  for (int64_t i = 0; i < a.row_places; ++i) rows[i] = i < item.num_rows ? item.rows[i] : -1;
  if (!a.residual) return;
  for (int64_t g = 0; g < group; ++g) {
    float* out = a.residual + (item.request * a.heads + item.kv_head * group + g) * a.residual_pages;
    for (int64_t p = 0; p < a.residual_pages; ++p) {
      const bool is_counted = item.has_residual && p >= item.first_page && p < item.num_pages;
      const float left = is_counted ? item.page_sum[g * item.pages + p] : 0.0f;
      out[p] = left > 0.0f ? item.reference[g * item.pages + p] / kLog2e + __builtin_logf(left) : -__builtin_inff();
      if (!a.residual_factor) continue;
      const int64_t rank = a.layout.value_rank;
      const float* moments = item.moment + (p * group + g) * item.value_stride;
      float* factor = a.residual_factor + (out + p - a.residual) * rank;
      for (int64_t j = 0; j < rank; ++j) factor[j] = left > 0.0f ? moments[j] / left : 0.0f;
    }
  }
}

inline void select_item(const DecodeArgs& a, Item& item) {
  prepare(a, item);
  if (item.is_scored) {
    for (int64_t i = 0; i < item.ranges; ++i) scan_range(a, item, i);
    normalize(a, item);
    for (int64_t i = 0; i < item.ranges; ++i) weigh_range(a, item, i);
    find_threshold(a, item);
    for (int64_t i = 0; i < item.ranges; ++i) keep_range(a, item, i);
    choose_rows(a, item);
    keep_share(a, item);
    for (int64_t i = 0; item.has_residual && i < item.ranges; ++i) subtract_range(a, item, i);
  }
  list_rows(a, item);
}

inline void finish_item(const DecodeArgs& a, Item& item, TaskMemory& memory) {
  if (a.output) merge_item(a, item, memory.total);
  if (a.rows) write_selection(a, item);
}

inline void run_whole(const DecodeArgs& a, Item& item) {
  Carver carver(scratch(Scratch::kTask, item_bytes(a, item)));
  carve(a, item, carver);
  TaskMemory memory;
  select_item(a, item);
  for (int64_t i = 0; i < item.row_tasks + item.residual_tasks; ++i) {
    attend_task(a, item, i, memory);
  }
  finish_item(a, item, memory);
}

// Calls step(item, i) for i < count(item) of every item, all in parallel.
template <class CountOf, class Step>
inline void for_each_part(const Parallel& parallel, Item* items, int64_t num_items, const CountOf& count,
                          const Step& step) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_items; ++i) total += count(items[i]);
  for_each(parallel, total, [&](int64_t index) {
    int64_t i = 0;
    for (; index >= count(items[i]); ++i) index -= count(items[i]);
    step(items[i], index);
  });
}

inline void run_split(const DecodeArgs& a, Item* items, int64_t num_items, const Parallel& parallel) {
  const auto by_item = [](const Item&) -> int64_t { return 1; };
  const auto by_range = [](const Item& item) { return item.ranges; };
  for_each_part(parallel, items, num_items, by_item, [&](Item& item, int64_t) { prepare(a, item); });
  for_each_part(parallel, items, num_items, by_range, [&](Item& item, int64_t i) { scan_range(a, item, i); });
  for_each_part(parallel, items, num_items, by_item, [&](Item& item, int64_t) {
    if (item.is_scored) normalize(a, item);
  });
  for_each_part(parallel, items, num_items, by_range, [&](Item& item, int64_t i) { weigh_range(a, item, i); });
  for_each_part(parallel, items, num_items, by_item, [&](Item& item, int64_t) {
    if (item.is_scored) find_threshold(a, item);
  });
  for_each_part(parallel, items, num_items, by_range, [&](Item& item, int64_t i) { keep_range(a, item, i); });
  for_each_part(parallel, items, num_items, by_item, [&](Item& item, int64_t) {
    if (item.is_scored) {
      choose_rows(a, item);
      keep_share(a, item);
    }
    list_rows(a, item);
  });
  for_each_part(
      parallel, items, num_items, [](const Item& item) { return item.has_residual ? item.ranges : 0; },
      [&](Item& item, int64_t i) { subtract_range(a, item, i); });
  for_each_part(
      parallel, items, num_items, [](const Item& item) { return item.row_tasks + item.residual_tasks; },
      [&](Item& item, int64_t i) {
        TaskMemory memory;
        attend_task(a, item, i, memory);
      });
  for_each_part(parallel, items, num_items, by_item, [&](Item& item, int64_t) {
    TaskMemory memory;
    finish_item(a, item, memory);
  });
}

inline void decode(const DecodeArgs& a, const Parallel& parallel) {
  const int64_t num_items = a.requests * a.kv_heads;
  Carver counter(nullptr);
  counter.take<Item>(num_items);
  counter.take<int64_t>(num_items);
  const size_t header = counter.used();
  // Reading a candidate's factors costs about a tenth of attending a row.
  const auto cost = [&](const Item& item) { return item.num_rows + (item.is_scored ? (item.end - item.first) / 8 : 0); };
  int64_t total = 0;
  size_t split_bytes = 0;
  for (int64_t i = 0; i < num_items; ++i) total += cost(make_item(a, i));
  const auto is_split = [&](const Item& item) { return cost(item) * parallel.threads * 2 > total && cost(item) > 256; };
  for (int64_t i = 0; i < num_items; ++i) {
    const Item item = make_item(a, i);
    if (parallel.threads > 1 && is_split(item)) split_bytes += item_bytes(a, item);
  }
  Carver carver(scratch(Scratch::kCall, header + split_bytes));
  Item* items = carver.take<Item>(num_items);
  int64_t* order = carver.take<int64_t>(num_items);
  int64_t num_split = 0, num_whole = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    const Item item = make_item(a, i);
    if (parallel.threads > 1 && is_split(item)) {
      items[num_split] = item;
      carve(a, items[num_split++], carver);
    } else {
      items[num_items - ++num_whole] = item;
    }
  }
  run_split(a, items, num_split, parallel);
  Item* whole = items + num_split;
  // Longest first, by powers of two, so that threads finish together.
  int64_t starts[65] = {};
  const auto bucket = [&](const Item& item) { return __builtin_clzll(static_cast<uint64_t>(cost(item)) | 1); };
  for (int64_t i = 0; i < num_whole; ++i) ++starts[bucket(whole[i]) + 1];
  for (int i = 0; i < 64; ++i) starts[i + 1] += starts[i];
  for (int64_t i = 0; i < num_whole; ++i) order[starts[bucket(whole[i])]++] = i;
  for_each(parallel, num_whole, [&](int64_t i) { run_whole(a, whole[order[i]]); });
  if (!a.attended) return;
  for (int64_t b = 0; b < a.requests; ++b) a.attended[b] = 0;
  for (int64_t i = 0; i < num_items; ++i) a.attended[items[i].request] += items[i].num_rows;
}

}  // namespace LRQK_ISA
}  // namespace lrqk
