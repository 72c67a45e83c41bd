// Proxy scores of bfloat16 factors: per page the projected query q X, fused with the dot products with the page's key
// factor.
//
// A warp works on one page at a time. The lanes split the head size for q X (its rank * heads sums are exchanged in a
// butterfly), and the tokens for the scores.
#include "cuda/lrqk/log_sum.cuh"
#include "cuda/lrqk/products.cuh"

namespace lrqk::cuda {
namespace {

// Writes a tile's highest score, its scores less that, and the sum of their powers of two. `head` is the first of
// `heads` that are stored.
template <int kHeads>
__device__ inline void store_tile(const SelectArgs& a, int64_t head, int heads, int tile, int position, bool is_active,
                                  const float (&scores)[4][kHeads]) {
  const int64_t tokens = tokens_per_head(a), tiles = tiles_per_head(a);
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    if (g >= heads) break;
    float highest = fmaxf(fmaxf(scores[0][g], scores[1][g]), fmaxf(scores[2][g], scores[3][g]));
    highest = warp_max(highest);
    unsigned bits[4];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_candidate = scores[i][g] > -INFINITY;
      const float delta = is_candidate ? fmaxf(scores[i][g] - highest, kLowestDelta) : -INFINITY;
      bits[i] = __half_as_ushort(__float2half_rn(delta));
      // Of the rounded number: sums and weights that are read back later then agree.
      sum += power_of_two(half_bits_to_float(bits[i]));
    }
    sum = warp_sum(sum);
    if (is_active) {
      *reinterpret_cast<uint2*>(a.scratch.delta + (head + g) * tokens + position) =
          make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
    }
    if (lane_index() == 0) {
      a.scratch.tile_max[(head + g) * tiles + tile] = highest;
      a.scratch.tile_sum[(head + g) * tiles + tile] = sum;
    }
  }
}

// Grid: (page ranges, KV * blocks of kHeads heads, B).
template <int kHeads, int kQuads>
__global__ void __launch_bounds__(kThreads) score_bfloat16_kernel(const SelectArgs a) {
  using Product = Products<kHeads, kQuads>;
  __shared__ __align__(16) float all_weights[kWarps][kMaxRank * kHeads];
  float* weights = all_weights[warp_index()];
  const int request = blockIdx.z;
  const HeadBlock block = head_block<kHeads>(a);
  const Candidates c = candidates_of(a, request);
  if (c.count() == 0) return;

  Product product;
  product.load(a, block, request * a.query_request_stride + block.first * a.query_head_stride);
  const int size = tile_tokens(a), tiles = a.page_size / size;
  const int end_page = ceil_div(c.end, a.page_size);
  const int* table = a.block_table + request * a.block_table_stride;
  const int first_page = c.first / a.page_size + blockIdx.x * kWarps + warp_index();
  for (int p = first_page; p < end_page; p += gridDim.x * kWarps) {
    const uint8_t* page = a.factors.data + table[p] * a.factors.page_stride + block.kv_head * a.factors.head_stride;
    __syncwarp();
    product.project(a, page, weights);
    for (int t = 0; t < tiles; ++t) {
      const int token = t * size + lane_index() * 4, position = p * a.page_size + token;
      const bool is_active = lane_index() * 4 < size;
      float scores[4][kHeads] = {};
      if (is_active) Product::score(a, page, token, weights, scores);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (is_active && c.has(position + i)) continue;
#pragma unroll
        for (int g = 0; g < kHeads; ++g) scores[i][g] = -INFINITY;
      }
      store_tile<kHeads>(a, block.head, block.heads, p * tiles + t, position, is_active, scores);
    }
  }
  sum_heads_at_last(a, c, block);
}

}  // namespace

void score_bfloat16(const SelectArgs& a, cudaStream_t stream) {
  with_heads(a, [&](auto heads) {
    constexpr int kHeads = decltype(heads)::value;
    const dim3 grid(ceil_div(a.pages, 2 * kWarps), a.kv_heads * head_blocks<kHeads>(a), a.requests);
    if (a.head_size <= 128) {
      launch(score_bfloat16_kernel<kHeads, 1>, grid, kThreads, stream, a);
    } else {
      launch(score_bfloat16_kernel<kHeads, 2>, grid, kThreads, stream, a);
    }
  });
}

}  // namespace lrqk::cuda
