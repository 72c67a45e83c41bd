// The products of a page's proxy scores with bfloat16 factors, by a warp and in float32: projected queries, and their
// products with key factors.
#pragma once

#include "cuda/lrqk/factors.cuh"

namespace lrqk::cuda {

// The queries of a group, kQuads times four neighbouring elements of each a lane.
template <int kHeads, int kQuads>
struct Products {
  float query[kHeads][kQuads * 4];

  __device__ void load(const SelectArgs& a, const HeadBlock& block, int64_t first);
  __device__ void project(const SelectArgs& a, const uint8_t* page, float* weights) const;
  __device__ static void score(const SelectArgs& a, const uint8_t* page, int token, const float* weights,
                               float (&scores)[4][kHeads]);
};

template <int kHeads, int kQuads>
__device__ inline void Products<kHeads, kQuads>::load(const SelectArgs& a, const HeadBlock& block, int64_t first) {
#pragma unroll
  for (int g = 0; g < kHeads; ++g) load_query<kQuads>(a, first + g * a.query_head_stride, g < block.heads, query[g]);
}

// weights[j * kHeads + g] = (q_g . X_j) * scale_j, in powers of two.
template <int kHeads, int kQuads>
__device__ inline void Products<kHeads, kQuads>::project(const SelectArgs& a, const uint8_t* page,
                                                         float* weights) const {
  constexpr int kRanks = 32 / kHeads;
  const uint8_t* projection = page + a.layout.projection_offset;
  const float* scale = reinterpret_cast<const float*>(page + a.layout.projection_scale_offset);
  const int quads = a.head_size / 4;
  for (int first = 0; first < a.layout.rank; first += kRanks) {
    float v[32];
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {  // kept in registers: every index of v is a constant
#pragma unroll
      for (int g = 0; g < kHeads; ++g) v[i * kHeads + g] = 0.0f;
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const int quad = j * 32 + lane_index();
        uint2 words{};
        if (first + i < a.layout.rank && quad < quads) {
          words = *reinterpret_cast<const uint2*>(projection + ((first + i) * quads + quad) * 8);
        }
        const float x[4] = {bfloat16_element(words.x, 0), bfloat16_element(words.x, 1), bfloat16_element(words.y, 0),
                            bfloat16_element(words.y, 1)};
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
#pragma unroll
          for (int e = 0; e < 4; ++e) v[i * kHeads + g] += x[e] * query[g][j * 4 + e];
        }
      }
    }
    const float sum = sum_to_lane(v);
    const int j = first + lane_index() / kHeads;
    if (j < a.layout.rank) weights[j * kHeads + lane_index() % kHeads] = sum * scale[j] * (a.scale * kLog2e);
  }
  __syncwarp();
}

// Scores of four consecutive tokens for kHeads heads.
template <int kHeads, int kQuads>
__device__ inline void Products<kHeads, kQuads>::score(const SelectArgs& a, const uint8_t* page, int token,
                                                       const float* weights, float (&scores)[4][kHeads]) {
#pragma unroll 4
  for (int w = 0; w < a.layout.rank / 2; ++w) {
    const uint4 words = *reinterpret_cast<const uint4*>(page + (static_cast<int64_t>(w) * a.page_size + token) * 4);
    const unsigned of_token[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = bfloat16_element(of_token[i], e);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) scores[i][g] += x * weights[(w * 2 + e) * kHeads + g];
      }
    }
  }
}

}  // namespace lrqk::cuda
