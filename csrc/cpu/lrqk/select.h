// The top-k of an item by the softmax weights of the scan, summed over the query heads.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lrqk/prepare.h"
#include "cpu/top_k.h"

namespace lrqk {
namespace LRQK_ISA {

// Weights of the W tokens at `words`, summed over the heads; with kPairs > 0, `pairs` is kPairs.
template <int kPairs>
inline F group_weight(const uint32_t* words, int pairs, const F* factors) {
  F total = zero();
  LRQK_UNROLL
  for (int pair = 0; pair < (kPairs ? kPairs : pairs); ++pair) {
    const I both = load_words(words + pair * W);
    total = mul_add(high_bf16(both), factors[2 * pair], total);
    total = mul_add(low_bf16(both), factors[2 * pair + 1], total);
  }
  return total;
}

// group_weight and peaks of a page of candidates.
template <int kPairs>
inline void weigh_candidates(const uint32_t* words, int pairs, const F* factors, int64_t n, int64_t peak_span,
                             float* out, float* peaks) {
  for (int64_t i = 0; i < n; i += peak_span * W, peaks += W) {
    F top = zero();
    for (int64_t k = 0; k < peak_span; ++k) {
      const F total = group_weight<kPairs>(words + (i + k * W) * pairs, pairs, factors);
      store(out + i + k * W, total);
      top = max(top, total);
    }
    store(peaks, top);
  }
}

// group_weight and peaks of the pages of one range.
inline void weigh_range(const DecodeArgs& a, Item& item, int64_t range) {
  const int64_t group = group_of(a), n = a.page_size;
  const int64_t stop = min(item.num_pages, (range + 1) * item.range_pages);
  const auto run = item.pairs == 1 ? weigh_candidates<1> : item.pairs == 2 ? weigh_candidates<2> : weigh_candidates<0>;
  for (int64_t p = range * item.range_pages; p < stop; ++p) {
    float* out = item.group_weight + p * n;
    float* peaks = item.peaks + p * n / item.peak_span;
    F factors[kMaxGroup + 1];
    for (int64_t g = 0; g < group; ++g) factors[g] = set(item.coefficient[g * item.padded_pages + p]);
    factors[group] = zero();
    if (p >= item.first_page) {
      run(item.weights + p * n * item.pairs, item.pairs, factors, n, item.peak_span, out, peaks);
    }
    const Span span = candidates_of(a, item, p);
    if (span.covers(n)) continue;
    for (int64_t i = 0; i < span.begin; ++i) out[i] = -1.0f;
    for (int64_t i = span.end; i < n; ++i) out[i] = -1.0f;
    for (int64_t i = 0; i < n; i += item.peak_span * W, peaks += W) {
      F top = load(out + i);
      for (int64_t k = 1; k < item.peak_span; ++k) top = max(top, load(out + i + k * W));
      store(peaks, top);
    }
  }
}

// A lower bound of the top_k-th largest weight.
inline void find_threshold(const DecodeArgs& a, Item& item) {
  constexpr int kBits = 18;  // a lower threshold only keeps a few tokens more
  item.threshold = kth_largest(item.peaks, item.num_pages * a.page_size / item.peak_span, a.top_k, kBits);
}

// Keeps what reaches the threshold: everything that may be selected, and little more.
inline void keep_range(const DecodeArgs& a, Item& item, int64_t range) {
  const int64_t n = a.page_size;
  const int64_t stop = min(item.num_pages, (range + 1) * item.range_pages) * n;
  int32_t* index = item.kept_index + range * item.kept_stride;
  float* weights = item.kept_weight + range * item.kept_stride;
  const F threshold = set(item.threshold);
  int64_t count = 0;
  const int64_t block = item.peak_span * W;
  for (int64_t first = range * item.range_pages * n; first < stop; first += block) {
    if (item.peak_span > 1 && !bits(ge(load(item.peaks + first / item.peak_span), threshold))) continue;
    for (int64_t i = first; i < first + block; i += W) {
      const F weight = load(item.group_weight + i);
      const M is_kept = ge(weight, threshold);
      if (!bits(is_kept)) continue;
      compress_store_index(index + count, static_cast<int32_t>(i), is_kept);
      count += compress_store(weights + count, weight, is_kept);
    }
  }
  item.range_kept[range] = count;
}

// What the ranges kept, side by side and padded with -1 to a multiple of W; returns how many.
inline int64_t join_ranges(Item& item) {
  int64_t count = 0;
  for (int64_t range = 0; range < item.ranges; ++range) {
    const int64_t from = range * item.kept_stride, here = item.range_kept[range];
    std::memmove(item.kept_weight + count, item.kept_weight + from, here * sizeof(float));
    std::memmove(item.kept_index + count, item.kept_index + from, here * sizeof(int32_t));
    count += here;
  }
  for (int64_t i = count; i < ceil_div(count, W) * W; ++i) item.kept_weight[i] = -1.0f;
  return count;
}

// The first num_selected `positions`, ascending. Of equal weights the earlier tokens win.
inline void select_tokens(const DecodeArgs& a, Item& item) {
  const int64_t count = join_ranges(item);
  const float least = kth_largest(item.kept_weight, ceil_div(count, W) * W, a.top_k, 31);
  int64_t ties = a.top_k, selected = 0;
  for (int64_t i = 0; i < count; ++i) ties -= item.kept_weight[i] > least;
  for (int64_t i = 0; i < count && selected < a.top_k; ++i) {
    const float weight = item.kept_weight[i];
    item.positions[selected] = item.kept_index[i];
    const bool is_tie = weight == least && ties > 0;
    ties -= is_tie;
    selected += weight > least || is_tie;
  }
  item.num_selected = selected;
}

}  // namespace LRQK_ISA
}  // namespace lrqk
