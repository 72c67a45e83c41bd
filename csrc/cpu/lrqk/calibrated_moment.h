// Moments of a page with columns in 8 and 4 bits: weights are rounded to 8 bits, and sums are whole numbers.
//
// A page's weights have one unit per head, a 255th of the largest that is left. The mean divides by the sum of the same
// rounded weights.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/lrqk/calibrated_page.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr float kTopWeight = 255.0f;

struct ByteMoments {
  float* sums;     // [num_pages, G, r], key factors times rounded weights
  float* weights;  // [num_pages, G], of the rounded weights
};

// Bytes [B, N] of the weights [N / W, pairs, W], two bfloat16 to a word, of heads from an even one on; and their sums.
template <int B>
inline void round_weights(const uint32_t* words, int pairs, int64_t page_size, const float* largest, Fetcher& fetcher,
                          uint8_t* bytes, float* sums) {
  F inverse[B], total[B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    inverse[g] = set(largest[g] > 1e-30f ? kTopWeight / largest[g] : 0.0f);
    total[g] = zero();
  }
  for (int64_t n = 0; n < page_size; n += W) {
    fetcher.step();
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      const F weight = bf16_at(load_words(words + n * pairs + g / 2 * W), g);
      const I rounded = round_to_int(mul(weight, inverse[g]));
      total[g] = add(total[g], to_float(rounded));
      store_low_8(bytes + g * page_size + n, rounded);
    }
  }
  for (int g = 0; g < B; ++g) sums[g] = reduce_sum(total[g]);
}

// Adds up K words of columns, leading ones from `word` on, or those of K / 2 trailing words in two halves; to out
// [B, rank], whose first column is theirs.
template <int B, int K, bool kTrailing>
inline void add_up_words(const uint8_t* words, int64_t page_size, const uint8_t* weights, int32_t bias,
                         const float* weight_sums, int rank, float* out) {
  I acc[K][B];
  LRQK_UNROLL
  for (int k = 0; k < K; ++k) {
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) acc[k][g] = zero_int();
  }
  for (int64_t n = 0; n < page_size; n += W) {
    I factors[K];
    LRQK_UNROLL
    for (int k = 0; k < K; k += kTrailing ? 2 : 1) {
      const I four = transpose_bytes(load_words(words + ((kTrailing ? k / 2 : k) * page_size + n) * 4));
      if constexpr (kTrailing) {
        factors[k] = low_nibbles(four);
        factors[k + 1] = high_nibbles(four);
      } else {
        factors[k] = four;
      }
    }
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      const I weight = spread_bytes(weights + g * page_size + n);
      LRQK_UNROLL
      for (int k = 0; k < K; ++k) acc[k][g] = dot_bytes(acc[k][g], weight, factors[k]);
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int g = 0; g < B; ++g) {
      int32_t sums[4];
      store_quad_sums(sums, acc[k][g]);
      for (int i = 0; i < 4; ++i) {
        out[g * rank + 4 * k + i] = static_cast<float>(sums[i]) - static_cast<float>(bias) * weight_sums[g];
      }
    }
  }
}

// Of one page, for all heads.
inline void sum_byte_moments(const CalibratedPage& page, const uint32_t* weights, int group, int pairs,
                             int64_t page_size, int64_t p, const float* largest, Fetcher& fetcher,
                             const ByteMoments& out) {
  const int rank = page.layout->rank;
  alignas(64) uint8_t bytes[4 * kMaxPageSize];
  for_head_blocks(group, [&](auto block, int g) {
    constexpr int B = decltype(block)::value;
    const int64_t first = p * group + g;
    round_weights<B>(weights + g / 2 * W, pairs, page_size, largest + g, fetcher, bytes, out.weights + first);
    float* sums = out.sums + first * rank;
    const auto add = [&](auto words_tag, auto trailing_tag, const uint8_t* words, int column) {
      add_up_words<B, decltype(words_tag)::value, decltype(trailing_tag)::value>(
          words, page_size, bytes, trailing_tag ? kNibbleBias : 0, out.weights + first, rank, sums + column);
    };
    int word = 0;
    for (; word + 4 <= page.leading_words(); word += 4) {
      add(Count<4>{}, std::false_type{}, page.data + word * page_size * 4, word * 4);
    }
    for (; word < page.leading_words(); ++word) {
      add(Count<1>{}, std::false_type{}, page.data + word * page_size * 4, word * 4);
    }
    const int leading = page.layout->leading_rank;
    for (word = 0; word + 2 <= page.trailing_words(); word += 2) {
      add(Count<4>{}, std::true_type{}, page.trailing() + word * page_size * 4, leading + word * 8);
    }
    for (; word < page.trailing_words(); ++word) {
      add(Count<2>{}, std::true_type{}, page.trailing() + word * page_size * 4, leading + word * 8);
    }
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
