// What is left of each page once the selected tokens are taken out: sums of the weights and of the key factors.
#pragma once

#include <cstdint>

#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

// Sum and largest of a page's weights [N / W, pairs, W], two bfloat16 to a word, for B heads from an even one on.
template <int B>
inline void sum_weights(const uint32_t* words, int pairs, int64_t page_size, Fetcher& fetcher, float* sums,
                        float* largest) {
  F sum[B], top[B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) sum[g] = top[g] = zero();
  for (int64_t n = 0; n < page_size; n += W) {
    fetcher.step();
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      const F weight = bf16_at(load_words(words + n * pairs + g / 2 * W), g);
      sum[g] = add(sum[g], weight);
      top[g] = max(top[g], weight);
    }
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    sums[g] = reduce_sum(sum[g]);
    largest[g] = reduce_max(top[g]);
  }
}

// The index of the first selected position from `least` on.
inline int64_t first_selected(const Item& item, int64_t least) {
  int64_t low = 0;
  for (int64_t high = item.num_selected; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (item.positions[middle] < least) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Of the pages of one range.
template <class Scorer>
inline void sum_left(const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t range) {
  const int group = group_of(a);
  const int64_t n = a.page_size, stop = min(item.num_pages, (range + 1) * item.range_pages);
  float sums[kMaxGroup], largest[kMaxGroup];
  int64_t p = max(range * item.range_pages, item.first_page);
  int64_t i = first_selected(item, p * n);
  for (; p < stop; ++p) {
    uint32_t* weights = item.weights + p * n * item.pairs;
    for (; i < item.num_selected && item.positions[i] < (p + 1) * n; ++i) {
      const int64_t token = item.positions[i] - p * n;
      uint32_t* words = weights + token / W * item.pairs * W + token % W;
      for (int pair = 0; pair < item.pairs; ++pair) words[pair * W] = 0;
    }
    const bool has_next = item.padded_value_rank && p + 1 < stop;
    Fetcher fetcher(has_next ? factor_page(a, item, p + 1).data : nullptr, Scorer::moment_bytes(a.layout, n));
    for_head_blocks(group, [&](auto block, int g) {
      sum_weights<decltype(block)::value>(weights + g / 2 * W, item.pairs, n, fetcher, sums + g, largest + g);
    });
    for (int g = 0; g < group; ++g) item.page_sum[g * item.padded_pages + p] = sums[g];
    if (item.padded_value_rank) {
      Scorer::sum_moments(a, item, item.scorer, p, factor_page(a, item, p), weights, largest, fetcher);
    }
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
