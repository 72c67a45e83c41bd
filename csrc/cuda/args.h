// Arguments of the CUDA kernels: plain structs, no framework.
//
// Shapes: B requests, H query heads, KV kv heads, G = H / KV, d head size, N page tokens, P pages that a row of the
// block table has room for, r rank, T tokens of a step, R places for attended rows, S hot slots of a request.
// Innermost dimensions are contiguous; strides are in elements unless they say bytes. A request of length 0 is
// padding: no kernel reads a page or writes a slot for it. Pages from num_pages on have no host memory (the framework's
// own warm-up names some): nothing is read or written for them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lrqk::cuda {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Where the sections of one factor page are; vllm_lrqk/methods/lrqk/format.py owns these numbers.
struct PageLayout {
  int64_t page_stride;        // bytes
  int64_t head_stride;        // bytes
  int64_t projection_offset;  // bytes; the key factor is at 0
  int64_t scale_offset;       // bytes
  int rank;
  bool is_int8;  // else bfloat16
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRank = 64;
constexpr int kBins = 2048;          // of one digit of a radix select
constexpr int kTileTokens = 128;     // scores share a maximum and a sum by tiles of min(N, kTileTokens) tokens
constexpr int kChunkTokens = 4096;   // that one block weighs, collects and lists
constexpr int kMaxTies = 16384;      // listed per item; with more of them refine() reads all keys instead
constexpr int kPositionBits = 22;    // the longest context is 2^22 tokens

// Select's state of one (request, KV head), zero between calls except for threshold, bin and need.
struct ItemState {
  unsigned long long threshold;  // composites (see keys.cuh) from here on are selected
  int bin;                       // first digit of the threshold's key; -1 selects every candidate
  int need;                      // how many of the keys in `bin` are selected
  unsigned num_ties;             // keys in `bin`
  unsigned weighed, collected;   // blocks that have arrived
  unsigned padding;
  unsigned histogram[kBins];
};

struct SelectScratch {
  ItemState* items;        // [B, KV]
  unsigned* scored;        // [B, H] blocks that have arrived, zero between calls
  uint16_t* delta;         // [B, H, P * N] float16: score less its tile's highest, both in powers of two
  float* tile_max;         // [B, H, tiles]
  float* tile_sum;         // [B, H, tiles] of 2^delta over the tile's candidates
  float* log_sum;          // [B, H], log2 of the sum of 2^score over all candidates
  unsigned* keys;          // [B, KV, P * N]
  int* ties;               // [B, KV, kMaxTies] positions
  int* chunk_counts;       // [B, KV, chunks] selected tokens
};

struct SelectArgs {
  const void* query;  // [B, H, d]
  int64_t query_request_stride, query_head_stride;
  const uint8_t* factors;  // [num_pages, KV, page_bytes]
  PageLayout layout;
  const int* block_table;  // [B, P]
  int64_t block_table_stride;
  const int* seq_lens;     // [B]
  int* rows;               // [B, KV, R], R = top_k + sink_tokens + recent_tokens + N
  float* residual;         // [B, H, P], or null
  float* residual_factor;  // [B, H, P, v], or null; needs residual
  SelectScratch scratch;
  int requests, heads, kv_heads, head_size, page_size, pages;
  int top_k, recent_tokens, sink_tokens;
  int value_rank;  // v, leading columns of the key factor that values follow, a multiple of 4
  float scale;
  DType dtype;  // of the query
};

struct HotArgs {
  uint8_t* data;  // [num_blocks, KV, block_bytes]: kv [slots, 2, d], row, tag, last_used int32 [slots] each
  int64_t block_stride, head_stride;  // bytes
  int slots_per_block, row_bytes;
};

struct ResolveArgs {
  const int* rows;         // [B, KV, R] token positions, -1 for none
  const int* block_table;  // [B, P]
  int64_t block_table_stride;
  const int* seq_lens;    // [B]
  const int* hot_blocks;  // [B, M]
  int64_t hot_blocks_stride;
  HotArgs hot;
  const int64_t* generation;  // [num_host_pages]
  const int* clock;           // [1]
  int64_t* address;           // [B, KV, R] bytes from hot.data of rows that were there, -1 for the others
  int64_t* miss_address;      // [B, KV, R] bytes from hot.data of the slots to fill, -1 after the last
  int64_t* miss_row;          // [B, KV, R] page * N + offset of each; -1: the row of the current token
  int* miss_count;            // [B, KV]
  unsigned long long* counters;  // [2] rows hit, rows missed, over all calls
  int* table;                    // [B, KV, table_size] scratch
  int* age;                      // [B, KV, M * slots_per_block] scratch
  int* miss_place;               // [B, KV, R] scratch
  int table_size;                // a power of two above M * slots_per_block
  int requests, kv_heads, page_size, places, hot_blocks_per_request, num_host_pages;
};

struct HostArgs {
  uint8_t* data;                      // [num_pages, KV, N, 2, d], memory that the device can read and write
  int64_t page_stride, head_stride;  // bytes
  int row_bytes;                      // 2 * d * itemsize, a multiple of 16
  int page_size, num_pages;
};

struct FetchArgs {
  HostArgs host;
  uint8_t* hot;                 // base of miss_address
  const int64_t* miss_address;  // [B, KV, R]
  const int64_t* miss_row;      // [B, KV, R]
  const int* miss_count;        // [B, KV]
  const uint8_t* key;           // [B, KV, d] of the current tokens
  const uint8_t* value;         // [B, KV, d]
  int64_t key_request_stride, key_head_stride, value_request_stride, value_head_stride;  // bytes
  int requests, kv_heads, places;
};

struct AppendArgs {
  HostArgs host;
  const uint8_t* key;    // [T, KV, d]
  const uint8_t* value;  // [T, KV, d]
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;  // bytes
  const int64_t* slots;  // [T], page * N + offset; negative: skip
  int64_t* generation;   // [num_host_pages], or null; grows where a page is written at its first token
  int* clock;            // [1], or null; grows by one
  int tokens, kv_heads;
};

struct GatherArgs {
  HostArgs host;
  const int64_t* pages;  // [M]
  uint8_t* output;       // [M, KV, N, 2, d]
  int num_pages, kv_heads;
};

cudaError_t select(const SelectArgs&, cudaStream_t);
cudaError_t resolve(const ResolveArgs&, cudaStream_t);
cudaError_t fetch(const FetchArgs&, cudaStream_t);
cudaError_t append(const AppendArgs&, cudaStream_t);
cudaError_t gather_pages(const GatherArgs&, cudaStream_t);

}  // namespace lrqk::cuda
