// Moments of a page: the leading columns of its tokens' key factors, summed with the weights of those that are left.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common.h"
#include "cpu/lrqk/page.h"

namespace lrqk {
namespace LRQK_ISA {

// Sums K words of int8 columns from `word` on for B heads, to sums [B, W / 4], whose quads make four columns each. Weights
// are rounded to multiples of 1 / inverse.
template <int B, int K>
inline void add_up_words(const FactorPage& page, int word, const uint32_t* weights, int pairs, int64_t page_size,
                         const F* inverse, Fetcher& fetcher, I (*sums)[W / 4]) {
  const uint8_t* words = page.data + word * page_size * 4;
  I acc[K][B];
  LRQK_UNROLL
  for (int i = 0; i < K * B; ++i) acc[i / B][i % B] = zero_int();
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
      const I even_steps = spread_pair<0>(steps), odd_steps = spread_pair<1>(steps);
      LRQK_UNROLL
      for (int k = 0; k < K; ++k) acc[k][g] = dot(dot(acc[k][g], even[k], even_steps), odd[k], odd_steps);
    }
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int k = 0; k < K; ++k) sums[g][k] = acc[k][g];
  }
}

template <int B>
inline void add_up_int8(const FactorPage& page, const uint32_t* weights, int pairs, int64_t page_size,
                        const float* largest, Fetcher& fetcher, int padded_rank, float* out) {
  constexpr int K = W / 4;
  const int words = page.layout->value_rank / 4;
  // Sums have to fit in 31 bits.
  const float top = min(32767.0f, 2147483648.0f / (127.0f * page_size) - 1.0f);
  F inverse[B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) inverse[g] = set(largest[g] > 1e-30f ? top / largest[g] : 0.0f);
  const auto run = [&](auto count, int word) {
    constexpr int kWords = decltype(count)::value;
    I sums[B][K];
    add_up_words<B, kWords>(page, word, weights, pairs, page_size, inverse, fetcher, sums);
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      for (int k = kWords; k < K; ++k) sums[g][k] = zero_int();
      store(out + g * padded_rank + word * 4, mul(to_float(sum_quads(sums[g])), set(largest[g] / top)));
    }
  };
  int word = 0;
  for (; word + K <= words; word += K) run(Count<K>{}, word);
  if (word + 3 == words) run(Count<min(3, K)>{}, word);
  if (word + 2 == words) run(Count<min(2, K)>{}, word);
  if (word + 1 == words) run(Count<1>{}, word);
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
