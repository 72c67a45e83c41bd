// The exact threshold: keys in the threshold's bin are listed, and the block that arrives last orders them by their
// remaining digits and then by position.
#include "cuda/topk/candidates.cuh"
#include "cuda/topk/topk.h"

namespace lrqk::cuda {
namespace {

constexpr int kTieBits = 20 + kPositionBits;  // of a composite, below the first digit
constexpr int kDigitBits = 11;
constexpr int kTokens = 4;  // per thread and turn: one 16-byte read

constexpr int kNoDigit = -2;  // below every bin

// What refine() looks at: the listed ties or, where there are too many, all candidates.
struct Ties {
  const unsigned* keys;
  const int* list;
  int count, first, bin;
  bool is_listed;

  // The lower bits of entry i's composite, and its position; false for a candidate outside the bin.
  __device__ bool read(int i, unsigned long long& low, int& position) const {
    position = is_listed ? __ldcg(list + i) : first + i;
    const unsigned key = __ldcg(keys + position);
    low = composite_of(key, position) & ((1ull << kTieBits) - 1);
    return first_digit(key) == bin;
  }
};

// Finds the threshold and adds the selected ties to the counts of their chunks. Every thread of the block calls it.
__device__ inline void refine(const Ties& ties, ItemState& item, int* chunk_counts) {
  __shared__ unsigned histogram[kBins];
  unsigned long long prefix = 0, low;
  int need = item.need, shift = kTieBits, position;
  bool is_exact = false;
  while (shift > 0 && !is_exact) {
    const int width = min(kDigitBits, shift);
    shift -= width;
    clear_bins(histogram);
    for (int i = threadIdx.x; i < ties.count; i += blockDim.x) {
      if (!ties.read(i, low, position) || low >> (shift + width) != prefix >> (shift + width)) continue;
      atomicAdd(&histogram[(low >> shift) & ((1u << width) - 1)], 1u);
    }
    __syncthreads();
    const Digit digit = find_digit(histogram, need);
    prefix |= static_cast<unsigned long long>(digit.value) << shift;
    need -= digit.above;
    is_exact = digit.count == need;
  }
  for (int i = threadIdx.x; i < ties.count; i += blockDim.x) {
    if (ties.read(i, low, position) && low >= prefix) atomicAdd(&chunk_counts[position / kChunkTokens], 1);
  }
  if (threadIdx.x == 0) item.threshold = (static_cast<unsigned long long>(ties.bin) << kTieBits) | prefix;
}

// Grid: (chunks, KV, B).
__global__ void __launch_bounds__(kThreads) collect_kernel(const TopKArgs a) {
  __shared__ int first_place;
  const int request = blockIdx.z, chunk = blockIdx.x;
  const Candidates c = candidates_of(a, request);
  if (c.count() == 0) return;
  const int64_t index = static_cast<int64_t>(request) * a.kv_heads + blockIdx.y;
  const unsigned* keys = a.scratch.keys + index * tokens_per_head(a);
  int* list = a.scratch.ties + index * kMaxTies;
  int* chunk_counts = a.scratch.chunk_counts + index * gridDim.x;
  ItemState& item = a.scratch.items[index];
  const int bin = item.bin;
  const int begin = chunk * kChunkTokens, end = min(begin + kChunkTokens, c.end);
  int above = 0, equal = 0;
  for (int position = begin + threadIdx.x * kTokens; position < end; position += kThreads * kTokens) {
    const uint4 words = *reinterpret_cast<const uint4*>(keys + position);
    const unsigned key[kTokens] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int digit = c.has(position + i) ? first_digit(key[i]) : kNoDigit;
      above += digit > bin;
      equal += digit == bin;
    }
  }
  int num_ties;
  int place = block_scan(equal, num_ties);
  above = block_sum(above);
  if (threadIdx.x == 0) {
    chunk_counts[chunk] = above;
    first_place = num_ties ? static_cast<int>(atomicAdd(&item.num_ties, static_cast<unsigned>(num_ties))) : 0;
  }
  __syncthreads();
  place += first_place;
  for (int first = begin + threadIdx.x * kTokens; equal && first < end; first += kThreads * kTokens) {
    for (int position = first; position < first + kTokens; ++position) {
      if (!c.has(position) || first_digit(keys[position]) != bin) continue;
      if (place < kMaxTies) list[place] = position;
      ++place;
    }
  }
  if (!is_last_block(&item.collected, gridDim.x)) return;
  const int listed = static_cast<int>(__ldcg(&item.num_ties));
  if (bin < 0) {
    if (threadIdx.x == 0) item.threshold = composite_of(1, (1 << kPositionBits) - 1);
  } else {
    const bool is_listed = listed <= kMaxTies;
    refine({keys, list, is_listed ? listed : c.count(), c.first, bin, is_listed}, item, chunk_counts);
  }
  __syncthreads();
  if (threadIdx.x == 0) item.num_ties = 0;
}

}  // namespace

void collect(const TopKArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(static_cast<int64_t>(a.pages) * a.page_size, kChunkTokens)),
                  a.kv_heads, a.requests);
  launch(collect_kernel, grid, kThreads, stream, a);
}

}  // namespace lrqk::cuda
