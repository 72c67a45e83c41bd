// Attention of the query heads of one KV head over rows that lie anywhere in memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr int kChunkRows = 32;  // rows whose values stay in the first-level cache between scores and sums
constexpr int kColumnPairs = W >= 16 ? 2 : 1;

// Online softmax over some of the rows, for each head of a group; scores are in units of log 2.
struct Partial {
  float* m;    // [G], highest score
  float* l;    // [G], sum of 2^(score - m)
  float* acc;  // [G, d], sum of 2^(score - m) value
};

inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i);
}

// scores[g][i] = q_g . row_i; the count is rounded up to whole batches, whose rows must be readable. Fetches the
// rows of `later` meanwhile, if given.
template <int B, class T>
inline void dot_rows(const float* query, int64_t head_size, const T* const* rows, int count, const T* const* later,
                     float* scores) {
  constexpr int kBatch = W / B;
  for (int first = 0; first < count; first += kBatch) {
    F acc[W];
    LRQK_UNROLL
    for (int i = 0; i < W; ++i) acc[i] = zero();
    for (int64_t i = 0; i < head_size; i += 2 * W) {
      F qa[B], qb[B];
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        qa[g] = load(query + g * head_size + i);
        qb[g] = load(query + g * head_size + i + W);
      }
      LRQK_UNROLL
      for (int row = 0; row < kBatch; ++row) {
        if (later) prefetch(later[first + row] + i, 2 * W * sizeof(T));
        F a, b;
        load_pair(rows[first + row] + i, a, b);
        LRQK_UNROLL
        for (int g = 0; g < B; ++g) {
          acc[g * kBatch + row] = mul_add(a, qa[g], acc[g * kBatch + row]);
          acc[g * kBatch + row] = mul_add(b, qb[g], acc[g * kBatch + row]);
        }
      }
    }
    alignas(64) float sums[W];
    store(sums, reduce_sum_each(acc));
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) {
      std::memcpy(scores + g * kChunkRows + first, sums + g * kBatch, kBatch * sizeof(float));
    }
  }
}

// acc[g] = acc[g] * rescale[g] + sum_i weights[g][i] row_i, for kPairs pairs of columns. Fetches the same columns
// of the rows of `later` meanwhile, if given.
template <int B, int kPairs, class T>
inline void add_columns(const T* const* rows, const T* const* later, int64_t column, int count, const float* weights,
                        const float* rescale, float* acc, int64_t head_size) {
  F sums[B][2 * kPairs];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) {
      sums[g][i] = mul(load(acc + g * head_size + column + i * W), set(rescale[g]));
    }
  }
  for (int row = 0; row < count; ++row) {
    if (later) prefetch(later[row] + head_size + column, kPairs * 2 * W * sizeof(T));
    LRQK_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      F a, b;
      load_pair(rows[row] + column + pair * 2 * W, a, b);
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        const F weight = set(weights[g * kChunkRows + row]);
        sums[g][2 * pair] = mul_add(a, weight, sums[g][2 * pair]);
        sums[g][2 * pair + 1] = mul_add(b, weight, sums[g][2 * pair + 1]);
      }
    }
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) store(acc + g * head_size + column + i * W, sums[g][i]);
  }
}

template <class T>
inline void add_rows(const T* const* rows, const T* const* later, int count, const float* weights, const float* rescale,
                     int heads, int64_t head_size, float* acc) {
  for_head_blocks(heads, [&](auto block, int g) {
    constexpr int B = decltype(block)::value;
    const float* w = weights + g * kChunkRows;
    float* out = acc + g * head_size;
    const T* const* next = g == 0 ? later : nullptr;
    int64_t column = 0;
    for (; column + kColumnPairs * 2 * W <= head_size; column += kColumnPairs * 2 * W) {
      add_columns<B, kColumnPairs>(rows, next, column, count, w, rescale + g, out, head_size);
    }
    for (; column < head_size; column += 2 * W) {
      add_columns<B, 1>(rows, next, column, count, w, rescale + g, out, head_size);
    }
  });
}

// From load_pair's order to the natural one.
template <class T>
inline void to_natural_order(float* acc, int heads, int64_t head_size) {
  for (int64_t i = 0; i < heads * head_size; i += 2 * W) {
    float natural[2 * W];
    for (int half = 0; half < 2; ++half) {
      for (int lane = 0; lane < W; ++lane) {
        natural[pair_index(static_cast<const T*>(nullptr), half, lane)] = acc[i + half * W + lane];
      }
    }
    std::memcpy(acc + i, natural, sizeof(natural));
  }
}

// One query head in load_pair's order, scaled for scores in units of log 2.
template <class T>
inline void prepare_query(const T* query, int64_t head_size, float scale, float* out) {
  const F factor = set(scale * kLog2e);
  for (int64_t i = 0; i < head_size; i += 2 * W) {
    F a, b;
    load_pair(query + i, a, b);
    store(out + i, mul(a, factor));
    store(out + i + W, mul(b, factor));
  }
}

inline void clear(const Partial& partial, int heads, int64_t head_size) {
  for (int g = 0; g < heads; ++g) {
    partial.m[g] = kMasked;
    partial.l[g] = 0.0f;
  }
  std::memset(partial.acc, 0, heads * head_size * sizeof(float));
}

// Attends rows(0) ... rows(count - 1), each a key with its value behind it. Rows up to `available` are fetched for
// whoever comes next. `scores` [G, kChunkRows] and `rescale` [G] are working memory. With cap > 0 it is the soft cap of
// the logits, in units of log 2 as well.
template <class T, class Rows>
inline void attend_rows(const float* query, int heads, int64_t head_size, const Rows& rows, int64_t count,
                        int64_t available, float* scores, float* rescale, const Partial& out, float cap = 0.0f) {
  clear(out, heads, head_size);
  const T* keys[2][kChunkRows];
  const T* values[kChunkRows];
  const auto find = [&](int64_t first, const T** pointers) {
    for (int i = 0; i < kChunkRows; ++i) pointers[i] = rows(min(first + i, available - 1));
  };
  if (count > 0) find(0, keys[0]);
  for (int64_t first = 0; first < count; first += kChunkRows) {
    const int here = static_cast<int>(min<int64_t>(kChunkRows, count - first));
    const T** now = keys[first / kChunkRows % 2];
    const T** later = nullptr;
    if (first + kChunkRows < available) {
      later = keys[1 - first / kChunkRows % 2];
      find(first + kChunkRows, later);
    }
    for (int i = 0; i < kChunkRows; ++i) values[i] = now[i] + head_size;
    for_head_blocks(heads, [&](auto block, int g) {
      dot_rows<decltype(block)::value>(query + g * head_size, head_size, now, here, g == 0 ? later : nullptr,
                                       scores + g * kChunkRows);
    });
    for (int g = 0; g < heads; ++g) {
      float* s = scores + g * kChunkRows;
      for (int i = 0; cap > 0.0f && i < kChunkRows; i += W) store(s + i, soft_cap(load(s + i), cap));
      for (int i = here; i < kChunkRows; ++i) s[i] = kMasked;
      F top = set(out.m[g]);
      for (int i = 0; i < kChunkRows; i += W) top = max(top, load(s + i));
      const float m = reduce_max(top);
      F total = zero();
      for (int i = 0; i < kChunkRows; i += W) {
        const F weight = exp2(sub(load(s + i), set(m)));
        store(s + i, weight);
        total = add(total, weight);
      }
      for (int i = here; i < kChunkRows; ++i) s[i] = 0.0f;
      alignas(64) float ratio[W];
      store(ratio, exp2(set(out.m[g] - m)));
      rescale[g] = ratio[0];
      out.l[g] = out.l[g] * rescale[g] + reduce_sum(total);
      out.m[g] = m;
    }
    add_rows(values, later, here, scores, rescale, heads, head_size, out.acc);
  }
  to_natural_order<T>(out.acc, heads, head_size);
}

// Joins `count` partials, head by head, and writes the output of each head. `sinks` [heads] are as in Logits.
template <class T>
inline void merge_partials(const Partial* partials, int64_t count, int heads, int64_t head_size, T* output,
                           int64_t head_stride, float* total, const float* sinks = nullptr) {
  for (int g = 0; g < heads; ++g) {
    const float sink = sinks ? sinks[g] * kLog2e : kMasked;
    float m = sink;
    for (int64_t i = 0; i < count; ++i) m = max(m, partials[i].m[g]);
    alignas(64) float share[W];
    store(share, exp2(set(sink - m)));
    float l = sinks ? share[0] : 0.0f;
    std::memset(total, 0, head_size * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      if (!(partials[i].l[g] != 0.0f)) continue;
      alignas(64) float weight[W];
      store(weight, exp2(set(partials[i].m[g] - m)));
      l += partials[i].l[g] * weight[0];
      const float* part = partials[i].acc + g * head_size;
      for (int64_t c = 0; c < head_size; c += W) {
        store(total + c, mul_add(load(part + c), set(weight[0]), load(total + c)));
      }
    }
    const F inverse = set(l != 0.0f ? 1.0f / l : 0.0f);
    for (int64_t c = 0; c < head_size; c += W) store(output + g * head_stride + c, mul(load(total + c), inverse));
  }
}

}  // namespace LRQK_ISA
}  // namespace lrqk
