// Rows of keys and values: where they are in host pages and hot slots, and how a warp copies them.
#pragma once

#include "cuda/block.cuh"

namespace lrqk::cuda {

// A 32-bit mark of a row and its page's generation, as HotCache._tag in vllm_lrqk/core/hot_rows.py.
__device__ inline int tag_of(int64_t row, int64_t generation) {
  constexpr unsigned long long kMultiplier = 0x9E3779B1u;
  const unsigned long long place = static_cast<unsigned long long>(row) + 1;
  const unsigned long long mixed = (static_cast<unsigned long long>(generation) * kMultiplier + place) * kMultiplier;
  return static_cast<int>(static_cast<unsigned>(mixed >> 8) - 0x80000000u);
}

// One hot slot of a request.
struct HotSlot {
  int64_t address;  // bytes from hot.data
  int *row, *tag, *last_used;
};

__device__ inline HotSlot hot_slot(const HotArgs& hot, const int* blocks, int kv_head, int slot) {
  const int in_block = slot % hot.slots_per_block;
  const int64_t block = blocks[slot / hot.slots_per_block] * hot.block_stride + kv_head * hot.head_stride;
  const int64_t rows_end = block + static_cast<int64_t>(hot.slots_per_block) * hot.row_bytes;
  int* row = reinterpret_cast<int*>(hot.data + rows_end) + in_block;
  return {block + static_cast<int64_t>(in_block) * hot.row_bytes, row, row + hot.slots_per_block,
          row + 2 * hot.slots_per_block};
}

__device__ inline uint8_t* host_row(const HostArgs& host, int64_t row, int kv_head) {
  return host.data + row / host.page_size * host.page_stride + kv_head * host.head_stride +
         row % host.page_size * host.row_bytes;
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
