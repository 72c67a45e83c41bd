// Proxy scores of a page's tokens, s~_n = sum_j z_j A_nj, each plus an offset of its head.
#pragma once

#include <cstdint>

#include "cpu/lrqk/page.h"
#include "cpu/lrqk/project.h"

namespace lrqk {
namespace LRQK_ISA {

// Scores of the V vectors of tokens from n on, for B heads, with int8 factors.
template <int B, int V>
inline void score_int8(const FactorPage& page, const Projected& z, int g0, int64_t page_size, int64_t n,
                       const F* offset, Fetcher& fetcher, F (*scores)[B]) {
  const int32_t* words[B];
  I acc[V][B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    words[g] = z.words + (g0 + g) * z.padded_rank;
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) acc[v][g] = zero_int();
  }
  for (int j = 0; j < page.layout->rank; j += 4) {
    fetcher.step();
    I even[V], odd[V];
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) {
      const I word = load_words(page.data + j * page_size + (n + v * W) * 4);
      even[v] = even_bytes(word);
      odd[v] = odd_bytes(word);
    }
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      const I q_even = set_int(words[g][j]), q_odd = set_int(words[g][j + 1]);
      LRQK_UNROLL
      for (int v = 0; v < V; ++v) acc[v][g] = dot(dot(acc[v][g], even[v], q_even), odd[v], q_odd);
    }
  }
  LRQK_UNROLL
  for (int v = 0; v < V; ++v) {
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) scores[v][g] = mul_add(to_float(acc[v][g]), set(z.unit[g0 + g]), offset[g]);
  }
}

// The same with bfloat16 factors.
template <int B, int V>
inline void score_bf16(const FactorPage& page, const Projected& z, int g0, int64_t page_size, int64_t n,
                       const F* offset, Fetcher& fetcher, F (*scores)[B]) {
  const bf16* data = reinterpret_cast<const bf16*>(page.data);
  LRQK_UNROLL
  for (int v = 0; v < V; ++v) {
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) scores[v][g] = offset[g];
  }
  for (int j = 0; j < page.layout->rank; j += 2) {
    fetcher.step();
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) {
      F even, odd;
      load_pair(data + j * page_size + (n + v * W) * 2, even, odd);
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        const float* q = z.values() + (g0 + g) * z.padded_rank + j;
        scores[v][g] = mul_add(odd, set(q[1]), mul_add(even, set(q[0]), scores[v][g]));
      }
    }
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
