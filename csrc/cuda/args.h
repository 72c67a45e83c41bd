// Arguments of the CUDA kernels that no method owns: plain structs, no framework.
//
// Shapes, here and in the folders: B requests, H query heads, KV kv heads, G = H / KV, d head size, N page tokens,
// P pages that a request's block table has room for, T tokens of a step, R = capacity, attended positions at most,
// M hot blocks of a request. Innermost dimensions are contiguous; strides are in elements unless they say bytes.
//
// A *row* is the key of a token with its value behind it; a *slot* is where a row is in the host pages, page * N +
// offset; a *hot row* is one that the device keeps; a *position* is a token's index in its request.
//
// A request of length 0 is padding: no kernel reads a page or writes a row for it. Pages from num_pages on have no host
// memory (the framework's own warm-up names some): nothing is read or written for them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lrqk::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;  // of one digit of a radix select

struct HotArgs {
  uint8_t* data;  // [num_blocks, KV, block_bytes]: rows [n, 2, d], then slot, tag and last_used int32 [n] each
  int64_t block_stride, head_stride;  // bytes
  int rows_per_block, row_bytes;      // n
};

struct ResolveArgs {
  const int* positions;    // [B, KV, R], -1 for none
  const int* block_table;  // [B, P]
  int64_t block_table_stride;
  const int* seq_lens;    // [B]
  const int* hot_blocks;  // [B, M]
  int64_t hot_blocks_stride;
  HotArgs hot;
  const int64_t* generation;     // [num_host_pages]
  const int* clock;              // [1]
  int64_t* address;              // [B, KV, R] bytes from hot.data of rows that were there, -1 for the others
  int64_t* miss_address;         // [B, KV, R] bytes from hot.data of the hot rows to fill, -1 after the last
  int64_t* miss_slot;            // [B, KV, R] slot of each; -1: the row of the current token
  int* miss_count;               // [B, KV]
  unsigned long long* counters;  // [2] rows hit, rows missed, over all calls
  int* table;                    // [B, KV, table_size] scratch
  int* age;                      // [B, KV, M * rows_per_block] scratch
  int* miss_index;               // [B, KV, R] scratch
  int table_size;                // a power of two above M * rows_per_block
  int requests, kv_heads, page_size, capacity, hot_blocks_per_request, num_host_pages;
};

struct HostArgs {
  uint8_t* data;                     // [num_pages, KV, N, 2, d], memory that the device can read and write
  int64_t page_stride, head_stride;  // bytes
  int row_bytes;                     // 2 * d * itemsize, a multiple of 16
  int page_size, num_pages;
};

struct FetchArgs {
  HostArgs host;
  uint8_t* hot;                 // base of miss_address
  const int64_t* miss_address;  // [B, KV, R]
  const int64_t* miss_slot;     // [B, KV, R]
  const int* miss_count;        // [B, KV]
  const uint8_t* key;           // [B, KV, d] of the current tokens
  const uint8_t* value;         // [B, KV, d]
  int64_t key_request_stride, key_head_stride, value_request_stride, value_head_stride;  // bytes
  int requests, kv_heads, capacity;
};

struct AppendArgs {
  HostArgs host;
  const uint8_t* key;                                                                // [T, KV, d]
  const uint8_t* value;                                                              // [T, KV, d]
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;  // bytes
  const int64_t* slot_mapping;                                                       // [T]; negative: skip
  int64_t* generation;  // [num_host_pages], or null; grows where a page is written at its first token
  int* clock;           // [1], or null; grows by one
  int tokens, kv_heads;
};

constexpr int kLayersPerGather = 64;

struct GatherArgs {
  HostArgs host;                          // of every layer but for its data
  const uint8_t* data[kLayersPerGather];  // of each layer
  const int64_t* pages;                   // [num_pages]
  uint8_t* output;                        // [num_layers, num_pages, KV, N, 2, d]
  int num_layers, num_pages, kv_heads;
};

cudaError_t resolve(const ResolveArgs&, cudaStream_t);
cudaError_t fetch(const FetchArgs&, cudaStream_t);
cudaError_t append(const AppendArgs&, cudaStream_t);
cudaError_t gather_pages(const GatherArgs&, cudaStream_t);

}  // namespace lrqk::cuda
