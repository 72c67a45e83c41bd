// One decode step of one LoLA layer: the update, if it is due, the new row, and window, cache and state in one pass.
#pragma once

#include "cpu/lola/update.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

struct DecodeMemory {
  float* query;         // [G, d], in load_pair's order
  float* natural;       // [G, d]; scaled for the slope state
  float* features;      // [D]
  float* scores;        // [G, kChunkRows]
  float* rescale;       // [G]
  float* total;         // [d]
  Partial partials[2];  // exact rows, state
};

inline DecodeMemory take_decode_memory(int64_t group, int64_t head_size, int64_t num_features, Carver& carver) {
  DecodeMemory m;
  m.query = carver.take<float>(group * head_size);
  m.natural = carver.take<float>(group * head_size);
  m.features = carver.take<float>(num_features);
  m.scores = carver.take<float>(group * kChunkRows);
  m.rescale = carver.take<float>(group);
  m.total = carver.take<float>(head_size);
  for (Partial& partial : m.partials) {
    partial.m = carver.take<float>(group);
    partial.l = carver.take<float>(group);
    partial.acc = carver.take<float>(group * head_size);
  }
  return m;
}

template <class T>
inline void update_in_memory(const LolaArgs& a, int64_t head, const HeadMemory<T>& memory, int64_t updates) {
  Carver counter(nullptr);
  take_candidates<T>(a.memory, counter);
  take_update_memory<T>(a, counter);
  Carver carver(scratch(Scratch::kTask, counter.used()));
  Candidates<T> c = take_candidates<T>(a.memory, carver);
  UpdateMemory<T> m = take_update_memory<T>(a, carver);
  const int64_t d = a.tokens.head_size, cached = cached_after(a.memory, updates), first = updates * a.memory.chunk;
  for (int64_t i = 0; i < cached + a.memory.chunk; ++i) {
    const int64_t position = first + i - cached;
    const T* row = i < cached ? memory.cache + i * 2 * d : memory.ring + position % ring_rows(a.memory) * 2 * d;
    c.rows.keys[i] = row;
    c.rows.values[i] = row + d;
    c.positions[i] = i < cached ? memory.positions[i] : static_cast<int32_t>(position);
  }
  load_directions(a, head, m);
  update(a, head, memory, updates, c, m);
  store_cache(c, cached_after(a.memory, updates + 1), d, memory);
}

// What the state reads for the queries of one head; their order is natural, scores are in units of log 2.
template <class T>
inline void read_state(const LolaArgs& a, int64_t head, const HeadMemory<T>& state, int64_t folded, int group,
                       const float* query, const Partial& out) {
  const int64_t d = a.tokens.head_size;
  const int r = a.memory.rank;
  const float* directions = a.query_directions + head * r * d;
  const float log_count = __builtin_log2f(static_cast<float>(folded));
  for (int g = 0; g < group; ++g) {
    const auto dot = [&](const float* other) {
      F total = zero();
      for (int64_t c = 0; c < d; c += W) total = mul_add(load(query + g * d + c), load(other + c), total);
      return reduce_sum(total);
    };
    float* value = out.acc + g * d;
    out.m[g] = log_count + dot(state.key_mean);
    out.l[g] = 1.0f;
    std::memcpy(value, state.value_mean, d * sizeof(float));
    for (int j = 0; j < r; ++j) {
      const F weight = set(dot(directions + j * d) / kLog2e / static_cast<float>(folded));
      for (int64_t c = 0; c < d; c += W) {
        store(value + c, mul_add(load(state.cross_moment + j * d + c), weight, load(value + c)));
      }
    }
  }
}

template <class T>
inline void decode_head(const LolaArgs& a, int64_t request, int64_t head) {
  const LolaTokens& t = a.tokens;
  const int64_t d = t.head_size, seen = a.seq_lens[request];
  const int group = static_cast<int>(t.heads / t.kv_heads);
  T* output = static_cast<T*>(t.output) + request * t.output_token_stride + head * group * t.output_head_stride;
  if (seen <= 0) {
    for (int g = 0; g < group; ++g) std::memset(output + g * t.output_head_stride, 0, d * sizeof(T));
    return;
  }
  const HeadMemory<T> memory = head_memory<T>(a.memory, a.blocks[request * a.blocks_stride], head);
  const int64_t updates = updates_at(a.memory, seen), rows = ring_rows(a.memory);
  if (updates > updates_at(a.memory, seen - 1)) update_in_memory(a, head, memory, updates - 1);
  put_row(memory.ring + (seen - 1) % rows * 2 * d, token_key<T>(t, request, head), token_value<T>(t, request, head), d);

  Carver counter(nullptr);
  take_decode_memory(group, d, a.memory.num_features, counter);
  Carver carver(scratch(Scratch::kTask, counter.used()));
  const DecodeMemory m = take_decode_memory(group, d, a.memory.num_features, carver);
  const F factor = set(a.memory.num_features > 0 ? 1.0f : a.scale * kLog2e);
  for (int g = 0; g < group; ++g) {
    const T* query =
        static_cast<const T*>(t.query) + request * t.query_token_stride + (head * group + g) * t.query_head_stride;
    prepare_query(query, d, a.scale, m.query + g * d);
    for (int64_t c = 0; c < d; c += W) store(m.natural + g * d + c, mul(load(query + c), factor));
  }
  const int64_t cached = cached_after(a.memory, updates), folded = folded_after(a.memory, updates);
  const int64_t first = updates * a.memory.chunk, oldest = first % rows;
  const auto row = [&](int64_t i) -> const T* {
    if (i < cached) return memory.cache + i * 2 * d;
    const int64_t place = oldest + i - cached;
    return memory.ring + (place < rows ? place : place - rows) * 2 * d;
  };
  const int64_t count = cached + seen - first;
  attend_rows<T>(m.query, group, d, row, count, count, m.scores, m.rescale, m.partials[0]);
  const bool has_features = folded > 0 && a.memory.num_features > 0;
  const bool has_state = has_features || (folded > 0 && a.memory.rank > 0);
  if (has_features) {
    read_hedgehog(a, head, memory, group, m.natural, m.features, m.partials[0], m.partials[1]);
  } else if (has_state) {
    read_state(a, head, memory, folded, group, m.natural, m.partials[1]);
  }
  merge_partials(m.partials, has_state ? 2 : 1, group, d, output, t.output_head_stride, m.total);
}

inline void decode(const LolaArgs& a, const Parallel& parallel) {
  for_each(parallel, a.tokens.count * a.tokens.kv_heads, [&](int64_t index) {
    with_type(a.tokens.dtype, [&](auto tag) {
      decode_head<typename decltype(tag)::type>(a, index / a.tokens.kv_heads, index % a.tokens.kv_heads);
    });
  });
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
