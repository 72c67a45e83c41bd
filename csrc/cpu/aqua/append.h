// New tokens into the blocks: projected keys across the dimensions' runs, values as they are.
#pragma once

#include <cstring>

#include "cpu/aqua/project.h"

namespace lrqk {
namespace LRQK_ISA {
namespace aqua {

template <class T>
inline void append_token(const AquaAppendArgs& a, int64_t token, int64_t kv_head, float* projected) {
  const AquaBlocks& blocks = a.blocks;
  const int64_t n = blocks.block_size, stored = blocks.stored;
  const int64_t index = a.slot_mapping[token] / n, offset = a.slot_mapping[token] % n;
  uint8_t* block = blocks.data + index * blocks.block_stride + kv_head * blocks.head_stride;
  const T* key = static_cast<const T*>(a.key) + token * a.key_token_stride + kv_head * a.key_head_stride;
  const T* value = static_cast<const T*>(a.value) + token * a.value_token_stride + kv_head * a.value_head_stride;
  std::memcpy(block + blocks.value_offset + offset * a.head_size * sizeof(T), value, a.head_size * sizeof(T));
  project(key, projection_of(a.basis, kv_head, a.head_size, stored), a.head_size, stored, projected);
  const float* offsets = a.basis.offset + kv_head * stored;
  for (int64_t j = 0; j < stored; j += W) store(projected + j, sub(load(projected + j), load(offsets + j)));
  if (blocks.is_int8) {
    const float* sigma = a.basis.sigma + kv_head * stored;
    float largest = 0.0f;
    for (int64_t j = 0; j < stored; ++j) {
      projected[j] /= sigma[j];
      largest = max(largest, __builtin_fabsf(projected[j]));
    }
    const float scale = max(largest, 1e-30f) / 127.0f;
    reinterpret_cast<float*>(block + blocks.key_scale_offset)[offset] = scale;
    int8_t* out = reinterpret_cast<int8_t*>(block) + offset;
    for (int64_t j = 0; j < stored; ++j) out[j * n] = static_cast<int8_t>(__builtin_rintf(projected[j] / scale));
    return;
  }
  T* out = reinterpret_cast<T*>(block) + offset;
  T rounded[W];
  for (int64_t j = 0; j < stored; j += W) {
    store(rounded, load(projected + j));
    for (int i = 0; i < W; ++i) out[(j + i) * n] = rounded[i];
  }
}

inline void append(const AquaAppendArgs& a, const Parallel& parallel) {
  constexpr int64_t kTaskTokens = 16;
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t parts = ceil_div(a.tokens, kTaskTokens);
    for_each(parallel, parts * a.kv_heads, [&](int64_t task) {
      alignas(64) float projected[kMaxStored];
      const int64_t kv_head = task / parts, first = task % parts * kTaskTokens;
      for (int64_t token = first; token < min(first + kTaskTokens, a.tokens); ++token) {
        if (a.slot_mapping[token] >= 0) append_token<T>(a, token, kv_head, projected);
      }
    });
  });
}

}  // namespace aqua
}  // namespace LRQK_ISA
}  // namespace lrqk
