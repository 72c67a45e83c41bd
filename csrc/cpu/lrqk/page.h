// A factor page in memory, and fetching one ahead of its use.
#pragma once

#include <cstdint>

#include "cpu/common.h"
#include "cpu/lrqk/args.h"

namespace lrqk {
namespace LRQK_ISA {

struct FactorPage {
  const uint8_t* data;  // the key factor, [r / w, N, w] with w elements to a 4-byte word
  const PageLayout* layout;

  const void* projection() const { return data + layout->projection_offset; }  // [r, d]
  const float* projection_scale() const { return floats(layout->projection_scale_offset); }
  const bf16* value_mean() const { return reinterpret_cast<const bf16*>(data + layout->value_mean_offset); }
  const void* value_projection() const { return data + layout->value_projection_offset; }  // [value_rank, d]
  const float* value_scale() const { return floats(layout->value_scale_offset); }
  const float* key_factor_mean() const { return floats(layout->key_factor_mean_offset); }

 private:
  const float* floats(int64_t offset) const { return reinterpret_cast<const float*>(data + offset); }
};

// Fetches the lines of the next page, a few at a time between other work: all at once they would block each other.
// Projecting and scoring a page make rank + page_size rank / (8 W) steps at least, which is more than its lines / 3.
class Fetcher {
 public:
  Fetcher(const uint8_t* data, int64_t bytes) : at_(data), end_(data ? data + bytes : data) {}
  void step() {
    if (at_ >= end_) return;
    for (int i = 0; i < 3; ++i) __builtin_prefetch(at_ + i * 64);
    at_ += 3 * 64;
  }

 private:
  const uint8_t *at_, *end_;
};

}  // namespace LRQK_ISA
}  // namespace lrqk
