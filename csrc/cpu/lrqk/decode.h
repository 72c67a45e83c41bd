// One decode step of one layer, and its selection alone.
//
// An item is one (request, KV head). Small items run whole on one thread; an item that would keep one thread busy
// for longer than its share is split by ranges of pages and of rows. Both walk the same stages in the same order, and
// compute the same numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/common.h"
#include "cpu/lrqk/item.h"
#include "cpu/lrqk/left.h"
#include "cpu/lrqk/output.h"
#include "cpu/lrqk/prepare.h"
#include "cpu/lrqk/scan.h"
#include "cpu/lrqk/select.h"
#include "cpu/lrqk/share.h"

namespace lrqk {
namespace LRQK_ISA {

// The parts of one stage of one item are independent of each other. An item with none skips the stage.
template <class Scorer>
struct Stage {
  int64_t (*parts)(const Item&);
  void (*run)(const DecodeArgs&, ScoredItem<Scorer>&, int64_t part);
};

inline int64_t once(const Item&) { return 1; }
inline int64_t once_if_scored(const Item& item) { return item.is_scored; }
inline int64_t by_range(const Item& item) { return item.ranges; }
inline int64_t by_range_of_residual(const Item& item) { return item.has_residual ? item.ranges : 0; }
inline int64_t by_partial(const Item& item) { return item.row_parts + item.page_parts; }

template <class Scorer>
inline constexpr Stage<Scorer> kStages[] = {
    {once, [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t) { prepare(a, item); }},
    {by_range, [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t i) { scan_range(a, item, i); }},
    {once_if_scored, [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t) { normalize(a, item); }},
    {by_range, [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t i) { weigh_range(a, item, i); }},
    {once_if_scored, [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t) { find_threshold(a, item); }},
    {by_range, [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t i) { keep_range(a, item, i); }},
    {once,
     [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t) {
       if (item.is_scored) {
         select_tokens(a, item);
         keep_share(a, item);
       }
       list_always(item);
     }},
    {by_range_of_residual, [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t i) { sum_left(a, item, i); }},
    {by_partial, [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t i) { attend_part(a, item, i); }},
    {once,
     [](const DecodeArgs& a, ScoredItem<Scorer>& item, int64_t) {
       if (a.output) write_output(a, item);
       if (a.positions) write_selection(a, item);
     }},
};

template <class Scorer>
inline void run_whole(const DecodeArgs& a, ScoredItem<Scorer>& item) {
  Carver carver(scratch(Scratch::kTask, item_bytes(a, item)));
  carve(a, item, carver);
  for (const Stage<Scorer>& stage : kStages<Scorer>) {
    const int64_t parts = stage.parts(item);
    for (int64_t i = 0; i < parts; ++i) stage.run(a, item, i);
  }
}

// Each stage for the parts of all items, in parallel.
template <class Scorer>
inline void run_split(const DecodeArgs& a, ScoredItem<Scorer>* items, int64_t num_items, const Parallel& parallel) {
  for (const Stage<Scorer>& stage : kStages<Scorer>) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_items; ++i) total += stage.parts(items[i]);
    for_each(parallel, total, [&](int64_t part) {
      int64_t i = 0;
      for (; part >= stage.parts(items[i]); ++i) part -= stage.parts(items[i]);
      stage.run(a, items[i], part);
    });
  }
}

// In rows that are attended: reading a candidate's factors costs about an eighth of attending a row.
inline int64_t cost_of(const Item& item) {
  return item.num_positions + (item.is_scored ? (item.end - item.first) / 8 : 0);
}

// `order`: the items, longest first by powers of two, so that threads finish together.
template <class Scorer>
inline void sort_by_cost(const ScoredItem<Scorer>* items, int64_t num_items, int64_t* order) {
  int64_t starts[65] = {};
  const auto bucket = [](const Item& item) { return __builtin_clzll(static_cast<uint64_t>(cost_of(item)) | 1); };
  for (int64_t i = 0; i < num_items; ++i) ++starts[bucket(items[i]) + 1];
  for (int i = 0; i < 64; ++i) starts[i + 1] += starts[i];
  for (int64_t i = 0; i < num_items; ++i) order[starts[bucket(items[i])]++] = i;
}

template <class Scorer>
inline void decode(const DecodeArgs& a, const Parallel& parallel) {
  using ItemOf = ScoredItem<Scorer>;
  const int64_t num_items = a.requests * a.kv_heads;
  int64_t total = 0;
  for (int64_t i = 0; i < num_items; ++i) total += cost_of(make_item<Scorer>(a, i));
  const auto is_split = [&](const Item& item) {
    return parallel.threads > 1 && cost_of(item) > 256 && cost_of(item) * parallel.threads * 2 > total;
  };
  Carver counter(nullptr);
  counter.take<ItemOf>(num_items);
  counter.take<int64_t>(num_items);
  size_t bytes = counter.used();
  for (int64_t i = 0; i < num_items; ++i) {
    const ItemOf item = make_item<Scorer>(a, i);
    if (is_split(item)) bytes += item_bytes(a, item);
  }
  Carver carver(scratch(Scratch::kCall, bytes));
  ItemOf* items = carver.take<ItemOf>(num_items);  // split ones first, then whole ones
  int64_t* order = carver.take<int64_t>(num_items);
  int64_t num_split = 0, num_whole = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    const ItemOf item = make_item<Scorer>(a, i);
    if (is_split(item)) {
      items[num_split] = item;
      carve(a, items[num_split++], carver);
    } else {
      items[num_items - ++num_whole] = item;
    }
  }
  run_split(a, items, num_split, parallel);
  ItemOf* whole = items + num_split;
  sort_by_cost(whole, num_whole, order);
  for_each(parallel, num_whole, [&](int64_t i) { run_whole(a, whole[order[i]]); });
  if (!a.attended) return;
  for (int64_t b = 0; b < a.requests; ++b) a.attended[b] = 0;
  for (int64_t i = 0; i < num_items; ++i) a.attended[items[i].request] += items[i].num_positions;
}

}  // namespace LRQK_ISA
}  // namespace lrqk
