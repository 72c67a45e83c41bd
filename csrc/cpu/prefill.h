// Exact attention of one chunk over the host pages: causal inside the chunk, and everything before it.
//
// A task is a block of tokens with the query heads of one KV head as rows. Scores are kept transposed, [keys, rows]:
// then keys and values are read in their natural order, and the softmax runs along vector lanes.
#pragma once

#include <cstring>

#include "cpu/matmul.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int kBlockRows = 192;  // a multiple of kMatmulRows and of 2 W
constexpr int kTileKeys = 120;   // a multiple of kMatmulRows
constexpr int kWeightStride = kBlockRows + 16;  // an odd number of cache lines: rows do not fall on the same ones
static_assert(kBlockRows % kMatmulRows == 0 && kBlockRows % (2 * W) == 0 && kTileKeys % kMatmulRows == 0);

struct PrefillMemory {
  float* query;      // [kBlockRows / 2 W, d, 2 W], scaled for scores in units of log 2
  float* key;        // [kTileKeys, d]
  float* value;      // [d / 2 W, kTileKeys, 2 W]
  float* weights;    // [kTileKeys, kWeightStride], scores and then their exponentials
  float* output;     // [kBlockRows, d]
  float* highest;    // [kBlockRows]
  float* sum;        // [kBlockRows]
  float* keep;       // [kBlockRows]
  float* last_key;   // [kBlockRows], the last key of the chunk that a row attends
};

inline PrefillMemory carve(int64_t head_size, Carver& carver) {
  PrefillMemory m;
  m.query = carver.take<float>(kBlockRows * head_size);
  m.key = carver.take<float>(kTileKeys * head_size);
  m.value = carver.take<float>(kTileKeys * head_size);
  m.weights = carver.take<float>(kTileKeys * kWeightStride);
  m.output = carver.take<float>(kBlockRows * head_size);
  m.highest = carver.take<float>(kBlockRows);
  m.sum = carver.take<float>(kBlockRows);
  m.keep = carver.take<float>(kBlockRows);
  m.last_key = carver.take<float>(kBlockRows);
  return m;
}

struct Block {
  int64_t kv_head, first_token, tokens;
  int rows, padded_rows;  // tokens * G, and that rounded up to 2 W
};

template <class T>
inline void load_queries(const PrefillArgs& p, const Block& block, PrefillMemory& m) {
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const float factor = p.scale * kLog2e;
  alignas(64) float row_values[1024];
  for (int row = 0; row < block.padded_rows; ++row) {
    const int source = min(row, block.rows - 1);
    const int64_t token = block.first_token + source / group;
    const T* q = static_cast<const T*>(p.query) + token * p.query_token_stride +
                 (block.kv_head * group + source % group) * p.query_head_stride;
    for (int64_t i = 0; i < p.head_size; i += W) store(row_values + i, mul(load(q + i), set(factor)));
    float* out = m.query + row / (2 * W) * (2 * W) * p.head_size + row % (2 * W);
    for (int64_t i = 0; i < p.head_size; ++i) out[i * 2 * W] = row_values[i];
    m.last_key[row] = static_cast<float>(token);
    m.highest[row] = kMasked;
    m.sum[row] = 0.0f;
  }
  std::memset(m.output, 0, kBlockRows * p.head_size * sizeof(float));
}

inline float* value_place(const PrefillMemory& m, int key, int64_t column) {
  const int64_t within = column % (2 * W);
  return m.value + (column - within) * kTileKeys + key * 2 * W + within;
}

// Keys and values of `count` tokens from `position` on, of the request when is_context, else of the chunk.
template <class T>
inline void load_tile(const PrefillArgs& p, int64_t kv_head, bool is_context, int64_t position, int count,
                      PrefillMemory& m) {
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
      store(m.key + i * d + column, load(key + column));
      store(value_place(m, i, column), load(value + column));
    }
  }
  const int padded = static_cast<int>(ceil_div(count, kMatmulRows)) * kMatmulRows;
  for (int i = count; i < padded; ++i) {
    for (int64_t column = 0; column < d; column += W) {
      store(m.key + i * d + column, zero());
      store(value_place(m, i, column), zero());
    }
  }
}

// Exponentials of the tile's scores, in place; updates highest, sum and keep. A row sees the chunk's key
// position + i when that is at most its last_key.
inline void exponentiate_tile(int count, int padded, int padded_rows, bool is_causal, int64_t position,
                              PrefillMemory& m) {
  for (int row = 0; row < padded_rows; row += W) {
    float* weights = m.weights + row;
    if (is_causal) {
      const F last_key = load(m.last_key + row), masked = set(kMasked);
      for (int i = 0; i < count; ++i) {
        float* w = weights + i * kWeightStride;
        store(w, if_then_else(ge(last_key, set(static_cast<float>(position + i))), load(w), masked));
      }
    }
    const F before = load(m.highest + row);
    F top[2] = {before, before};
    for (int i = 0; i < count; ++i) top[i & 1] = max(top[i & 1], load(weights + i * kWeightStride));
    const F highest = max(top[0], top[1]);
    F total = zero();
    for (int i = 0; i < count; ++i) {
      const F weight = exp2(sub(load(weights + i * kWeightStride), highest));
      store(weights + i * kWeightStride, weight);
      total = add(total, weight);
    }
    for (int i = count; i < padded; ++i) store(weights + i * kWeightStride, zero());
    const F keep = exp2(sub(before, highest));
    store(m.highest + row, highest);
    store(m.keep + row, keep);
    store(m.sum + row, mul_add(load(m.sum + row), keep, total));
  }
}

template <class T>
inline void attend_tile(const PrefillArgs& p, const Block& block, bool is_context, int64_t position, int count,
                        PrefillMemory& m) {
  const int64_t d = p.head_size;
  const int padded = static_cast<int>(ceil_div(count, kMatmulRows)) * kMatmulRows;
  load_tile<T>(p, block.kv_head, is_context, position, count, m);
  for (int row = 0; row < block.padded_rows; row += 2 * W) {
    for (int i = 0; i < padded; i += kMatmulRows) {
      multiply_tile<false>(m.key + i * d, d, 1, m.query + row * d, 2 * W, d, m.weights + i * kWeightStride + row,
                           kWeightStride, nullptr);
    }
  }
  const bool is_causal = !is_context && position + count > block.first_token + 1;
  exponentiate_tile(count, padded, block.padded_rows, is_causal, position, m);
  const int rows = static_cast<int>(ceil_div(block.rows, kMatmulRows)) * kMatmulRows;
  for (int64_t column = 0; column < d; column += 2 * W) {
    for (int row = 0; row < rows; row += kMatmulRows) {
      multiply_tile<true>(m.weights + row, 1, kWeightStride, m.value + column * kTileKeys, 2 * W, padded, m.output + row * d + column, d,
                          m.keep + row);
    }
  }
}

template <class T>
inline void store_output(const PrefillArgs& p, const Block& block, const PrefillMemory& m) {
  const int group = static_cast<int>(p.heads / p.kv_heads);
  for (int row = 0; row < block.rows; ++row) {
    T* out = static_cast<T*>(p.output) + (block.first_token + row / group) * p.output_token_stride +
             (block.kv_head * group + row % group) * p.output_head_stride;
    const F inverse = set(1.0f / m.sum[row]);
    for (int64_t i = 0; i < p.head_size; i += W) store(out + i, mul(load(m.output + row * p.head_size + i), inverse));
  }
}

inline void prefill(const PrefillArgs& p, const Parallel& parallel) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t block_tokens = kBlockRows / group;
  const int64_t blocks = ceil_div(p.tokens, block_tokens);
  for_each(parallel, blocks * p.kv_heads, [&](int64_t index) {
    Carver counter(nullptr);
    carve(p.head_size, counter);
    Carver carver(scratch(Scratch::kTask, counter.used()));
    PrefillMemory m = carve(p.head_size, carver);
    Block block;
    block.kv_head = index % p.kv_heads;
    block.first_token = (blocks - 1 - index / p.kv_heads) * block_tokens;  // the longest first
    block.tokens = min(block_tokens, p.tokens - block.first_token);
    block.rows = static_cast<int>(block.tokens * group);
    block.padded_rows = static_cast<int>(ceil_div(block.rows, 2 * W)) * 2 * W;
    with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      load_queries<T>(p, block, m);
      for (int64_t i = 0; i < p.context_len; i += kTileKeys) {
        attend_tile<T>(p, block, true, i, static_cast<int>(min<int64_t>(kTileKeys, p.context_len - i)), m);
      }
      const int64_t stop = block.first_token + block.tokens;
      for (int64_t i = 0; i < stop; i += kTileKeys) {
        attend_tile<T>(p, block, false, i, static_cast<int>(min<int64_t>(kTileKeys, stop - i)), m);
      }
      store_output<T>(p, block, m);
    });
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
