// Arguments of LRQK's CPU kernels; cpu/args.h has the shapes. Besides: r rank, M pages to seal, R = capacity.
#pragma once

#include <cstdint>

#include "cpu/args.h"
#include "layout.h"

namespace lrqk {

constexpr int kMaxRank = 512;

// The basis of calibrated factors. Pairs are the dimensions that RoPE turns together.
struct CalibratedBasis {
  const float* query;    // X [KV, d / 2, 2, r], by pairs
  const float* key;      // Y [KV, d / 2, 2, r], likewise
  const float* value;    // [KV, r, d], the calibrated value map
  const int32_t* pairs;  // [d / 2, 2]
  const float* frames;   // [pages, d / 2, 2], cosine and sine of each pair at a page's first position
  const int32_t* turns;  // [pages + 12 or more, d / 2], the same as two int16, in units of 1 / 32767
};

struct DecodeArgs {
  const void* query;  // [B, H, d]
  int64_t query_request_stride, query_head_stride;
  HostPages host;  // unused by select
  FactorPages factors;
  PageLayout layout;
  CalibratedBasis basis;       // of calibrated factors
  const int32_t* block_table;  // [B, P]
  int64_t block_table_stride;
  const int32_t* seq_lens;  // [B]
  void* output;             // [B, H, d], or null for select
  int64_t output_request_stride, output_head_stride;
  int64_t* attended;   // [B], or null for select
  int32_t* positions;  // select: [B, KV, R], else null
  int64_t capacity;    // R
  float* residual;     // select: [B, H, residual_pages], or null
  float* moment;       // select: [B, H, residual_pages, value_rank], or null
  int64_t residual_pages;
  int64_t requests, heads, kv_heads, head_size, page_size;
  int page_shift;  // page_size is 1 << page_shift
  int64_t top_k, recent_tokens, sink_tokens;
  bool with_residual;
  bool with_moments;  // the residual has linear values
  float top_p;
  float scale;
  Logits logits;  // sinks do not change what is selected
  DType dtype;
};

struct SealArgs {
  const int64_t* pages;  // [M]
  HostPages host;
  FactorPages factors;
  PageLayout layout;
  CalibratedBasis basis;        // of calibrated factors
  const int64_t* page_numbers;  // [M], where in their requests the pages are; of calibrated factors
  int64_t num_pages, kv_heads, head_size, page_size;
  int iterations;
  float lambda_q, lambda_k;
  // RIDGE, KEY_SHARE, VALUE_SHIFT and VALUE_ITERATIONS of vllm_lrqk/methods/lrqk/seal.py
  float ridge, key_share, value_shift;
  int value_iterations;
  DType dtype;
};

}  // namespace lrqk
