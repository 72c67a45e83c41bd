// The scan over all pages of an item: exponentials of the scores, page sums and log-sum-exps.
#pragma once

#include <cstdint>

#include "cpu/lrqk/prepare.h"

namespace lrqk {
namespace LRQK_ISA {

// Log-sum-exps of the pages so far, head by head.
struct RunningSoftmax {
  alignas(64) float m[kMaxGroup];
  alignas(64) float l[kMaxGroup];  // of 2^(score - m)

  explicit RunningSoftmax(int group) {
    for (int g = 0; g < static_cast<int>(ceil_div(group, W)) * W; ++g) {
      m[g] = kMasked;
      l[g] = 0.0f;
    }
  }
  // Joins a page whose sums are of 2^(score - reference).
  void add(int group, const float* reference, const float* page_sum) {
    for (int g = 0; g < group; g += W) {
      const F before = load(m + g), now = load(reference + g), top = max(before, now);
      const F kept = mul(load(l + g), exp2(sub(before, top)));
      store(l + g, mul_add(load(page_sum + g), exp2(sub(now, top)), kept));
      store(m + g, top);
    }
  }
  bool is_empty() const { return m[0] == kMasked; }
  // To about 1e-4; any number would do that is close.
  float log_sum(int g) const {
    const uint32_t word = bits_of(l[g]);
    const float mantissa = float_of((word & 0x7fffff) | 0x3f800000);
    // The minimax polynomial of log2 on [1, 2).
    const float log_mantissa =
        -2.5128543f +
        mantissa * (4.0700899f + mantissa * (-2.1206742f + mantissa * (0.64514193f - mantissa * 0.081615735f)));
    return m[g] + static_cast<float>(static_cast<int32_t>(word >> 23) - 127) + log_mantissa;
  }
};

// 2^(score - reference) of V vectors of tokens for B heads, in bfloat16 and two heads to a word, to [V, pairs, W]; adds
// them to the heads' totals. On an edge, `valid` holds 1 for candidates and 0 for others. `cap` > 0 is the soft cap of
// the scores, in their units.
template <class Scorer, class Kind, int B, int V, bool kIsEdge>
inline void weigh_vectors(const typename Scorer::Page& page, int pairs, int g0, int64_t page_size, int64_t n,
                          const F* offset, const float* valid, float cap, Fetcher& fetcher, uint32_t* weights,
                          F* total) {
  F scores[V][B];
  Scorer::template score<Kind, B, V>(page, g0, page_size, n, offset, fetcher, scores);
  LRQK_UNROLL
  for (int v = 0; v < V; ++v) {
    F weight[B];
    LRQK_UNROLL
    for (int g = 0; cap > 0.0f && g < B; ++g) {
      scores[v][g] = add(soft_cap(sub(scores[v][g], offset[g]), cap), offset[g]);
    }
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

template <class Scorer, class Kind, int B, bool kIsEdge>
inline void weigh_page(const typename Scorer::Page& page, int pairs, int g0, int64_t page_size, const float* reference,
                       const float* valid, float cap, Fetcher& fetcher, uint32_t* weights, float* totals) {
  constexpr int V = Scorer::kVectors;
  F offset[B], total[B];
  for (int g = 0; g < B; ++g) {
    offset[g] = set(-reference[g]);
    total[g] = zero();
  }
  weights += g0 / 2 * W;
  int64_t n = 0;
  for (; n + V * W <= page_size; n += V * W) {
    weigh_vectors<Scorer, Kind, B, V, kIsEdge>(page, pairs, g0, page_size, n, offset, valid, cap, fetcher,
                                               weights + n * pairs, total);
  }
  for (; n < page_size; n += W) {
    weigh_vectors<Scorer, Kind, B, 1, kIsEdge>(page, pairs, g0, page_size, n, offset, valid, cap, fetcher,
                                               weights + n * pairs, total);
  }
  for (int g = 0; g < B; ++g) totals[g] = reduce_sum(total[g]);
}

template <class Scorer, class Kind, int B>
inline void highest_scores(const typename Scorer::Page& page, int g0, int64_t page_size, const float* valid, float cap,
                           float* m) {
  F top[B], scores[1][B], offset[B];
  Fetcher idle(nullptr, 0);
  for (int g = 0; g < B; ++g) {
    top[g] = set(kMasked);
    offset[g] = zero();
  }
  for (int64_t n = 0; n < page_size; n += W) {
    Scorer::template score<Kind, B, 1>(page, g0, page_size, n, offset, idle, scores);
    for (int g = 0; g < B; ++g) {
      if (cap > 0.0f) scores[0][g] = soft_cap(scores[0][g], cap);
      const F score = valid ? if_then_else(ge(load(valid + n), set(0.5f)), scores[0][g], set(kMasked)) : scores[0][g];
      top[g] = max(top[g], score);
    }
  }
  for (int g = 0; g < B; ++g) m[g] = reduce_max(top[g]);
}

// Of one page; fetches `next`, if given.
template <class Scorer, class Kind>
inline void scan_page(const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t p, int64_t range, const uint8_t* next,
                      RunningSoftmax& running) {
  const int group = group_of(a);
  const int64_t n = a.page_size;
  const FactorPage factors = factor_page(a, item, p);
  Fetcher fetcher(next, Scorer::page_bytes(a.layout));
  const typename Scorer::Page page = Scorer::open(a, item, item.scorer, p, factors, range, fetcher);

  const Span span = candidates_of(a, item, p);
  float valid[kMaxPageSize];
  const bool is_edge = !span.covers(n);
  for (int64_t i = 0; is_edge && i < n; ++i) valid[i] = i >= span.begin && i < span.end ? 1.0f : 0.0f;

  alignas(64) float reference[kMaxGroup], totals[kMaxGroup];
  for (int g = 0; g < group; ++g) reference[g] = running.log_sum(g);
  uint32_t* weights = item.weights + p * n * item.pairs;
  const float cap = a.logits.cap * kLog2e;
  // A score far above all before it would overflow; then the page's own maximum is the reference.
  bool is_good = !running.is_empty();
  while (true) {
    if (!is_good) {
      for_head_blocks(group, [&](auto block, int g) {
        highest_scores<Scorer, Kind, decltype(block)::value>(page, g, n, is_edge ? valid : nullptr, cap, reference + g);
      });
    }
    for_head_blocks(group, [&](auto block, int g) {
      constexpr int B = decltype(block)::value;
      const auto run = is_edge ? weigh_page<Scorer, Kind, B, true> : weigh_page<Scorer, Kind, B, false>;
      run(page, item.pairs, g, n, reference + g, valid, cap, fetcher, weights, totals + g);
    });
    if (!is_good) break;
    for (int g = 0; g < group; ++g) is_good = is_good && totals[g] < 0x1p100f;
    if (is_good) break;
  }
  for (int g = 0; g < group; ++g) {
    item.reference[g * item.padded_pages + p] = reference[g];
    item.page_sum[g * item.padded_pages + p] = totals[g];
  }
  running.add(group, reference, totals);
}

template <class Scorer>
inline void scan_range(const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t range) {
  RunningSoftmax running(group_of(a));
  const int64_t stop = min(item.num_pages, (range + 1) * item.range_pages);
  Scorer::with_kind(a.layout, [&](auto kind) {
    for (int64_t p = max(range * item.range_pages, item.first_page); p < stop; ++p) {
      const uint8_t* next = p + 1 < stop ? factor_page(a, item, p + 1).data : nullptr;
      scan_page<Scorer, decltype(kind)>(a, item, p, range, next, running);
    }
  });
}

// coefficient, from the heads' log-sum-exps over all pages.
inline void normalize(const DecodeArgs& a, Item& item) {
  const int64_t group = group_of(a);
  for (int64_t g = 0; g < group; ++g) {
    const float* sums = item.page_sum + g * item.padded_pages;
    const float* reference = item.reference + g * item.padded_pages;
    F top = set(kMasked);
    for (int64_t p = 0; p < item.padded_pages; p += W) top = max(top, load(reference + p));
    top = set(reduce_max(top));
    F total = zero();
    for (int64_t p = 0; p < item.padded_pages; p += W) {
      total = mul_add(load(sums + p), exp2(sub(load(reference + p), top)), total);
    }
    const F inverse = set(1.0f / reduce_sum(total));
    for (int64_t p = 0; p < item.padded_pages; p += W) {
      store(item.coefficient + g * item.padded_pages + p, mul(inverse, exp2(sub(load(reference + p), top))));
    }
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
