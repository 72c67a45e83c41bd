// The page-local LRQK fit on Gram matrices; vllm_lrqk/methods/lrqk/seal.py has the formulas and the reasons.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/matmul.h"

namespace lrqk {
namespace LRQK_ISA {

// Matrices of one fit. Rows are padded to kMatmulRows, columns of [d, r] and [r, r] to `width`, with zeros.
struct Fit {
  int64_t d;
  int rank, width;  // width: rank rounded up to 2 W
  float ridge;
  float* gram_q;             // [d, d]
  float* gram_k;             // [d, d]
  float* x;                  // [d, r]
  float* y;                  // [d, r]
  float* gq_x;               // [d, r]
  float* gk_y;               // [d, r]
  float* b_q;                // [d, r], transposed
  float* b_k;                // [d, r], transposed
  float* sum;                // [d, r]
  float* x_gram;             // [r, r]
  float* y_gram;             // [r, r]
  float* small;              // [r, r]
  float* inverse;            // [r, r]
  double* triangle;          // [r, r]
  double* inverse_triangle;  // [r, r]
};

inline Fit carve_fit(int64_t d, int rank, Carver& carver) {
  Fit f{};
  f.d = d;
  f.rank = rank;
  f.width = static_cast<int>(ceil_div(rank, 2 * W)) * 2 * W;
  const int64_t rows = ceil_div(d, kMatmulRows) * kMatmulRows;
  const int64_t small_rows = ceil_div(rank, kMatmulRows) * kMatmulRows;
  f.gram_q = carver.take<float>(rows * d);
  f.gram_k = carver.take<float>(rows * d);
  // Transposed reads run over the end of the last row by less than one tile.
  float** const tall[] = {&f.x, &f.y, &f.gq_x, &f.gk_y, &f.b_q, &f.b_k, &f.sum};
  for (float** matrix : tall) {
    *matrix = carver.take<float>(rows * f.width + kMatmulRows);
  }
  float** const squares[] = {&f.x_gram, &f.y_gram, &f.small, &f.inverse};
  for (float** matrix : squares) {
    *matrix = carver.take<float>(small_rows * f.width);
  }
  f.triangle = carver.take<double>(static_cast<int64_t>(rank) * rank);
  f.inverse_triangle = carver.take<double>(static_cast<int64_t>(rank) * rank);
  return f;
}

inline float mean_diagonal(const float* matrix, int64_t n, int64_t stride) {
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) total += matrix[i * stride + i];
  return total / n;
}

// The lower triangle l with l l' = gram + ridge, [r, r] in f.triangle.
inline double* cholesky(const Fit& f, const float* gram) {
  const int r = f.rank;
  const double ridge = max<double>(f.ridge * mean_diagonal(gram, r, f.width), 1.17549435e-38);
  double* l = f.triangle;
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j <= i; ++j) {
      double value = gram[i * f.width + j] + (i == j ? ridge : 0.0);
      for (int k = 0; k < j; ++k) value -= l[i * r + k] * l[j * r + k];
      l[i * r + j] = i == j ? __builtin_sqrt(max(value, 1e-300)) : value / l[j * r + j];
    }
  }
  return l;
}

// out [d, r] = numerator [d, r] (gram + ridge)^-1, by Cholesky in double precision.
inline void solve_right(const Fit& f, const float* numerator, const float* gram, float* out) {
  const int r = f.rank;
  const double* l = cholesky(f, gram);
  double* m = f.inverse_triangle;  // the rows of l^-1
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j <= i; ++j) m[i * r + j] = i == j ? 1.0 : 0.0;
    for (int k = 0; k < i; ++k) {
      for (int j = 0; j <= k; ++j) m[i * r + j] -= l[i * r + k] * m[k * r + j];
    }
    for (int j = 0; j <= i; ++j) m[i * r + j] /= l[i * r + i];
  }
  std::memset(f.inverse, 0, static_cast<size_t>(r) * f.width * sizeof(float));
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j <= i; ++j) {
      double value = 0.0;
      for (int k = i; k < r; ++k) value += m[k * r + i] * m[k * r + j];
      f.inverse[i * f.width + j] = f.inverse[j * f.width + i] = static_cast<float>(value);
    }
  }
  multiply(numerator, f.width, 1, f.d, f.inverse, f.width, f.width, r, out, f.width);
}

// out [d, r] = gram [d, d] factor [d, r]
inline void apply(const Fit& f, const float* gram, const float* factor, float* out) {
  multiply(gram, f.d, 1, f.d, factor, f.width, f.width, f.d, out, f.width);
}

// out [r, r] = a' b for [d, r] matrices
inline void inner(const Fit& f, const float* a, const float* b, float* out) {
  multiply(a, 1, f.width, f.rank, b, f.width, f.width, f.d, out, f.width);
}

inline void add_scaled(const float* a, const float* b, float factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += W) store(out + i, mul_add(load(b + i), set(factor), load(a + i)));
}

// Unit vectors of the coordinates with the largest |Q| |K|.
inline void start_columns(const Fit& f, float* out) {
  std::memset(out, 0, f.d * f.width * sizeof(float));
  float before = __builtin_inff();
  int64_t before_index = -1;
  for (int j = 0; j < f.rank; ++j) {
    float best = -__builtin_inff();
    int64_t index = -1;
    for (int64_t i = 0; i < f.d; ++i) {
      const float size = f.gram_q[i * f.d + i] * f.gram_k[i * f.d + i];
      const bool is_left = size < before || (size == before && i > before_index);
      if (is_left && (size > best || index < 0)) {
        best = size;
        index = i;
      }
    }
    if (index < 0) return;  // not a number
    out[index * f.width + j] = 1.0f;
    before = best;
    before_index = index;
  }
}

inline void fit_projections(const Fit& f, int iterations, float lambda_q, float lambda_k) {
  const int64_t tall = f.d * f.width, square = static_cast<int64_t>(f.rank) * f.width;
  start_columns(f, f.x);
  std::memcpy(f.y, f.x, tall * sizeof(float));
  for (int i = 0; i < iterations; ++i) {
    apply(f, f.gram_q, f.x, f.gq_x);
    apply(f, f.gram_k, f.y, f.gk_y);
    inner(f, f.x, f.gq_x, f.x_gram);
    inner(f, f.y, f.gk_y, f.y_gram);
    solve_right(f, f.gq_x, f.x_gram, f.b_q);
    solve_right(f, f.gk_y, f.y_gram, f.b_k);

    add_scaled(f.gk_y, f.b_q, lambda_q, tall, f.sum);
    inner(f, f.b_q, f.b_q, f.small);
    add_scaled(f.y_gram, f.small, lambda_q, square, f.small);
    solve_right(f, f.sum, f.small, f.x);

    apply(f, f.gram_q, f.x, f.gq_x);
    add_scaled(f.gq_x, f.b_k, lambda_k, tall, f.sum);
    inner(f, f.x, f.gq_x, f.x_gram);
    inner(f, f.b_k, f.b_k, f.small);
    add_scaled(f.x_gram, f.small, lambda_k, square, f.small);
    solve_right(f, f.sum, f.small, f.y);
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
