// The scorer of LRQK: proxy scores of a page's tokens from its low-rank key factors.
//
// A scorer is what scan.h and decode.h ask for scores, as a template parameter. It has
//
//   Memory             its working memory of one item
//   carve, prepare     which take that memory, and fill it from the query
//   page_bytes         how many bytes it reads from a page's begin
//   with_kind          calls with a type that says how pages are stored, which scan.h compiles for
//   Page, open         page p of the item, ready to be scored by the thread that scans `range`
//   kVectors           how many vectors of tokens are best scored together
//   score              scores of V vectors of tokens from n on, for B heads from g0 on, each plus an offset of its
//                      head; calls fetcher.step() between other work
//
// and, for the linear values of what is left,
//
//   moment_bytes       how many bytes sum_moments reads from a page's begin
//   sum_moments        sums a page's key factors with the weights of what is left, of which it is told each head's largest
//   mean_factor        the mean key factor of what is left of a page
//   add_values         what it adds to the values of some pages
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/lrqk/item.h"
#include "cpu/lrqk/linear_values.h"
#include "cpu/lrqk/moment.h"
#include "cpu/lrqk/project.h"
#include "cpu/lrqk/score.h"

namespace lrqk {
namespace LRQK_ISA {

struct LowRankScorer {
  struct Memory {
    float* heads;  // [G, d], natural order
    ProxyQuery query;
    int32_t* words;  // [ranges, G, padded_rank], the query projected on the page at hand
    float* unit;     // [ranges, G]
    int padded_rank;
    float* moment;  // [num_pages, G, padded_value_rank], leading key factors summed with the weights left
  };
  struct Page {
    FactorPage factors;
    Projected z;
  };
  static constexpr int kVectors = 2;  // they share the loads of the query's words

  static void carve(const DecodeArgs& a, const Item& item, Carver& carver, Memory& memory) {
    const int64_t group = group_of(a), query = group * a.head_size;
    memory.padded_rank = static_cast<int>(ceil_div(a.layout.rank, W) * W);
    memory.heads = carver.take<float>(query);
    memory.query = {carver.take<int16_t>(query), carver.take<float>(query), carver.take<float>(group)};
    memory.words = carver.take<int32_t>(item.ranges * group * memory.padded_rank);
    memory.unit = carver.take<float>(item.ranges * group);
    memory.moment = carver.take<float>(item.num_pages * group * item.padded_value_rank);
  }

  static void prepare(const DecodeArgs& a, const Item& item, Memory& memory) {
    load_heads(a, item, memory.heads);
    prepare_proxy_query(memory.heads, group_of(a), a.head_size, a.scale, a.layout.is_int8, memory.query);
  }

  static int64_t page_bytes(const PageLayout& layout) { return layout.value_mean_offset; }

  template <class Call>
  static void with_kind(const PageLayout& layout, const Call& call) {
    if (layout.is_int8) {
      call(std::true_type{});
    } else {
      call(std::false_type{});
    }
  }

  static Page open(const DecodeArgs& a, const Item&, const Memory& memory, int64_t, const FactorPage& factors,
                   int64_t range, Fetcher& fetcher) {
    const int64_t group = group_of(a);
    const Projected z = {memory.words + range * group * memory.padded_rank, memory.unit + range * group,
                         memory.padded_rank};
    for_head_blocks(static_cast<int>(group), [&](auto block, int g) {
      project<decltype(block)::value>(factors, memory.query, g, a.head_size, fetcher, z);
    });
    return {factors, z};
  }

  template <class IsInt8, int B, int V>
  static void score(const Page& page, int g0, int64_t page_size, int64_t n, const F* offset, Fetcher& fetcher,
                    F (*scores)[B]) {
    if constexpr (IsInt8::value) {
      score_int8<B, V>(page.factors, page.z, g0, page_size, n, offset, fetcher, scores);
    } else {
      score_bf16<B, V>(page.factors, page.z, g0, page_size, n, offset, fetcher, scores);
    }
  }

  static float* moment_of(const DecodeArgs& a, const Item& item, const Memory& memory, int64_t p) {
    return memory.moment + p * group_of(a) * item.padded_value_rank;
  }

  static int64_t moment_bytes(const PageLayout& layout, int64_t page_size) {
    return layout.value_rank * page_size * (layout.is_int8 ? 1 : 2);
  }

  static void sum_moments(const DecodeArgs& a, const Item& item, Memory& memory, int64_t p, const FactorPage& factors,
                          const uint32_t* weights, const float* largest, Fetcher& fetcher) {
    page_moments(factors, weights, group_of(a), item.pairs, a.page_size, largest, fetcher, item.padded_value_rank,
                 moment_of(a, item, memory, p));
  }

  static void mean_factor(const DecodeArgs& a, const Item& item, const Memory& memory, int64_t p, int g, float* out) {
    const float* moment = moment_of(a, item, memory, p) + g * item.padded_value_rank;
    const float left = item.page_sum[g * item.padded_pages + p];
    for (int j = 0; j < a.layout.value_rank; ++j) out[j] = moment[j] / left;
  }

  static void add_values(const DecodeArgs& a, const Item& item, const Memory& memory, int64_t begin, int count,
                         const float* weights, float* acc) {
    const auto add = a.layout.is_int8 ? add_linear_values<i8> : add_linear_values<bf16>;
    add(a, item, memory.moment, begin, count, weights, acc);
  }
};

}  // namespace LRQK_ISA
}  // namespace lrqk
