// What the threads of a warp and of a block do together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/args.h"
#include "cuda/launch.cuh"
#include "elements.h"

namespace lrqk::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The same on the host and on the device, for any pair of integers.
template <class T>
__host__ __device__ inline T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
__host__ __device__ inline T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
__host__ __device__ inline T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

__device__ inline int lane_index() { return threadIdx.x % 32; }
__device__ inline int warp_index() { return threadIdx.x / 32; }

template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(kAllLanes, value, width);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, width));
  return value;
}

// The sum over all lanes of v[lane]: halves of v change hands until one element is left.
template <int kWidth = 16, class T>
__device__ inline T sum_to_lane(T (&v)[32]) {
  const bool upper = lane_index() & kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const T kept = upper ? v[i + kWidth] : v[i];
    const T sent = upper ? v[i] : v[i + kWidth];
    v[i] = kept + __shfl_xor_sync(kAllLanes, sent, kWidth);
  }
  if constexpr (kWidth > 1) return sum_to_lane<kWidth / 2>(v);
  return v[0];
}

// Sum over the lanes before this one; `total` over all.
__device__ inline int warp_scan(int value, int& total) {
  int sum = value;
#pragma unroll
  for (int width = 1; width < 32; width *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, width);
    if (lane_index() >= width) sum += other;
  }
  total = __shfl_sync(kAllLanes, sum, 31);
  return sum - value;
}

// Sum over the threads before this one; `total` over all. Every thread of the block calls it.
__device__ inline int block_scan(int value, int& total) {
  __shared__ int sums[33];
  int of_warp;
  const int before = warp_scan(value, of_warp);
  if (lane_index() == 0) sums[warp_index()] = of_warp;
  __syncthreads();
  if (warp_index() == 0) {
    const int warps = blockDim.x / 32;
    int all;
    const int first = warp_scan(lane_index() < warps ? sums[lane_index()] : 0, all);
    sums[lane_index()] = first;
    if (lane_index() == 0) sums[32] = all;
  }
  __syncthreads();
  total = sums[32];
  const int result = sums[warp_index()] + before;
  __syncthreads();
  return result;
}

__device__ inline int block_sum(int value) {
  int total;
  block_scan(value, total);
  return total;
}

__device__ inline float block_combine(float value, bool is_max) {
  __shared__ float parts[32];
  value = is_max ? warp_max(value) : warp_sum(value);
  if (lane_index() == 0) parts[warp_index()] = value;
  __syncthreads();
  float result = parts[0];
  for (int i = 1; i < static_cast<int>(blockDim.x / 32); ++i) {
    result = is_max ? fmaxf(result, parts[i]) : result + parts[i];
  }
  __syncthreads();
  return result;
}

// True in the block that arrives last of `blocks`: what the others wrote before is then visible to it (read it with
// __ldcg). Resets the counter.
__device__ inline bool is_last_block(unsigned* arrived, unsigned blocks) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1u) == blocks - 1;
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  if (threadIdx.x == 0) *arrived = 0;
  return true;
}

struct Digit {
  int value;  // the bin in which the rank lies
  int above;  // entries in higher bins
  int count;  // entries in this bin
};

// The bin of the `rank`-th largest entry (from 1) of a histogram in shared memory, for all threads. `rank` is at most
// the number of entries.
__device__ inline Digit find_digit(const unsigned* histogram, int rank) {
  __shared__ Digit found;
  const int bins = kBins / blockDim.x;
  const int last = kBins - 1 - static_cast<int>(threadIdx.x) * bins;
  int sum = 0;
  for (int i = 0; i < bins; ++i) sum += static_cast<int>(histogram[last - i]);
  int total;
  int above = block_scan(sum, total);
  if (above < rank && rank <= above + sum) {
    int bin = last;
    while (above + static_cast<int>(histogram[bin]) < rank) above += static_cast<int>(histogram[bin--]);
    found = {bin, above, static_cast<int>(histogram[bin])};
  }
  __syncthreads();
  const Digit result = found;
  __syncthreads();
  return result;
}

__device__ inline void clear_bins(unsigned* histogram) {
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) histogram[i] = 0;
  __syncthreads();
}

__device__ inline float to_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  if (dtype == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  return __half2float(static_cast<const __half*>(data)[index]);
}

// 2^value, off by 2^-22 of it at most; 0 below float32's normal numbers.
__device__ inline float power_of_two(float value) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(value));
  return value;
#else
  return exp2f(value);
#endif
}

// The logarithm of a normal number to base 2, off by 2^-22, or by 2^-22 of it.
__device__ inline float log_two(float value) {
#ifdef __CUDA_ARCH__
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(value));
  return value;
#else
  return log2f(value);
#endif
}

__device__ inline float half_bits_to_float(unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

}  // namespace lrqk::cuda
