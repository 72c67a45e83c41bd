// The scorer of LRQK: proxy scores of a page's tokens from its low-rank key factors.
//
// A scorer is what scan.h and decode.h ask for scores, as a template parameter. It has
//
//   Memory             its working memory of one item
//   carve, prepare     which take that memory, and fill it from the query
//   page_bytes         how many bytes it reads from a page's begin
//   with_kind          calls with a type that says how pages are stored, which scan.h compiles for
//   Page, open         one page, ready to be scored by the thread that scans `range`
//   kVectors           how many vectors of tokens are best scored together
//   score              scores of V vectors of tokens from n on, for B heads from g0 on, each plus an offset of its
//                      head; calls fetcher.step() between other work
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/lrqk/item.h"
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
  }

  static void prepare(const DecodeArgs& a, const Item& item, Memory& memory) {
    const int group = group_of(a);
    with_type(a.dtype, [&](auto tag) {
      const auto* heads = query_heads<typename decltype(tag)::type>(a, item);
      for (int g = 0; g < group; ++g) {
        const auto* head = heads + g * a.query_head_stride;
        for (int64_t i = 0; i < a.head_size; i += W) store(memory.heads + g * a.head_size + i, load(head + i));
      }
    });
    prepare_proxy_query(memory.heads, group, a.head_size, a.scale, a.layout.is_int8, memory.query);
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

  static Page open(const DecodeArgs& a, const Memory& memory, const FactorPage& factors, int64_t range,
                   Fetcher& fetcher) {
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
};

}  // namespace LRQK_ISA
}  // namespace lrqk
