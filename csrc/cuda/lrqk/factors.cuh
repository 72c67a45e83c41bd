// How kernels go through key factors: a block works on up to kHeads heads of one group, which share what is read.
#pragma once

#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/lrqk/select.h"

namespace lrqk::cuda {

constexpr float kLog2e = 1.44269504088896340736f;

// Element `e` of a word of two.
__device__ inline float bfloat16_element(unsigned word, int e) {
  return __uint_as_float(e == 0 ? word << 16 : word & 0xffff0000u);
}

// The heads of one block, in a grid of KV * head_blocks<kHeads> and B for y and z.
struct HeadBlock {
  int kv_head, first, heads;  // `heads` query heads from `first` on
  int64_t head;               // the first one's place in [B, H]
};

template <int kHeads>
__host__ __device__ inline int head_blocks(const SelectArgs& a) {
  return ceil_div(a.heads / a.kv_heads, kHeads);
}

template <int kHeads>
__device__ inline HeadBlock head_block(const SelectArgs& a) {
  const int group = a.heads / a.kv_heads, blocks = head_blocks<kHeads>(a);
  const int kv_head = blockIdx.y / blocks, g = blockIdx.y % blocks * kHeads, first = kv_head * group + g;
  return {kv_head, first, min(kHeads, group - g), static_cast<int64_t>(blockIdx.z) * a.heads + first};
}

// This lane's elements of one head's query: `kQuads` times four neighbours.
template <int kQuads>
__device__ inline void load_query(const SelectArgs& a, int64_t head, bool is_head, float (&query)[kQuads * 4]) {
#pragma unroll
  for (int i = 0; i < kQuads * 4; ++i) {
    const int column = (i / 4 * 32 + lane_index()) * 4 + i % 4;
    query[i] = is_head && column < a.head_size ? to_float(a.query, a.dtype, head + column) : 0.0f;
  }
}

// Calls `start` with a constant: the heads of a block.
template <class Start>
void with_heads(const SelectArgs& a, const Start& start) {
  const int group = a.heads / a.kv_heads;
  if (group == 1) {
    start(std::integral_constant<int, 1>{});
  } else if (group == 2) {
    start(std::integral_constant<int, 2>{});
  } else if (group <= 4) {
    start(std::integral_constant<int, 4>{});
  } else {
    start(std::integral_constant<int, 8>{});
  }
}

}  // namespace lrqk::cuda
