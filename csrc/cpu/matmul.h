// Small float32 matrix products in register tiles.
#pragma once

#include <cstdint>

#include "cpu/common.h"

namespace lrqk {
namespace LRQK_ISA {

// c[i, :] = c[i, :] rescale[i] + sum_k a[i, k] b[k, :] for kMatmulRows rows i and 2 W columns; without `rescale`, c is
// overwritten. Element (i, k) of a is at i * a_row + k * a_step.
template <bool kAdd>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                          float* c, int64_t c_row, const float* rescale) {
  F acc[kMatmulRows][2];
  LRQK_UNROLL
  for (int i = 0; i < kMatmulRows; ++i) {
    acc[i][0] = kAdd ? mul(load(c + i * c_row), set(rescale[i])) : zero();
    acc[i][1] = kAdd ? mul(load(c + i * c_row + W), set(rescale[i])) : zero();
  }
  // One pointer for four rows: with one for each, the loop would reload them.
  constexpr int kPointers = (kMatmulRows + 3) / 4;
  const float* rows[kPointers];
  for (int i = 0; i < kPointers; ++i) rows[i] = a + 4 * i * a_row;
  for (int64_t k = 0; k < depth; ++k, b += b_step) {
    const F b0 = load(b), b1 = load(b + W);
    LRQK_UNROLL
    for (int i = 0; i < kMatmulRows; ++i) {
      const F factor = set(rows[i / 4][i % 4 * a_row]);
      acc[i][0] = mul_add(factor, b0, acc[i][0]);
      acc[i][1] = mul_add(factor, b1, acc[i][1]);
    }
    LRQK_UNROLL
    for (int i = 0; i < kPointers; ++i) {
      rows[i] += a_step;
      asm("" : "+r"(rows[i]));
    }
  }
  LRQK_UNROLL
  for (int i = 0; i < kMatmulRows; ++i) {
    store(c + i * c_row, acc[i][0]);
    store(c + i * c_row + W, acc[i][1]);
  }
}

// c = a b for whole matrices. Columns are a multiple of 2 W; rows are rounded up to kMatmulRows: that many of c are
// written, and of a are read.
inline void multiply(const float* a, int64_t a_row, int64_t a_step, int64_t rows, const float* b, int64_t b_step,
                     int64_t columns, int64_t depth, float* c, int64_t c_row) {
  for (int64_t column = 0; column < columns; column += 2 * W) {
    for (int64_t row = 0; row < rows; row += kMatmulRows) {
      multiply_tile<false>(a + row * a_row, a_row, a_step, b + column, b_step, depth, c + row * c_row + column, c_row,
                           nullptr);
    }
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
