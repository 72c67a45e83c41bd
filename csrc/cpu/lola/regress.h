// The regression of values on projected keys that the slope state recalls with.
#pragma once

#include "cpu/lola/memory.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

// out [r, d] = -(S / n + ridge)^-1 (cross_moment / n), S the second moment; the ridge is a share of its mean diagonal.
// `triangle` [r, r] is working memory for the Cholesky factor, in double precision.
inline void negative_regression(const LolaArgs& a, const float* cross_moment, const float* second_moment,
                                int64_t folded, double* triangle, float* out) {
  const int r = a.memory.rank;
  const int64_t d = a.tokens.head_size;
  const double inverse = 1.0 / static_cast<double>(folded);
  double diagonal = 0.0;
  for (int i = 0; i < r; ++i) diagonal += second_moment[i * r + i] * inverse;
  const double ridge = a.ridge * diagonal / r + a.least_variance;
  double* l = triangle;
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j <= i; ++j) {
      double value = second_moment[i * r + j] * inverse + (i == j ? ridge : 0.0);
      for (int k = 0; k < j; ++k) value -= l[i * r + k] * l[j * r + k];
      l[i * r + j] = i == j ? __builtin_sqrt(max(value, 1e-300)) : value / l[j * r + j];
    }
  }
  const F scale = set(static_cast<float>(-inverse));
  for (int i = 0; i < r; ++i) {
    for (int64_t c = 0; c < d; c += W) {
      F x = mul(load(cross_moment + i * d + c), scale);
      for (int k = 0; k < i; ++k) {
        x = mul_add(set(static_cast<float>(-l[i * r + k])), load(out + k * d + c), x);
      }
      store(out + i * d + c, mul(x, set(static_cast<float>(1.0 / l[i * r + i]))));
    }
  }
  for (int i = r - 1; i >= 0; --i) {
    for (int64_t c = 0; c < d; c += W) {
      F x = load(out + i * d + c);
      for (int k = i + 1; k < r; ++k) {
        x = mul_add(set(static_cast<float>(-l[k * r + i])), load(out + k * d + c), x);
      }
      store(out + i * d + c, mul(x, set(static_cast<float>(1.0 / l[i * r + i]))));
    }
  }
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
