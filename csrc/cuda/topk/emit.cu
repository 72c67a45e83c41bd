// The selection itself: selected positions in order, those that every step attends, and what is left of each page.
//
// A block works on kChunkTokens tokens, a lane on eight neighbours at a time: keys and scores are read once, 16 bytes at
// a time. What is left of a tile is summed relative to the tile's highest score, whether that is selected or not; where
// this leaves nothing of float32's range, it is summed anew relative to the highest of what is left.
#include "cuda/topk/candidates.cuh"
#include "cuda/topk/topk.h"

namespace lrqk::cuda {
namespace {

constexpr float kLn2 = 0.693147180559945309417f;
constexpr int kLaneTokens = 8;
constexpr int kSpanTokens = 32 * kLaneTokens;       // of a warp at a time
constexpr int kSpans = kChunkTokens / kSpanTokens;  // of a block
constexpr int kSpansPerWarp = kSpans / kWarps;      // span i * kWarps + warp
constexpr int kHeadsAtOnce = 4;                     // whose sums are in shared memory
constexpr int kMostTiles = kChunkTokens / 16;       // of a block
constexpr float kLeastSum = 1e-30f;                 // sums from here on are exact enough

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

// What is known of a lane's eight tokens, a bit for each.
struct Tokens {
  unsigned is_candidate, is_selected;
};

// The threshold of composites, as a key and the last position that is selected with it.
struct Threshold {
  unsigned key;
  int last;
  __device__ explicit Threshold(unsigned long long composite)
      : key(static_cast<unsigned>(composite >> kPositionBits)),
        last(static_cast<int>(~composite & ((1u << kPositionBits) - 1))) {}
  __device__ bool selects(unsigned other, int position) const {
    return (other > key) | ((other == key) & (position <= last));  // no branches
  }
};

__device__ inline Tokens read_tokens(const unsigned* keys, const Candidates& c, int position,
                                     const Threshold& threshold) {
  Tokens tokens{};
  if (position >= c.end || position + kLaneTokens <= c.first) return tokens;
  const uint4 low = *reinterpret_cast<const uint4*>(keys + position);
  const uint4 high = *reinterpret_cast<const uint4*>(keys + position + 4);
  const unsigned key[kLaneTokens] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const int before = max(c.first - position, 0), until = min(c.end - position, kLaneTokens);
  tokens.is_candidate = ((1u << until) - 1) & ~((1u << before) - 1);
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    tokens.is_selected |= static_cast<unsigned>(threshold.selects(key[i], position + i)) << i;
  }
  tokens.is_selected &= tokens.is_candidate;
  return tokens;
}

struct Deltas {
  uint4 words;
  __device__ float operator[](int i) const {
    const unsigned pair = i < 2 ? words.x : i < 4 ? words.y : i < 6 ? words.z : words.w;
    return half_bits_to_float(i % 2 == 0 ? pair & 0xffffu : pair >> 16);
  }
};

constexpr int kMostLanes = kTileTokens / kLaneTokens;  // of a tile

// The sum over the lanes of this lane's tile, `lanes` neighbours.
__device__ inline float sum_of_tile(float value, int lanes) {
#pragma unroll
  for (int width = kMostLanes / 2; width > 0; width /= 2) {
    if (width < lanes) value += __shfl_xor_sync(kAllLanes, value, width);
  }
  return value;
}

__device__ inline float highest_of_tile(float value, int lanes) {
#pragma unroll
  for (int width = kMostLanes / 2; width > 0; width /= 2) {
    if (width < lanes) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, width));
  }
  return value;
}

// A lane's eight tokens, and the tile that they are in.
struct Place {
  int position, tile, lanes;
  bool is_inside;  // of the pages
};

// log2 of the sum of 2^score over what is left of this lane's tile, for one head. All lanes of the warp call it.
__device__ inline float left_of_tile(const TopKArgs& a, int64_t head, const Place& place, unsigned left, bool is_cut) {
  const int lanes = place.lanes;
  const int64_t tile = head * tiles_per_head(a) + place.tile;
  const float tile_max = place.is_inside ? a.scratch.tile_max[tile] : -INFINITY;
  Deltas delta{};
  float sum = 0.0f;
  if (is_cut && left) {
    delta.words = *reinterpret_cast<const uint4*>(a.scratch.delta + head * tokens_per_head(a) + place.position);
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) sum += (left >> i) & 1u ? power_of_two(delta[i]) : 0.0f;
  }
  sum = sum_of_tile(sum, lanes);
  if (!is_cut && left) sum = a.scratch.tile_sum[tile];
  // Lanes without anything left say so through -inf; one lane of the tile has something left, or none.
  float shift = 0.0f;
  const bool is_lost = is_cut && sum < kLeastSum;
  if (__ballot_sync(kAllLanes, is_lost && left)) {
    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) highest = fmaxf(highest, is_lost && (left >> i) & 1u ? delta[i] : -INFINITY);
    highest = highest_of_tile(highest, lanes);
    float again = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i)
      again += is_lost && (left >> i) & 1u ? power_of_two(delta[i] - highest) : 0.0f;
    again = sum_of_tile(again, lanes);
    if (is_lost) {
      sum = again;
      shift = highest;
    }
  }
  return sum > 0.0f ? tile_max + shift + log_two(sum) : -INFINITY;
}

// Grid: (chunks, KV, B).
__global__ void __launch_bounds__(kThreads) emit_kernel(const TopKArgs a) {
  __shared__ int span_count[kSpans];
  __shared__ float left_of[kHeadsAtOnce][kMostTiles];
  const int request = blockIdx.z, kv_head = blockIdx.y, chunk = blockIdx.x, group = a.heads / a.kv_heads;
  const int64_t index = static_cast<int64_t>(request) * a.kv_heads + kv_head;
  const int64_t head = static_cast<int64_t>(request) * a.heads + kv_head * group;
  const Candidates c = candidates_of(a, request);
  int* positions = a.positions + index * (a.top_k + a.sink_tokens + a.recent_tokens + a.page_size);
  if (chunk == 0) list_always(a, c, a.seq_lens[request], positions);

  const int first_page = chunk * (kChunkTokens / a.page_size);
  const int pages = min(kChunkTokens / a.page_size, a.pages - first_page), first_token = chunk * kChunkTokens;
  if (first_token >= c.end) {
    for (int i = threadIdx.x; a.residual && i < pages * group; i += blockDim.x) {
      a.residual[(head + i / pages) * a.pages + first_page + i % pages] = -INFINITY;
    }
    return;
  }
  const unsigned* keys = a.scratch.keys + index * tokens_per_head(a);
  const Threshold threshold(a.scratch.items[index].threshold);
  Tokens tokens[kSpansPerWarp];
  int place[kSpansPerWarp];  // of the lane's first selected token among those of the span
#pragma unroll
  for (int i = 0; i < kSpansPerWarp; ++i) {
    const int span = i * kWarps + warp_index();
    tokens[i] = read_tokens(keys, c, first_token + span * kSpanTokens + lane_index() * kLaneTokens, threshold);
    int total;
    place[i] = warp_scan(__popc(tokens[i].is_selected), total);
    if (lane_index() == 0) span_count[span] = total;
  }
  int before = 0;
  for (int i = threadIdx.x; i < chunk; i += blockDim.x) before += a.scratch.chunk_counts[index * gridDim.x + i];
  before = block_sum(before);
#pragma unroll
  for (int i = 0; i < kSpansPerWarp; ++i) {
    const int span = i * kWarps + warp_index();
    int own = before + place[i];
    for (int s = 0; s < span; ++s) own += span_count[s];
    const int position = first_token + span * kSpanTokens + lane_index() * kLaneTokens;
    for (unsigned rest = tokens[i].is_selected; rest; rest &= rest - 1) {
      positions[own++] = position + __popc((rest & (0u - rest)) - 1u);
    }
  }
  if (!a.residual) return;
  uint8_t* left_bytes = reinterpret_cast<uint8_t*>(a.scratch.left + index * left_words_per_head(a));
#pragma unroll
  for (int i = 0; i < kSpansPerWarp; ++i) {
    const int position = first_token + (i * kWarps + warp_index()) * kSpanTokens + lane_index() * kLaneTokens;
    if (position >= a.pages * a.page_size) continue;
    left_bytes[position / kLaneTokens] = static_cast<uint8_t>(tokens[i].is_candidate & ~tokens[i].is_selected);
  }

  const int size = tile_tokens(a), lanes = size / kLaneTokens, tiles = a.page_size / size;
  const unsigned own_tile = ((1u << lanes) - 1) << (lane_index() / lanes * lanes);
  for (int g = 0; g < group; g += kHeadsAtOnce) {
    const int heads = min(kHeadsAtOnce, group - g);
#pragma unroll
    for (int i = 0; i < kSpansPerWarp; ++i) {
      const int in_chunk = (i * kWarps + warp_index()) * kSpanTokens + lane_index() * kLaneTokens;
      const unsigned left = tokens[i].is_candidate & ~tokens[i].is_selected;
      const bool is_cut = __ballot_sync(kAllLanes, tokens[i].is_selected) & own_tile;
      const unsigned having = __ballot_sync(kAllLanes, left) & own_tile;
      const int position = first_token + in_chunk, tile_in_chunk = in_chunk / size;
      const Place place{position, first_token / size + tile_in_chunk, lanes, position < a.pages * a.page_size};
      // The first lane of the tile that has something left speaks for it; without one the first lane does.
      const int speaker = having ? __popc((having & (0u - having)) - 1u) : lane_index() / lanes * lanes;
      for (int h = 0; h < heads; ++h) {
        const float value = left_of_tile(a, head + g + h, place, left, is_cut);
        if (lane_index() == speaker) left_of[h][tile_in_chunk] = value;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * pages; i += blockDim.x) {
      const int h = i / pages, page = i % pages;
      const float* of_page = &left_of[h][page * tiles];
      float highest = of_page[0], sum = 0.0f;
      for (int t = 1; t < tiles; ++t) highest = fmaxf(highest, of_page[t]);
      for (int t = 0; t < tiles && highest > -INFINITY; ++t) sum += power_of_two(of_page[t] - highest);
      a.residual[(head + g + h) * a.pages + first_page + page] =
          sum > 0.0f ? (highest + log_two(sum)) * kLn2 : -INFINITY;
    }
    __syncthreads();
  }
}

}  // namespace

void emit(const TopKArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(static_cast<int64_t>(a.pages) * a.page_size, kChunkTokens)),
                  a.kv_heads, a.requests);
  launch(emit_kernel, grid, kThreads, stream, a);
}

}  // namespace lrqk::cuda
