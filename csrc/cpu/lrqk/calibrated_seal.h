// Factorising full pages in the calibrated basis; vllm_lrqk/methods/lrqk/calibrated_seal.py has the plain form.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lrqk/calibrated_page.h"
#include "cpu/lrqk/seal_page.h"
#include "cpu/lrqk/values.h"

namespace lrqk {
namespace LRQK_ISA {

// m.fit.y [d, r]: R(p0) Y, so that keys need not be turned into the page's frame.
inline void turn_key_basis(const SealArgs& s, int64_t head, int64_t page_number, SealMemory& m) {
  const int64_t pairs = s.head_size / 2, rank = s.layout.rank, width = m.width;
  const float* turns = s.basis.frames + page_number * s.head_size;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const float* y = s.basis.key + (head * pairs + pair) * 2 * rank;
    const F cosine = set(turns[2 * pair]), sine = set(turns[2 * pair + 1]);
    float* first = m.fit.y + s.basis.pairs[2 * pair] * width;
    float* second = m.fit.y + s.basis.pairs[2 * pair + 1] * width;
    for (int64_t j = 0; j < rank; j += W) {
      const F y1 = load(y + j), y2 = load(y + rank + j);
      store(first + j, sub(mul(y1, cosine), mul(y2, sine)));
      store(second + j, mul_add(y2, cosine, mul(y1, sine)));
    }
  }
}

// Replaces the columns of [rows, width] by whole numbers of at most 127, and of at most 7 from `leading` on, and writes
// their scales.
inline void round_columns(float* matrix, int64_t rows, int64_t width, int rank, int leading, bf16* scales) {
  for (int j = 0; j < rank; j += W) {
    float highest[W], scale[W], quotient[W];
    for (int lane = 0; lane < W; ++lane) highest[lane] = j + lane < leading ? 127.0f : 7.0f;
    F top = set(1e-30f);
    for (int64_t i = 0; i < rows; ++i) top = max(top, abs(load(matrix + i * width + j)));
    store(scale, top);
    for (int lane = 0; lane < W; ++lane) scale[lane] /= highest[lane];
    store(scales + j, load(scale));
    store(scale, load(scales + j));
    for (int64_t i = 0; i < rows; ++i) {
      float* row = matrix + i * width + j;
      for (int lane = 0; lane < W; ++lane) quotient[lane] = row[lane] / scale[lane];
      store(row, to_float(round_to_int(load(quotient))));
      for (int lane = 0; lane < W; ++lane) row[lane] = max(min(row[lane], highest[lane]), -highest[lane]);
    }
  }
}

inline uint8_t pack_int4(float low, float high) {
  return static_cast<uint8_t>((static_cast<int>(low) + kNibbleBias) | ((static_cast<int>(high) + kNibbleBias) << 4));
}

// The key factor, m.factor [N, r] of whole numbers, into the page.
inline void write_key_factor(const SealArgs& s, const SealMemory& m, uint8_t* page) {
  const int rank = s.layout.rank, leading = s.layout.leading_rank;
  for (int64_t n = 0; n < s.page_size; ++n) {
    const float* row = m.factor + n * m.width;
    for (int j = 0; j < leading; ++j) {
      page[(j / 4 * s.page_size + n) * 4 + j % 4] = static_cast<uint8_t>(static_cast<int8_t>(row[j]));
    }
    uint8_t* trailing = page + s.layout.trailing_offset + n * 4;
    for (int j = leading; j < rank; j += 8, trailing += s.page_size * 4) {
      for (int i = 0; i < 4; ++i) trailing[i] = pack_int4(row[j + i], row[j + 4 + i]);
    }
  }
}

// The page's own value map: least squares of its values on m.factor without its means.
inline void write_value_map(const SealArgs& s, SealMemory& m, uint8_t* page) {
  const int64_t d = s.head_size, n = s.page_size, width = m.width, half = d / 2;
  const Fit& f = m.fit;
  const int rank = s.layout.rank;
  multiply(m.factor, 1, width, rank, m.factor, width, width, n, f.x_gram, width);
  multiply(m.value, 1, d, d, m.factor, width, width, n, f.sum, width);
  solve_right(f, f.sum, f.x_gram, f.x);
  round_columns(f.x, d, width, rank, 0, reinterpret_cast<bf16*>(page + s.layout.value_scale_offset));
  uint8_t* map = page + s.layout.value_projection_offset;
  for (int64_t i = 0; i < half; ++i) {
    for (int j = 0; j < rank; ++j) {
      map[(j / 4 * half + i) * 4 + j % 4] = pack_int4(f.x[i * width + j], f.x[(half + i) * width + j]);
    }
  }
}

inline void seal_calibrated(const SealArgs& s, const Parallel& parallel) {
  for_each(parallel, s.num_pages * s.kv_heads, [&](int64_t index) {
    Carver counter(nullptr);
    carve_seal(s, counter);
    void* memory = scratch(Scratch::kTask, counter.used());
    std::memset(memory, 0, counter.used());
    Carver carver(memory);
    SealMemory m = carve_seal(s, carver);
    m.fit.ridge = s.ridge;
    const int64_t page = s.pages[index / s.kv_heads], head = index % s.kv_heads;
    uint8_t* out = s.factors.data + page * s.factors.page_stride + head * s.factors.head_stride;
    with_type(s.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* rows = static_cast<const T*>(s.host.data) + page * s.host.page_stride + head * s.host.head_stride;
      load_page(s, rows, m);
    });
    const int rank = s.layout.rank;
    turn_key_basis(s, head, s.page_numbers[index / s.kv_heads], m);
    multiply(m.key, s.head_size, 1, s.page_size, m.fit.y, m.width, m.width, s.head_size, m.factor, m.width);
    round_columns(m.factor, s.page_size, m.width, rank, s.layout.leading_rank,
                  reinterpret_cast<bf16*>(out + s.layout.projection_scale_offset));
    write_key_factor(s, m, out);
    bf16* value_mean = reinterpret_cast<bf16*>(out + s.layout.value_mean_offset);
    for (int64_t i = 0; i < s.head_size; i += W) store(value_mean + i, load(m.value_mean + i));
    center_factors(s, m, rank, m.scales);
    fp16* mean = reinterpret_cast<fp16*>(out + s.layout.key_factor_mean_offset);
    for (int j = 0; j < rank; j += W) store(mean + j, load(m.scales + j));
    if (s.layout.has_value_map) write_value_map(s, m, out);
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
