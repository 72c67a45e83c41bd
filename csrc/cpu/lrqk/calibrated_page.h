// A factor page whose columns are in 8 and in 4 bits; vllm_lrqk/methods/lrqk/calibrated_format.py has its bytes.
#pragma once

#include <cstdint>

#include "cpu/lrqk/page.h"

namespace lrqk {
namespace LRQK_ISA {

// What an int4 in memory has been added to.
constexpr int kNibbleBias = 8;

struct CalibratedPage {
  const uint8_t* data;
  const PageLayout* layout;

  explicit CalibratedPage(const FactorPage& page) : data(page.data), layout(page.layout) {}

  int leading_words() const { return layout->leading_rank / 4; }
  int trailing_words() const { return (layout->rank - layout->leading_rank) / 8; }
  const uint8_t* trailing() const { return data + layout->trailing_offset; }  // [(r - l) / 8, N, 4], two int4
  const bf16* scale() const { return at<bf16>(layout->projection_scale_offset); }
  const fp16* key_factor_mean() const { return at<fp16>(layout->key_factor_mean_offset); }
  const uint8_t* value_projection() const {
    return data + layout->value_projection_offset;
  }  // [r / 4, d / 2, 4], likewise
  const bf16* value_scale() const { return at<bf16>(layout->value_scale_offset); }

 private:
  template <class T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(data + offset);
  }
};

inline I low_nibbles(I words) { return bit_and(words, set_int(0x0f0f0f0f)); }
inline I high_nibbles(I words) { return bit_and(shift_right_logical<4>(words), set_int(0x0f0f0f0f)); }

}  // namespace LRQK_ISA
}  // namespace lrqk
