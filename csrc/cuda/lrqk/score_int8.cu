// Proxy scores of int8 factors, by the tensor cores: per page the projected query q X, fused with the products with the
// page's key factor.
//
// Queries and their projections become 16-bit numbers, in two bytes, of a unit of their own each: the columns of the
// right matrix are the high and the low bytes of four heads, and the sums of a lane are those of one head. Rounding
// moves a score by 2^-16 of the largest |q X_j| |A_j| at most for each of the rank's columns.
//
// A warp works on one page at a time. In what follows g = lane / 4 and t = lane % 4, as in cuda/mma.cuh.
#include "cuda/lrqk/log_sum.cuh"
#include "cuda/mma.cuh"

namespace lrqk::cuda {
namespace {

constexpr int kRankTile = 16;    // columns of a key factor in one product
constexpr int kTurnTokens = 64;  // of a warp: 8 neighbours for each g
constexpr int kLaneTokens = 8;
constexpr float kMost = 127 * 256 + 127;  // of a number in two signed bytes

struct TwoBytes {
  int high, low;  // value = high * 256 + low; both fit into a signed byte
};

// `inverse` is one over the unit, of which the value has at most kMost.
__device__ inline TwoBytes two_bytes(float value, float inverse) {
  const int number = __float2int_rn(value * inverse);
  const int high = (number + 128) >> 8;
  return {high, number - high * 256};
}

__device__ inline float inverse_unit(float highest) { return highest > 0.0f ? kMost / highest : 0.0f; }

// The queries of a block: words of four neighbouring elements.
template <int kHeads, int kQuads>
struct Queries {
  static constexpr int kWords = kQuads * 32 + 4;  // of a head, and some that keep them out of each other's banks
  int words[kHeads][2][kWords];                   // high bytes, low bytes
  float unit[kHeads];

  // Every thread of the block calls it. What is beyond the heads and the head size is zero.
  __device__ void load(const SelectArgs& a, const HeadBlock& block) {
    const int64_t first = blockIdx.z * a.query_request_stride + block.first * a.query_head_stride;
    for (int h = warp_index(); h < kHeads; h += kWarps) {
      float query[kQuads * 4], highest = 0.0f;
      load_query<kQuads>(a, first + h * a.query_head_stride, h < block.heads, query);
#pragma unroll
      for (float element : query) highest = fmaxf(highest, fabsf(element));
      highest = warp_max(highest);
      const float inverse = inverse_unit(highest);
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        unsigned high = 0, low = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const TwoBytes number = two_bytes(query[j * 4 + e], inverse);
          high |= (static_cast<unsigned>(number.high) & 0xffu) << (8 * e);
          low |= (static_cast<unsigned>(number.low) & 0xffu) << (8 * e);
        }
        words[h][0][j * 32 + lane_index()] = static_cast<int>(high);
        words[h][1][j * 32 + lane_index()] = static_cast<int>(low);
      }
      if (lane_index() == 0) unit[h] = highest / kMost;
    }
    __syncthreads();
  }
};

// Projections of a warp's page, as right matrices: a byte for each column of the key factor.
template <int kHeads, int kTiles>
struct Weights {
  int8_t high_low[kHeads * 2][kTiles * kRankTile];
};

// Projects the queries: `weights` of one page, and the units of its numbers, of head 4 n + t in `unit[n]`.
template <int kHeads, int kQuads, int kTiles>
__device__ inline void project(const SelectArgs& a, const Queries<kHeads, kQuads>& queries, const uint8_t* page,
                               Weights<kHeads, kTiles>& weights, float (&unit)[kHeads / 4]) {
  constexpr int kBlocks = kHeads / 4;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const uint8_t* projection = page + a.layout.projection_offset;
  const float* scale = reinterpret_cast<const float*>(page + a.layout.projection_scale_offset);
  float weight[kBlocks][kTiles][2], highest[kBlocks] = {};
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int row = m * kRankTile + g;
    int sums[kBlocks][4] = {};
#pragma unroll
    for (int c = 0; c < kQuads * 4; ++c) {  // 32 elements of the head size, 8 neighbours for each t
      const int element = c * 32 + t * 8;
      int2 x[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row + i * 8 < a.layout.rank && element < a.head_size) {
          x[i] = *reinterpret_cast<const int2*>(projection + (row + i * 8) * a.head_size + element);
        }
      }
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int2 q = *reinterpret_cast<const int2*>(&queries.words[n * 4 + g / 2][g % 2][element / 4]);
        multiply_int8(sums[n], {x[0].x, x[1].x}, q.x);
        multiply_int8(sums[n], {x[0].y, x[1].y}, q.y);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float of_column = row + i * 8 < a.layout.rank ? scale[row + i * 8] * (a.scale * kLog2e) : 0.0f;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int sum = sums[n][i * 2] * 256 + sums[n][i * 2 + 1];
        weight[n][m][i] = static_cast<float>(sum) * (of_column * queries.unit[n * 4 + t]);
        highest[n] = fmaxf(highest[n], fabsf(weight[n][m][i]));
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int width = 4; width < 32; width *= 2) {
      highest[n] = fmaxf(highest[n], __shfl_xor_sync(kAllLanes, highest[n], width));
    }
    unit[n] = highest[n] * (1.0f / kMost);
    const float inverse = inverse_unit(highest[n]);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const TwoBytes number = two_bytes(weight[n][m][i], inverse);
        const int column = (n * 4 + t) * 2, j = m * kRankTile + g + i * 8;
        weights.high_low[column][j] = static_cast<int8_t>(number.high);
        weights.high_low[column + 1][j] = static_cast<int8_t>(number.low);
      }
    }
  }
  __syncwarp();
}

// Scores of eight neighbouring tokens from `token` on, of heads 4 n + t.
template <int kHeads, int kTiles>
__device__ inline void score_tokens(const SelectArgs& a, const uint8_t* page, int token, bool is_active,
                                    const int (&right)[kHeads / 4][kTiles], const float (&unit)[kHeads / 4],
                                    float (&scores)[kHeads / 4][kLaneTokens]) {
  constexpr int kBlocks = kHeads / 4;
  int sums[kBlocks][kLaneTokens / 2][4] = {};
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int word = m * 4 + lane_index() % 4;
    int4 words[2] = {};
    if (is_active && word * 4 < a.layout.rank) {
      const int4* tokens = reinterpret_cast<const int4*>(page + (static_cast<int64_t>(word) * a.page_size + token) * 4);
      words[0] = tokens[0];
      words[1] = tokens[1];
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_int8(sums[n][i * 2], {words[i].x, words[i].y}, right[n][m]);
        multiply_int8(sums[n][i * 2 + 1], {words[i].z, words[i].w}, right[n][m]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const int* pair = &sums[n][i / 2][i % 2 * 2];
      scores[n][i] = static_cast<float>(pair[0] * 256 + pair[1]) * unit[n];
    }
  }
}

// Of a tile and one head: the highest score, and the sum of the powers of two of all scores less that.
struct TileOfHead {
  float highest, sum;
};

// A bit for each token of the lane: the eight from g * 8 on, of each turn.
template <int kTurns>
__device__ inline unsigned candidates_of_lane(const Candidates& c, int first_token, int size) {
  unsigned which = 0;
  for (int i = 0; i < kTurns * kLaneTokens; ++i) {
    const int in_tile = i / kLaneTokens * kTurnTokens + lane_index() / 4 * kLaneTokens + i % kLaneTokens;
    which |= static_cast<unsigned>(in_tile < size && c.has(first_token + in_tile)) << i;
  }
  return which;
}

// Of the lane's head in block n; the lanes of one t share it. `which` are the lane's candidates; scores less their
// highest go to `delta`, of the lane's first token, where that is not null.
template <int kTurns, int kBlocks, bool kIsWhole>
__device__ inline TileOfHead tile_of_head(const float (&scores)[kTurns][kBlocks][kLaneTokens], int n, unsigned which,
                                          uint16_t* delta, int size) {
  TileOfHead tile{-INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < kTurns * kLaneTokens; ++i) {
    const bool counts = kIsWhole || (which >> i) & 1u;
    tile.highest = fmaxf(tile.highest, counts ? scores[i / kLaneTokens][n][i % kLaneTokens] : -INFINITY);
  }
#pragma unroll
  for (int width = 4; width < 32; width *= 2) {
    tile.highest = fmaxf(tile.highest, __shfl_xor_sync(kAllLanes, tile.highest, width));
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    unsigned pairs[kLaneTokens / 2];
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const bool counts = kIsWhole || (which >> (turn * kLaneTokens + i)) & 1u;
      const float less = counts ? fmaxf(scores[turn][n][i] - tile.highest, kLowestDelta) : -INFINITY;
      const unsigned bits = __half_as_ushort(__float2half_rn(less));
      pairs[i / 2] = i % 2 ? pairs[i / 2] | bits << 16 : bits;
      // Of the rounded number: sums and weights that are read back later then agree.
      tile.sum += power_of_two(half_bits_to_float(bits));
    }
    if (delta && (kIsWhole || turn * kTurnTokens + lane_index() / 4 * kLaneTokens < size)) {
      *reinterpret_cast<uint4*>(delta + turn * kTurnTokens) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
#pragma unroll
  for (int width = 4; width < 32; width *= 2) tile.sum += __shfl_xor_sync(kAllLanes, tile.sum, width);
  return tile;
}

// Grid: (page ranges, KV * blocks of kHeads heads, B).
template <int kHeads, int kQuads, int kTiles>
__global__ void __launch_bounds__(kThreads) score_int8_kernel(const SelectArgs a) {
  constexpr int kBlocks = kHeads / 4, kTurns = kTileTokens / kTurnTokens;
  __shared__ __align__(16) Queries<kHeads, kQuads> queries;
  __shared__ __align__(16) Weights<kHeads, kTiles> all_weights[kWarps];
  Weights<kHeads, kTiles>& weights = all_weights[warp_index()];
  const int request = blockIdx.z, g = lane_index() / 4, t = lane_index() % 4;
  const HeadBlock block = head_block<kHeads>(a);
  const Candidates c = candidates_of(a, request);
  if (c.count() == 0) return;

  queries.load(a, block);
  const int size = tile_tokens(a), tiles = a.page_size / size;
  const int end_page = ceil_div(c.end, a.page_size);
  const int* table = a.block_table + request * a.block_table_stride;
  const int first_page = c.first / a.page_size + blockIdx.x * kWarps + warp_index();
  for (int p = first_page; p < end_page; p += gridDim.x * kWarps) {
    const uint8_t* page = a.factors.data + table[p] * a.factors.page_stride + block.kv_head * a.factors.head_stride;
    float unit[kBlocks];
    __syncwarp();
    project(a, queries, page, weights, unit);
    int right[kBlocks][kTiles];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        right[n][m] = *reinterpret_cast<const int*>(&weights.high_low[n * 8 + g][m * kRankTile + t * 4]);
      }
    }
    for (int tile = 0; tile < tiles; ++tile) {
      const int first_token = p * a.page_size + tile * size;
      float scores[kTurns][kBlocks][kLaneTokens];
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int in_tile = turn * kTurnTokens + g * kLaneTokens;
        score_tokens<kHeads, kTiles>(a, page, tile * size + in_tile, in_tile < size, right, unit, scores[turn]);
      }
      const bool is_whole = size == kTileTokens && c.has(first_token) && c.has(first_token + size - 1);
      const unsigned which = is_whole ? ~0u : candidates_of_lane<kTurns>(c, first_token, size);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const bool is_head = n * 4 + t < block.heads;
        const int64_t head = block.head + n * 4 + t;
        uint16_t* delta = a.scratch.delta + head * tokens_per_head(a) + first_token + g * kLaneTokens;
        if (!is_head) delta = nullptr;
        const TileOfHead found = is_whole ? tile_of_head<kTurns, kBlocks, true>(scores, n, which, delta, size)
                                          : tile_of_head<kTurns, kBlocks, false>(scores, n, which, delta, size);
        if (is_head && g == 0) {
          a.scratch.tile_max[head * tiles_per_head(a) + p * tiles + tile] = found.highest;
          a.scratch.tile_sum[head * tiles_per_head(a) + p * tiles + tile] = found.sum;
        }
      }
    }
  }
  sum_heads_at_last(a, c, block);
}

template <int kHeads, int kQuads, int kTiles>
void start(const SelectArgs& a, cudaStream_t stream) {
  const dim3 grid(ceil_div(a.pages, 2 * kWarps), a.kv_heads * head_blocks<kHeads>(a), a.requests);
  launch(score_int8_kernel<kHeads, kQuads, kTiles>, grid, kThreads, stream, a);
}

// Registers are too few for eight heads of the highest ranks.
template <int kQuads>
void start_for_rank(const SelectArgs& a, cudaStream_t stream) {
  const bool has_few = a.heads / a.kv_heads <= 4;
  if (a.layout.rank > 32) {
    start<4, kQuads, 4>(a, stream);
  } else if (a.layout.rank > 16) {
    has_few ? start<4, kQuads, 2>(a, stream) : start<8, kQuads, 2>(a, stream);
  } else {
    has_few ? start<4, kQuads, 1>(a, stream) : start<8, kQuads, 1>(a, stream);
  }
}

}  // namespace

void score_int8(const SelectArgs& a, cudaStream_t stream) {
  if (a.head_size <= 128) {
    start_for_rank<1>(a, stream);
  } else {
    start_for_rank<2>(a, stream);
  }
}

}  // namespace lrqk::cuda
