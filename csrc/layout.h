// Factor pages in memory, and the layout of one: one list of fields for Python, C++ and CUDA.
//
// vllm_lrqk/methods/lrqk/format.py and calibrated_format.py own the numbers: PageFormat and CalibratedFormat have
// attributes of these names, and what a format lacks is 0. Python asks the library for kPageLayoutNames and hands back
// the values in that order. Offsets are bytes from the page's first; the key factor is at 0.
#pragma once

#include <cstddef>
#include <cstdint>

#define LRQK_PAGE_LAYOUT(FIELD)                                        \
  FIELD(int, rank)                                                     \
  FIELD(int, value_rank)   /* 0: no linear values */                   \
  FIELD(bool, is_int8)     /* else bfloat16 */                         \
  FIELD(int, leading_rank) /* calibrated factors: columns in 8 bits */ \
  FIELD(bool, has_value_map)                                           \
  FIELD(int64_t, page_bytes)                                           \
  FIELD(int64_t, trailing_offset) /* the other columns, in 4 bits */   \
  FIELD(int64_t, projection_offset)                                    \
  FIELD(int64_t, projection_scale_offset)                              \
  FIELD(int64_t, value_mean_offset)                                    \
  FIELD(int64_t, value_projection_offset)                              \
  FIELD(int64_t, value_scale_offset)                                   \
  FIELD(int64_t, key_factor_mean_offset)

namespace lrqk {

struct PageLayout {
#define LRQK_DECLARE(type, name) type name;
  LRQK_PAGE_LAYOUT(LRQK_DECLARE)
#undef LRQK_DECLARE
};

struct FactorPages {
  uint8_t* data;        // [num_pages, KV, page_bytes]
  int64_t page_stride;  // bytes
  int64_t head_stride;  // bytes
};

#define LRQK_NAME(type, name) #name ","
#define LRQK_COUNT(type, name) +1
constexpr const char* kPageLayoutNames = LRQK_PAGE_LAYOUT(LRQK_NAME);  // each followed by a comma
constexpr size_t kPageLayoutSize = 0 LRQK_PAGE_LAYOUT(LRQK_COUNT);
#undef LRQK_NAME
#undef LRQK_COUNT

// From kPageLayoutSize integers in the order of kPageLayoutNames.
template <class Values>
PageLayout page_layout(const Values& values) {
  PageLayout layout;
  size_t i = 0;
#define LRQK_FILL(type, name) layout.name = static_cast<type>(values[i++]);
  LRQK_PAGE_LAYOUT(LRQK_FILL)
#undef LRQK_FILL
  return layout;
}

}  // namespace lrqk
