// Arguments of the CPU kernels that no method owns: plain structs, no framework.
//
// Shapes, here and in the folders of the methods: B requests, H query heads, KV kv heads, G = H / KV, d head size,
// N page tokens, P pages of the longest request, T tokens of a chunk. Innermost dimensions are contiguous; outer
// strides are in elements unless they say bytes.
//
// A *row* is the key of a token with its value behind it; a *slot* is where a row is in the host pages, page * N +
// offset; a *position* is a token's index in its request.
#pragma once

#include <cstdint>

#include "elements.h"

namespace lrqk {

struct HostPages {
  const void* data;     // [num_pages, KV, N, 2, d]
  int64_t page_stride;  // elements
  int64_t head_stride;  // elements
};

struct AppendArgs {
  const void* key;    // [T, KV, d]
  const void* value;  // [T, KV, d]
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  void* host;  // [num_pages, KV, N, 2, d]
  int64_t host_page_stride, host_head_stride;
  const int64_t* slot_mapping;  // [T]; negative: skip
  int64_t tokens, kv_heads, head_size, page_size;
  int64_t element_bytes;
};

// What a layer does to its attention logits beside scaling them.
struct Logits {
  float cap;           // each becomes cap tanh(logit / cap); 0: it stays
  const float* sinks;  // [H], a logit of each head that only the denominator of the softmax has; null: none
};

struct PrefillArgs {
  const void* query;  // [T, H, d]
  const void* key;    // [T, KV, d]
  const void* value;  // [T, KV, d]
  int64_t query_token_stride, query_head_stride;
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  HostPages host;
  const int32_t* pages;  // [P]
  void* output;          // [T, H, d]
  int64_t output_token_stride, output_head_stride;
  int64_t tokens, context_len, heads, kv_heads, head_size, page_size;
  int64_t window;  // tokens that a query attends to, its own included; 0: all up to its own
  float scale;
  Logits logits;
  DType dtype;
};

struct WindowArgs {
  const void* query;  // [B, H, d]
  int64_t query_request_stride, query_head_stride;
  HostPages rows;              // pages before a request's window are not read
  const int32_t* block_table;  // [B, P]
  int64_t block_table_stride;
  const int32_t* seq_lens;  // [B], the current token included; 0: the output is zero
  void* output;             // [B, H, d]
  int64_t output_request_stride, output_head_stride;
  int64_t requests, heads, kv_heads, head_size;
  int64_t page_size;  // a power of two
  int64_t window;
  float scale;
  Logits logits;
  DType dtype;
};

// How kernels run in parallel: `run(n, task, context)` calls task(i, context) once for every i < n, from
// `threads` threads at most, in an order that it chooses.
struct Parallel {
  int threads;
  void (*run)(int64_t n, void (*task)(int64_t index, void* context), void* context);
};

constexpr int64_t kMaxHeadSize = 1024;
constexpr int64_t kMaxPageSize = 1024;
constexpr int64_t kMaxGroup = 64;

}  // namespace lrqk
