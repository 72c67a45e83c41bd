// The scan over all pages of an item: exponentials of the scores, page sums and log-sum-exps.
#pragma once

#include "cpu/lrqk/moment.h"
#include "cpu/lrqk/prepare.h"

namespace lrqk {
namespace LRQK_ISA {

// Log-sum-exps of the pages so far, head by head.
struct Running {
  alignas(64) float highest[kMaxGroup];
  alignas(64) float sum[kMaxGroup];  // of 2^(score - highest)

  explicit Running(int group) {
    for (int g = 0; g < static_cast<int>(ceil_div(group, W)) * W; ++g) {
      highest[g] = kMasked;
      sum[g] = 0.0f;
    }
  }
  // Joins a page whose sums are of 2^(score - reference).
  void add(int group, const float* reference, const float* page_sum) {
    for (int g = 0; g < group; g += W) {
      const F before = load(highest + g), now = load(reference + g), top = max(before, now);
      const F kept = mul(load(sum + g), exp2(sub(before, top)));
      store(sum + g, mul_add(load(page_sum + g), exp2(sub(now, top)), kept));
      store(highest + g, top);
    }
  }
  bool is_empty() const { return highest[0] == kMasked; }
  // To about 1e-4; any number would do that is close.
  float log_sum(int g) const {
    const uint32_t bits = bits_of(sum[g]);
    const float m = float_of((bits & 0x7fffff) | 0x3f800000);
    // The minimax polynomial of log2 on [1, 2).
    const float log_m = -2.5128543f + m * (4.0700899f + m * (-2.1206742f + m * (0.64514193f - m * 0.081615735f)));
    return highest[g] + static_cast<float>(static_cast<int32_t>(bits >> 23) - 127) + log_m;
  }
};

// 2^(score - reference) of V vectors of tokens for B heads, in bfloat16 and two heads to a word, to [V, pairs, W]; adds
// them to the heads' totals. On an edge, `valid` holds 1 for candidates and 0 for others.
template <int B, int V, bool kIsInt8, bool kIsEdge>
inline void weigh_vectors(const FactorPage& page, const Projected& z, int pairs, int g0, int64_t page_size, int64_t n,
                          const F* offset, const float* valid, Fetcher& fetcher, uint32_t* weights, F* total) {
  F scores[V][B];
  score_vectors<B, V, kIsInt8>(page, z, g0, page_size, n, offset, fetcher, scores);
  LRQK_UNROLL
  for (int v = 0; v < V; ++v) {
    F weight[B];
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      weight[g] = round_to_bf16(exp2_rough(scores[v][g]));
      if (kIsEdge) weight[g] = mul(weight[g], load(valid + n + v * W));
      total[g] = add(total[g], weight[g]);
    }
    LRQK_UNROLL
    for (int g = 0; g < B; g += 2) {
      store_words(weights + (v * pairs + g / 2) * W, pack_bf16(weight[g], g + 1 < B ? weight[g + 1] : zero()));
    }
  }
}

template <int B, bool kIsInt8, bool kIsEdge>
inline void weigh_page(const FactorPage& page, const Projected& z, int pairs, int g0, int64_t page_size,
                       const float* reference, const float* valid, Fetcher& fetcher, uint32_t* weights,
                       float* totals) {
  constexpr int V = kVectorsTogether;
  F offset[B], total[B];
  for (int g = 0; g < B; ++g) {
    offset[g] = set(-reference[g]);
    total[g] = zero();
  }
  weights += g0 / 2 * W;
  int64_t n = 0;
  for (; n + V * W <= page_size; n += V * W) {
    weigh_vectors<B, V, kIsInt8, kIsEdge>(page, z, pairs, g0, page_size, n, offset, valid, fetcher,
                                          weights + n * pairs, total);
  }
  for (; n < page_size; n += W) {
    weigh_vectors<B, 1, kIsInt8, kIsEdge>(page, z, pairs, g0, page_size, n, offset, valid, fetcher,
                                          weights + n * pairs, total);
  }
  for (int g = 0; g < B; ++g) totals[g] = reduce_sum(total[g]);
}

template <int B, bool kIsInt8>
inline void highest_scores(const FactorPage& page, const Projected& z, int g0, int64_t page_size, const float* valid,
                           float* highest) {
  F top[B], scores[1][B], offset[B];
  Fetcher idle(nullptr, 0);
  for (int g = 0; g < B; ++g) {
    top[g] = set(kMasked);
    offset[g] = zero();
  }
  for (int64_t n = 0; n < page_size; n += W) {
    score_vectors<B, 1, kIsInt8>(page, z, g0, page_size, n, offset, idle, scores);
    for (int g = 0; g < B; ++g) {
      const F score = valid ? if_then_else(ge(load(valid + n), set(0.5f)), scores[0][g], set(kMasked)) : scores[0][g];
      top[g] = max(top[g], score);
    }
  }
  for (int g = 0; g < B; ++g) highest[g] = reduce_max(top[g]);
}

inline void scan_page(const DecodeArgs& a, Item& item, int64_t p, int64_t range, const uint8_t* next,
                      Running& running) {
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int64_t n = a.page_size;
  const bool is_int8 = a.layout.is_int8;
  const FactorPage page = factor_page(a, item, p);
  const Projected z = projected(a, item, range);
  Fetcher fetcher(next, a.layout.value_mean_offset);
  for_head_blocks(group, [&](auto block, int g) {
    project<decltype(block)::value>(page, item.proxy_query, g, a.head_size, fetcher, z);
  });

  const Span span = candidates_of(a, item, p);
  float valid[kMaxPageSize];
  const bool is_edge = !span.covers(n);
  for (int64_t i = 0; is_edge && i < n; ++i) valid[i] = i >= span.begin && i < span.end ? 1.0f : 0.0f;

  alignas(64) float reference[kMaxGroup], totals[kMaxGroup];
  for (int g = 0; g < group; ++g) reference[g] = running.log_sum(g);
  // A score far above all before it would overflow; then the page's own maximum is the reference.
  bool is_good = !running.is_empty();
  while (true) {
    if (!is_good) {
      for_head_blocks(group, [&](auto block, int g) {
        const auto run = is_int8 ? highest_scores<decltype(block)::value, true>
                                 : highest_scores<decltype(block)::value, false>;
        run(page, z, g, n, is_edge ? valid : nullptr, reference + g);
      });
    }
    for_head_blocks(group, [&](auto block, int g) {
      constexpr int B = decltype(block)::value;
      const auto run = is_int8 ? (is_edge ? weigh_page<B, true, true> : weigh_page<B, true, false>)
                               : (is_edge ? weigh_page<B, false, true> : weigh_page<B, false, false>);
      run(page, z, item.pairs, g, n, reference + g, valid, fetcher, item.weights + p * n * item.pairs, totals + g);
    });
    if (!is_good) break;
    for (int g = 0; g < group; ++g) is_good = is_good && totals[g] < 0x1p100f;
    if (is_good) break;
  }
  for (int g = 0; g < group; ++g) {
    item.reference[g * item.pages + p] = reference[g];
    item.page_sum[g * item.pages + p] = totals[g];
  }
  running.add(group, reference, totals);
  if (item.value_stride) {
    page_moments(page, item.weights + p * n * item.pairs, group, item.pairs, n, item.value_stride,
                 item.moment + p * group * item.value_stride);
  }
}

inline void scan_range(const DecodeArgs& a, Item& item, int64_t range) {
  Running running(static_cast<int>(a.heads / a.kv_heads));
  const int64_t stop = min(item.num_pages, (range + 1) * item.range_pages);
  for (int64_t p = max(range * item.range_pages, item.first_page); p < stop; ++p) {
    scan_page(a, item, p, range, p + 1 < stop ? factor_page(a, item, p + 1).data : nullptr, running);
  }
}

// coefficient, from the heads' log-sum-exps over all pages.
inline void normalize(const DecodeArgs& a, Item& item) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t g = 0; g < group; ++g) {
    const float* sums = item.page_sum + g * item.pages;
    const float* reference = item.reference + g * item.pages;
    F top = set(kMasked);
    for (int64_t p = 0; p < item.pages; p += W) top = max(top, load(reference + p));
    top = set(reduce_max(top));
    F total = zero();
    for (int64_t p = 0; p < item.pages; p += W) total = mul_add(load(sums + p), exp2(sub(load(reference + p), top)), total);
    const F inverse = set(1.0f / reduce_sum(total));
    for (int64_t p = 0; p < item.pages; p += W) {
      store(item.coefficient + g * item.pages + p, mul(inverse, exp2(sub(load(reference + p), top))));
    }
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
