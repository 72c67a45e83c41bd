// Products of matrices by the tensor cores: a warp multiplies 16 rows and 8 columns, 16 elements of each.
//
// With g = lane / 4 and t = lane % 4, a lane has of the left matrix rows g and g + 8, of the right one column g, and of
// the sums rows g and g + 8 of columns 2 t and 2 t + 1. A word holds four neighbouring int8 elements of the inner
// dimension, or two float16 ones. All lanes of the warp call a product.
#pragma once

#include <cstring>

#include "cuda/block.cuh"

namespace lrqk::cuda {

// sums {[g][2t], [g][2t+1], [g+8][2t], [g+8][2t+1]} += left * right, of 16 elements: `left` {word t of row g, of row
// g + 8}, `right` word t of column g.
__device__ inline void multiply_int8(int (&sums)[4], const int (&left)[2], int right);

// As above, of float16 numbers, with sums in float32: `left` {word t of row g, of row g + 8, word t + 4 of row g, of row
// g + 8}, `right` {word t, word t + 4 of column g}.
__device__ inline void multiply_half(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2]);

__device__ inline unsigned bits_of(__half2 pair) {
  unsigned bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ inline __half2 half2_of(unsigned bits) {
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &bits, sizeof(pair));
  return pair;
}

#ifdef __CUDACC__
__device__ inline void multiply_int8(int (&sums)[4], const int (&left)[2], int right) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
               : "r"(left[0]), "r"(left[1]), "r"(right));
}
__device__ inline void multiply_half(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}
#else
inline void multiply_half(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2]) {
  const int row = lane_index() / 4 * 4, column = lane_index() % 4 * 8;
  for (int word = 0; word < 8; ++word) {
    const int place = word / 4, lane = word % 4;
    const unsigned rows[2] = {__shfl_sync(kAllLanes, left[place * 2], row + lane),
                              __shfl_sync(kAllLanes, left[place * 2 + 1], row + lane)};
    const unsigned columns[2] = {__shfl_sync(kAllLanes, right[place], column + lane),
                                 __shfl_sync(kAllLanes, right[place], column + 4 + lane)};
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 32; half += 16) {
        sums[i] +=
            half_bits_to_float(rows[i / 2] >> half & 0xffffu) * half_bits_to_float(columns[i % 2] >> half & 0xffffu);
      }
    }
  }
}

inline void multiply_int8(int (&sums)[4], const int (&left)[2], int right) {
  const int row = lane_index() / 4 * 4, column = lane_index() % 4 * 8;
  for (int word = 0; word < 4; ++word) {
    const int rows[2] = {__shfl_sync(kAllLanes, left[0], row + word), __shfl_sync(kAllLanes, left[1], row + word)};
    const int columns[2] = {__shfl_sync(kAllLanes, right, column + word),
                            __shfl_sync(kAllLanes, right, column + 4 + word)};
    for (int i = 0; i < 4; ++i) sums[i] = __dp4a(rows[i / 2], columns[i % 2], sums[i]);
  }
}
#endif

}  // namespace lrqk::cuda
