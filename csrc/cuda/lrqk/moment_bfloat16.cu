// The mean key factor of what is left of each page, for bfloat16 factors: of its unselected candidates, weighted with
// exp(score).
//
// A warp works on one page. The lanes split the tokens; their sums, value_rank * heads of them, are exchanged in a
// butterfly.
#include "cuda/lrqk/factors.cuh"
#include "cuda/lrqk/select.h"
#include "cuda/topk/candidates.cuh"

namespace lrqk::cuda {
namespace {

// Shares of four consecutive tokens in what is left of their page; `tokens` has a bit for each that is left.
template <int kHeads>
__device__ inline void load_shares(const SelectArgs& a, const HeadBlock& block, const float (&log_left)[kHeads],
                                   int position, unsigned tokens, float (&shares)[4][kHeads]) {
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    if (g >= block.heads) break;
    const int64_t head = block.head + g;
    const uint2 pairs = *reinterpret_cast<const uint2*>(a.scratch.delta + head * tokens_per_head(a) + position);
    const unsigned bits[4] = {pairs.x & 0xffffu, pairs.x >> 16, pairs.y & 0xffffu, pairs.y >> 16};
    const float shift = a.scratch.tile_max[head * tiles_per_head(a) + position / tile_tokens(a)] - log_left[g];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((tokens >> i) & 1u) shares[i][g] = power_of_two(half_bits_to_float(bits[i]) + shift);
    }
  }
}

// Adds one tile: sums[column * kHeads + g] += share * A, over its tokens. A lane's sums are its own.
template <int kHeads>
__device__ inline void add_tile(const SelectArgs& a, const uint8_t* page, int token, bool is_active,
                                const float (&shares)[4][kHeads], float* sums) {
  constexpr int kElements = 2, kColumns = 32 / kHeads;
  for (int column = 0; column < a.layout.value_rank; column += kColumns) {
    float v[32] = {};
#pragma unroll
    for (int w = 0; w < kColumns / kElements; ++w) {
      const int word = column / kElements + w;
      if (!is_active || word * kElements >= a.layout.value_rank) continue;
      const uint4 words =
          *reinterpret_cast<const uint4*>(page + (static_cast<int64_t>(word) * a.page_size + token) * 4);
      const unsigned of_token[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = bfloat16_element(of_token[i], e);
#pragma unroll
          for (int g = 0; g < kHeads; ++g) v[(w * kElements + e) * kHeads + g] += x * shares[i][g];
        }
      }
    }
    sums[column * kHeads + lane_index()] += sum_to_lane(v);
  }
}

// Grid: (pages by warps, KV * blocks of kHeads heads, B). Reads what emit wrote; pages without candidates
// keep whatever is in their place.
template <int kHeads>
__global__ void __launch_bounds__(kThreads) moment_bfloat16_kernel(const SelectArgs a) {
  __shared__ float all_sums[kWarps][kMaxRank * kHeads];
  float* sums = all_sums[warp_index()];
  const HeadBlock block = head_block<kHeads>(a);
  const int request = blockIdx.z, value_rank = a.layout.value_rank, p = blockIdx.x * kWarps + warp_index();
  const Candidates c = candidates_of(a, request);
  if (p >= a.pages || p * a.page_size >= c.end) return;  // nothing is left there, and nobody asks for its mean
  for (int i = lane_index(); i < ceil_div(value_rank * kHeads, 32) * 32; i += 32) sums[i] = 0.0f;
  float log_left[kHeads];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    log_left[g] = g < block.heads ? a.residual[(block.head + g) * a.pages + p] * kLog2e : 0.0f;
  }
  // Which tokens are left is the same for all heads of a group.
  if (log_left[0] > -INFINITY) {
    const int size = tile_tokens(a);
    const int64_t index = static_cast<int64_t>(request) * a.kv_heads + block.kv_head;
    const unsigned* left_words = a.scratch.left + index * left_words_per_head(a);
    const int page_id = a.block_table[request * a.block_table_stride + p];
    const uint8_t* page = a.factors.data + page_id * a.factors.page_stride + block.kv_head * a.factors.head_stride;
    const bool is_active = lane_index() * 4 < size;
    for (int t = 0; t < a.page_size / size; ++t) {
      const int token = t * size + lane_index() * 4, position = p * a.page_size + token;
      const unsigned left = is_active ? left_words[position / 32] >> position % 32 & 0xfu : 0;
      if (!__ballot_sync(kAllLanes, left)) continue;
      float shares[4][kHeads] = {};
      if (left) load_shares<kHeads>(a, block, log_left, position, left, shares);
      add_tile<kHeads>(a, page, token, is_active, shares, sums);
    }
  }
  for (int i = lane_index(); i < value_rank * kHeads; i += 32) {
    const int g = i % kHeads;
    if (g < block.heads) a.moment[((block.head + g) * a.pages + p) * value_rank + i / kHeads] = sums[i];
  }
}

}  // namespace

void moment_bfloat16(const SelectArgs& a, cudaStream_t stream) {
  with_heads(a, [&](auto heads) {
    constexpr int kHeads = decltype(heads)::value;
    const dim3 grid(ceil_div(a.pages, kWarps), a.kv_heads * head_blocks<kHeads>(a), a.requests);
    launch(moment_bfloat16_kernel<kHeads>, grid, kThreads, stream, a);
  });
}

}  // namespace lrqk::cuda
