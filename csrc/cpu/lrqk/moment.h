// Moments of a page: the leading columns of its tokens' key factors, summed with the weights of those that are left.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common.h"
#include "cpu/lrqk/page.h"

namespace lrqk {
namespace LRQK_ISA {

// Adds up K words of int8 columns from `word` on for B heads, to out [B, padded_rank]. Weights are rounded to whole numbers, of
// which the head's `largest` is `top`.
template <int B, int K>
inline void add_up_words(const FactorPage& page, int word, const uint32_t* weights, int pairs, int64_t page_size,
                         float top, const float* largest, Fetcher& fetcher, int padded_rank, float* out) {
  const uint8_t* words = page.data + word * page_size * 4;
  I acc[K][B];
  F inverse[B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    inverse[g] = set(largest[g] > 1e-30f ? top / largest[g] : 0.0f);
    LRQK_UNROLL
    for (int k = 0; k < K; ++k) acc[k][g] = zero_int();
  }
  for (int64_t n = 0; n < page_size; n += W) {
    fetcher.step();
    // Of each four tokens: in word i of four column i of the tokens 0 and 2, or 1 and 3, as int16.
    I even[K], odd[K];
    LRQK_UNROLL
    for (int k = 0; k < K; ++k) {
      const I columns = transpose_bytes(load_words(words + (k * page_size + n) * 4));
      even[k] = even_bytes(columns);
      odd[k] = odd_bytes(columns);
    }
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      const F weight = bf16_at(load_words(weights + n * pairs + g / 2 * W), g);
      const I steps = round_to_int(mul(weight, inverse[g]));
      const I both = bit_or(steps, shift_left<16>(swap_pairs(steps)));
      const I even_steps = spread_word<0>(both), odd_steps = spread_word<1>(both);
      LRQK_UNROLL
      for (int k = 0; k < K; ++k) acc[k][g] = dot(dot(acc[k][g], even[k], even_steps), odd[k], odd_steps);
    }
  }
  for (int g = 0; g < B; ++g) {
    const float unit = largest[g] / top;
    for (int k = 0; k < K; ++k) {
      int32_t sums[4];
      store_quad_sums(sums, acc[k][g]);
      float* columns = out + g * padded_rank + (word + k) * 4;
      for (int i = 0; i < 4; ++i) columns[i] = static_cast<float>(sums[i]) * unit;
    }
  }
}

template <int B>
inline void add_up_int8(const FactorPage& page, const uint32_t* weights, int pairs, int64_t page_size,
                        const float* largest, Fetcher& fetcher, int padded_rank, float* out) {
  constexpr int K = W >= 16 ? 4 : 2;  // sums that fit the registers
  const int words = page.layout->value_rank / 4;
  // Sums have to fit in 31 bits.
  const float top = min(32767.0f, 2147483648.0f / (127.0f * page_size) - 1.0f);
  int word = 0;
  for (; word + K <= words; word += K) {
    add_up_words<B, K>(page, word, weights, pairs, page_size, top, largest, fetcher, padded_rank, out);
  }
  for (; word < words; ++word) {
    add_up_words<B, 1>(page, word, weights, pairs, page_size, top, largest, fetcher, padded_rank, out);
  }
}

// The same with bfloat16 columns, in float32.
template <int B>
inline void add_up_bf16(const FactorPage& page, const uint32_t* weights, int pairs, int64_t page_size, Fetcher& fetcher,
                        int padded_rank, float* out) {
  for (int word = 0; word < page.layout->value_rank / 2; ++word) {
    F acc[2][B];
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) acc[0][g] = acc[1][g] = zero();
    for (int64_t n = 0; n < page_size; n += W) {
      fetcher.step();
      F factors[2];
      load_pair(reinterpret_cast<const bf16*>(page.data + (word * page_size + n) * 4), factors[0], factors[1]);
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        const F weight = bf16_at(load_words(weights + n * pairs + g / 2 * W), g);
        acc[0][g] = mul_add(factors[0], weight, acc[0][g]);
        acc[1][g] = mul_add(factors[1], weight, acc[1][g]);
      }
    }
    for (int g = 0; g < B; ++g) {
      out[g * padded_rank + word * 2] = reduce_sum(acc[0][g]);
      out[g * padded_rank + word * 2 + 1] = reduce_sum(acc[1][g]);
    }
  }
}

// moment [G, padded_rank] of one page, from `weights` [N / W, pairs, W] with two bfloat16 to a word, and the largest of
// each head [G].
inline void page_moments(const FactorPage& page, const uint32_t* weights, int group, int pairs, int64_t page_size,
                         const float* largest, Fetcher& fetcher, int padded_rank, float* moment) {
  std::memset(moment, 0, group * padded_rank * sizeof(float));
  for_head_blocks(group, [&](auto block, int g) {
    constexpr int B = decltype(block)::value;
    const uint32_t* words = weights + g / 2 * W;
    float* out = moment + g * padded_rank;
    if (page.layout->is_int8) {
      add_up_int8<B>(page, words, pairs, page_size, largest + g, fetcher, padded_rank, out);
    } else {
      add_up_bf16<B>(page, words, pairs, page_size, fetcher, padded_rank, out);
    }
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
