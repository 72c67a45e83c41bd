// A factor page whose columns are in 8 and in 4 bits; vllm_lrqk/methods/lrqk/calibrated_format.py has its bytes.
#pragma once

#include <cstdint>
#include <cstring>

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

  // The columns of one token.
  void token(int64_t n, int64_t page_size, float* factors) const {
    alignas(64) int8_t bytes[kMaxRank];
    int8_t* out = bytes;
    for (int word = 0; word < leading_words(); ++word, out += 4) std::memcpy(out, data + (word * page_size + n) * 4, 4);
    for (int word = 0; word < trailing_words(); ++word, out += 8) {
      uint32_t both;
      std::memcpy(&both, trailing() + (word * page_size + n) * 4, 4);
      const uint32_t halves[2] = {both & 0x0f0f0f0fu, (both >> 4) & 0x0f0f0f0fu};
      std::memcpy(out, halves, 8);
    }
    const int rank = layout->rank, leading = layout->leading_rank;
    for (int j = 0; j < leading; ++j) factors[j] = static_cast<float>(bytes[j]);
    for (int j = leading; j < rank; ++j) factors[j] = static_cast<float>(bytes[j] - kNibbleBias);
  }

  void prefetch_token(int64_t n, int64_t page_size) const {
    for (int word = 0; word < leading_words(); ++word) __builtin_prefetch(data + (word * page_size + n) * 4);
    for (int word = 0; word < trailing_words(); ++word) __builtin_prefetch(trailing() + (word * page_size + n) * 4);
  }

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
