// Moments of a page: the leading columns of its tokens' key factors, summed with the weights of the scan.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common.h"
#include "cpu/lrqk/page.h"

namespace lrqk {
namespace LRQK_ISA {

// Key factors of W tokens in kWordRanks neighbouring ranks.
template <bool kIsInt8>
constexpr int kWordRanks = kIsInt8 ? 4 : 2;

template <bool kIsInt8>
inline void load_key_factors(const FactorPage& page, int word, int64_t page_size, int64_t n, F* factors) {
  const uint8_t* at = page.data + (word * page_size + n) * 4;
  if constexpr (kIsInt8) {
    const I words = load_words(at);
    factors[0] = byte_to_float<0>(words);
    factors[1] = byte_to_float<1>(words);
    factors[2] = byte_to_float<2>(words);
    factors[3] = byte_to_float<3>(words);
  } else {
    load_pair(reinterpret_cast<const bf16*>(at), factors[0], factors[1]);
  }
}

// Of B heads, from `weights` [N / W, pairs, W] with two bfloat16 to a word, to `out` [B, padded_rank].
template <int B, bool kIsInt8>
inline void add_up_moments(const FactorPage& page, const uint32_t* weights, int pairs, int64_t page_size,
                           int padded_rank, float* out) {
  constexpr int R = kWordRanks<kIsInt8>;
  for (int word = 0; word < page.layout->value_rank / R; ++word) {
    F acc[B * R];
    LRQK_UNROLL
    for (int i = 0; i < B * R; ++i) acc[i] = zero();
    for (int64_t n = 0; n < page_size; n += W) {
      F factors[R], weight[B + 1];
      load_key_factors<kIsInt8>(page, word, page_size, n, factors);
      LRQK_UNROLL
      for (int g = 0; g < B; g += 2) {
        const I both = load_words(weights + n * pairs + g / 2 * W);
        weight[g] = high_bf16(both);
        weight[g + 1] = low_bf16(both);
      }
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        LRQK_UNROLL
        for (int j = 0; j < R; ++j) acc[g * R + j] = mul_add(factors[j], weight[g], acc[g * R + j]);
      }
    }
    if constexpr (B * R == W) {
      alignas(64) float sums[W];
      store(sums, reduce_sum_each(acc));
      for (int g = 0; g < B; ++g) std::memcpy(out + g * padded_rank + word * R, sums + g * R, R * sizeof(float));
    } else {
      for (int i = 0; i < B * R; ++i) out[i / R * padded_rank + word * R + i % R] = reduce_sum(acc[i]);
    }
  }
}

// moment [G, padded_rank] of one page.
inline void page_moments(const FactorPage& page, const uint32_t* weights, int group, int pairs, int64_t page_size,
                         int padded_rank, float* moment) {
  std::memset(moment, 0, group * padded_rank * sizeof(float));
  for_head_blocks(group, [&](auto block, int g) {
    constexpr int B = decltype(block)::value;
    const auto run = page.layout->is_int8 ? add_up_moments<B, true> : add_up_moments<B, false>;
    run(page, weights + g / 2 * W, pairs, page_size, padded_rank, moment + g * padded_rank);
  });
}

// Takes one token out of the moment of its page.
inline void subtract_token(const FactorPage& page, int64_t n, int64_t page_size, const float* weights, int group,
                           int padded_rank, float* moment) {
  const int rank = page.layout->value_rank, ranks = page.layout->is_int8 ? 4 : 2;
  alignas(64) uint8_t bytes[2 * kMaxRank];
  alignas(64) float factors[kMaxRank];
  for (int word = 0; word < rank / ranks; ++word) {
    std::memcpy(bytes + word * 4, page.data + (word * page_size + n) * 4, 4);
  }
  if (page.layout->is_int8) {
    for (int j = 0; j < rank; ++j) factors[j] = static_cast<float>(reinterpret_cast<const int8_t*>(bytes)[j]);
  } else {
    for (int j = 0; j < rank; ++j) factors[j] = float_of(uint32_t{reinterpret_cast<const uint16_t*>(bytes)[j]} << 16);
  }
  for (int g = 0; g < group; ++g) {
    for (int j = 0; j < rank; ++j) moment[g * padded_rank + j] -= weights[g] * factors[j];
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
