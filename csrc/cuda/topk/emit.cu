// The selection itself: selected positions in order, those that every step attends, and what is left of each page.
//
// A warp works on one page; a block on kChunkTokens tokens.
#include "cuda/topk/candidates.cuh"
#include "cuda/topk/topk.h"

namespace lrqk::cuda {
namespace {

constexpr float kLn2 = 0.693147180559945309417f;

// Natural logarithm of the l of exp(score) over one head's unselected candidates of a page; all lanes get it.
__device__ inline float left_of_page(const TopKArgs& a, const Page& page, const Candidates& c, int64_t head,
                                     unsigned flags) {
  const uint16_t* delta = a.scratch.delta + head * tokens_per_head(a);
  const int64_t first_tile = head * tiles_per_head(a) + page.first_token / page.size;
  float m = -INFINITY, l = 0.0f;
  for (int t = 0; t < page.tiles; ++t) {
    const float tile_max = a.scratch.tile_max[first_tile + t];
    float here = tile_max, part = a.scratch.tile_sum[first_tile + t];
    if (__ballot_sync(kAllLanes, (flags >> (t * 4)) & 15u)) {
      float left[4];
      const int position = page.first_token + t * page.size + lane_index() * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool is_left = lane_index() * 4 < page.size && c.has(position + i) && !((flags >> (t * 4 + i)) & 1u);
        left[i] = is_left ? half_bits_to_float(delta[position + i]) : -INFINITY;
      }
      const float top = warp_max(fmaxf(fmaxf(left[0], left[1]), fmaxf(left[2], left[3])));
      part = 0.0f;
      if (top > -INFINITY) {
        for (int i = 0; i < 4; ++i) part += exp2f(left[i] - top);
      }
      part = warp_sum(part);
      here = tile_max + top;
    }
    if (part == 0.0f) continue;
    const float both = fmaxf(m, here);
    l = l * exp2f(m - both) + part * exp2f(here - both);
    m = both;
  }
  return l > 0.0f ? (m + log2f(l)) * kLn2 : -INFINITY;
}

// Positions beside the selected ones, and -1 where there are none. One block per (request, KV head) calls it.
__device__ inline void list_always(const TopKArgs& a, const Candidates& c, int length, int* positions) {
  for (int i = min(c.count(), a.top_k) + threadIdx.x; i < a.top_k; i += blockDim.x) positions[i] = -1;
  int* always = positions + a.top_k;
  const int tail = max(c.end, a.sink_tokens), count = a.sink_tokens + a.recent_tokens + a.page_size;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int position = i < a.sink_tokens ? i : tail + i - a.sink_tokens;
    always[i] = position < length ? position : -1;
  }
}

// Grid: (chunks, KV, B).
__global__ void __launch_bounds__(kThreads) emit_kernel(const TopKArgs a) {
  __shared__ int page_first[kThreads];
  const int request = blockIdx.z, kv_head = blockIdx.y, chunk = blockIdx.x;
  const int group = a.heads / a.kv_heads;
  const int64_t index = static_cast<int64_t>(request) * a.kv_heads + kv_head;
  const int64_t head = static_cast<int64_t>(request) * a.heads + kv_head * group;
  const Candidates c = candidates_of(a, request);
  int* positions = a.positions + index * (a.top_k + a.sink_tokens + a.recent_tokens + a.page_size);
  if (chunk == 0) list_always(a, c, a.seq_lens[request], positions);

  const int pages_per_chunk = kChunkTokens / a.page_size;  // at most kThreads
  const int first_page = chunk * pages_per_chunk, size = tile_tokens(a);
  const unsigned long long threshold = a.scratch.items[index].threshold;
  Page page{0, size, a.page_size / size, a.scratch.keys + index * tokens_per_head(a)};
  const auto has_candidates = [&](int p) { return p * a.page_size < c.end && (p + 1) * a.page_size > c.first; };
  const bool is_empty = first_page * a.page_size >= c.end;
  if (!is_empty) {
    for (int i = warp_index(); i < pages_per_chunk; i += kWarps) {
      page.first_token = (first_page + i) * a.page_size;
      const unsigned flags = has_candidates(first_page + i) ? selected_tokens(page, c, threshold) : 0;
      const int count = warp_sum(__popc(flags));
      if (lane_index() == 0) page_first[i] = count;
    }
    int before = 0;
    for (int i = threadIdx.x; i < chunk; i += blockDim.x) before += a.scratch.chunk_counts[index * gridDim.x + i];
    before = block_sum(before);
    const int own = static_cast<int>(threadIdx.x) < pages_per_chunk ? page_first[threadIdx.x] : 0;
    int total;
    before += block_scan(own, total);
    if (static_cast<int>(threadIdx.x) < pages_per_chunk) page_first[threadIdx.x] = before;
    __syncthreads();
  }
  for (int i = warp_index(); i < pages_per_chunk && first_page + i < a.pages; i += kWarps) {
    const int p = first_page + i;
    if (is_empty || !has_candidates(p)) {
      for (int g = lane_index(); a.residual && g < group; g += 32) a.residual[(head + g) * a.pages + p] = -INFINITY;
      continue;
    }
    page.first_token = p * a.page_size;
    const unsigned flags = selected_tokens(page, c, threshold);
    int first = page_first[i];
    for (int t = 0; t < page.tiles; ++t) {
      const unsigned mine = (flags >> (t * 4)) & 15u;
      int total;
      int own = first + warp_scan(__popc(mine), total);
      for (int j = 0; j < 4; ++j) {
        if ((mine >> j) & 1u) positions[own++] = page.first_token + t * size + lane_index() * 4 + j;
      }
      first += total;
    }
    for (int g = 0; a.residual && g < group; ++g) {
      const float left = left_of_page(a, page, c, head + g, flags);
      if (lane_index() == 0) a.residual[(head + g) * a.pages + p] = left;
    }
  }
}

}  // namespace

void emit(const TopKArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(static_cast<int64_t>(a.pages) * a.page_size, kChunkTokens)),
                  a.kv_heads, a.requests);
  launch(emit_kernel, grid, kThreads, stream, a);
}

}  // namespace lrqk::cuda
