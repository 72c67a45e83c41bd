// The top-k of each (request, KV head) by its heads' softmax weights, and what is left of each page.
//
// A scorer writes scores (delta, tile_max, tile_sum and log_sum of TopKScratch); weigh, collect and emit do the rest,
// one after the other. Shapes are those of cuda/args.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/args.h"

namespace lrqk::cuda {

constexpr int kTileTokens = 128;    // scores share a maximum and a sum by tiles of min(N, kTileTokens) tokens
constexpr int kChunkTokens = 4096;  // that one block weighs, collects and lists
constexpr int kMaxTies = 16384;     // listed per item; with more of them refine() reads all keys instead
constexpr int kPositionBits = 22;   // the longest context is 2^22 tokens

// State of one (request, KV head), zero between calls except for threshold, bin and need.
struct ItemState {
  unsigned long long threshold;  // composites (see candidates.cuh) from here on are selected
  int bin;                       // first digit of the threshold's key; -1 selects every candidate
  int need;                      // how many of the keys in `bin` are selected
  unsigned num_ties;             // keys in `bin`
  unsigned weighed, collected;   // blocks that have arrived
  unsigned padding;
  unsigned histogram[kBins];
};

struct TopKScratch {
  ItemState* items;   // [B, KV]
  unsigned* scored;   // [B, H] blocks that have arrived, zero between calls
  uint16_t* delta;    // [B, H, P * N] float16: score less its tile's maximum, both in powers of two
  float* tile_max;    // [B, H, tiles]
  float* tile_sum;    // [B, H, tiles] of 2^delta over the tile's candidates
  float* log_sum;     // [B, H], log2 of the sum of 2^score over all candidates
  unsigned* keys;     // [B, KV, P * N]
  unsigned* left;     // [B, KV, P * N / 32, rounded up] a bit for each candidate that is not selected; with residual
  int* ties;          // [B, KV, kMaxTies] positions
  int* chunk_counts;  // [B, KV, chunks] selected tokens
};

struct TopKArgs {
  const int* seq_lens;  // [B]
  int* positions;       // [B, KV, R], R = top_k + sink_tokens + recent_tokens + N
  float* residual;      // [B, H, P], log-sum-exp of what is left of each page, or null
  TopKScratch scratch;
  int requests, heads, kv_heads, page_size, pages;
  int top_k, recent_tokens, sink_tokens;
};

// Cut `memory` (null: only count) into the parts of `scratch`; the bytes that they take.
// The state is zero before the first call; its layout must not change between calls.
int64_t carve_state(TopKScratch& scratch, uint8_t* memory, int64_t max_requests, int64_t heads, int64_t kv_heads);
int64_t carve_scratch(TopKScratch& scratch, uint8_t* memory, int64_t requests, int64_t heads, int64_t kv_heads,
                      int64_t pages, int64_t page_size);

void weigh(const TopKArgs&, cudaStream_t);
void collect(const TopKArgs&, cudaStream_t);
void emit(const TopKArgs&, cudaStream_t);

}  // namespace lrqk::cuda
