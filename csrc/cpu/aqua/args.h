// Arguments of AQUA's CPU kernels. Shapes: as in cpu/args.h, and s stored dimensions, N tokens of a block.
#pragma once

#include <cstdint>

#include "cpu/args.h"

namespace lrqk {

constexpr int64_t kMaxStored = 512;  // dimensions of a key

// The blocks of one layer; vllm_lrqk/methods/aqua/format.py owns these numbers.
struct AquaBlocks {
  uint8_t* data;             // [num_blocks, KV, block bytes]
  int64_t block_stride;      // bytes
  int64_t head_stride;       // bytes
  int64_t value_offset;      // bytes; the keys [s, N] are at 0, the values [N, d] here
  int64_t key_scale_offset;  // bytes; [N] float, of int8 keys
  int64_t block_size, stored;
  bool is_int8;  // keys; else as values
};

struct AquaBasis {
  const float* projection;  // [KV, d, s]
  const float* offset;      // [KV, s], of keys
  const float* sigma;       // [KV, s]
};

struct AquaDecodeArgs {
  const void* query;  // [B, H, d]
  int64_t query_request_stride, query_head_stride;
  AquaBlocks blocks;
  AquaBasis basis;
  const int32_t* block_table;  // [B, P]
  int64_t block_table_stride;
  const int32_t* seq_lens;  // [B]
  void* output;             // [B, H, d]
  int64_t output_request_stride, output_head_stride;
  int64_t requests, heads, kv_heads, head_size;
  int64_t keep;         // dimensions of a head's scores
  bool per_query_head;  // who chooses them; else the group
  float scale;
  DType dtype;  // of query, values and output
};

struct AquaAppendArgs {
  const void* key;    // [T, KV, d]
  const void* value;  // [T, KV, d]
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  AquaBlocks blocks;
  AquaBasis basis;
  const int64_t* slot_mapping;  // [T], block * N + offset; negative: skip
  int64_t tokens, kv_heads, head_size;
  DType dtype;  // of key and value
};

}  // namespace lrqk
