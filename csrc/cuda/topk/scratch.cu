// The scratch memory of a selection.
#include "cuda/topk/topk.h"

#include "cuda/block.cuh"

namespace lrqk::cuda {
namespace {

// Hands out aligned pieces of one block of memory; with a null base it only counts.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += ceil_div<int64_t>(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace

int64_t carve_state(TopKScratch& scratch, uint8_t* memory, int64_t max_requests, int64_t heads, int64_t kv_heads) {
  Carver carver(memory);
  scratch.items = carver.take<ItemState>(max_requests * kv_heads);
  scratch.scored = carver.take<unsigned>(max_requests * heads);
  return carver.used();
}

int64_t carve_scratch(TopKScratch& scratch, uint8_t* memory, int64_t requests, int64_t heads, int64_t kv_heads,
                      int64_t pages, int64_t page_size) {
  Carver carver(memory);
  const int64_t tokens = pages * page_size, tile = min<int64_t>(page_size, kTileTokens);
  scratch.delta = carver.take<uint16_t>(requests * heads * tokens);
  scratch.tile_max = carver.take<float>(requests * heads * (tokens / tile));
  scratch.tile_sum = carver.take<float>(requests * heads * (tokens / tile));
  scratch.log_sum = carver.take<float>(requests * heads);
  scratch.keys = carver.take<unsigned>(requests * kv_heads * tokens);
  scratch.left = carver.take<unsigned>(requests * kv_heads * ceil_div<int64_t>(tokens, 32));
  scratch.ties = carver.take<int>(requests * kv_heads * kMaxTies);
  scratch.chunk_counts = carver.take<int>(requests * kv_heads * ceil_div<int64_t>(tokens, kChunkTokens));
  return carver.used();
}

}  // namespace lrqk::cuda
