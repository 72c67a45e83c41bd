// Exact attention of one chunk over the host pages: causal inside the chunk, and everything before it.
//
// A task is a block of tokens with the query heads of one KV head. Scores are kept transposed, [keys, queries]:
// then keys and values are read in their natural order, and the softmax runs along vector lanes.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/matmul.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int kBlockQueries = 192;                 // a multiple of kMatmulRows and of 2 W
constexpr int kTileKeys = 120;                     // a multiple of kMatmulRows
constexpr int kWeightStride = kBlockQueries + 16;  // an odd number of cache lines: keys do not fall on the same ones
static_assert(kBlockQueries % kMatmulRows == 0 && kBlockQueries % (2 * W) == 0 && kTileKeys % kMatmulRows == 0);

struct PrefillMemory {
  float* query;     // [kBlockQueries / 2 W, d, 2 W], scaled for scores in units of log 2
  float* key;       // [kTileKeys, d]
  float* value;     // [d / 2 W, kTileKeys, 2 W]
  float* weights;   // [kTileKeys, kWeightStride], scores and then their exponentials
  float* acc;       // [kBlockQueries, d]
  float* m;         // [kBlockQueries]
  float* l;         // [kBlockQueries]
  float* rescale;   // [kBlockQueries]
  float* last_key;  // [kBlockQueries], the last key of the chunk that a query attends
};

inline PrefillMemory carve(int64_t head_size, Carver& carver) {
  PrefillMemory memory;
  memory.query = carver.take<float>(kBlockQueries * head_size);
  memory.key = carver.take<float>(kTileKeys * head_size);
  memory.value = carver.take<float>(kTileKeys * head_size);
  memory.weights = carver.take<float>(kTileKeys * kWeightStride);
  memory.acc = carver.take<float>(kBlockQueries * head_size);
  memory.m = carver.take<float>(kBlockQueries);
  memory.l = carver.take<float>(kBlockQueries);
  memory.rescale = carver.take<float>(kBlockQueries);
  memory.last_key = carver.take<float>(kBlockQueries);
  return memory;
}

struct Block {
  int64_t kv_head, first_token, tokens;
  int queries, padded_queries;  // tokens * G, and that rounded up to 2 W
};

template <class T>
inline void load_queries(const PrefillArgs& p, const Block& block, PrefillMemory& memory) {
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const float factor = p.scale * kLog2e;
  alignas(64) float values[kMaxHeadSize];
  for (int q = 0; q < block.padded_queries; ++q) {
    const int source = min(q, block.queries - 1);
    const int64_t token = block.first_token + source / group;
    const T* head = static_cast<const T*>(p.query) + token * p.query_token_stride +
                    (block.kv_head * group + source % group) * p.query_head_stride;
    for (int64_t i = 0; i < p.head_size; i += W) store(values + i, mul(load(head + i), set(factor)));
    float* out = memory.query + q / (2 * W) * (2 * W) * p.head_size + q % (2 * W);
    for (int64_t i = 0; i < p.head_size; ++i) out[i * 2 * W] = values[i];
    memory.last_key[q] = static_cast<float>(token);
    const float* sinks = p.logits.sinks;
    memory.m[q] = sinks ? sinks[block.kv_head * group + source % group] * kLog2e : kMasked;
    memory.l[q] = sinks ? 1.0f : 0.0f;
  }
  std::memset(memory.acc, 0, kBlockQueries * p.head_size * sizeof(float));
}

inline float* value_at(const PrefillMemory& memory, int key, int64_t column) {
  const int64_t within = column % (2 * W);
  return memory.value + (column - within) * kTileKeys + key * 2 * W + within;
}

// Keys and values of `count` tokens from `position` on, of the request when is_context, else of the chunk.
template <class T>
inline void load_tile(const PrefillArgs& p, int64_t kv_head, bool is_context, int64_t position, int count,
                      PrefillMemory& memory) {
  const int64_t d = p.head_size;
  for (int i = 0; i < count; ++i) {
    const int64_t token = position + i;
    const T *key, *value;
    if (is_context) {
      key = static_cast<const T*>(p.host.data) + p.pages[token / p.page_size] * p.host.page_stride +
            kv_head * p.host.head_stride + token % p.page_size * 2 * d;
      value = key + d;
    } else {
      key = static_cast<const T*>(p.key) + token * p.key_token_stride + kv_head * p.key_head_stride;
      value = static_cast<const T*>(p.value) + token * p.value_token_stride + kv_head * p.value_head_stride;
    }
    for (int64_t column = 0; column < d; column += W) {
      store(memory.key + i * d + column, load(key + column));
      store(value_at(memory, i, column), load(value + column));
    }
  }
  const int padded = static_cast<int>(ceil_div(count, kMatmulRows)) * kMatmulRows;
  for (int i = count; i < padded; ++i) {
    for (int64_t column = 0; column < d; column += W) {
      store(memory.key + i * d + column, zero());
      store(value_at(memory, i, column), zero());
    }
  }
}

// Exponentials of the tile's scores, in place, after their soft cap if it is above 0; updates m, l and rescale. A query sees the key at position + i, counted
// from the chunk's first, when that is at most its last_key and, with a window, among the last `window` up to it.
inline void exponentiate_tile(int count, int padded, int padded_queries, bool is_causal, int64_t window,
                              int64_t position, float cap, PrefillMemory& memory) {
  for (int q = 0; q < padded_queries; q += W) {
    float* weights = memory.weights + q;
    for (int i = 0; cap > 0.0f && i < count; ++i) {
      float* w = weights + i * kWeightStride;
      store(w, soft_cap(load(w), cap));
    }
    if (is_causal) {
      const F last_key = load(memory.last_key + q), masked = set(kMasked);
      for (int i = 0; i < count; ++i) {
        float* w = weights + i * kWeightStride;
        store(w, if_then_else(ge(last_key, set(static_cast<float>(position + i))), load(w), masked));
      }
    }
    if (window > 0) {  // a tile without any key for a query gives it weights that its own key outweighs to nothing
      const F before_first = sub(load(memory.last_key + q), set(static_cast<float>(window))), masked = set(kMasked);
      for (int i = 0; i < count; ++i) {
        float* w = weights + i * kWeightStride;
        store(w, if_then_else(ge(before_first, set(static_cast<float>(position + i))), masked, load(w)));
      }
    }
    const F before = load(memory.m + q);
    F top[2] = {before, before};
    for (int i = 0; i < count; ++i) top[i & 1] = max(top[i & 1], load(weights + i * kWeightStride));
    const F m = max(top[0], top[1]);
    F total = zero();
    for (int i = 0; i < count; ++i) {
      const F weight = exp2(sub(load(weights + i * kWeightStride), m));
      store(weights + i * kWeightStride, weight);
      total = add(total, weight);
    }
    for (int i = count; i < padded; ++i) store(weights + i * kWeightStride, zero());
    const F rescale = exp2(sub(before, m));
    store(memory.m + q, m);
    store(memory.rescale + q, rescale);
    store(memory.l + q, mul_add(load(memory.l + q), rescale, total));
  }
}

template <class T>
inline void attend_tile(const PrefillArgs& p, const Block& block, bool is_context, int64_t position, int count,
                        PrefillMemory& memory) {
  const int64_t d = p.head_size;
  const int padded = static_cast<int>(ceil_div(count, kMatmulRows)) * kMatmulRows;
  load_tile<T>(p, block.kv_head, is_context, position, count, memory);
  for (int q = 0; q < block.padded_queries; q += 2 * W) {
    for (int i = 0; i < padded; i += kMatmulRows) {
      multiply_tile<false>(memory.key + i * d, d, 1, memory.query + q * d, 2 * W, d,
                           memory.weights + i * kWeightStride + q, kWeightStride, nullptr);
    }
  }
  const bool is_causal = !is_context && position + count > block.first_token + 1;
  const int64_t from_chunk = is_context ? position - p.context_len : position;
  const bool leaves_window = p.window > 0 && from_chunk <= block.first_token + block.tokens - 1 - p.window;
  exponentiate_tile(count, padded, block.padded_queries, is_causal, leaves_window ? p.window : 0, from_chunk,
                    p.logits.cap * kLog2e, memory);
  const int queries = static_cast<int>(ceil_div(block.queries, kMatmulRows)) * kMatmulRows;
  for (int64_t column = 0; column < d; column += 2 * W) {
    for (int q = 0; q < queries; q += kMatmulRows) {
      multiply_tile<true>(memory.weights + q, 1, kWeightStride, memory.value + column * kTileKeys, 2 * W, padded,
                          memory.acc + q * d + column, d, memory.rescale + q);
    }
  }
}

template <class T>
inline void store_output(const PrefillArgs& p, const Block& block, const PrefillMemory& memory) {
  const int group = static_cast<int>(p.heads / p.kv_heads);
  for (int q = 0; q < block.queries; ++q) {
    T* out = static_cast<T*>(p.output) + (block.first_token + q / group) * p.output_token_stride +
             (block.kv_head * group + q % group) * p.output_head_stride;
    const F inverse = set(1.0f / memory.l[q]);
    for (int64_t i = 0; i < p.head_size; i += W) store(out + i, mul(load(memory.acc + q * p.head_size + i), inverse));
  }
}

inline void prefill(const PrefillArgs& p, const Parallel& parallel) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t block_tokens = kBlockQueries / group;
  const int64_t blocks = ceil_div(p.tokens, block_tokens);
  for_each(parallel, blocks * p.kv_heads, [&](int64_t index) {
    Carver counter(nullptr);
    carve(p.head_size, counter);
    Carver carver(scratch(Scratch::kTask, counter.used()));
    PrefillMemory memory = carve(p.head_size, carver);
    Block block;
    block.kv_head = index % p.kv_heads;
    block.first_token = (blocks - 1 - index / p.kv_heads) * block_tokens;  // the longest first
    block.tokens = min(block_tokens, p.tokens - block.first_token);
    block.queries = static_cast<int>(block.tokens * group);
    block.padded_queries = static_cast<int>(ceil_div(block.queries, 2 * W)) * 2 * W;
    with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      load_queries<T>(p, block, memory);
      // Of the chunk, counted from its first token; negative in the context.
      const int64_t first_key = p.window > 0 ? block.first_token - p.window + 1 : -p.context_len;
      for (int64_t i = max<int64_t>(0, p.context_len + min<int64_t>(0, first_key)); i < p.context_len; i += kTileKeys) {
        attend_tile<T>(p, block, true, i, static_cast<int>(min<int64_t>(kTileKeys, p.context_len - i)), memory);
      }
      const int64_t stop = block.first_token + block.tokens;
      for (int64_t i = max<int64_t>(0, first_key); i < stop; i += kTileKeys) {
        attend_tile<T>(p, block, false, i, static_cast<int>(min<int64_t>(kTileKeys, stop - i)), memory);
      }
      store_output<T>(p, block, memory);
    });
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
