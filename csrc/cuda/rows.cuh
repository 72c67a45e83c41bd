// Rows of keys and values: where they are in host pages and on the device, and how a warp copies them.
#pragma once

#include "cuda/block.cuh"

namespace lrqk::cuda {

// A 32-bit mark of a slot and its page's generation, as HotCache._tag in vllm_lrqk/core/hot_rows.py.
__device__ inline int tag_of(int64_t slot, int64_t generation) {
  constexpr unsigned long long kMultiplier = 0x9E3779B1u;
  const unsigned long long nonzero = static_cast<unsigned long long>(slot) + 1;
  const unsigned long long mixed = (static_cast<unsigned long long>(generation) * kMultiplier + nonzero) * kMultiplier;
  return static_cast<int>(static_cast<unsigned>(mixed >> 8) - 0x80000000u);
}

// One hot row of a request.
struct HotRow {
  int64_t address;  // bytes from hot.data
  int *slot, *tag, *last_used;
};

__device__ inline HotRow hot_row(const HotArgs& hot, const int* blocks, int kv_head, int index) {
  const int in_block = index % hot.rows_per_block;
  const int64_t block = blocks[index / hot.rows_per_block] * hot.block_stride + kv_head * hot.head_stride;
  const int64_t rows_end = block + static_cast<int64_t>(hot.rows_per_block) * hot.row_bytes;
  int* slot = reinterpret_cast<int*>(hot.data + rows_end) + in_block;
  return {block + static_cast<int64_t>(in_block) * hot.row_bytes, slot, slot + hot.rows_per_block,
          slot + 2 * hot.rows_per_block};
}

__device__ inline uint8_t* host_row(const HostArgs& host, int64_t slot, int kv_head) {
  return host.data + slot / host.page_size * host.page_stride + kv_head * host.head_stride +
         slot % host.page_size * host.row_bytes;
}

// One warp copies `bytes`, a multiple of 16; both ends are aligned to 16.
__device__ inline void copy_row(uint8_t* to, const uint8_t* from, int bytes) {
  for (int i = lane_index() * 16; i < bytes; i += 32 * 16) {
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
  }
}

// One warp joins a key and a value, each of half of `bytes` (a multiple of 8).
__device__ inline void join_row(uint8_t* to, const uint8_t* key, const uint8_t* value, int bytes) {
  const int half = bytes / 2;
  for (int i = lane_index() * 8; i < bytes; i += 32 * 8) {
    *reinterpret_cast<uint2*>(to + i) = *reinterpret_cast<const uint2*>(i < half ? key + i : value + (i - half));
  }
}

}  // namespace lrqk::cuda
