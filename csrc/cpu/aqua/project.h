// Vectors in the basis of their KV head, and which dimensions of a query count.
#pragma once

#include "cpu/aqua/args.h"
#include "cpu/common.h"

namespace lrqk {
namespace LRQK_ISA {
namespace aqua {

inline const float* projection_of(const AquaBasis& basis, int64_t kv_head, int64_t head_size, int64_t stored) {
  return basis.projection + kv_head * head_size * stored;
}

// out[j] = sum_i vector[i] projection[i, j], for `stored` a multiple of W.
template <class T>
inline void project(const T* vector, const float* projection, int64_t head_size, int64_t stored, float* out) {
  alignas(64) float values[W];
  for (int64_t j = 0; j < stored; j += W) store(out + j, zero());
  for (int64_t first = 0; first < head_size; first += W) {
    store(values, load(vector + first));
    const float* rows = projection + first * stored;
    for (int64_t j = 0; j < stored; j += W) {
      F acc = load(out + j);
      LRQK_UNROLL
      for (int i = 0; i < W; ++i) acc = mul_add(load(rows + i * stored + j), set(values[i]), acc);
      store(out + j, acc);
    }
  }
}

// is_chosen[j] for the `keep` largest of size[0 ... stored - 1], of equal ones the first.
inline void choose(const float* size, int64_t stored, int64_t keep, bool* is_chosen) {
  for (int64_t j = 0; j < stored; ++j) {
    int64_t larger = 0;
    for (int64_t i = 0; i < j; ++i) larger += size[i] >= size[j];
    for (int64_t i = j + 1; i < stored; ++i) larger += size[i] > size[j];
    is_chosen[j] = larger < keep;
  }
}

// The dimensions that a group of query heads reads.
struct Dimensions {
  float* query;    // [count, G], scaled for scores in units of log 2; zero where a head does not use a dimension
  int32_t* index;  // [count], ascending
  int32_t* pairs;  // int8 keys: [count / 2, G], two int16 of the query divided by `step`
  float* step;     // int8 keys: [G]
  int count;       // int8 keys: even
};

inline int64_t max_count(int64_t stored) { return stored + stored % 2; }

// Chooses dimensions for projected queries [G, s], which it scales.
inline void choose_dimensions(const AquaDecodeArgs& a, int64_t kv_head, int group, float* projected, Dimensions& out) {
  const int64_t stored = a.blocks.stored;
  const float* sigma = a.basis.sigma + kv_head * stored;
  bool is_chosen[kMaxStored];
  float size[kMaxStored];
  bool is_read[kMaxStored] = {};
  if (a.keep >= stored) {
    for (int64_t j = 0; j < stored; ++j) is_read[j] = true;
  } else if (a.per_query_head) {
    for (int g = 0; g < group; ++g) {
      float* q = projected + g * stored;
      for (int64_t j = 0; j < stored; ++j) size[j] = q[j] * q[j];
      choose(size, stored, a.keep, is_chosen);
      for (int64_t j = 0; j < stored; ++j) {
        q[j] = is_chosen[j] ? q[j] : 0.0f;
        is_read[j] |= is_chosen[j];
      }
    }
  } else {
    for (int64_t j = 0; j < stored; ++j) {
      float sum = 0.0f;
      for (int g = 0; g < group; ++g) sum += projected[g * stored + j] * projected[g * stored + j];
      size[j] = sum * sigma[j] * sigma[j];
    }
    choose(size, stored, a.keep, is_read);
  }
  out.count = 0;
  for (int64_t j = 0; j < stored; ++j) {
    if (!is_read[j]) continue;
    const float factor = a.scale * kLog2e * (a.blocks.is_int8 ? sigma[j] : 1.0f);
    for (int g = 0; g < group; ++g) out.query[out.count * group + g] = projected[g * stored + j] * factor;
    out.index[out.count++] = static_cast<int32_t>(j);
  }
}

// Queries for int8 keys: 16 bits with one step per head, two dimensions in a word.
inline void quantize_query(int group, Dimensions& out) {
  if (out.count % 2) {
    for (int g = 0; g < group; ++g) out.query[out.count * group + g] = 0.0f;
    out.index[out.count] = out.index[out.count - 1];
    ++out.count;
  }
  for (int g = 0; g < group; ++g) {
    float largest = 1e-30f;
    for (int i = 0; i < out.count; ++i) largest = max(largest, __builtin_fabsf(out.query[i * group + g]));
    out.step[g] = largest / 32767.0f;
    const auto rounded = [&](int i) {
      return static_cast<int32_t>(__builtin_rintf(out.query[i * group + g] / out.step[g]));
    };
    for (int i = 0; i < out.count; i += 2) {
      const uint32_t word =
          (static_cast<uint32_t>(rounded(i)) & 0xffff) | (static_cast<uint32_t>(rounded(i + 1)) << 16);
      out.pairs[i / 2 * group + g] = static_cast<int32_t>(word);
    }
  }
}

}  // namespace aqua
}  // namespace LRQK_ISA
}  // namespace lrqk
