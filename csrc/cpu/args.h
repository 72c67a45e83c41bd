// Arguments of the CPU kernels: plain structs, no framework.
//
// Shapes: B requests, H query heads, KV kv heads, G = H / KV, d head size, N page tokens, P pages of the
// longest request, r rank, T tokens of a chunk, M pages to seal, R places for selected rows.
// Innermost dimensions are contiguous; outer strides are given in elements unless they say bytes.
#pragma once

#include <cstdint>

#include "cpu/elements.h"

namespace lrqk {

constexpr int kMaxStride = 512;  // of a rank, rounded up to a vector

// Where the sections of one factor page are; vllm_lrqk/methods/lrqk/format.py owns these numbers.
struct PageLayout {
  int64_t page_stride;        // bytes
  int64_t head_stride;        // bytes
  int64_t projection_offset;  // bytes; the key factor is at 0
  int64_t scale_offset;       // bytes
  int64_t value_mean_offset;  // bytes
  int64_t value_projection_offset;  // bytes
  int64_t value_scale_offset;       // bytes
  int64_t key_factor_mean_offset;   // bytes
  int rank;
  int value_rank;  // 0: no linear values
  bool is_int8;  // else bfloat16
};

struct HostPages {
  const void* data;     // [num_pages, KV, N, 2, d]
  int64_t page_stride;  // elements
  int64_t head_stride;  // elements
};

struct DecodeArgs {
  const void* query;  // [B, H, d]
  int64_t query_request_stride, query_head_stride;
  HostPages host;          // unused by select
  const uint8_t* factors;  // [num_pages, KV, page_bytes]
  PageLayout layout;
  const int32_t* block_table;  // [B, P]
  int64_t block_table_stride;
  const int32_t* seq_lens;  // [B]
  void* output;             // [B, H, d], or null for select
  int64_t output_request_stride, output_head_stride;
  int64_t* attended;  // [B], or null for select
  int32_t* rows;      // select: [B, KV, row_places], else null
  int64_t row_places;
  float* residual;         // select: [B, H, residual_pages], or null
  float* residual_factor;  // select: [B, H, residual_pages, value_rank], or null
  int64_t residual_pages;
  int64_t requests, heads, kv_heads, head_size, page_size;
  int page_shift;  // page_size is 1 << page_shift
  int64_t top_k, recent_tokens, sink_tokens;
  bool with_residual;
  bool with_moments;  // the residual has linear values
  float top_p;
  float scale;
  DType dtype;
};

struct AppendArgs {
  const void* key;    // [T, KV, d]
  const void* value;  // [T, KV, d]
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  void* host;                                 // [num_pages, KV, N, 2, d]
  int64_t host_page_stride, host_head_stride;  // elements
  const int64_t* slots;                       // [T], page * N + offset; negative: skip
  int64_t tokens, kv_heads, head_size, page_size;
  int64_t element_bytes;
};

struct SealArgs {
  const int64_t* pages;  // [M]
  HostPages host;
  uint8_t* factors;  // [num_pages, KV, page_bytes]
  PageLayout layout;
  const float* gram_q;  // [M, KV, d, d] contiguous, or null for the identity
  int64_t num_pages, kv_heads, head_size, page_size;
  int iterations;
  float lambda_q, lambda_k;
  // RIDGE, QUERY_SHARE, VALUE_SHIFT and VALUE_ITERATIONS of vllm_lrqk/methods/lrqk/seal.py
  float ridge, query_share, value_shift;
  int value_iterations;
  DType dtype;
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
  float scale;
  DType dtype;
};

// How kernels run in parallel: `run(n, task, context)` calls task(i, context) once for every i < n, from
// `threads` threads at most, in an order that it chooses.
struct Parallel {
  int threads;
  void (*run)(int64_t n, void (*task)(int64_t index, void* context), void* context);
};

struct KernelTable {
  void (*decode)(const DecodeArgs&, const Parallel&);
  void (*append)(const AppendArgs&, const Parallel&);
  void (*seal)(const SealArgs&, const Parallel&);
  void (*prefill)(const PrefillArgs&, const Parallel&);
  int vector_elements;  // the head size must be a multiple of twice this
};

extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kPortableKernels;

}  // namespace lrqk
