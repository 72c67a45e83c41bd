// As moment_bfloat16.cu for int8 factors, by the tensor cores: shares of tokens times the key factor, whose words become
// pairs of float16 of neighbouring tokens.
//
// With g = lane / 4 and t = lane % 4 as in cuda/mma.cuh: of 32 tokens the columns of the right matrix have in turn words
// g % 4 of the first 16 (g < 4) and of the last 16, one element of the word at a time; the rows of the left matrix are
// the heads with the shares of the first or of the last 16. Half of the sums pair the one with the other: they are left
// out. Float16 rounds a share by 2^-12 of it, or by 2^-25 of all shares.
#include "cuda/lrqk/factors.cuh"
#include "cuda/mma.cuh"
#include "cuda/topk/candidates.cuh"

namespace lrqk::cuda {
namespace {

constexpr int kTurnTokens = 32;
constexpr int kLaneTokens = 4;  // of a turn, for each t

struct HalfPairs {
  unsigned of_element[4][2];  // element e of tokens {0, 1} and {2, 3}
};

// Element e of a word of four tokens: bytes b become the float16 numbers 1024 + (b + 128), less 1152.
__device__ inline HalfPairs half_pairs(const uint4& words) {
  const unsigned word[4] = {words.x ^ 0x80808080u, words.y ^ 0x80808080u, words.z ^ 0x80808080u, words.w ^ 0x80808080u};
  const __half2 offset = __float2half2_rn(1152.0f);
  HalfPairs pairs;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned mixed[2] = {__byte_perm(word[i * 2], word[i * 2 + 1], 0x5140),
                               __byte_perm(word[i * 2], word[i * 2 + 1], 0x7362)};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const unsigned bits = __byte_perm(mixed[e / 2], 0x64646464u, e % 2 ? 0x4342 : 0x4140);
      pairs.of_element[e][i] = bits_of(__hsub2(half2_of(bits), offset));
    }
  }
  return pairs;
}

// Shares of four neighbouring tokens in what is left of their page; `left` has a bit for each that is left.
struct Shares {
  unsigned pairs[2] = {0, 0};
};

__device__ inline Shares shares_of(const uint2& delta, float shift, unsigned left) {
  float share[kLaneTokens];
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const unsigned pair = i < 2 ? delta.x : delta.y;
    const float power = power_of_two(half_bits_to_float(i % 2 ? pair >> 16 : pair & 0xffffu) + shift);
    share[i] = (left >> i) & 1u ? power : 0.0f;
  }
  return {{bits_of(__floats2half2_rn(share[0], share[1])), bits_of(__floats2half2_rn(share[2], share[3]))}};
}

// Grid: (pages by warps, KV * blocks of kHeads heads, B). Reads what emit wrote; pages without candidates keep whatever
// is in their place. kTiles times 16 columns.
template <int kHeads, int kTiles>
__global__ void __launch_bounds__(kThreads) moment_int8_kernel(const SelectArgs a) {
  constexpr int kSubsets = kHeads / 4;  // of 16 tokens, of which a lane has the shares
  const HeadBlock block = head_block<kHeads>(a);
  const int request = blockIdx.z, value_rank = a.layout.value_rank, p = blockIdx.x * kWarps + warp_index();
  const int g = lane_index() / 4, t = lane_index() % 4, h = g % kHeads;
  const Candidates c = candidates_of(a, request);
  if (p >= a.pages || p * a.page_size >= c.end) return;  // nothing is left there, and nobody asks for its mean
  const bool is_head = h < block.heads;
  const int64_t head = block.head + (is_head ? h : 0);
  const float log_left = a.residual[head * a.pages + p] * kLog2e;
  const int64_t index = static_cast<int64_t>(request) * a.kv_heads + block.kv_head;
  const unsigned* left_words = a.scratch.left + index * left_words_per_head(a);
  const uint16_t* deltas = a.scratch.delta + head * tokens_per_head(a);
  const float* tile_max = a.scratch.tile_max + head * tiles_per_head(a);
  const int page_id = a.block_table[request * a.block_table_stride + p];
  const uint8_t* page = a.factors.data + page_id * a.factors.page_stride + block.kv_head * a.factors.head_stride;

  float sums[kTiles][4][4] = {};
  const int tiles = a.page_size < kTileTokens ? 1 : a.page_size / kTileTokens;
  for (int tile = 0; tile < tiles; ++tile) {
    const float shift = tile_max[p * tiles + tile] - log_left;
#pragma unroll
    for (int turn = 0; turn < kTileTokens / kTurnTokens; ++turn) {
      const int first = tile * kTileTokens + turn * kTurnTokens;
      unsigned left[4] = {};  // of the product
#pragma unroll
      for (int subset = 0; subset < kSubsets; ++subset) {
        const int in_page = first + (kSubsets == 1 ? g / 4 : subset) * 16 + t * kLaneTokens;
        const int position = p * a.page_size + in_page;
        const bool is_read = is_head && in_page < a.page_size;  // no branch: the loads of a tile then go out together
        const unsigned word = is_read ? left_words[position / 32] >> position % 32 : 0;
        const uint2 delta = is_read ? *reinterpret_cast<const uint2*>(deltas + position) : uint2{};
        const Shares shares = shares_of(delta, shift, word);
        left[subset] = shares.pairs[0];
        left[subset + 2] = shares.pairs[1];
      }
      const int token = first + g / 4 * 16 + t * kLaneTokens;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const int column_word = m * 4 + g % 4;
        uint4 words{};
        if (column_word * 4 < value_rank && token < a.page_size) {
          words = *reinterpret_cast<const uint4*>(page + (static_cast<int64_t>(column_word) * a.page_size + token) * 4);
        }
        const HalfPairs right = half_pairs(words);
#pragma unroll
        for (int e = 0; e < 4; ++e) multiply_half(sums[m][e], left, right.of_element[e]);
      }
    }
  }

  // Columns 2 t and 2 t + 1 are neighbouring words, of the first 16 tokens for t < 2.
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    float of_words[2][4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float own = kSubsets == 2 && t >= 2 ? sums[m][e][i + 2] : sums[m][e][i];
        of_words[i][e] = own + __shfl_xor_sync(kAllLanes, own, kSubsets == 1 ? 16 + 2 : 2);
      }
    }
    if (!is_head || t >= 2 || (kSubsets == 1 && g >= 4)) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = (m * 4 + t * 2 + i) * 4;
      if (column >= value_rank) continue;
      float* to = a.moment + (head * a.pages + p) * value_rank + column;
      *reinterpret_cast<float4*>(to) = make_float4(of_words[i][0], of_words[i][1], of_words[i][2], of_words[i][3]);
    }
  }
}

template <int kHeads>
void start(const SelectArgs& a, cudaStream_t stream) {
  const dim3 grid(ceil_div(a.pages, kWarps), a.kv_heads * head_blocks<kHeads>(a), a.requests);
  if (a.layout.value_rank <= 16) {
    launch(moment_int8_kernel<kHeads, 1>, grid, kThreads, stream, a);
  } else if (a.layout.value_rank <= 32) {
    launch(moment_int8_kernel<kHeads, 2>, grid, kThreads, stream, a);
  } else {
    launch(moment_int8_kernel<kHeads, 4>, grid, kThreads, stream, a);
  }
}

}  // namespace

void moment_int8(const SelectArgs& a, cudaStream_t stream) {
  if (a.heads / a.kv_heads <= 4) {
    start<4>(a, stream);
  } else {
    start<8>(a, stream);
  }
}

}  // namespace lrqk::cuda
