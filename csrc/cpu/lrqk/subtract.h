// Taking the selected tokens out of what the scan summed over each page.
#pragma once

#include <cstdint>

#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int kTokensAhead = 16;  // whose key factors are fetched meanwhile

// Takes the selected tokens out of the page sums and moments of one range.
template <class Scorer>
inline void subtract_range(const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t range) {
  const int group = group_of(a);
  const int64_t n = a.page_size, first = range * item.range_pages * n;
  const int64_t stop = min(item.num_pages, (range + 1) * item.range_pages) * n;
  int64_t i = 0;
  for (int64_t high = item.num_selected; i < high;) {
    const int64_t middle = (i + high) / 2;
    if (item.positions[middle] < first) {
      i = middle + 1;
    } else {
      high = middle;
    }
  }
  while (i < item.num_selected && item.positions[i] < stop) {
    const int64_t page = item.positions[i] >> a.page_shift, begin = i;
    uint32_t* weights = item.weights + page * n * item.pairs;
    const auto at = [&](int64_t position) {
      return weights + (position & (n - 1)) / W * item.pairs * W + position % W;
    };
    float taken[kMaxGroup + 1] = {}, now[kMaxGroup + 1];
    const FactorPage factors = factor_page(a, item, page);
    const bool has_moments = item.padded_value_rank > 0;
    for (; i < item.num_selected && item.positions[i] >> a.page_shift == page; ++i) {
      if (has_moments && i + kTokensAhead < item.num_selected) {
        const int64_t position = item.positions[i + kTokensAhead];
        Scorer::prefetch_token(factor_page(a, item, position >> a.page_shift), position & (n - 1), n);
      }
      const uint32_t* both = at(item.positions[i]);
      for (int pair = 0; pair < item.pairs; ++pair) {
        now[2 * pair] = float_of(both[pair * W] & 0xffff0000u);
        now[2 * pair + 1] = float_of(both[pair * W] << 16);
        taken[2 * pair] += now[2 * pair];
        taken[2 * pair + 1] += now[2 * pair + 1];
      }
      if (has_moments) {
        Scorer::subtract_token(a, item, item.scorer, page, factors, item.positions[i] & (n - 1), now);
      }
    }
    bool is_cleared = false;
    const auto clear_taken = [&] {
      for (int64_t k = begin; !is_cleared && k < i; ++k) {
        for (int pair = 0; pair < item.pairs; ++pair) at(item.positions[k])[pair * W] = 0;
      }
      is_cleared = true;
    };
    for (int g = 0; g < group; ++g) {
      float& left = item.page_sum[g * item.padded_pages + page];
      if (taken[g] <= left * (1.0f - 0x1p-6f)) {
        left -= taken[g];
        continue;
      }
      // The difference would lose many digits: add up what is left.
      clear_taken();
      F total = zero();
      for (int64_t k = 0; k < n / W; ++k) {
        const I both = load_words(weights + (k * item.pairs + g / 2) * W);
        total = add(total, g % 2 ? low_bf16(both) : high_bf16(both));
      }
      left = reduce_sum(total);
    }
    if (!has_moments) continue;
    if (Scorer::is_rough(a, item, item.scorer, page)) clear_taken();
    if (is_cleared) Scorer::sum_moments(a, item, item.scorer, page, factors, weights);
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
