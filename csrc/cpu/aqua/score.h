// Scores of the tokens of one block from its dimension-major keys.
//
// Tokens come in places: of each 2 W tokens, those that load_pair puts into its first half and then the others.
#pragma once

#include "cpu/aqua/project.h"
#include "cpu/attend.h"

namespace lrqk {
namespace LRQK_ISA {
namespace aqua {

constexpr int kTilePairs = kColumnPairs;  // registers of keys, by two, that one pass over the dimensions fills
constexpr int kTileTokens = kTilePairs * 2 * W;

// Into the second-level cache: rows of a power of two of bytes share few lines of the first.
inline void prefetch_far(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
}

// Scores of kPairs * 2 W tokens for B heads; fetches the same part of the keys at `later`, if given.
template <int B, int kPairs, class T>
inline void score_tile(const T* keys, const T* later, int64_t block_size, const Dimensions& dims, const float* query,
                       int group, float* scores) {
  F acc[B][2 * kPairs];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) acc[g][i] = zero();
  }
  for (int i = 0; i < dims.count; ++i) {
    const int64_t row = dims.index[i] * block_size;
    if (later) prefetch_far(later + row, kPairs * 2 * W * sizeof(T));
    F qs[B];
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) qs[g] = set(query[i * group + g]);
    LRQK_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      F a, b;
      load_pair(keys + row + pair * 2 * W, a, b);
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        acc[g][2 * pair] = mul_add(a, qs[g], acc[g][2 * pair]);
        acc[g][2 * pair + 1] = mul_add(b, qs[g], acc[g][2 * pair + 1]);
      }
    }
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) store(scores + g * block_size + i * W, acc[g][i]);
  }
}

// The same for int8 keys: integer sums, which still want the token's scale and the head's step. Here `query` is pairs.
template <int B, int kPairs>
inline void score_tile(const i8* keys, const i8* later, int64_t block_size, const Dimensions& dims,
                       const int32_t* query, int group, float* scores) {
  I acc[B][2 * kPairs];
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) acc[g][i] = zero_int();
  }
  const I low_mask = set_int(0xffff), high_mask = set_high_mask();
  for (int i = 0; i < dims.count; i += 2) {
    const int64_t row = dims.index[i] * block_size, next = dims.index[i + 1] * block_size;
    if (later) {
      prefetch_far(later + row, kPairs * 2 * W);
      prefetch_far(later + next, kPairs * 2 * W);
    }
    I qs[B];
    LRQK_UNROLL
    for (int g = 0; g < B; ++g) qs[g] = set_int(query[i / 2 * group + g]);
    LRQK_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const I a = widen_8(&keys[row + pair * 2 * W].value), b = widen_8(&keys[next + pair * 2 * W].value);
      // Both dimensions of even tokens and of odd ones.
      const I even = bit_or(bit_and(a, low_mask), shift_left<16>(b));
      const I odd = bit_or(shift_right_logical<16>(a), bit_and(b, high_mask));
      LRQK_UNROLL
      for (int g = 0; g < B; ++g) {
        acc[g][2 * pair] = dot(acc[g][2 * pair], even, qs[g]);
        acc[g][2 * pair + 1] = dot(acc[g][2 * pair + 1], odd, qs[g]);
      }
    }
  }
  LRQK_UNROLL
  for (int g = 0; g < B; ++g) {
    LRQK_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) store(scores + g * block_size + i * W, to_float(acc[g][i]));
  }
}

inline const float* queries_of(const Dimensions& dims, const void*) { return dims.query; }
inline const int32_t* queries_of(const Dimensions& dims, const i8*) { return dims.pairs; }

// scores[g][place] of `count` tokens of a block, rounded up to 2 W. Fetches each tile while the one before it is scored,
// and the first tile of the block at `later`, if given.
template <class K>
inline void score_block(const K* keys, const K* later, int64_t block_size, const Dimensions& dims, int group,
                        int64_t count, float* scores) {
  const auto* query = queries_of(dims, keys);
  for (int64_t token = 0; token < count;) {
    const bool is_wide = token + kTileTokens <= block_size;
    const int64_t end = token + (is_wide ? kTileTokens : 2 * W);
    const K* next = end < count ? keys + end : later;
    for_head_blocks(group, [&](auto block, int g) {
      constexpr int B = decltype(block)::value;
      const K* fetched = g == 0 ? next : nullptr;
      float* out = scores + g * block_size + token;
      if (is_wide) {
        score_tile<B, kTilePairs>(keys + token, fetched, block_size, dims, query + g, group, out);
      } else {
        score_tile<B, 1>(keys + token, fetched, block_size, dims, query + g, group, out);
      }
    });
    token = end;
  }
}

// The token of a block that is at a place.
template <class K>
inline int64_t token_at(const K* keys, int64_t place) {
  const int half = static_cast<int>(place / W % 2), lane = static_cast<int>(place % W);
  return place / (2 * W) * (2 * W) + pair_index(keys, half, lane);
}
inline int64_t token_at(const i8*, int64_t place) { return token_at(static_cast<const bf16*>(nullptr), place); }

}  // namespace aqua
}  // namespace LRQK_ISA
}  // namespace lrqk
