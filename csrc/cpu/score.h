// Proxy scores of one factor page: s~_n = sum_j (q . X_j) scale_j A_nj, for the query heads of one KV head.
#pragma once

#include "common.h"

namespace lrqk {
namespace LRQK_ISA {

// The query heads of one KV head, prepared once per step. Scores come out in units of log 2.
struct ProxyQuery {
  int16_t* words;  // [G, d], for int8 factors
  float* values;   // [G, d], for bfloat16 factors: scaled, in load_pair's order
  float* unit;     // [G], what one step of `words` is worth
};

inline void prepare_proxy_query(const float* query, int heads, int64_t head_size, float scale, ProxyQuery& out) {
  // The largest sum of int8 times int16 products has to fit in 31 bits.
  const float limit = smaller(32767.0f, 2147483648.0f / (127.0f * head_size) - 1.0f);
  for (int g = 0; g < heads; ++g) {
    const float* q = query + g * head_size;
    F top = zero();
    for (int64_t i = 0; i < head_size; i += W) top = max(top, abs(load(q + i)));
    const float size = maximum(top);
    const float inverse = size > 1e-30f ? limit / size : 0.0f;
    out.unit[g] = size / limit * scale * kLog2e;
    for (int64_t i = 0; i < head_size; i += W) store_int16(out.words + g * head_size + i, mul(load(q + i), set1(inverse)));
    for (int64_t i = 0; i < head_size; i += 2 * W) {
      for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < W; ++lane) {
          const int from = pair_index(static_cast<const bf16*>(nullptr), half, lane);
          out.values[g * head_size + i + half * W + lane] = q[i + from] * scale * kLog2e;
        }
      }
    }
  }
}

struct FactorPage {
  const uint8_t* data;
  const PageLayout* layout;
  const void* projection() const { return data + layout->projection_offset; }  // [r, d]
  const float* scale() const { return reinterpret_cast<const float*>(data + layout->scale_offset); }
  const bf16* value_mean() const { return reinterpret_cast<const bf16*>(data + layout->value_mean_offset); }
};

constexpr int kMaxRank = 512;

// z[g][j] = (q_g . X_j) scale_j for ranks first ... first + W - 1, zero past the rank.
template <int B>
inline void project(const FactorPage& page, const ProxyQuery& query, int g0, int64_t head_size, int first, F* z) {
  const int count = smaller(page.layout->rank - first, W);
  float scale[W] = {};
  for (int j = 0; j < count; ++j) scale[j] = page.scale()[first + j];
  if (page.layout->is_int8) {
    I acc[B][W];
    const int8_t* x = static_cast<const int8_t*>(page.projection()) + first * head_size;
    const int16_t* q = query.words + g0 * head_size;
    LRQK_UNROLL
    for (int j = 0; j < W; ++j) {
      I sums[B];
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) sums[g] = int_zero();
      if (j < count) {
        for (int64_t i = 0; i < head_size; i += 2 * W) {
          const I wide = widen_bytes(x + j * head_size + i);
          LRQK_UNROLL
          for (int g = 0; g < B; ++g) sums[g] = dot(sums[g], wide, load_words(q + g * head_size + i));
        }
      }
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) acc[g][j] = sums[g];
    }
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      z[g] = mul(to_float(sum_each(acc[g])), mul(load(scale), set1(query.unit[g0 + g])));
    }
  } else {
    F acc[B][W];
    const bf16* x = static_cast<const bf16*>(page.projection()) + first * head_size;
    const float* q = query.values + g0 * head_size;
    LRQK_UNROLL
    for (int j = 0; j < W; ++j) {
      F sums[B];
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) sums[g] = zero();
      if (j < count) {
        for (int64_t i = 0; i < head_size; i += 2 * W) {
          F a, b;
          load_pair(x + j * head_size + i, a, b);
          LRQK_UNROLL
          for (int g = 0; g < B; ++g) {
            sums[g] = fma(a, load(q + g * head_size + i), sums[g]);
            sums[g] = fma(b, load(q + g * head_size + i + W), sums[g]);
          }
        }
      }
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) acc[g][j] = sums[g];
    }
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) z[g] = mul(sum_each(acc[g]), load(scale));
  }
}

constexpr int kTokenVectors = W >= 16 ? 4 : 2;  // tokens scored together, in vectors: they share the query's words

// Score sums of tokens n ... n + V W - 1, through int8 factors; `words` are as store_pair_words leaves them.
template <int B, int V>
inline void score_tokens(const FactorPage& page, const int32_t (*words)[kMaxRank], int heads, int64_t page_size,
                         int64_t n, float* sums, I* top) {
  I acc[V][B];
  LRQK_UNROLL
  for (int v = 0; v < V; ++v) {
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) acc[v][g] = int_zero();
  }
  for (int j = 0; j < page.layout->rank; j += 4) {
    I even[V], odd[V];
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) {
      const I word = load_words(page.data + j * page_size + (n + v * W) * 4);
      even[v] = even_bytes(word);
      odd[v] = odd_bytes(word);
    }
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      const I q_even = broadcast_word(words[g] + j), q_odd = broadcast_word(words[g] + j + 1);
      LRQK_UNROLL
      for (int v = 0; v < V; ++v) acc[v][g] = dot(dot(acc[v][g], even[v], q_even), odd[v], q_odd);
    }
  }
  LRQK_UNROLL
  for (int v = 0; v < V; ++v) {
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      top[g] = max(top[g], acc[v][g]);
      store_words(sums + ((n / W + v) * heads + g) * W, acc[v][g]);
    }
  }
}

// The same through bfloat16 factors.
template <int B>
inline void score_tokens(const FactorPage& page, const float (*z)[kMaxRank], int heads, int64_t page_size, int64_t n,
                         float* sums, F* top) {
  F acc[B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) acc[g] = zero();
  for (int j = 0; j < page.layout->rank; j += 2) {
    F even, odd;
    load_pair(reinterpret_cast<const bf16*>(page.data) + j * page_size + n * 2, even, odd);
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) acc[g] = fma(odd, set1(z[g][j + 1]), fma(even, set1(z[g][j]), acc[g]));
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    top[g] = max(top[g], acc[g]);
    store(sums + (n / W * heads + g) * W, acc[g]);
  }
}

// Score sums of all tokens of a page for B heads: int32 with int8 factors, else float32. That of token n and head g
// goes to sums[(n / W * heads + g) * W + n % W]; unit[g] times a sum is a score, highest[g] the largest score.
// Fetches the page at `next` meanwhile, if given.
template <int B>
inline void score_page(const FactorPage& page, const ProxyQuery& query, int heads, int g0, int64_t head_size,
                       int64_t page_size, const uint8_t* next, float* sums, float* unit, float* highest) {
  const int rank = page.layout->rank;
  alignas(64) float z[B][kMaxRank];
  for (int first = 0; first < rank; first += W) {
    F part[B];
    project<B>(page, query, g0, head_size, first, part);
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) store(z[g] + first, part[g]);
  }
  if (!page.layout->is_int8) {
    F top[B];
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) top[g] = set1(kMasked);
    for (int64_t n = 0; n < page_size; n += W) score_tokens<B>(page, z, heads, page_size, n, sums, top);
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      unit[g] = 1.0f;
      highest[g] = maximum(top[g]);
    }
    return;
  }
  alignas(64) int32_t words[B][kMaxRank];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    F largest = zero();
    for (int j = 0; j < rank; j += W) largest = max(largest, abs(load(z[g] + j)));
    const float size = maximum(largest);
    const F inverse = set1(size > 1e-30f ? 32767.0f / size : 0.0f);
    unit[g] = size / 32767.0f;
    for (int j = 0; j < rank; j += W) store_pair_words(words[g] + j, mul(load(z[g] + j), inverse));
  }
  I top[B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) top[g] = int_set1(INT32_MIN);
  int64_t n = 0;
  const int64_t share = ceil_div(page.layout->value_mean_offset * kTokenVectors * W, page_size * 64) * 64;
  for (; n + kTokenVectors * W <= page_size; n += kTokenVectors * W) {
    if (next) {
      for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next + i, 0, 3);
      next += share;
    }
    score_tokens<B, kTokenVectors>(page, words, heads, page_size, n, sums, top);
  }
  for (; n < page_size; n += W) score_tokens<B, 1>(page, words, heads, page_size, n, sums, top);
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    highest[g] = maximum(to_float(top[g])) * unit[g];
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
