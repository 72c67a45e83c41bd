// One (request, KV head) of a decode step and its working memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/attend.h"
#include "cpu/common.h"
#include "cpu/lrqk/args.h"
#include "cpu/lrqk/page.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int64_t kRangeTokens = 8192;  // tokens of one part when an item is split over threads
constexpr int64_t kPartRows = 512;      // rows of one partial; fixed, so that results do not depend on threads
constexpr int64_t kPartPages = 256;     // page values of one partial

struct Item {
  int64_t request, kv_head;
  const int32_t* block_table;  // the request's
  int64_t seq_len;
  int64_t first, end;             // candidates
  int64_t first_page, num_pages;  // pages first_page ... num_pages - 1 hold them
  bool is_scored;                 // else all candidates are attended and no page is read
  bool has_residual;
  int64_t num_always;     // tokens that are attended in any case
  int64_t num_selected;   // at most, until select.h and share.h have found them
  int64_t num_positions;  // both together

  float* query;        // [G, d], load_pair's order, scaled for scores in units of log 2
  int32_t* positions;  // [num_positions], ascending candidates, then the rest
  Partial* partials;   // [row_parts + page_parts]
  int64_t row_parts, page_parts;

  // Of scored items. Scores are in units of log 2; padded_pages is num_pages rounded up to W.
  int64_t padded_pages, range_pages, ranges;
  int pairs;              // of heads, rounded up
  int padded_value_rank;  // value rank rounded up to W; 0: no moments
  uint32_t* weights;      // [num_pages, N / W, pairs, W], 2^(score - reference), two bfloat16 a word; 0 once selected
  float* reference;       // [G, padded_pages], the head's log-sum-exp over the pages before, roughly
  float* page_sum;        // [G, padded_pages], of `weights`; later of those left
  float* coefficient;     // [G, padded_pages], 2^(reference - log-sum-exp over all pages)
  float* group_weight;    // [num_pages, N], softmax weights summed over the heads; -1 where no candidate
  float* peaks;           // [num_pages, N / peak_span], largest of each peak_span tokens
  int64_t peak_span;
  float threshold;      // what at least top_k tokens reach
  int64_t kept_stride;  // range_pages N + W
  int64_t* range_kept;  // [ranges]
  int32_t* kept_index;  // [ranges, kept_stride], tokens that may be selected
  float* kept_weight;   // [ranges, kept_stride]
};

// With the working memory of its scorer (see low_rank_scorer.h).
template <class Scorer>
struct ScoredItem : Item {
  typename Scorer::Memory scorer;
};

inline int group_of(const DecodeArgs& a) { return static_cast<int>(a.heads / a.kv_heads); }

template <class Scorer>
inline ScoredItem<Scorer> make_item(const DecodeArgs& a, int64_t index) {
  ScoredItem<Scorer> item{};
  const int64_t n = a.page_size;
  item.request = index / a.kv_heads;
  item.kv_head = index % a.kv_heads;
  item.block_table = a.block_table + item.request * a.block_table_stride;
  item.seq_len = a.seq_lens[item.request];
  item.first = a.sink_tokens;
  item.end = min((item.seq_len - 1) / n * n, max<int64_t>(item.seq_len - a.recent_tokens, 0));
  const int64_t candidates = max<int64_t>(item.end - item.first, 0);
  item.first_page = item.first / n;
  item.num_pages = candidates ? ceil_div(item.end, n) : 0;
  item.is_scored = candidates > a.top_k || (a.top_p < 1.0f && candidates > 0);
  item.has_residual = item.is_scored && a.with_residual;
  const int64_t tail = max<int64_t>(item.seq_len - max(item.end, item.first), 0);
  item.num_always = min(item.first, item.seq_len) + tail;
  item.num_selected = min(candidates, a.top_k);
  item.num_positions = item.num_selected + item.num_always;
  item.row_parts = a.output ? ceil_div(item.num_positions, kPartRows) : 0;
  item.page_parts = a.output && item.has_residual ? ceil_div(item.num_pages, kPartPages) : 0;
  item.padded_pages = ceil_div(item.num_pages, W) * W;
  item.range_pages = max<int64_t>(kRangeTokens / n, 1);
  item.ranges = item.is_scored ? ceil_div(item.num_pages, item.range_pages) : 0;
  item.pairs = static_cast<int>(ceil_div(group_of(a), 2));
  const bool has_moments = item.has_residual && a.with_moments;
  item.padded_value_rank = has_moments ? static_cast<int>(ceil_div(a.layout.value_rank, W) * W) : 0;
  item.kept_stride = item.range_pages * n + W;
  // Peaks of a few tokens each give a lower bound of the k-th largest weight at a fraction of the work.
  item.peak_span = 1;
  while (item.peak_span * 2 * W <= n && candidates >= 4 * a.top_k * item.peak_span) item.peak_span *= 2;
  return item;
}

template <class Scorer>
inline void carve(const DecodeArgs& a, ScoredItem<Scorer>& item, Carver& carver) {
  const int64_t group = group_of(a), query = group * a.head_size;
  item.query = carver.take<float>(query);
  item.positions = carver.take<int32_t>(item.num_positions + W);
  const int64_t parts = item.row_parts + item.page_parts;
  item.partials = carver.take<Partial>(parts);
  float* m = carver.take<float>(parts * group);
  float* l = carver.take<float>(parts * group);
  float* acc = carver.take<float>(parts * query);
  if (!carver.is_counting()) {
    for (int64_t i = 0; i < parts; ++i) item.partials[i] = {m + i * group, l + i * group, acc + i * query};
  }
  if (!item.is_scored) return;
  Scorer::carve(a, item, carver, item.scorer);
  const int64_t tokens = item.num_pages * a.page_size;
  item.weights = carver.take<uint32_t>(item.pairs * tokens);
  item.reference = carver.take<float>(group * item.padded_pages);
  item.page_sum = carver.take<float>(group * item.padded_pages);
  item.coefficient = carver.take<float>(group * item.padded_pages);
  item.group_weight = carver.take<float>(tokens);
  item.peaks = carver.take<float>(tokens / item.peak_span);
  item.range_kept = carver.take<int64_t>(item.ranges);
  item.kept_index = carver.take<int32_t>(item.ranges * item.kept_stride);
  item.kept_weight = carver.take<float>(item.ranges * item.kept_stride);
}

template <class Scorer>
inline size_t item_bytes(const DecodeArgs& a, ScoredItem<Scorer> item) {
  Carver counter(nullptr);
  carve(a, item, counter);
  return counter.used();
}

// The query heads of an item, as T.
template <class T>
inline const T* query_heads(const DecodeArgs& a, const Item& item) {
  return static_cast<const T*>(a.query) + item.request * a.query_request_stride +
         item.kv_head * group_of(a) * a.query_head_stride;
}

// The same as float32 [G, d], natural order.
inline void load_heads(const DecodeArgs& a, const Item& item, float* out) {
  with_type(a.dtype, [&](auto tag) {
    const auto* heads = query_heads<typename decltype(tag)::type>(a, item);
    for (int g = 0; g < group_of(a); ++g) {
      const auto* head = heads + g * a.query_head_stride;
      for (int64_t i = 0; i < a.head_size; i += W) store(out + g * a.head_size + i, load(head + i));
    }
  });
}

inline FactorPage factor_page(const DecodeArgs& a, const Item& item, int64_t page) {
  return {a.factors.data + item.block_table[page] * a.factors.page_stride + item.kv_head * a.factors.head_stride,
          &a.layout};
}

}  // namespace LRQK_ISA
}  // namespace lrqk
