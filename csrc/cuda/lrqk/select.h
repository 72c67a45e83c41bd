// Selection by LRQK's proxy scores: score -> weigh -> collect -> emit, and moment for linear values.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/topk/topk.h"
#include "elements.h"
#include "layout.h"

namespace lrqk::cuda {

constexpr int kMaxRank = 64;

struct SelectArgs : TopKArgs {
  const void* query;  // [B, H, d]
  int64_t query_request_stride, query_head_stride;
  FactorPages factors;
  PageLayout layout;
  const int* block_table;  // [B, P]
  int64_t block_table_stride;
  float* moment;  // [B, H, P, value_rank], mean key factor of what is left of each page, or null; needs residual
  int head_size;
  float scale;
  DType dtype;  // of the query
};

cudaError_t select(const SelectArgs&, cudaStream_t);

void score_int8(const SelectArgs&, cudaStream_t);
void score_bfloat16(const SelectArgs&, cudaStream_t);
void moment_int8(const SelectArgs&, cudaStream_t);
void moment_bfloat16(const SelectArgs&, cudaStream_t);

}  // namespace lrqk::cuda
