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
    for (int j = 0; j < W; ++j) {
      I sums[B];
      for (int g = 0; g < B; ++g) sums[g] = int_zero();
      if (j < count) {
        for (int64_t i = 0; i < head_size; i += 2 * W) {
          const I wide = widen_bytes(x + j * head_size + i);
          for (int g = 0; g < B; ++g) sums[g] = dot(sums[g], wide, load_words(q + g * head_size + i));
        }
      }
      for (int g = 0; g < B; ++g) acc[g][j] = sums[g];
    }
    for (int g = 0; g < B; ++g) {
      z[g] = mul(to_float(sum_each(acc[g])), mul(load(scale), set1(query.unit[g0 + g])));
    }
  } else {
    F acc[B][W];
    const bf16* x = static_cast<const bf16*>(page.projection()) + first * head_size;
    const float* q = query.values + g0 * head_size;
    for (int j = 0; j < W; ++j) {
      F sums[B];
      for (int g = 0; g < B; ++g) sums[g] = zero();
      if (j < count) {
        for (int64_t i = 0; i < head_size; i += 2 * W) {
          F a, b;
          load_pair(x + j * head_size + i, a, b);
          for (int g = 0; g < B; ++g) {
            sums[g] = fma(a, load(q + g * head_size + i), sums[g]);
            sums[g] = fma(b, load(q + g * head_size + i + W), sums[g]);
          }
        }
      }
      for (int g = 0; g < B; ++g) acc[g][j] = sums[g];
    }
    for (int g = 0; g < B; ++g) z[g] = mul(sum_each(acc[g]), load(scale));
  }
}

// Scores of all tokens of a page for B heads. Token n of head g goes to scores[(n / W * heads + g) * W + n % W],
// and highest[g] gets the largest.
template <int B>
inline void score_page(const FactorPage& page, const ProxyQuery& query, int heads, int g0, int64_t head_size,
                       int64_t page_size, float* scores, float* highest) {
  const int rank = page.layout->rank;
  alignas(64) float z[B][kMaxRank];
  for (int first = 0; first < rank; first += W) {
    F part[B];
    project<B>(page, query, g0, head_size, first, part);
    for (int g = 0; g < B; ++g) store(z[g] + first, part[g]);
  }
  F top[B];
  for (int g = 0; g < B; ++g) top[g] = set1(kMasked);
  float* out = scores + g0 * W;
  if (page.layout->is_int8) {
    alignas(64) int32_t words[B][kMaxRank];
    float unit[B];
    for (int g = 0; g < B; ++g) {
      F largest = zero();
      for (int j = 0; j < rank; j += W) largest = max(largest, abs(load(z[g] + j)));
      const float size = maximum(largest);
      const F inverse = set1(size > 1e-30f ? 32767.0f / size : 0.0f);
      unit[g] = size / 32767.0f;
      for (int j = 0; j < rank; j += W) store_pair_words(words[g] + j, mul(load(z[g] + j), inverse));
    }
    for (int64_t n = 0; n < page_size; n += W, out += heads * W) {
      I acc[B];
      for (int g = 0; g < B; ++g) acc[g] = int_zero();
      for (int j = 0; j < rank; j += 4) {
        const I word = load_words(page.data + j * page_size + n * 4);
        const I even = even_bytes(word), odd = odd_bytes(word);
        for (int g = 0; g < B; ++g) {
          acc[g] = dot(acc[g], even, broadcast_word(words[g] + j));
          acc[g] = dot(acc[g], odd, broadcast_word(words[g] + j + 1));
        }
      }
      for (int g = 0; g < B; ++g) {
        const F score = mul(to_float(acc[g]), set1(unit[g]));
        top[g] = max(top[g], score);
        store(out + g * W, score);
      }
    }
  } else {
    for (int64_t n = 0; n < page_size; n += W, out += heads * W) {
      F acc[B];
      for (int g = 0; g < B; ++g) acc[g] = zero();
      for (int j = 0; j < rank; j += 2) {
        F even, odd;
        load_pair(reinterpret_cast<const bf16*>(page.data) + j * page_size + n * 2, even, odd);
        for (int g = 0; g < B; ++g) {
          acc[g] = fma(even, set1(z[g][j]), acc[g]);
          acc[g] = fma(odd, set1(z[g][j + 1]), acc[g]);
        }
      }
      for (int g = 0; g < B; ++g) {
        top[g] = max(top[g], acc[g]);
        store(out + g * W, acc[g]);
      }
    }
  }
  for (int g = 0; g < B; ++g) highest[g] = maximum(top[g]);
}

}  // namespace LRQK_ISA
}  // namespace lrqk
