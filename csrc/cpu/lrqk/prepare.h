// What one item attends. The steps by range may run in parallel; the others join the ranges.
#pragma once

#include "cpu/lrqk/item.h"
#include "cpu/top_k.h"

namespace lrqk {
namespace LRQK_ISA {

inline FactorPage factor_page(const DecodeArgs& a, const Item& item, int64_t page) {
  return {a.factors + item.table[page] * a.layout.page_stride + item.kv_head * a.layout.head_stride, &a.layout};
}

inline Projected projected(const DecodeArgs& a, const Item& item, int64_t range) {
  const int64_t group = a.heads / a.kv_heads;
  return {item.words + range * group * item.stride, item.unit + range * group, item.stride};
}

inline void prepare(const DecodeArgs& a, Item& item) {
  const int group = static_cast<int>(a.heads / a.kv_heads);
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* query = static_cast<const T*>(a.query) + item.request * a.query_request_stride +
                     item.kv_head * group * a.query_head_stride;
    for (int g = 0; g < group; ++g) {
      const T* head = query + g * a.query_head_stride;
      prepare_query(head, a.head_size, a.scale, item.attend_query + g * a.head_size);
      for (int64_t i = 0; item.is_scored && i < a.head_size; i += W) {
        store(item.query + g * a.head_size + i, load(head + i));
      }
    }
  });
  if (!item.is_scored) return;
  prepare_proxy_query(item.query, group, a.head_size, a.scale, a.layout.is_int8, item.proxy_query);
  for (int64_t i = 0; i < group * item.pages; ++i) item.reference[i] = kMasked;
  std::memset(item.page_sum, 0, group * item.pages * sizeof(float));
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

template <class Visit>
inline void for_others(const Span& span, int64_t page_size, const Visit& visit) {
  for (int64_t n = 0; n < span.begin; ++n) visit(n);
  for (int64_t n = span.end; n < page_size; ++n) visit(n);
}

// The rows that are attended besides the selected ones; all candidates where nothing is scored.
inline void list_rows(const DecodeArgs&, Item& item) {
  int64_t count = item.num_selected;
  if (!item.is_scored) {
    for (int64_t i = 0; i < count; ++i) item.rows[i] = static_cast<int32_t>(item.first + i);
  }
  for (int64_t n = 0; n < min(item.first, item.seq_len); ++n) item.rows[count++] = static_cast<int32_t>(n);
  for (int64_t n = max(item.end, item.first); n < item.seq_len; ++n) item.rows[count++] = static_cast<int32_t>(n);
  item.num_rows = count;
}

}  // namespace LRQK_ISA
}  // namespace lrqk
