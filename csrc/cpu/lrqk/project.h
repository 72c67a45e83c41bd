// The query heads of one KV head in the coordinates of a factor page: z_j = (q . X_j) scale_j.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common.h"
#include "cpu/lrqk/page.h"

namespace lrqk {
namespace LRQK_ISA {

// The query, prepared once per step. Scores come out in units of log 2.
struct ProxyQuery {
  int16_t* words;  // [G, d], for int8 factors
  float* values;   // [G, d], for bfloat16 factors: scaled, in load_pair's order
  float* unit;     // [G], what one step of `words` is worth
};

inline void prepare_proxy_query(const float* query, int heads, int64_t head_size, float scale, bool is_int8,
                                ProxyQuery& out) {
  // The largest sum of int8 times int16 products has to fit in 31 bits.
  const float limit = min(32767.0f, 2147483648.0f / (127.0f * head_size) - 1.0f);
  for (int g = 0; g < heads; ++g) {
    const float* q = query + g * head_size;
    F top = zero();
    for (int64_t i = 0; i < head_size; i += W) top = max(top, abs(load(q + i)));
    const float size = reduce_max(top);
    const F inverse = set(size > 1e-30f ? limit / size : 0.0f);
    out.unit[g] = size / limit * scale * kLog2e;
    for (int64_t i = 0; i < head_size; i += W) store_int16(out.words + g * head_size + i, mul(load(q + i), inverse));
    for (int64_t i = 0; !is_int8 && i < head_size; i += 2 * W) {
      for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < W; ++lane) {
          const int from = pair_index(static_cast<const bf16*>(nullptr), half, lane);
          out.values[g * head_size + i + half * W + lane] = q[i + from] * scale * kLog2e;
        }
      }
    }
  }
}

// The query in the coordinates of one page.
struct Projected {
  int32_t* words;   // [G, padded_rank]; int8 factors: as store_pair_words leaves z / unit; else z itself as float32
  float* unit;      // [G]; a score is unit times a sum over the words
  int padded_rank;  // rank rounded up to W
  float* values() const { return reinterpret_cast<float*>(words); }
};

// z of ranks first ... first + W - 1, zero past the rank, with int8 factors; with kBlocks > 0, head_size is
// 2 W kBlocks.
template <int B, int kBlocks>
inline void project_int8(const FactorPage& page, const ProxyQuery& query, int g0, int64_t head_size, int first,
                         int count, Fetcher& fetcher, F* z) {
  I acc[B][W];
  const int8_t* x = static_cast<const int8_t*>(page.projection()) + first * head_size;
  const int16_t* q = query.words + g0 * head_size;
  const int64_t blocks = kBlocks ? kBlocks : head_size / (2 * W);
  constexpr bool kFitsRegisters = kBlocks > 0 && B * kBlocks <= 16;
  I words[B][kFitsRegisters ? kBlocks : 1];
  LRQK_UNROLL
  for (int i = 0; i < B * kBlocks && kFitsRegisters; ++i) {
    words[i % B][i / B] = load_words(q + (i % B) * head_size + i / B * 2 * W);
  }
  for (int j = 0; j < count; ++j) {
    I sums[B];
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) sums[g] = zero_int();
    fetcher.step();
    LRQK_UNROLL
    for (int64_t i = 0; i < blocks; ++i) {
      const I wide = widen_8(x + j * head_size + i * 2 * W);
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        sums[g] = dot(sums[g], wide, kFitsRegisters ? words[g][i] : load_words(q + g * head_size + i * 2 * W));
      }
    }
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) acc[g][j] = sums[g];
  }
  for (int j = count; j < W; ++j) {
    for (int g = 0; g < B; ++g) acc[g][j] = zero_int();
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) z[g] = mul(to_float(reduce_sum_each(acc[g])), set(query.unit[g0 + g]));
}

// The same with bfloat16 factors.
template <int B>
inline void project_bf16(const FactorPage& page, const ProxyQuery& query, int g0, int64_t head_size, int first,
                         int count, Fetcher& fetcher, F* z) {
  F acc[B][W];
  const bf16* x = static_cast<const bf16*>(page.projection()) + first * head_size;
  const float* q = query.values + g0 * head_size;
  for (int j = 0; j < W; ++j) {
    F sums[B];
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) sums[g] = zero();
    if (j < count) {
      fetcher.step();
      for (int64_t i = 0; i < head_size; i += 2 * W) {
        F a, b;
        load_pair(x + j * head_size + i, a, b);
        LRQK_UNROLL
        for (int g = 0; g < B; ++g) {
          sums[g] = mul_add(a, load(q + g * head_size + i), sums[g]);
          sums[g] = mul_add(b, load(q + g * head_size + i + W), sums[g]);
        }
      }
    }
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) acc[g][j] = sums[g];
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) z[g] = reduce_sum_each(acc[g]);
}

template <int B>
inline void project(const FactorPage& page, const ProxyQuery& query, int g0, int64_t head_size, Fetcher& fetcher,
                    const Projected& out) {
  const int rank = page.layout->rank;
  const bool is_int8 = page.layout->is_int8;
  float* values[B];
  F largest[B];
  for (int g = 0; g < B; ++g) {
    values[g] = out.values() + (g0 + g) * out.padded_rank;
    largest[g] = zero();
  }
  for (int first = 0; first < rank; first += W) {
    const int count = min(rank - first, W);
    alignas(64) float scale[W] = {};
    std::memcpy(scale, page.projection_scale() + first, count * sizeof(float));
    F z[B];
    if (is_int8) {
      const auto run = head_size == 8 * W   ? project_int8<B, 4>
                       : head_size == 4 * W ? project_int8<B, 2>
                                            : project_int8<B, 0>;
      run(page, query, g0, head_size, first, count, fetcher, z);
    } else {
      project_bf16<B>(page, query, g0, head_size, first, count, fetcher, z);
    }
    for (int g = 0; g < B; ++g) {
      z[g] = mul(z[g], load(scale));
      largest[g] = max(largest[g], abs(z[g]));
      store(values[g] + first, z[g]);
    }
  }
  for (int g = 0; g < B; ++g) {
    out.unit[g0 + g] = 1.0f;
    if (!is_int8) continue;
    const float size = reduce_max(largest[g]);
    const F inverse = set(size > 1e-30f ? 32767.0f / size : 0.0f);
    out.unit[g0 + g] = size / 32767.0f;
    for (int j = 0; j < rank; j += W) {
      store_pair_words(out.words + (g0 + g) * out.padded_rank + j, mul(load(values[g] + j), inverse));
    }
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
