// Rows between the host pages and the device: fetch (missing rows), append (new rows), gather (whole pages).
#include "cuda/rows.cuh"

namespace lrqk::cuda {
namespace {

constexpr int kFetchBlocks = 8;  // per (request, KV head)

// Grid: (kFetchBlocks, KV, B); a warp per row.
__global__ void __launch_bounds__(kThreads) fetch_kernel(const FetchArgs a) {
  const int request = blockIdx.z, kv_head = blockIdx.y;
  const int64_t index = static_cast<int64_t>(request) * a.kv_heads + kv_head;
  const int misses = a.miss_count[index];
  for (int i = blockIdx.x * kWarps + warp_index(); i < misses; i += gridDim.x * kWarps) {
    uint8_t* to = a.hot + a.miss_address[index * a.capacity + i];
    const int64_t slot = a.miss_slot[index * a.capacity + i];
    if (slot >= 0) {
      copy_row(to, host_row(a.host, slot, kv_head), a.host.row_bytes);
    } else {
      join_row(to, a.key + request * a.key_request_stride + kv_head * a.key_head_stride,
               a.value + request * a.value_request_stride + kv_head * a.value_head_stride, a.host.row_bytes);
    }
  }
}

// Grid: (T / warps); a warp per token.
__global__ void __launch_bounds__(kThreads) append_kernel(const AppendArgs a) {
  if (a.clock && blockIdx.x == 0 && threadIdx.x == 0) ++*a.clock;
  const int token = blockIdx.x * kWarps + warp_index();
  if (token >= a.tokens) return;
  const int64_t slot = a.slot_mapping[token];
  if (slot < 0 || slot / a.host.page_size >= a.host.num_pages) return;
  if (a.generation && slot % a.host.page_size == 0 && lane_index() == 0) ++a.generation[slot / a.host.page_size];
  for (int head = 0; head < a.kv_heads; ++head) {
    join_row(host_row(a.host, slot, head), a.key + token * a.key_token_stride + head * a.key_head_stride,
             a.value + token * a.value_token_stride + head * a.value_head_stride, a.host.row_bytes);
  }
}

// Grid: (pieces, KV, layers * pages); a block's threads copy neighbouring 16 bytes.
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherArgs a) {
  const int64_t page = a.pages[blockIdx.z % a.num_pages];
  if (page >= a.host.num_pages) return;
  const int64_t bytes = static_cast<int64_t>(a.host.page_size) * a.host.row_bytes;
  const uint8_t* from = a.data[blockIdx.z / a.num_pages] + page * a.host.page_stride + blockIdx.y * a.host.head_stride;
  uint8_t* to = a.output + (static_cast<int64_t>(blockIdx.z) * a.kv_heads + blockIdx.y) * bytes;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 16; i < bytes;
       i += static_cast<int64_t>(gridDim.x) * kThreads * 16) {
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
  }
}

}  // namespace

cudaError_t fetch(const FetchArgs& a, cudaStream_t stream) {
  if (a.requests == 0) return cudaSuccess;
  launch(fetch_kernel, dim3(kFetchBlocks, a.kv_heads, a.requests), kThreads, stream, a);
  return cudaGetLastError();
}

cudaError_t append(const AppendArgs& a, cudaStream_t stream) {
  launch(append_kernel, dim3(max(ceil_div(a.tokens, kWarps), 1)), kThreads, stream, a);
  return cudaGetLastError();
}

cudaError_t gather_pages(const GatherArgs& a, cudaStream_t stream) {
  if (a.num_layers * a.num_pages == 0) return cudaSuccess;
  const int64_t bytes = static_cast<int64_t>(a.host.page_size) * a.host.row_bytes;
  const int64_t pieces = ceil_div<int64_t>(bytes, kThreads * 16 * 4);
  const dim3 grid(static_cast<unsigned>(pieces), a.kv_heads, a.num_layers * a.num_pages);
  launch(gather_kernel, grid, kThreads, stream, a);
  return cudaGetLastError();
}

}  // namespace lrqk::cuda
