// Weights: each candidate's softmax weight summed over its group of heads, as ordered keys, and the bin of the first
// digit in which the top_k-th key lies.
#include "cuda/topk/candidates.cuh"
#include "cuda/topk/topk.h"

namespace lrqk::cuda {
namespace {

constexpr int kTokens = 8;  // per thread and turn: one 16-byte read per head

// Summed weights of the tokens at position ... position + 7, which lie in one tile.
__device__ inline void sum_weights(const TopKArgs& a, int64_t head, int position, float (&weight)[kTokens]) {
  const int group = a.heads / a.kv_heads;
  const int64_t tokens = tokens_per_head(a), tiles = tiles_per_head(a);
  for (int g = 0; g < group; ++g) {
    const uint16_t* delta = a.scratch.delta + (head + g) * tokens + position;
    const uint4 words = *reinterpret_cast<const uint4*>(delta);
    const unsigned pair[4] = {words.x, words.y, words.z, words.w};
    const int64_t tile = (head + g) * tiles + position / tile_tokens(a);
    const float shift = a.scratch.tile_max[tile] - a.scratch.log_sum[head + g];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const unsigned bits = i % 2 == 0 ? pair[i / 2] & 0xffffu : pair[i / 2] >> 16;
      weight[i] += power_of_two(half_bits_to_float(bits) + shift);
    }
  }
}

__device__ inline void find_first_digit(const TopKArgs& a, const Candidates& c, ItemState& item) {
  __shared__ unsigned bins[kBins];
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
    bins[i] = __ldcg(item.histogram + i);
    item.histogram[i] = 0;
  }
  __syncthreads();
  if (c.count() <= a.top_k) {
    if (threadIdx.x == 0) {
      item.bin = -1;
      item.need = 0;
    }
    return;
  }
  const Digit digit = find_digit(bins, a.top_k);
  if (threadIdx.x == 0) {
    item.bin = digit.value;
    item.need = a.top_k - digit.above;
  }
}

// Grid: (chunks, KV, B).
__global__ void __launch_bounds__(kThreads) weigh_kernel(const TopKArgs a) {
  __shared__ unsigned histogram[kBins];
  const int request = blockIdx.z, kv_head = blockIdx.y, group = a.heads / a.kv_heads;
  const Candidates c = candidates_of(a, request);
  if (c.count() == 0) return;
  const int64_t index = static_cast<int64_t>(request) * a.kv_heads + kv_head;
  const int64_t head = static_cast<int64_t>(request) * a.heads + kv_head * group;
  unsigned* keys = a.scratch.keys + index * tokens_per_head(a);
  ItemState& item = a.scratch.items[index];
  const int begin = blockIdx.x * kChunkTokens, end = min(begin + kChunkTokens, c.end);
  clear_bins(histogram);
  for (int position = begin + threadIdx.x * kTokens; position < end; position += kThreads * kTokens) {
    if (position + kTokens <= c.first) continue;
    float weight[kTokens] = {};
    sum_weights(a, head, position, weight);
    unsigned key[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      key[i] = c.has(position + i) ? key_of(weight[i]) : 0u;
      if (key[i]) atomicAdd(&histogram[first_digit(key[i])], 1u);
    }
    *reinterpret_cast<uint4*>(keys + position) = make_uint4(key[0], key[1], key[2], key[3]);
    *reinterpret_cast<uint4*>(keys + position + 4) = make_uint4(key[4], key[5], key[6], key[7]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
    if (histogram[i]) atomicAdd(&item.histogram[i], histogram[i]);
  }
  if (is_last_block(&item.weighed, gridDim.x)) find_first_digit(a, c, item);
}

}  // namespace

void weigh(const TopKArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(static_cast<int64_t>(a.pages) * a.page_size, kChunkTokens)),
                  a.kv_heads, a.requests);
  launch(weigh_kernel, grid, kThreads, stream, a);
}

}  // namespace lrqk::cuda
