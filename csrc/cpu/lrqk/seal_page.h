// One (page, KV head) that is factorised: its working memory, and how its factors are quantised and written.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lrqk/args.h"
#include "cpu/lrqk/fit.h"

namespace lrqk {
namespace LRQK_ISA {

struct SealMemory {
  Fit fit;
  float* key;          // [N, d]
  float* value;        // [N, d], without their mean; for linear values only
  float* value_mean;   // [d]
  float* factor;       // [N, r], width as in Fit
  float* scales;       // [r], of columns
  float* explained;    // [r, d]
  double* directions;  // three times [r, r]
  int64_t width;
};

inline SealMemory carve_seal(const SealArgs& s, Carver& carver) {
  SealMemory m{};
  const int64_t rows = ceil_div(s.page_size, kMatmulRows) * kMatmulRows;
  m.fit = carve_fit(s.head_size, s.layout.rank, carver);
  m.width = m.fit.width;
  m.key = carver.take<float>(rows * s.head_size + kMatmulRows);
  if (s.layout.value_rank) m.value = carver.take<float>(rows * s.head_size + kMatmulRows);
  m.value_mean = carver.take<float>(s.head_size);
  m.factor = carver.take<float>(rows * m.width);
  m.scales = carver.take<float>(m.width);
  m.explained = carver.take<float>(ceil_div(s.layout.rank, kMatmulRows) * kMatmulRows * s.head_size);
  m.directions = carver.take<double>(3 * static_cast<int64_t>(s.layout.rank) * s.layout.rank);
  return m;
}

template <class T>
inline void load_page(const SealArgs& s, const T* rows, SealMemory& m) {
  const int64_t d = s.head_size;
  std::memset(m.value_mean, 0, d * sizeof(float));
  for (int64_t n = 0; n < s.page_size; ++n, rows += 2 * d) {
    for (int64_t i = 0; i < d; i += W) {
      store(m.key + n * d + i, load(rows + i));
      if (s.layout.value_rank) store(m.value + n * d + i, load(rows + d + i));
      store(m.value_mean + i, add(load(m.value_mean + i), load(rows + d + i)));
    }
  }
  for (int64_t i = 0; i < d; ++i) m.value_mean[i] /= s.page_size;
  for (int64_t n = 0; s.layout.value_rank && n < s.page_size * d; n += d) {
    for (int64_t i = 0; i < d; i += W) store(m.value + n + i, sub(load(m.value + n + i), load(m.value_mean + i)));
  }
}

// matrix * factor + diagonal, in place
inline void scale_gram(float* matrix, int64_t d, float factor, float diagonal) {
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; j += W) store(matrix + i * d + j, mul(load(matrix + i * d + j), set(factor)));
    matrix[i * d + i] += diagonal;
  }
}

// Both Gram matrices with a mean diagonal of N; that of the queries is the keys' blended with identity.
inline void load_grams(const SealArgs& s, SealMemory& m) {
  const int64_t d = s.head_size;
  const float tokens = static_cast<float>(s.page_size);
  multiply(m.key, 1, d, d, m.key, d, d, s.page_size, m.fit.gram_k, d);
  const float key_size = mean_diagonal(m.fit.gram_k, d, d);
  scale_gram(m.fit.gram_k, d, key_size > 0.0f ? tokens / key_size : 0.0f, 0.0f);
  std::memcpy(m.fit.gram_q, m.fit.gram_k, d * d * sizeof(float));
  scale_gram(m.fit.gram_q, d, s.key_share, tokens * (1.0f - s.key_share));
}

// One scale for each column of [rows, width], float32 [rank]; 1 for bfloat16.
inline void column_scales(const SealArgs& s, const float* matrix, int64_t rows, int64_t width, float* scales) {
  if (!s.layout.is_int8) {
    for (int j = 0; j < s.layout.rank; ++j) scales[j] = 1.0f;
    return;
  }
  for (int64_t j = 0; j < width; j += W) {
    F top = zero();
    for (int64_t i = 0; i < rows; ++i) top = max(top, abs(load(matrix + i * width + j)));
    store(scales + j, mul(max(top, set(1e-30f)), set(1.0f / 127.0f)));
  }
}

// One row of [., width] divided by the scales, as stored elements.
inline void quantize_row(const SealArgs& s, const float* row, int64_t width, const float* scales, uint8_t* out) {
  for (int64_t j = 0; j < width; j += W) {
    if (s.layout.is_int8) {
      float quotient[W];
      for (int lane = 0; lane < W; ++lane) quotient[lane] = row[j + lane] / scales[j + lane];
      store_int8(reinterpret_cast<int8_t*>(out) + j, load(quotient));
    } else {
      store(reinterpret_cast<bf16*>(out) + j, load(row + j));
    }
  }
}

// `matrix` [d, r], divided by the scales, as stored [r, d]; `bytes` is working memory.
inline void write_transposed(const SealArgs& s, const float* matrix, int rank, int64_t width, const float* scales,
                             uint8_t* bytes, uint8_t* out) {
  const int64_t element_bytes = s.layout.is_int8 ? 1 : 2;
  for (int64_t i = 0; i < s.head_size; ++i) {
    quantize_row(s, matrix + i * width, width, scales, bytes);
    for (int j = 0; j < rank; ++j) {
      std::memcpy(out + (j * s.head_size + i) * element_bytes, bytes + j * element_bytes, element_bytes);
    }
  }
}

inline void write_page(const SealArgs& s, SealMemory& m, uint8_t* page) {
  const PageLayout& layout = s.layout;
  const int rank = layout.rank;
  const int64_t d = s.head_size, n = s.page_size, width = m.width;
  const int64_t words = rank * (layout.is_int8 ? 1 : 2) / 4;
  // Balance the columns: only the product of a column of the factor and one of x matters.
  for (int j = 0; j < rank; ++j) {
    float square = 0.0f;
    for (int64_t i = 0; i < d; ++i) square += m.fit.x[i * width + j] * m.fit.x[i * width + j];
    const float size = max(__builtin_sqrtf(square), 1e-30f);
    for (int64_t i = 0; i < d; ++i) {
      m.fit.x[i * width + j] /= size;
      m.fit.y[i * width + j] *= size;
    }
  }
  multiply(m.key, d, 1, n, m.fit.y, width, width, d, m.factor, width);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(m.fit.gq_x);
  float* scales = m.scales;
  column_scales(s, m.factor, n, width, scales);
  for (int64_t i = 0; i < n; ++i) {
    quantize_row(s, m.factor + i * width, width, scales, bytes);
    for (int64_t w = 0; w < words; ++w) std::memcpy(page + (w * n + i) * 4, bytes + w * 4, 4);
  }
  float* stored_scales = reinterpret_cast<float*>(page + layout.projection_scale_offset);
  std::memcpy(stored_scales, scales, rank * sizeof(float));
  column_scales(s, m.fit.x, d, width, scales);
  for (int j = 0; j < rank; ++j) stored_scales[j] *= scales[j];
  write_transposed(s, m.fit.x, rank, width, scales, bytes, page + layout.projection_offset);
  bf16* mean = reinterpret_cast<bf16*>(page + layout.value_mean_offset);
  for (int64_t i = 0; i < d; i += W) store(mean + i, load(m.value_mean + i));
}

}  // namespace LRQK_ISA
}  // namespace lrqk
