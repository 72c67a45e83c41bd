// The scorer of calibrated factors: one basis for all pages, in the frame of each; see low_rank_scorer.h for what a
// scorer has.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/lrqk/calibrated_moment.h"
#include "cpu/lrqk/calibrated_project.h"
#include "cpu/lrqk/calibrated_score.h"
#include "cpu/lrqk/calibrated_values.h"
#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

struct CalibratedScorer {
  struct Memory {
    float* heads;  // [G, d], natural order
    TurnedQuery query;
    int64_t* tile;   // [ranges], first of the pages that `z` is of; -1: none
    float* z;        // [ranges, kMatmulRows, G, r], the query projected on a few pages
    ByteQuery page;  // the same of the page at hand: [ranges, G, r], [ranges, G], [ranges, G]
    ByteMoments moments;
  };
  struct Page {
    CalibratedPage factors;
    ByteQuery z;
  };
  static constexpr int kVectors = 2;

  static void carve(const DecodeArgs& a, const Item& item, Carver& carver, Memory& memory) {
    const int64_t group = group_of(a), rank = a.layout.rank, query = group * a.head_size;
    memory.heads = carver.take<float>(query);
    memory.query = {carver.take<int32_t>(query / 2 * rank), carver.take<float>(group * rank)};
    memory.tile = carver.take<int64_t>(item.ranges);
    memory.z = carver.take<float>(item.ranges * kMatmulRows * group * rank);
    memory.page = {carver.take<int8_t>(item.ranges * group * rank), carver.take<int32_t>(item.ranges * group),
                   carver.take<float>(item.ranges * group)};
    const int64_t pages = item.padded_value_rank ? item.num_pages * group : 0;
    memory.moments = {carver.take<float>(pages * rank), carver.take<float>(pages)};
  }

  static void prepare(const DecodeArgs& a, const Item& item, Memory& memory) {
    load_heads(a, item, memory.heads);
    turn_query(a, item.kv_head, memory.heads, memory.query);
    for (int64_t i = 0; i < item.ranges; ++i) memory.tile[i] = -1;
  }

  static int64_t page_bytes(const PageLayout& layout) { return layout.value_mean_offset; }

  // The numbers of words of the usual columns, 16 and 16, or 0 for any.
  template <class Call>
  static void with_kind(const PageLayout& layout, const Call& call) {
    if (layout.leading_rank == 16 && layout.rank == 32) {
      call(std::integral_constant<int, 4>{});
    } else {
      call(std::integral_constant<int, 0>{});
    }
  }

  static Page open(const DecodeArgs& a, const Item& item, Memory& memory, int64_t p, const FactorPage& factors,
                   int64_t range, Fetcher& fetcher) {
    const int64_t group = group_of(a), rank = a.layout.rank;
    int64_t& tile = memory.tile[range];
    float* z = memory.z + range * kMatmulRows * group * rank;
    if (tile < 0 || p < tile || p >= tile + kMatmulRows) {
      tile = p;
      project_pages(a, memory.query, p, z);
    }
    const Page page = {
        CalibratedPage(factors),
        {memory.page.bytes + range * group * rank, memory.page.bias + range * group, memory.page.unit + range * group}};
    quantize_query(page.factors, z + (p - tile) * group * rank, static_cast<int>(group), page.z);
    for (int i = 0; i < 8; ++i) fetcher.step();
    return page;
  }

  template <class Words, int B, int V>
  static void score(const Page& page, int g0, int64_t page_size, int64_t n, const F* offset, Fetcher& fetcher,
                    F (*scores)[B]) {
    score_bytes<Words::value, Words::value / 2, B, V>(page.factors, page.z, g0, page_size, n, offset, fetcher, scores);
  }

  static int64_t moment_bytes(const PageLayout& layout, int64_t) { return page_bytes(layout); }

  static void sum_moments(const DecodeArgs& a, const Item& item, Memory& memory, int64_t p, const FactorPage& factors,
                          const uint32_t* weights, const float* largest, Fetcher& fetcher) {
    sum_byte_moments(CalibratedPage(factors), weights, group_of(a), item.pairs, a.page_size, p, largest, fetcher,
                     memory.moments);
  }

  // Mean key factor of what is left of a page for one head: [r].
  static void mean_factor(const DecodeArgs& a, const Item& item, const Memory& memory, int64_t p, int g, float* out) {
    const int64_t index = p * group_of(a) + g, rank = a.layout.rank;
    const float left = memory.moments.weights[index];
    for (int64_t j = 0; j < rank; ++j) out[j] = left > 0.0f ? memory.moments.sums[index * rank + j] / left : 0.0f;
  }

  static void add_values(const DecodeArgs& a, const Item& item, const Memory& memory, int64_t begin, int count,
                         const float* weights, float* acc) {
    add_calibrated_values(a, item, memory.moments, begin, count, weights, acc);
  }
};

}  // namespace LRQK_ISA
}  // namespace lrqk
