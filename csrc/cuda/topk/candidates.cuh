// Which tokens one decode step chooses from, and how their scores and weights are ordered.
#pragma once

#include "cuda/block.cuh"
#include "cuda/topk/topk.h"

namespace lrqk::cuda {

// Sealed tokens that are neither sink nor recent, as candidate_range in vllm_lrqk/methods/lrqk/score.py; empty: first =
// end = 0.
// The page that the current token fills is sealed after this step, which may be a graph.
struct Candidates {
  int first, end;
  __device__ int count() const { return end - first; }
  __device__ bool has(int position) const { return position >= first && position < end; }
};

__device__ inline Candidates candidates_of(const TopKArgs& a, int request) {
  const int length = a.seq_lens[request];
  const int sealed = max(length - 1, 0) / a.page_size * a.page_size;
  const int end = min(sealed, max(length - a.recent_tokens, 0));
  return end > a.sink_tokens ? Candidates{a.sink_tokens, end} : Candidates{0, 0};
}

__device__ inline int tile_tokens(const TopKArgs& a) { return min(a.page_size, kTileTokens); }
__device__ inline int tiles_per_head(const TopKArgs& a) { return a.pages * (a.page_size / tile_tokens(a)); }
__device__ inline int64_t tokens_per_head(const TopKArgs& a) { return static_cast<int64_t>(a.pages) * a.page_size; }

__device__ inline int64_t left_words_per_head(const TopKArgs& a) { return ceil_div<int64_t>(tokens_per_head(a), 32); }

// Weights are not negative, so that their bits order like the numbers; 0 is left for tokens that are no candidates.
__device__ inline unsigned key_of(float weight) { return weight > 0.0f ? __float_as_uint(weight) + 1 : 1u; }
__device__ inline int first_digit(unsigned key) { return static_cast<int>(key >> 20); }

// Keys made distinct: of two equal weights the earlier token is max.
__device__ inline unsigned long long composite_of(unsigned key, int position) {
  return (static_cast<unsigned long long>(key) << kPositionBits) | ((1u << kPositionBits) - 1 - position);
}

}  // namespace lrqk::cuda
