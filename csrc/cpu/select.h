// Scores and exact top-k of one item. The steps by range may run in parallel; the others join the ranges.
#pragma once

#include "item.h"
#include "top_k.h"

namespace lrqk {
namespace LRQK_ISA {

inline FactorPage factor_page(const DecodeArgs& a, const Item& item, int64_t page) {
  return {a.factors + item.table[page] * a.layout.page_stride + item.kv_head * a.layout.head_stride, &a.layout};
}

inline void prepare(const DecodeArgs& a, Item& item) {
  const int group = static_cast<int>(a.heads / a.kv_heads);
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* query = static_cast<const T*>(a.query) + item.request * a.query_request_stride +
                     item.kv_head * group * a.query_head_stride;
    for (int g = 0; g < group; ++g) {
      for (int64_t i = 0; i < a.head_size; i += W) {
        store(item.query + g * a.head_size + i, load(query + g * a.query_head_stride + i));
      }
    }
    prepare_query<T>(item.query, group, a.head_size, a.scale, item.attend_query);
  });
  if (!item.is_scored) return;
  prepare_proxy_query(item.query, group, a.head_size, a.scale, item.proxy_query);
  for (int64_t i = 0; i < group * item.pages; ++i) item.page_max[i] = kMasked;
  std::memset(item.page_sum, 0, group * item.pages * sizeof(float));
}

// Tokens [begin, end) of a page are candidates.
struct Span {
  int64_t begin, end;
  bool covers(int64_t page_size) const { return begin == 0 && end == page_size; }
};

inline Span candidates_of(const DecodeArgs& a, const Item& item, int64_t page) {
  const int64_t start = page * a.page_size;
  return {larger<int64_t>(item.first - start, 0), smaller(item.end - start, a.page_size)};
}

template <class Visit>
inline void for_others(const Span& span, int64_t page_size, const Visit& visit) {
  for (int64_t n = 0; n < span.begin; ++n) visit(n);
  for (int64_t n = span.end; n < page_size; ++n) visit(n);
}

inline float& token_of(float* page, int64_t n, int64_t g, int64_t group) {
  return page[(n / W * group + g) * W + n % W];
}

// From score sums to 2^(score - highest), in place; returns their total.
template <bool kIsInt>
inline float exponentiate(float* sums, int64_t vectors, int64_t stride, float unit, float highest) {
  F total = zero();
  const F factor = set1(unit), shift = set1(-highest);
  for (int64_t i = 0; i < vectors; ++i, sums += stride) {
    const F value = kIsInt ? to_float(load_words(sums)) : load(sums);
    const F weight = exp2(fma(value, factor, shift));
    store(sums, weight);
    total = add(total, weight);
  }
  return sum(total);
}

template <bool kIsInt>
inline float highest_sum(const float* sums, int64_t vectors, int64_t stride) {
  F top = set1(kMasked);
  for (int64_t i = 0; i < vectors; ++i, sums += stride) top = max(top, kIsInt ? to_float(load_words(sums)) : load(sums));
  return maximum(top);
}

inline float total_of(const float* values, int64_t vectors, int64_t stride) {
  F total = zero();
  for (int64_t i = 0; i < vectors; ++i, values += stride) total = add(total, load(values));
  return sum(total);
}

// weights, page_max and page_sum of the pages of one range.
inline void score_range(const DecodeArgs& a, Item& item, int64_t range) {
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int64_t n = a.page_size;
  const bool is_int = a.layout.is_int8;
  const int64_t stop = smaller(item.num_pages, (range + 1) * item.range_pages);
  for (int64_t p = larger(range * item.range_pages, item.first_page); p < stop; ++p) {
    float* weights = item.weights + p * n * group;
    const FactorPage page = factor_page(a, item, p);
    const uint8_t* next = p + 1 < stop ? factor_page(a, item, p + 1).data : nullptr;
    float unit[kMaxGroup], highest[kMaxGroup];
    for_head_blocks(group, [&](auto block, int g) {
      score_page<decltype(block)::value>(page, item.proxy_query, group, g, a.head_size, n, g == 0 ? next : nullptr,
                                         weights + g * W, unit + g, highest + g);
    });
    const Span span = candidates_of(a, item, p);
    for (int g = 0; g < group; ++g) {
      float* sums = weights + g * W;
      if (!span.covers(n)) {
        const float masked = is_int ? float_of(static_cast<uint32_t>(INT32_MIN)) : kMasked;
        for_others(span, n, [&](int64_t i) { token_of(weights, i, g, group) = masked; });
        highest[g] = is_int ? highest_sum<true>(sums, n / W, group * W) * unit[g]
                            : highest_sum<false>(sums, n / W, group * W) * unit[g];
      }
      float total = is_int ? exponentiate<true>(sums, n / W, group * W, unit[g], highest[g])
                           : exponentiate<false>(sums, n / W, group * W, unit[g], highest[g]);
      if (!span.covers(n)) {
        for_others(span, n, [&](int64_t i) { token_of(weights, i, g, group) = 0.0f; });
        total = total_of(sums, n / W, group * W);
      }
      item.page_max[g * item.pages + p] = highest[g];
      item.page_sum[g * item.pages + p] = total;
    }
  }
}

inline void normalize(const DecodeArgs& a, Item& item) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t g = 0; g < group; ++g) {
    const float* highest = item.page_max + g * item.pages;
    const float* sums = item.page_sum + g * item.pages;
    F top = set1(kMasked);
    for (int64_t p = 0; p < item.pages; p += W) top = max(top, load(highest + p));
    top = set1(maximum(top));
    F total = zero();
    for (int64_t p = 0; p < item.pages; p += W) total = fma(load(sums + p), exp2(sub(load(highest + p), top)), total);
    const F inverse = set1(1.0f / sum(total));
    for (int64_t p = 0; p < item.pages; p += W) {
      store(item.coefficient + g * item.pages + p, mul(inverse, exp2(sub(load(highest + p), top))));
    }
  }
}

// group_weight and peaks of the pages of one range.
inline void weigh_range(const DecodeArgs& a, Item& item, int64_t range) {
  const int64_t group = a.heads / a.kv_heads, n = a.page_size;
  const int64_t stop = smaller(item.num_pages, (range + 1) * item.range_pages);
  for (int64_t p = range * item.range_pages; p < stop; ++p) {
    float* out = item.group_weight + p * n;
    if (p < item.first_page) {
      for (int64_t i = 0; i < n; ++i) out[i] = -1.0f;
    } else {
      const float* weights = item.weights + p * n * group;
      for (int64_t i = 0; i < n / W; ++i) {
        F total = zero();
        for (int64_t g = 0; g < group; ++g, weights += W) {
          total = fma(load(weights), set1(item.coefficient[g * item.pages + p]), total);
        }
        store(out + i * W, total);
      }
      const Span span = candidates_of(a, item, p);
      for_others(span, n, [&](int64_t i) { out[i] = -1.0f; });
    }
    if (item.peak_span == 1) continue;
    float* peaks = item.peaks + p * n / item.peak_span;
    for (int64_t i = 0; i < n; i += item.peak_span * W, peaks += W) {
      F top = load(out + i);
      for (int64_t k = 1; k < item.peak_span; ++k) top = max(top, load(out + i + k * W));
      store(peaks, top);
    }
  }
}

constexpr int kThresholdBits = 18;  // a lower threshold only keeps a few tokens more

inline void find_threshold(const DecodeArgs& a, Item& item) {
  const int64_t tokens = item.num_pages * a.page_size;
  const float* values = item.peak_span > 1 ? item.peaks : item.group_weight;
  item.threshold = kth_largest(values, tokens / item.peak_span, a.top_k, kThresholdBits);
}

// Keeps what reaches the threshold: everything that may be selected, and little more.
inline void keep_range(const DecodeArgs& a, Item& item, int64_t range) {
  const int64_t n = a.page_size, offset = range * (item.range_pages * n + W);
  const int64_t stop = smaller(item.num_pages, (range + 1) * item.range_pages) * n;
  const F threshold = set1(item.threshold);
  int64_t count = 0;
  for (int64_t i = range * item.range_pages * n; i < stop; i += W) {
    const F weight = load(item.group_weight + i);
    const uint32_t mask = at_least(weight, threshold);
    if (!mask) continue;
    compress_index(item.kept_index + offset + count, static_cast<int32_t>(i), mask);
    count += compress(item.kept_weight + offset + count, weight, mask);
  }
  item.range_kept[range] = count;
}

// The first num_selected places of `rows`, ascending. Of equal weights the earlier tokens win.
inline void choose_rows(const DecodeArgs& a, Item& item) {
  const int64_t stride = item.range_pages * a.page_size + W;
  int64_t count = item.range_kept[0];
  for (int64_t range = 1; range < item.ranges; ++range) {
    std::memmove(item.kept_weight + count, item.kept_weight + range * stride, item.range_kept[range] * sizeof(float));
    std::memmove(item.kept_index + count, item.kept_index + range * stride, item.range_kept[range] * sizeof(int32_t));
    count += item.range_kept[range];
  }
  const int64_t padded = ceil_div(count, W) * W;
  for (int64_t i = count; i < padded; ++i) item.kept_weight[i] = -1.0f;
  const float least = kth_largest(item.kept_weight, padded, a.top_k, 31);
  int64_t ties = a.top_k;
  for (int64_t i = 0; i < count; ++i) ties -= item.kept_weight[i] > least;
  int64_t chosen = 0;
  for (int64_t i = 0; i < count && chosen < a.top_k; ++i) {
    const float weight = item.kept_weight[i];
    item.rows[chosen] = item.kept_index[i];
    const bool is_tie = weight == least && ties > 0;
    ties -= is_tie;
    chosen += weight > least || is_tie;
  }
  item.num_selected = chosen;
}

// Takes the selected tokens out of the page sums of one range.
inline void subtract_selected(const DecodeArgs& a, Item& item, int64_t range) {
  const int64_t group = a.heads / a.kv_heads, n = a.page_size;
  const int64_t stop = smaller(item.num_pages, (range + 1) * item.range_pages) * n;
  int64_t i = 0;
  for (int64_t high = item.num_selected; i < high;) {
    const int64_t middle = (i + high) / 2;
    if (item.rows[middle] < range * item.range_pages * n) {
      i = middle + 1;
    } else {
      high = middle;
    }
  }
  while (i < item.num_selected && item.rows[i] < stop) {
    const int64_t page = item.rows[i] / n, begin = i;
    float* weights = item.weights + page * n * group;
    float taken[kMaxGroup] = {};
    for (; i < item.num_selected && item.rows[i] < (page + 1) * n; ++i) {
      const float* weight = &token_of(weights, item.rows[i] - page * n, 0, group);
      for (int64_t g = 0; g < group; ++g) taken[g] += weight[g * W];
    }
    for (int64_t g = 0; g < group; ++g) {
      float& left = item.page_sum[g * item.pages + page];
      if (taken[g] <= left * (1.0f - 0x1p-6f)) {
        left -= taken[g];
        continue;
      }
      // The difference would lose too many digits: add up what is left.
      for (int64_t k = begin; k < i; ++k) token_of(weights, item.rows[k] - page * n, g, group) = 0.0f;
      left = total_of(weights + g * W, n / W, group * W);
    }
  }
}

inline void list_rows(const DecodeArgs&, Item& item) {
  int64_t count = item.num_selected;
  if (!item.is_scored) {
    for (int64_t i = 0; i < count; ++i) item.rows[i] = static_cast<int32_t>(item.first + i);
  }
  for (int64_t n = 0; n < smaller(item.first, item.seq_len); ++n) item.rows[count++] = static_cast<int32_t>(n);
  for (int64_t n = larger(item.end, item.first); n < item.seq_len; ++n) item.rows[count++] = static_cast<int32_t>(n);
  item.num_rows = count;
}

}  // namespace LRQK_ISA
}  // namespace lrqk
