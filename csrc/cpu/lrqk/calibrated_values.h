// What the key factors of the tokens that are left add to a page's mean value, by a map of 4 bits or the calibration's.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/attend.h"
#include "cpu/lrqk/calibrated_moment.h"
#include "cpu/lrqk/item.h"
#include "cpu/lrqk/linear_values.h"

namespace lrqk {
namespace LRQK_ISA {

// deviation [r] of one head on one page: how far the mean key factor of the tokens left is from the page's, times the
// weight of all of them and the columns' scales.
inline void weigh_deviation(const CalibratedPage& page, const ByteMoments& moments, int64_t index, float weight,
                            const bf16* scale, float* deviation) {
  const int rank = page.layout->rank;
  const float left = moments.weights[index];
  const F share = set(left > 0.0f ? weight / left : 0.0f), whole = set(left > 0.0f ? -weight : 0.0f);
  for (int j = 0; j < rank; j += W) {
    const F mean = mul(load(page.key_factor_mean() + j), whole);
    store(deviation + j, mul(mul_add(load(moments.sums + index * rank + j), share, mean), load(scale + j)));
  }
}

// values [B, d] += unit [B] times bytes [B, r] through the page's map, V vectors of words at a time.
template <int B, int V>
inline void add_mapped(const CalibratedPage& page, int64_t head_size, int64_t first, const int8_t* bytes,
                       const int32_t* bias, const float* unit, float* values) {
  const int rank = page.layout->rank;
  const int64_t half = head_size / 2;
  I low[V][B], high[V][B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) low[v][g] = high[v][g] = set_int(bias[g]);
  }
  for (int word = 0; word < rank / 4; ++word) {
    const uint8_t* words = page.value_projection() + (word * half + first) * 4;
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) {
      const I both = load_words(words + v * W * 4);
      const I a = low_nibbles(both), b = high_nibbles(both);
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        int32_t four;
        std::memcpy(&four, bytes + g * rank + word * 4, 4);
        const I factor = set_int(four);
        low[v][g] = dot_bytes(low[v][g], a, factor);
        high[v][g] = dot_bytes(high[v][g], b, factor);
      }
    }
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) {
      float* a = values + g * head_size + first + v * W;
      store(a, mul_add(to_float(low[v][g]), set(unit[g]), load(a)));
      store(a + half, mul_add(to_float(high[v][g]), set(unit[g]), load(a + half)));
    }
  }
}

// Of one page with a map of its own, for B heads; `deviation` [B, r].
template <int B>
inline void map_page(const CalibratedPage& page, int64_t head_size, const float* deviation, float* values) {
  const int rank = page.layout->rank;
  alignas(64) int8_t bytes[B * kMaxRank];
  int32_t bias[B];
  float unit[B];
  for (int g = 0; g < B; ++g) {
    F top = zero();
    for (int j = 0; j < rank; j += W) top = max(top, abs(load(deviation + g * rank + j)));
    const float size = reduce_max(top);
    const F inverse = set(size > 1e-30f ? 127.0f / size : 0.0f);
    unit[g] = size / 127.0f;
    I total = zero_int();
    for (int j = 0; j < rank; j += W) {
      const I steps = round_to_int(mul(load(deviation + g * rank + j), inverse));
      total = add(total, steps);
      store_low_8(bytes + g * rank + j, steps);
    }
    bias[g] = -kNibbleBias * static_cast<int32_t>(reduce_sum(to_float(total)));
  }
  const int64_t half = head_size / 2;
  int64_t first = 0;
  for (; first + 2 * W <= half; first += 2 * W) add_mapped<B, 2>(page, head_size, first, bytes, bias, unit, values);
  for (; first < half; first += W) add_mapped<B, 1>(page, head_size, first, bytes, bias, unit, values);
}

// values [d] += deviation [r] through map [r, d].
inline void map_once(const float* map, int rank, int64_t head_size, const float* deviation, float* values) {
  for (int64_t i = 0; i < head_size; i += W) {
    F sum = load(values + i);
    for (int j = 0; j < rank; ++j) sum = mul_add(load(map + j * head_size + i), set(deviation[j]), sum);
    store(values + i, sum);
  }
}

// Adds what pages [begin, begin + count) are worth with the heads' weights [G, kChunkRows], to acc [G, d] in load_pair's
// order of bfloat16.
inline void add_calibrated_values(const DecodeArgs& a, const Item& item, const ByteMoments& moments, int64_t begin,
                                  int count, const float* weights, float* acc) {
  const int group = group_of(a), rank = a.layout.rank;
  const int64_t d = a.head_size;
  const int64_t end = a.layout.has_value_map ? a.layout.page_bytes : a.layout.value_projection_offset;
  const int64_t fetched = end - a.layout.key_factor_mean_offset;
  for_head_blocks(group, [&](auto block, int g0) {
    constexpr int B = decltype(block)::value;
    alignas(64) float values[B * kMaxHeadSize], deviation[B * kMaxRank], total[B * kMaxRank];
    std::memset(values, 0, B * d * sizeof(float));
    std::memset(total, 0, B * rank * sizeof(float));
    for (int i = 0; i < count; ++i) {
      const CalibratedPage page(factor_page(a, item, begin + i));
      if (g0 == 0 && begin + i + kPagesAhead < item.num_pages) {
        const FactorPage later = factor_page(a, item, begin + i + kPagesAhead);
        prefetch(later.data + a.layout.key_factor_mean_offset, fetched);
      }
      const bf16* scale = a.layout.has_value_map ? page.value_scale() : page.scale();
      for (int g = 0; g < B; ++g) {
        weigh_deviation(page, moments, (begin + i) * group + g0 + g, weights[(g0 + g) * kChunkRows + i], scale,
                        deviation + g * rank);
      }
      if (a.layout.has_value_map) {
        map_page<B>(page, d, deviation, values);
        continue;
      }
      for (int64_t j = 0; j < B * rank; j += W) store(total + j, add(load(total + j), load(deviation + j)));
    }
    for (int g = 0; g < B; ++g) {
      if (!a.layout.has_value_map) {
        map_once(a.basis.value + item.kv_head * rank * d, rank, d, total + g * rank, values + g * d);
      }
      float* out = acc + (g0 + g) * d;
      for (int64_t i = 0; i < d; i += 2 * W) {
        for (int half = 0; half < 2; ++half) {
          for (int lane = 0; lane < W; ++lane) {
            out[i + half * W + lane] += values[g * d + i + pair_index(static_cast<const bf16*>(nullptr), half, lane)];
          }
        }
      }
    }
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
