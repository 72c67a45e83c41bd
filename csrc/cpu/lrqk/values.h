// Linear values of a page: values_first and value_regression of vllm_lrqk/methods/lrqk/seal.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lrqk/seal_page.h"

namespace lrqk {
namespace LRQK_ISA {

// Subtracts the mean of each column of m.factor [N, r]; the means of the first `rank` go to `means`, if given.
inline void center_factors(const SealArgs& s, SealMemory& m, int rank, float* means) {
  const int64_t n = s.page_size;
  for (int64_t j = 0; j < m.width; j += W) {
    F total = zero();
    for (int64_t i = 0; i < n; ++i) total = add(total, load(m.factor + i * m.width + j));
    const F mean = mul(total, set(1.0f / static_cast<float>(n)));
    for (int64_t i = 0; i < n; ++i) store(m.factor + i * m.width + j, sub(load(m.factor + i * m.width + j), mean));
    alignas(64) float lanes[W];
    store(lanes, mean);
    for (int64_t k = j; means && k < min<int64_t>(j + W, rank); ++k) means[k] = lanes[k - j];
  }
}

// Gram-Schmidt on the columns of q [r, r], each against those before it, twice for the sake of rounding.
inline void orthonormalize(double* q, int r) {
  for (int j = 0; j < r; ++j) {
    for (int pass = 0; pass < 2; ++pass) {
      for (int k = 0; k < j; ++k) {
        double product = 0.0;
        for (int i = 0; i < r; ++i) product += q[i * r + k] * q[i * r + j];
        for (int i = 0; i < r; ++i) q[i * r + j] -= product * q[i * r + k];
      }
      double square = 0.0;
      for (int i = 0; i < r; ++i) square += q[i * r + j] * q[i * r + j];
      const double inverse = 1.0 / max(__builtin_sqrt(square), 1e-300);
      for (int i = 0; i < r; ++i) q[i * r + j] *= inverse;
    }
  }
}

// m.explained [r, d] = lower^-1 m.factor' m.value
inline void explain_values(const SealArgs& s, SealMemory& m, const double* lower) {
  const int64_t d = s.head_size;
  const int r = s.layout.rank;
  multiply(m.factor, 1, m.width, r, m.value, d, d, s.page_size, m.explained, d);
  for (int i = 0; i < r; ++i) {
    float* row = m.explained + i * d;
    for (int j = 0; j < i; ++j) {
      const F factor = set(static_cast<float>(-lower[i * r + j]));
      for (int64_t k = 0; k < d; k += W) store(row + k, mul_add(load(m.explained + j * d + k), factor, load(row + k)));
    }
    const F inverse = set(static_cast<float>(1.0 / lower[i * r + i]));
    for (int64_t k = 0; k < d; k += W) store(row + k, mul(load(row + k), inverse));
  }
}

// q [r, r]: directions of m.explained in the order of their size, roughly, by orthogonal iteration.
inline void find_directions(const SealArgs& s, const SealMemory& m, double* size, double* next, double* q) {
  const int64_t d = s.head_size;
  const int r = s.layout.rank;
  double trace = 0.0;
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j <= i; ++j) {
      F total = zero();
      for (int64_t k = 0; k < d; k += W) {
        total = mul_add(load(m.explained + i * d + k), load(m.explained + j * d + k), total);
      }
      size[i * r + j] = size[j * r + i] = reduce_sum(total);
    }
    trace += size[i * r + i];
  }
  for (int i = 0; i < r; ++i) size[i * r + i] += max(trace / r * s.value_shift, 1.17549435e-38);
  for (int i = 0; i < r * r; ++i) q[i] = i % (r + 1) == 0 ? 1.0 : 0.0;
  for (int round = 0; round < s.value_iterations; ++round) {
    for (int i = 0; i < r; ++i) {
      for (int j = 0; j < r; ++j) next[i * r + j] = 0.0;
      for (int k = 0; k < r; ++k) {
        for (int j = 0; j < r; ++j) next[i * r + j] += size[i * r + k] * q[k * r + j];
      }
    }
    std::memcpy(q, next, static_cast<size_t>(r) * r * sizeof(double));
    orthonormalize(q, r);
  }
}

// matrix [d, r] = matrix times basis [r, r]
inline void change_basis(const Fit& f, const double* basis, float* matrix) {
  const int r = f.rank;
  std::memset(f.small, 0, static_cast<size_t>(r) * f.width * sizeof(float));
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j < r; ++j) f.small[i * f.width + j] = static_cast<float>(basis[i * r + j]);
  }
  multiply(matrix, f.width, 1, f.d, f.small, f.width, f.width, r, f.sum, f.width);
  std::memcpy(matrix, f.sum, f.d * f.width * sizeof(float));
}

// x y' in another basis: the leading columns of the key factor explain most of the values.
inline void put_values_first(const SealArgs& s, SealMemory& m) {
  const Fit& f = m.fit;
  const int r = f.rank;
  multiply(m.key, s.head_size, 1, s.page_size, f.y, f.width, f.width, s.head_size, m.factor, f.width);
  center_factors(s, m, 0, nullptr);
  multiply(m.factor, 1, f.width, r, m.factor, f.width, f.width, s.page_size, f.y_gram, f.width);
  const double* lower = cholesky(f, f.y_gram);
  explain_values(s, m, lower);
  double *q = m.directions, *next = q + r * r;
  find_directions(s, m, next, next + r * r, q);
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j < r; ++j) {
      next[i * r + j] = 0.0;
      for (int k = 0; k <= i; ++k) next[i * r + j] += lower[i * r + k] * q[k * r + j];
    }
  }
  change_basis(f, next, f.x);
  for (int i = r - 1; i >= 0; --i) {
    for (int j = 0; j < r; ++j) {
      for (int k = i + 1; k < r; ++k) q[i * r + j] -= lower[k * r + i] * q[k * r + j];
      q[i * r + j] /= lower[i * r + i];
    }
  }
  change_basis(f, q, f.y);
}

// Least squares of the values on the leading columns of the key factor, as `page` has them.
inline void write_linear_values(const SealArgs& s, SealMemory& m, uint8_t* page) {
  const int64_t d = s.head_size, n = s.page_size, width = m.width;
  const int ranks = s.layout.is_int8 ? 4 : 2, value_rank = s.layout.value_rank;
  std::memset(m.factor, 0, n * width * sizeof(float));
  for (int j = 0; j < value_rank; ++j) {
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t* word = page + (j / ranks * n + i) * 4;
      m.factor[i * width + j] = s.layout.is_int8
                                    ? static_cast<float>(reinterpret_cast<const int8_t*>(word)[j % ranks])
                                    : float_of(uint32_t{reinterpret_cast<const uint16_t*>(word)[j % ranks]} << 16);
    }
  }
  center_factors(s, m, value_rank, reinterpret_cast<float*>(page + s.layout.key_factor_mean_offset));
  Fit f = m.fit;
  f.rank = value_rank;
  multiply(m.factor, 1, width, value_rank, m.factor, width, width, n, f.x_gram, width);
  multiply(m.value, 1, d, d, m.factor, width, width, n, f.sum, width);
  solve_right(f, f.sum, f.x_gram, f.x);
  float* scales = m.scales;
  column_scales(s, f.x, d, width, scales);
  write_transposed(s, f.x, value_rank, width, scales, reinterpret_cast<uint8_t*>(f.gq_x),
                   page + s.layout.value_projection_offset);
  std::memcpy(page + s.layout.value_scale_offset, scales, value_rank * sizeof(float));
}

}  // namespace LRQK_ISA
}  // namespace lrqk
