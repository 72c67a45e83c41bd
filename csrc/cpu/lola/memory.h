// One KV head's part of a request's memory, and how much of it is in use: a function of the position alone.
#pragma once

#include "cpu/attend.h"
#include "cpu/lola/args.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

inline int64_t ring_rows(const LolaMemory& m) { return m.window + m.chunk; }

// Chunks that have left the window when `seen` tokens, the current one included, were taken in.
inline int64_t updates_at(const LolaMemory& m, int64_t seen) {
  return seen <= ring_rows(m) ? 0 : ceil_div(seen - ring_rows(m), m.chunk);
}
inline int64_t cached_after(const LolaMemory& m, int64_t updates) { return min(m.cache, updates * m.chunk); }
inline int64_t folded_after(const LolaMemory& m, int64_t updates) {
  return updates * m.chunk - cached_after(m, updates);
}

// A row is a key with its value behind it.
template <class T>
struct HeadMemory {
  float *key_mean, *value_mean, *cross_moment, *second_moment;
  float* feature_values;  // [D, d]
  float* feature_sum;     // [D]
  T* ring;                // [ring_rows, 2, d]
  T* cache;               // [cache, 2, d]
  int32_t* positions;     // [cache], ascending
};

template <class T>
inline HeadMemory<T> head_memory(const LolaMemory& m, int64_t block, int64_t head) {
  uint8_t* base = m.data + block * m.block_stride + head * m.head_stride;
  const auto sums = [&](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  return {sums(m.key_mean_offset),
          sums(m.value_mean_offset),
          sums(m.cross_moment_offset),
          sums(m.second_moment_offset),
          sums(m.feature_values_offset),
          sums(m.feature_sum_offset),
          reinterpret_cast<T*>(base + m.ring_offset),
          reinterpret_cast<T*>(base + m.cache_offset),
          reinterpret_cast<int32_t*>(base + m.positions_offset)};
}

// Keys and values of some tokens, wherever they lie.
template <class T>
struct Rows {
  const T** keys;
  const T** values;
};

template <class T>
inline Rows<T> take_rows(Carver& carver, int64_t count) {
  Rows<T> rows;
  rows.keys = carver.take<const T*>(count);
  rows.values = carver.take<const T*>(count);
  return rows;
}

template <class T>
inline void put_row(T* row, const T* key, const T* value, int64_t head_size) {
  std::memcpy(row, key, head_size * sizeof(T));
  std::memcpy(row + head_size, value, head_size * sizeof(T));
}

template <class T>
inline const T* token_key(const LolaTokens& t, int64_t token, int64_t kv_head) {
  return static_cast<const T*>(t.key) + token * t.key_token_stride + kv_head * t.key_head_stride;
}
template <class T>
inline const T* token_value(const LolaTokens& t, int64_t token, int64_t kv_head) {
  return static_cast<const T*>(t.value) + token * t.value_token_stride + kv_head * t.value_head_stride;
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
