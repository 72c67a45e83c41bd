// What ends every score kernel: the log-sum-exp of its heads, from the tiles' maxima and sums.
#pragma once

#include "cuda/lrqk/factors.cuh"
#include "cuda/topk/candidates.cuh"

namespace lrqk::cuda {

constexpr float kLowestDelta = -60000.0f;  // a finite float16

// log2 of the sum of 2^score of one head's candidates. Every thread of the block calls it.
__device__ inline void sum_head(const SelectArgs& a, const Candidates& c, int64_t head) {
  const int size = tile_tokens(a);
  const float* tile_max = a.scratch.tile_max + head * tiles_per_head(a);
  const float* tile_sum = a.scratch.tile_sum + head * tiles_per_head(a);
  const int first = c.first / size, end = ceil_div(c.end, size);
  float highest = -INFINITY;
  for (int i = first + threadIdx.x; i < end; i += blockDim.x) highest = fmaxf(highest, __ldcg(tile_max + i));
  highest = block_combine(highest, true);
  float sum = 0.0f;
  for (int i = first + threadIdx.x; i < end; i += blockDim.x) {
    sum += __ldcg(tile_sum + i) * power_of_two(__ldcg(tile_max + i) - highest);
  }
  sum = block_combine(sum, false);
  if (threadIdx.x == 0) a.scratch.log_sum[head] = highest + log_two(sum);
}

// Lets the block that arrives last of a row of the grid sum over the tiles of its heads.
__device__ inline void sum_heads_at_last(const SelectArgs& a, const Candidates& c, const HeadBlock& block) {
  if (!is_last_block(a.scratch.scored + block.head, gridDim.x)) return;
  for (int g = 0; g < block.heads; ++g) sum_head(a, c, block.head + g);
}

}  // namespace lrqk::cuda
