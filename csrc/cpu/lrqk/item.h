// One (request, KV head) of a decode step and its working memory.
#pragma once

#include "cpu/attend.h"
#include "cpu/lrqk/score.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int64_t kRangeTokens = 8192;  // tokens of one task when a request is split over threads
constexpr int64_t kTaskRows = 512;      // rows of one partial; fixed, so that results do not depend on threads
constexpr int64_t kTaskPages = 256;     // page means of one partial

struct Item {
  int64_t request, kv_head;
  const int32_t* table;
  int64_t seq_len;
  int64_t first, end;             // candidates
  int64_t first_page, num_pages;  // pages first_page ... num_pages - 1 hold them
  bool is_scored;                 // else all candidates are attended and no page is read
  bool has_residual;
  int64_t always;  // rows that are attended in any case
  int64_t num_rows;  // at most, until share.h has lowered it

  float* query;         // [G, d], natural order
  float* attend_query;  // [G, d], load_pair's order
  int32_t* rows;        // [num_rows], ascending candidates, then the rest
  int64_t num_selected;
  Partial* partials;  // [row_tasks + residual_tasks]
  int64_t row_tasks, residual_tasks;

  // Of scored items. Scores are in units of log 2; `pages` is num_pages rounded up to W.
  int64_t pages, range_pages, ranges;
  ProxyQuery proxy_query;
  int32_t* words;       // [ranges, G, stride], the query projected on the page at hand
  float* unit;          // [ranges, G]
  int stride;           // rank rounded up to W
  int pairs;            // of heads, rounded up
  uint32_t* weights;    // [num_pages, N / W, pairs, W], 2^(score - reference), two bfloat16 to a word
  float* reference;     // [G, pages], the head's log-sum-exp over the pages before, roughly
  float* page_sum;      // [G, pages], of `weights`; later without the selected tokens
  float* moment;        // [num_pages, G, value_stride], leading key factors summed with `weights`; likewise
  int value_stride;     // value rank rounded up to W; 0: no moments
  float* coefficient;   // [G, pages], 2^(reference - log-sum-exp over all pages)
  float* group_weight;  // [num_pages, N], softmax weights summed over the heads; -1 where no candidate
  float* peaks;         // [num_pages, N / peak_span], largest of each peak_span tokens
  int64_t peak_span;
  float threshold;      // what at least top_k tokens reach
  int64_t kept_stride;  // range_pages N + W
  int64_t* range_kept;  // [ranges]
  int32_t* kept_index;  // [ranges, kept_stride], tokens that may be selected
  float* kept_weight;   // [ranges, kept_stride]
};

inline Item make_item(const DecodeArgs& a, int64_t index) {
  Item item{};
  const int64_t n = a.page_size;
  item.request = index / a.kv_heads;
  item.kv_head = index % a.kv_heads;
  item.table = a.block_table + item.request * a.block_table_stride;
  item.seq_len = a.seq_lens[item.request];
  item.first = a.sink_tokens;
  item.end = min((item.seq_len - 1) / n * n, max<int64_t>(item.seq_len - a.recent_tokens, 0));
  const int64_t candidates = max<int64_t>(item.end - item.first, 0);
  item.first_page = item.first / n;
  item.num_pages = candidates ? ceil_div(item.end, n) : 0;
  item.is_scored = candidates > a.top_k || (a.top_p < 1.0f && candidates > 0);
  item.has_residual = item.is_scored && a.with_residual;
  item.num_selected = min(candidates, a.top_k);
  const int64_t tail = max<int64_t>(item.seq_len - max(item.end, item.first), 0);
  item.always = min(item.first, item.seq_len) + tail;
  item.num_rows = item.num_selected + item.always;
  item.pages = ceil_div(item.num_pages, W) * W;
  item.pairs = static_cast<int>(ceil_div(a.heads / a.kv_heads, 2));
  item.stride = static_cast<int>(ceil_div(a.layout.rank, W) * W);
  item.value_stride = item.has_residual && a.with_moments ? static_cast<int>(ceil_div(a.layout.value_rank, W) * W) : 0;
  item.range_pages = max<int64_t>(kRangeTokens / n, 1);
  item.ranges = item.is_scored ? ceil_div(item.num_pages, item.range_pages) : 0;
  item.row_tasks = a.output ? ceil_div(item.num_rows, kTaskRows) : 0;
  item.residual_tasks = a.output && item.has_residual ? ceil_div(item.num_pages, kTaskPages) : 0;
  item.kept_stride = item.range_pages * n + W;
  // Peaks of a few tokens each give a lower bound of the k-th largest weight at a fraction of the work.
  item.peak_span = 1;
  while (item.peak_span * 2 * W <= n && candidates >= 4 * a.top_k * item.peak_span) item.peak_span *= 2;
  return item;
}

inline void carve(const DecodeArgs& a, Item& item, Carver& carver) {
  const int64_t group = a.heads / a.kv_heads, query = group * a.head_size;
  item.query = carver.take<float>(query);
  item.attend_query = carver.take<float>(query);
  item.rows = carver.take<int32_t>(item.num_rows + W);
  const int64_t tasks = item.row_tasks + item.residual_tasks;
  item.partials = carver.take<Partial>(tasks);
  float* highest = carver.take<float>(tasks * group);
  float* sum = carver.take<float>(tasks * group);
  float* output = carver.take<float>(tasks * query);
  if (!carver.is_counting()) {
    for (int64_t i = 0; i < tasks; ++i) item.partials[i] = {highest + i * group, sum + i * group, output + i * query};
  }
  if (!item.is_scored) return;
  const int64_t tokens = item.num_pages * a.page_size;
  item.proxy_query = {carver.take<int16_t>(query), carver.take<float>(query), carver.take<float>(group)};
  item.words = carver.take<int32_t>(item.ranges * group * item.stride);
  item.unit = carver.take<float>(item.ranges * group);
  item.weights = carver.take<uint32_t>(item.pairs * tokens);
  item.reference = carver.take<float>(group * item.pages);
  item.page_sum = carver.take<float>(group * item.pages);
  item.moment = carver.take<float>(item.num_pages * group * item.value_stride);
  item.coefficient = carver.take<float>(group * item.pages);
  item.group_weight = carver.take<float>(tokens);
  item.peaks = carver.take<float>(tokens / item.peak_span);
  item.range_kept = carver.take<int64_t>(item.ranges);
  item.kept_index = carver.take<int32_t>(item.ranges * item.kept_stride);
  item.kept_weight = carver.take<float>(item.ranges * item.kept_stride);
}

inline size_t item_bytes(const DecodeArgs& a, Item item) {
  Carver counter(nullptr);
  carve(a, item, counter);
  return counter.used();
}

}  // namespace LRQK_ISA
}  // namespace lrqk
