// The products of a page's proxy scores, by a warp: projected queries, and their products with key factors.
//
// With bfloat16 factors they are float32. With int8 factors they are integers, four of them in one instruction: queries
// and their projections become 16-bit numbers, in two bytes, of a unit of their own each. Rounding them moves a score by
// 2^-16 of the largest |q X_j| |A_j| at most for each of the rank's columns.
#pragma once

#include "cuda/lrqk/factors.cuh"

namespace lrqk::cuda {

// The queries of a group and what becomes of them, as this kernel multiplies: 16-bit integers in two bytes each where
// the factors are int8, float32 where they are bfloat16.
template <bool kIsInt8, int kHeads, int kQuads>
struct Products;

template <int kHeads, int kQuads>
struct Products<false, kHeads, kQuads> {
  static constexpr int kSharedWords = kMaxRank * kHeads;  // of one warp

  float query[kHeads][kQuads * 4];

  __device__ void load(const SelectArgs& a, const HeadBlock& block, int64_t first);
  __device__ void project(const SelectArgs& a, const uint8_t* page, float* weights) const;
  __device__ static void score(const SelectArgs& a, const uint8_t* page, int token, const float* weights,
                               float (&scores)[4][kHeads]);
};

template <int kHeads, int kQuads>
struct Products<true, kHeads, kQuads> {
  // Two words of four bytes for each word of a token's key factor, the weights in float32, and their units.
  static constexpr int kSharedWords = kMaxRank / 4 * kHeads * 2 + kMaxRank * kHeads + kHeads;

  int high[kHeads][kQuads], low[kHeads][kQuads];
  float unit;  // of the query of head lane % kHeads

  __device__ void load(const SelectArgs& a, const HeadBlock& block, int64_t first);
  __device__ void project(const SelectArgs& a, const uint8_t* page, float* weights) const;
  __device__ static void score(const SelectArgs& a, const uint8_t* page, int token, const float* weights,
                               float (&scores)[4][kHeads]);
};

// This lane's elements of one head's query: `kQuads` times four neighbours.
template <int kQuads>
__device__ inline void load_query(const SelectArgs& a, int64_t head, bool is_head, float (&query)[kQuads * 4]) {
#pragma unroll
  for (int i = 0; i < kQuads * 4; ++i) {
    const int column = (i / 4 * 32 + lane_index()) * 4 + i % 4;
    query[i] = is_head && column < a.head_size ? to_float(a.query, a.dtype, head + column) : 0.0f;
  }
}

template <int kHeads, int kQuads>
__device__ inline void Products<false, kHeads, kQuads>::load(const SelectArgs& a, const HeadBlock& block,
                                                             int64_t first) {
#pragma unroll
  for (int g = 0; g < kHeads; ++g) load_query<kQuads>(a, first + g * a.query_head_stride, g < block.heads, query[g]);
}

// weights[j * kHeads + g] = (q_g . X_j) * scale_j, in powers of two.
template <int kHeads, int kQuads>
__device__ inline void Products<false, kHeads, kQuads>::project(const SelectArgs& a, const uint8_t* page,
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
        const float x[4] = {word_element<false>(words.x, 0), word_element<false>(words.x, 1),
                            word_element<false>(words.y, 0), word_element<false>(words.y, 1)};
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
__device__ inline void Products<false, kHeads, kQuads>::score(const SelectArgs& a, const uint8_t* page, int token,
                                                              const float* weights, float (&scores)[4][kHeads]) {
#pragma unroll 4
  for (int w = 0; w < a.layout.rank / 2; ++w) {
    const uint4 words = *reinterpret_cast<const uint4*>(page + (static_cast<int64_t>(w) * a.page_size + token) * 4);
    const unsigned of_token[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = word_element<false>(of_token[i], e);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) scores[i][g] += x * weights[(w * 2 + e) * kHeads + g];
      }
    }
  }
}

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

template <int kHeads, int kQuads>
__device__ inline void Products<true, kHeads, kQuads>::load(const SelectArgs& a, const HeadBlock& block,
                                                            int64_t first) {
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    float query[kQuads * 4], highest = 0.0f;
    load_query<kQuads>(a, first + g * a.query_head_stride, g < block.heads, query);
#pragma unroll
    for (float element : query) highest = fmaxf(highest, fabsf(element));
    highest = warp_max(highest);
    const float inverse = highest > 0.0f ? kMost / highest : 0.0f;
    if (lane_index() % kHeads == g) unit = highest / kMost;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      unsigned packed_high = 0, packed_low = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const TwoBytes number = two_bytes(query[j * 4 + e], inverse);
        packed_high |= (static_cast<unsigned>(number.high) & 0xffu) << (8 * e);
        packed_low |= (static_cast<unsigned>(number.low) & 0xffu) << (8 * e);
      }
      high[g][j] = static_cast<int>(packed_high);
      low[g][j] = static_cast<int>(packed_low);
    }
  }
}

// In `weights`: for each word of a token's key factor the high bytes of kHeads heads, then their low bytes; at the end
// the unit of each head. Sums are exact: 256 products of 127 and kMost fit into 31 bits.
template <int kHeads, int kQuads>
__device__ inline void Products<true, kHeads, kQuads>::project(const SelectArgs& a, const uint8_t* page,
                                                               float* weights) const {
  constexpr int kRanks = 32 / kHeads;
  float* exact = weights + kMaxRank / 4 * kHeads * 2;
  const uint8_t* projection = page + a.layout.projection_offset;
  const float* scale = reinterpret_cast<const float*>(page + a.layout.projection_scale_offset);
  const int quads = a.head_size / 4, g = lane_index() % kHeads;
  const float factor = unit * a.scale * kLog2e;
  float highest = 0.0f;
  for (int first = 0; first < a.layout.rank; first += kRanks) {
    int v[32];
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      int x[kQuads];
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const int quad = j * 32 + lane_index();
        x[j] = 0;
        if (first + i < a.layout.rank && quad < quads) {
          x[j] = *reinterpret_cast<const int*>(projection + ((first + i) * quads + quad) * 4);
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        int of_high = 0, of_low = 0;
#pragma unroll
        for (int j = 0; j < kQuads; ++j) {
          of_high = __dp4a(x[j], high[h][j], of_high);
          of_low = __dp4a(x[j], low[h][j], of_low);
        }
        v[i * kHeads + h] = of_high * 256 + of_low;
      }
    }
    const int sum = sum_to_lane(v);
    const int j = first + lane_index() / kHeads;
    if (j >= a.layout.rank) continue;
    const float weight = static_cast<float>(sum) * (scale[j] * factor);
    exact[j * kHeads + g] = weight;
    highest = fmaxf(highest, fabsf(weight));
  }
#pragma unroll
  for (int width = 16; width >= kHeads; width /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, width));
  }
  const float inverse = highest > 0.0f ? kMost / highest : 0.0f;
  int8_t* bytes = reinterpret_cast<int8_t*>(weights);
  for (int j = lane_index() / kHeads; j < a.layout.rank; j += kRanks) {  // those that this lane has summed
    const TwoBytes number = two_bytes(exact[j * kHeads + g], inverse);
    const int word = j / 4 * 2 * kHeads + g;
    bytes[word * 4 + j % 4] = static_cast<int8_t>(number.high);
    bytes[(word + kHeads) * 4 + j % 4] = static_cast<int8_t>(number.low);
  }
  if (lane_index() < kHeads) exact[kMaxRank * kHeads + g] = highest / kMost;
  __syncwarp();
}

template <int kHeads, int kQuads>
__device__ inline void Products<true, kHeads, kQuads>::score(const SelectArgs& a, const uint8_t* page, int token,
                                                             const float* weights, float (&scores)[4][kHeads]) {
  const int* pairs = reinterpret_cast<const int*>(weights);
  int of_high[4][kHeads] = {}, of_low[4][kHeads] = {};
#pragma unroll 4
  for (int w = 0; w < a.layout.rank / 4; ++w) {
    const int4 words = *reinterpret_cast<const int4*>(page + (static_cast<int64_t>(w) * a.page_size + token) * 4);
    const int of_token[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const int high_word = pairs[w * 2 * kHeads + g], low_word = pairs[(w * 2 + 1) * kHeads + g];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        of_high[i][g] = __dp4a(of_token[i], high_word, of_high[i][g]);
        of_low[i][g] = __dp4a(of_token[i], low_word, of_low[i][g]);
      }
    }
  }
  const float* units = weights + kMaxRank / 4 * kHeads * 2 + kMaxRank * kHeads;
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i][g] = static_cast<float>(of_high[i][g] * 256 + of_low[i][g]) * units[g];
  }
}

}  // namespace lrqk::cuda
