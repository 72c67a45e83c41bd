// Proxy scores of a page's tokens from columns in 8 and 4 bits, with a query in 8 bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lrqk/calibrated_page.h"

namespace lrqk {
namespace LRQK_ISA {

// A query projected on one page. Bytes of A are unsigned where they meet it: 128 more than a leading column's int8, and
// the int4 of a trailing one in the high half of its byte, 128 more than 16 times the number.
struct ByteQuery {
  int8_t* bytes;  // [G, r]
  int32_t* bias;  // [G], what the 128 add, negative
  float* unit;    // [G], what one step of a sum is worth
};

// From z [G, r], per step of each column of A, whose scales the page has.
inline void quantize_query(const CalibratedPage& page, const float* z, int group, const ByteQuery& out) {
  const int rank = page.layout->rank;
  alignas(64) float values[kMaxRank];
  for (int g = 0; g < group; ++g) {
    F top = zero();
    for (int j = 0; j < rank; j += W) {
      const F value = mul(load(z + g * rank + j), load(page.scale() + j));
      top = max(top, abs(value));
      store(values + j, value);
    }
    const float size = reduce_max(top);
    const F inverse = set(size > 1e-30f ? 127.0f / size : 0.0f);
    out.unit[g] = size / 127.0f;
    int8_t* bytes = out.bytes + g * rank;
    I total = zero_int();
    for (int j = 0; j < rank; j += W) {
      const I steps = round_to_int(mul(load(values + j), inverse));
      total = add(total, steps);
      store_low_8(bytes + j, steps);
    }
    out.bias[g] = -128 * static_cast<int32_t>(reduce_sum(to_float(total)));
  }
}

// Scores of the V vectors of tokens from n on, for B heads, each plus an offset; with kLeading and kTrailing > 0, the
// numbers of words.
template <int kLeading, int kTrailing, int B, int V>
inline void score_bytes(const CalibratedPage& page, const ByteQuery& z, int g0, int64_t page_size, int64_t n,
                        const F* offset, Fetcher& fetcher, F (*scores)[B]) {
  const int rank = page.layout->rank;
  const int leading = kLeading ? kLeading : page.leading_words();
  const int trailing = kTrailing ? kTrailing : page.trailing_words();
  const int8_t* bytes[B];
  I acc[V][B];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    bytes[g] = z.bytes + (g0 + g) * rank;
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) acc[v][g] = set_int(z.bias[g0 + g]);
  }
  const auto add_word = [&](const I* words, int word) {
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      int32_t four;
      std::memcpy(&four, bytes[g] + word * 4, 4);
      const I query = set_int(four);
      LRQK_UNROLL
      for (int v = 0; v < V; ++v) acc[v][g] = dot_bytes(acc[v][g], words[v], query);
    }
  };
  const I sign = set_int(static_cast<int32_t>(0x80808080u)), high = set_int(static_cast<int32_t>(0xf0f0f0f0u));
  LRQK_UNROLL
  for (int word = 0; word < leading; ++word) {
    fetcher.step();
    I words[V];
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) words[v] = bit_xor(load_words(page.data + (word * page_size + n + v * W) * 4), sign);
    add_word(words, word);
  }
  LRQK_UNROLL
  for (int word = 0; word < trailing; ++word) {
    fetcher.step();
    I both[V], words[V];
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) {
      both[v] = load_words(page.trailing() + (word * page_size + n + v * W) * 4);
      words[v] = bit_and(shift_left<4>(both[v]), high);
    }
    add_word(words, leading + 2 * word);
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) words[v] = bit_and(both[v], high);
    add_word(words, leading + 2 * word + 1);
  }
  LRQK_UNROLL
  for (int v = 0; v < V; ++v) {
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) scores[v][g] = mul_add(to_float(acc[v][g]), set(z.unit[g0 + g]), offset[g]);
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
