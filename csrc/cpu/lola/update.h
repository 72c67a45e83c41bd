// A chunk leaves the window: cache and leaving rows are scored against the state, the best stay, the rest is folded.
#pragma once

#include "cpu/lola/fold.h"
#include "cpu/lola/hedgehog.h"
#include "cpu/lola/regress.h"
#include "cpu/top_k.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

constexpr int kErrorRows = 4;

// The rows that compete for the cache, the older first.
template <class T>
struct Candidates {
  Rows<T> rows;
  int32_t* positions;
};

// Room for the most there can be, rounded up to whole blocks of dot_rows.
inline int64_t most_candidates(const LolaMemory& m) { return ceil_div(m.cache + m.chunk, kChunkRows) * kChunkRows; }

template <class T>
inline Candidates<T> take_candidates(const LolaMemory& m, Carver& carver) {
  Candidates<T> c;
  c.rows = take_rows<T>(carver, most_candidates(m));
  c.positions = carver.take<int32_t>(most_candidates(m));
  return c;
}

template <class T>
struct UpdateMemory {
  float* directions;  // [r, d] of the keys, in load_pair's order
  float* projected;   // [blocks of kChunkRows, r, kChunkRows], relative to the mean
  float* center;      // [r], the mean key along the directions
  float* regression;  // [r, d]
  double* triangle;   // [r, r]
  float* scores;      // [most_candidates]
  int32_t* rest;      // [most_candidates]
  Rows<T> rest_rows;  // [most_candidates]
  FoldMemory fold;
  HedgehogMemory hedgehog;
};

template <class T>
inline UpdateMemory<T> take_update_memory(const LolaArgs& a, Carver& carver) {
  const int64_t most = most_candidates(a.memory), d = a.tokens.head_size;
  const int r = a.memory.rank;
  UpdateMemory<T> m;
  m.directions = carver.take<float>(r * d);
  m.projected = carver.take<float>(r * most);
  m.center = carver.take<float>(r);
  m.regression = carver.take<float>(r * d);
  m.triangle = carver.take<double>(static_cast<int64_t>(r) * r);
  m.scores = carver.take<float>(most);
  m.rest = carver.take<int32_t>(most);
  m.rest_rows = take_rows<T>(carver, most);
  m.fold.projected = carver.take<float>(r * most);
  m.fold.projected_mean = carver.take<float>(r);
  m.fold.key_mean = carver.take<float>(d);
  m.fold.value_mean = carver.take<float>(d);
  m.hedgehog = take_hedgehog_memory(a, most, carver);
  return m;
}

// Once per head and call.
template <class T>
inline void load_directions(const LolaArgs& a, int64_t head, UpdateMemory<T>& m) {
  const int64_t d = a.tokens.head_size, r = a.memory.rank;
  const float* from = a.key_directions + head * r * d;
  for (int64_t i = 0; i < r * d; i += 2 * W) {
    for (int half = 0; half < 2; ++half) {
      for (int lane = 0; lane < W; ++lane) {
        m.directions[i + half * W + lane] = from[i + pair_index(static_cast<const T*>(nullptr), half, lane)];
      }
    }
  }
}

template <class T>
inline float& projected_at(const LolaMemory& memory, UpdateMemory<T>& m, int direction, int64_t row) {
  return m.projected[(row / kChunkRows * memory.rank + direction) * kChunkRows + row % kChunkRows];
}

// Candidates along the directions, relative to the state's mean key. Pointers past `count` must be readable rows.
template <class T>
inline void project_candidates(const LolaArgs& a, int64_t head, const HeadMemory<T>& state, const Rows<T>& rows,
                               int64_t count, int64_t folded, UpdateMemory<T>& m) {
  const int r = a.memory.rank;
  const int64_t d = a.tokens.head_size;
  const float* directions = a.key_directions + head * r * d;
  for (int j = 0; j < r; ++j) {
    F total = zero();
    for (int64_t c = 0; folded > 0 && c < d; c += W) {
      total = mul_add(load(directions + j * d + c), load(state.key_mean + c), total);
    }
    m.center[j] = reduce_sum(total);
  }
  for (int64_t first = 0; first < count; first += kChunkRows) {
    float* block = m.projected + first * r;
    const int here = static_cast<int>(min<int64_t>(kChunkRows, count - first));
    for_head_blocks(r, [&](auto size, int j) {
      dot_rows<decltype(size)::value, T>(m.directions + j * d, d, rows.keys + first, here, nullptr,
                                         block + j * kChunkRows);
    });
    for (int j = 0; j < r; ++j) {
      for (int i = 0; i < kChunkRows; ++i) block[j * kChunkRows + i] -= m.center[j];
    }
  }
}

// scores[i] = |value_i - what the state recalls for key_i|^2; an empty state recalls zero.
template <class T>
inline void recall_errors(const LolaArgs& a, const HeadMemory<T>& state, const Rows<T>& rows, int64_t count,
                          int64_t folded, UpdateMemory<T>& m) {
  const int64_t d = a.tokens.head_size;
  const bool has_state = folded > 0 && a.memory.rank > 0;
  const int r = has_state ? a.memory.rank : 0;
  if (has_state) negative_regression(a, state.cross_moment, state.second_moment, folded, m.triangle, m.regression);
  for (int64_t first = 0; first < count; first += kErrorRows) {
    F error[kErrorRows];
    int64_t row[kErrorRows];
    LRQK_UNROLL
    for (int i = 0; i < kErrorRows; ++i) {
      error[i] = zero();
      row[i] = min(first + i, count - 1);
    }
    for (int64_t c = 0; c < d; c += W) {
      F left[kErrorRows];
      LRQK_UNROLL
      for (int i = 0; i < kErrorRows; ++i) {
        left[i] = load(rows.values[row[i]] + c);
        if (has_state) left[i] = sub(left[i], load(state.value_mean + c));
      }
      for (int j = 0; j < r; ++j) {
        const F slope = load(m.regression + j * d + c);
        LRQK_UNROLL
        for (int i = 0; i < kErrorRows; ++i) {
          left[i] = mul_add(set(projected_at(a.memory, m, j, row[i])), slope, left[i]);
        }
      }
      LRQK_UNROLL
      for (int i = 0; i < kErrorRows; ++i) error[i] = mul_add(left[i], left[i], error[i]);
    }
    for (int i = 0; i < kErrorRows; ++i) m.scores[row[i]] = reduce_sum(error[i]);
  }
}

// random_scores of vllm_lrqk/methods/lola/attention.py.
inline float random_score(int32_t position, int64_t head) {
  uint32_t x = static_cast<uint32_t>(position) + static_cast<uint32_t>(head) * 0x9E3779B9u;
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  x = x ^ x >> 16;
  return static_cast<float>(x >> 8) * 0x1p-24f;
}

// Moves the `keep` best candidates to the front, in order, and lists the others in m.rest. Of equal scores the older
// stay.
template <class T>
inline void keep_best(const LolaMemory& memory, Candidates<T>& c, int64_t count, int64_t keep, UpdateMemory<T>& m) {
  for (int64_t i = 0; i < count; ++i) {
    const bool is_sink = c.positions[i] < memory.sink_tokens;
    // What is no number stays: it must not move others.
    if (is_sink || !(m.scores[i] >= 0.0f)) m.scores[i] = __builtin_inff();
  }
  for (int64_t i = count; i < most_candidates(memory); ++i) m.scores[i] = -1.0f;
  const float least = keep > 0 ? kth_largest(m.scores, ceil_div(count, W) * W, keep, 31) : __builtin_inff();
  int64_t ties = keep;
  for (int64_t i = 0; i < count; ++i) ties -= m.scores[i] > least;
  int64_t kept = 0, rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool is_tie = m.scores[i] == least && ties > 0;
    ties -= is_tie;
    if (m.scores[i] > least || is_tie) {
      c.rows.keys[kept] = c.rows.keys[i];
      c.rows.values[kept] = c.rows.values[i];
      c.positions[kept++] = c.positions[i];
    } else {
      m.rest_rows.keys[rest] = c.rows.keys[i];
      m.rest_rows.values[rest] = c.rows.values[i];
      m.rest[rest++] = static_cast<int32_t>(i);
    }
  }
}

// The next chunk leaves after so many updates. `c` holds the cached rows and then the leaving ones; afterwards those
// that stay come first. The state is changed in its place.
template <class T>
inline void update(const LolaArgs& a, int64_t head, const HeadMemory<T>& state, int64_t updates, Candidates<T>& c,
                   UpdateMemory<T>& m) {
  const LolaMemory& memory = a.memory;
  const int64_t cached = cached_after(memory, updates), folded = folded_after(memory, updates);
  const int64_t keep = cached_after(memory, updates + 1), count = cached + memory.chunk;
  if (keep == count) return;
  for (int64_t i = count; i < most_candidates(memory); ++i) c.rows.keys[i] = c.rows.keys[count - 1];
  if (memory.rank > 0) project_candidates(a, head, state, c.rows, count, folded, m);
  if (memory.num_features > 0) map_candidates(a, head, c.rows, count, m.hedgehog);
  if (memory.is_random) {
    for (int64_t i = 0; i < count; ++i) m.scores[i] = random_score(c.positions[i], head);
  } else if (memory.num_features > 0 && folded > 0) {
    hedgehog_errors(a, state, c.rows, count, m.hedgehog, m.scores);
  } else {
    recall_errors(a, state, c.rows, count, folded, m);
  }
  keep_best(memory, c, count, keep, m);
  const int64_t rest = count - keep;
  if (memory.num_features > 0) hedgehog_fold(a, state, m.rest_rows, m.rest, rest, folded, m.hedgehog);
  if (memory.rank == 0) return;
  m.fold.stride = ceil_div(rest, W) * W;
  for (int j = 0; j < memory.rank; ++j) {
    for (int64_t i = 0; i < rest; ++i) m.fold.projected[j * m.fold.stride + i] = projected_at(memory, m, j, m.rest[i]);
  }
  fold_rows(a, state, m.rest_rows, rest, folded, m.fold);
}

// Writes the first `count` candidates into the cache. Rows that are there already only move to the front.
template <class T>
inline void store_cache(const Candidates<T>& c, int64_t count, int64_t head_size, const HeadMemory<T>& memory) {
  for (int64_t i = 0; i < count; ++i) {
    T* row = memory.cache + i * 2 * head_size;
    if (c.rows.keys[i] != row) put_row(row, c.rows.keys[i], c.rows.values[i], head_size);
    memory.positions[i] = c.positions[i];
  }
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
