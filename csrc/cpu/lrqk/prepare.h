// What an item needs before its scan, and which tokens it attends besides those that it selects.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

template <class Scorer>
inline void prepare(const DecodeArgs& a, ScoredItem<Scorer>& item) {
  const int group = group_of(a);
  with_type(a.dtype, [&](auto tag) {
    const auto* heads = query_heads<typename decltype(tag)::type>(a, item);
    for (int g = 0; g < group; ++g) {
      prepare_query(heads + g * a.query_head_stride, a.head_size, a.scale, item.query + g * a.head_size);
    }
  });
  if (!item.is_scored) return;
  Scorer::prepare(a, item, item.scorer);
  for (int64_t i = 0; i < group * item.padded_pages; ++i) item.reference[i] = kMasked;
  std::memset(item.page_sum, 0, group * item.padded_pages * sizeof(float));
}

// Tokens [begin, end) of a page are candidates.
struct Span {
  int64_t begin, end;
  bool covers(int64_t page_size) const { return begin == 0 && end == page_size; }
};

inline Span candidates_of(const DecodeArgs& a, const Item& item, int64_t page) {
  const int64_t start = page * a.page_size;
  return {max<int64_t>(item.first - start, 0), min(item.end - start, a.page_size)};
}

// Appends the positions that are attended besides the selected ones; all candidates where nothing is scored.
inline void list_always(Item& item) {
  int64_t count = item.num_selected;
  if (!item.is_scored) {
    for (int64_t i = 0; i < count; ++i) item.positions[i] = static_cast<int32_t>(item.first + i);
  }
  for (int64_t n = 0; n < min(item.first, item.seq_len); ++n) item.positions[count++] = static_cast<int32_t>(n);
  for (int64_t n = max(item.end, item.first); n < item.seq_len; ++n) item.positions[count++] = static_cast<int32_t>(n);
  item.num_positions = count;
}

}  // namespace LRQK_ISA
}  // namespace lrqk
