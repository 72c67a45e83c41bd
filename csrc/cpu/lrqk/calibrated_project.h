// The query heads of one KV head in the calibrated basis, in the frames of pages: z = X' R(-p0) q.
//
// With (q1, q2) the dimensions that RoPE turns by an angle a, and (X1, X2) the rows of X for them,
//
//   z = sum over pairs of  cos(a) (X1 q1 + X2 q2) + sin(a) (X1 q2 - X2 q1)
//
// What is in brackets is the same for all pages: `TurnedQuery`. So z of several pages is a product of a table of cosines
// and sines with it, in int16.
#pragma once

#include <cstdint>

#include "cpu/lrqk/item.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr float kTurn = 32767.0f;        // what 1 is in the table
constexpr float kLargestSum = 65000.0f;  // of the query's int16, so that kTurn times it fits 32 bits

struct TurnedQuery {
  int32_t* words;  // [G, d / 2, r], both brackets as int16
  float* unit;     // [G, r], what one step of a sum is worth
};

// Of `query` [G, d], natural order, for scores in units of log 2 whose trailing columns are 16 times as large.
inline void turn_query(const DecodeArgs& a, int64_t kv_head, const float* query, const TurnedQuery& out) {
  const int64_t pairs = a.head_size / 2, rank = a.layout.rank;
  const int32_t* dims = a.basis.pairs;
  for (int g = 0; g < group_of(a); ++g) {
    const float* q = query + g * a.head_size;
    const float* x = a.basis.query + kv_head * a.head_size * rank;  // [d / 2, 2, r]
    for (int64_t j = 0; j < rank; j += W) {
      const auto both = [&](int64_t pair, F& first, F& second) {
        const F x1 = load(x + 2 * pair * rank + j), x2 = load(x + (2 * pair + 1) * rank + j);
        const F q1 = set(q[dims[2 * pair]]), q2 = set(q[dims[2 * pair + 1]]);
        first = mul_add(x1, q1, mul(x2, q2));
        second = sub(mul(x1, q2), mul(x2, q1));
      };
      F sum = zero(), top = zero(), first, second;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        both(pair, first, second);
        sum = add(sum, add(abs(first), abs(second)));
        top = max(top, max(abs(first), abs(second)));
      }
      alignas(64) float step[W], inverse[W];
      store(step, max(max(mul(sum, set(1.0f / kLargestSum)), mul(top, set(1.0f / 32000.0f))), set(1e-30f)));
      for (int lane = 0; lane < W; ++lane) {
        inverse[lane] = 1.0f / step[lane];
        const float size = j + lane < a.layout.leading_rank ? 1.0f : 1.0f / 16.0f;
        out.unit[g * rank + j + lane] = step[lane] / kTurn * a.scale * kLog2e * size;
      }
      for (int64_t pair = 0; pair < pairs; ++pair) {
        both(pair, first, second);
        const I low = bit_and(round_to_int(mul(first, load(inverse))), set_int(0xffff));
        const I high = shift_left<16>(round_to_int(mul(second, load(inverse))));
        store_words(out.words + (g * pairs + pair) * rank + j, bit_or(low, high));
      }
    }
  }
}

// z of kMatmulRows pages from `first` on and V vectors of columns from j on, to out [kMatmulRows, G, r] for one head.
template <int V>
inline void project_pages(const DecodeArgs& a, const TurnedQuery& query, int g, int64_t j, int64_t first, float* out) {
  const int64_t pairs = a.head_size / 2, rank = a.layout.rank, group = group_of(a);
  const int32_t* words = query.words + g * pairs * rank + j;
  I acc[kMatmulRows][V];
  LRQK_UNROLL
  for (int i = 0; i < kMatmulRows; ++i) {
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) acc[i][v] = zero_int();
  }
  // One pointer for four rows: with one for each, the loop would reload them.
  constexpr int kPointers = (kMatmulRows + 3) / 4;
  const int32_t* rows[kPointers];
  for (int i = 0; i < kPointers; ++i) rows[i] = a.basis.turns + (first + 4 * i) * pairs;
  for (int64_t pair = 0; pair < pairs; ++pair, words += rank) {
    I columns[V];
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) columns[v] = load_words(words + v * W);
    LRQK_UNROLL
    for (int i = 0; i < kMatmulRows; ++i) {
      const I turn = set_int(rows[i / 4][i % 4 * pairs]);
      LRQK_UNROLL
      for (int v = 0; v < V; ++v) acc[i][v] = dot(acc[i][v], columns[v], turn);
    }
    LRQK_UNROLL
    for (int i = 0; i < kPointers; ++i) {
      ++rows[i];
      asm("" : "+r"(rows[i]));
    }
  }
  LRQK_UNROLL
  for (int i = 0; i < kMatmulRows; ++i) {
    LRQK_UNROLL
    for (int v = 0; v < V; ++v) {
      const F unit = load(query.unit + g * rank + j + v * W);
      store(out + (i * group + g) * rank + j + v * W, mul(to_float(acc[i][v]), unit));
    }
  }
}

inline void project_pages(const DecodeArgs& a, const TurnedQuery& query, int64_t first, float* out) {
  const int64_t rank = a.layout.rank;
  for (int g = 0; g < group_of(a); ++g) {
    int64_t j = 0;
    for (; j + 2 * W <= rank; j += 2 * W) project_pages<2>(a, query, g, j, first, out);
    for (; j < rank; j += W) project_pages<1>(a, query, g, j, first, out);
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
