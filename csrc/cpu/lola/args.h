// Arguments of LoLA's CPU kernels; cpu/args.h has the shapes. Besides: r directions, f columns of a feature map.
#pragma once

#include <cstdint>

#include "cpu/args.h"
#include "cpu/lola/layout.h"

namespace lrqk {

// The memory of one layer: [num_blocks, KV, block_bytes].
struct LolaMemory : LolaLayout {
  uint8_t* data;
  int64_t block_stride, head_stride;  // bytes
};

// What every call says of its tokens: one of each request, or several of one.
struct LolaTokens {
  const void* query;  // [tokens, H, d]
  const void* key;    // [tokens, KV, d]
  const void* value;  // [tokens, KV, d]
  void* output;       // [tokens, H, d]
  int64_t query_token_stride, query_head_stride;
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  int64_t output_token_stride, output_head_stride;
  int64_t count, heads, kv_heads, head_size;
  DType dtype;
};

struct LolaArgs {
  LolaTokens tokens;
  LolaMemory memory;
  const float* query_directions;  // [KV, r, d] contiguous
  const float* key_directions;    // [KV, r, d] contiguous
  const float* query_maps;        // hedgehog: [H, d, f] contiguous
  const float* key_maps;          // hedgehog: [KV, d, f] contiguous
  const float* bias;              // hedgehog: [H], of the balance
  const float* kappa;             // hedgehog: [H, d] contiguous, or null: the balance follows the largest score
  const int32_t* blocks;          // decode: [B]; prefill: one
  int64_t blocks_stride;
  const int32_t* seq_lens;  // decode: [B], this step's token included; 0: no request
  int64_t context_len;      // prefill: tokens of the request before these
  float scale;
  float ridge, least_variance;  // RIDGE and LEAST_VARIANCE of vllm_lrqk/methods/lola/state.py
};

}  // namespace lrqk
