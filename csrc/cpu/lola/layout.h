// The layout of LoLA's memory: one list of fields for Python and C++.
//
// vllm_lrqk/methods/lola/format.py owns the numbers: MemoryFormat.layout has an entry of each name. Python asks the
// library for kLolaLayoutNames and hands back the values in that order. Offsets are bytes from the first of a head's
// part of a block.
#pragma once

#include <cstddef>
#include <cstdint>

#define LOLA_LAYOUT(FIELD)                                \
  FIELD(int64_t, block_bytes)                             \
  FIELD(int64_t, key_mean_offset)                         \
  FIELD(int64_t, value_mean_offset)                       \
  FIELD(int64_t, cross_moment_offset)                     \
  FIELD(int64_t, second_moment_offset)                    \
  FIELD(int64_t, feature_values_offset)                   \
  FIELD(int64_t, feature_sum_offset)                      \
  FIELD(int64_t, ring_offset)                             \
  FIELD(int64_t, cache_offset)                            \
  FIELD(int64_t, positions_offset)                        \
  FIELD(int64_t, window)                                  \
  FIELD(int64_t, chunk)                                   \
  FIELD(int64_t, cache)                                   \
  FIELD(int64_t, sink_tokens)                             \
  FIELD(int, rank)             /* 0: no slope state */    \
  FIELD(int64_t, num_features) /* 0: no hedgehog state */ \
  FIELD(bool, is_random)       /* who stays in the cache is drawn by lot */

namespace lrqk {

struct LolaLayout {
#define LOLA_DECLARE(type, name) type name;
  LOLA_LAYOUT(LOLA_DECLARE)
#undef LOLA_DECLARE
};

#define LOLA_NAME(type, name) #name ","
#define LOLA_COUNT(type, name) +1
constexpr const char* kLolaLayoutNames = LOLA_LAYOUT(LOLA_NAME);  // each followed by a comma
constexpr size_t kLolaLayoutSize = 0 LOLA_LAYOUT(LOLA_COUNT);
#undef LOLA_NAME
#undef LOLA_COUNT

// From kLolaLayoutSize integers in the order of kLolaLayoutNames.
template <class Values>
LolaLayout lola_layout(const Values& values) {
  LolaLayout layout;
  size_t i = 0;
#define LOLA_FILL(type, name) layout.name = static_cast<type>(values[i++]);
  LOLA_LAYOUT(LOLA_FILL)
#undef LOLA_FILL
  return layout;
}

}  // namespace lrqk
