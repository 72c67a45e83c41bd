// How kernels go through key factors: a block works on up to kHeads heads of one group, which share what is read.
#pragma once

#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/lrqk/select.h"

namespace lrqk::cuda {

constexpr float kLog2e = 1.44269504088896340736f;

// Element `e` of a 4-byte word of the key factor.
template <bool kIsInt8>
__device__ inline float word_element(unsigned word, int e) {
  if constexpr (kIsInt8) return static_cast<float>(static_cast<signed char>(word >> (8 * e)));
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

// Calls `start` with two constants: whether the factors are int8, and the heads of a block.
template <class Start>
void with_factors(const SelectArgs& a, const Start& start) {
  const auto with_heads = [&](auto is_int8) {
    const int group = a.heads / a.kv_heads;
    if (group == 1) {
      start(is_int8, std::integral_constant<int, 1>{});
    } else if (group == 2) {
      start(is_int8, std::integral_constant<int, 2>{});
    } else if (group <= 4) {
      start(is_int8, std::integral_constant<int, 4>{});
    } else {
      start(is_int8, std::integral_constant<int, 8>{});
    }
  };
  if (a.layout.is_int8) {
    with_heads(std::true_type{});
  } else {
    with_heads(std::false_type{});
  }
}

}  // namespace lrqk::cuda
