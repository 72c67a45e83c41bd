// Runs the CUDA kernels on a CPU, compiled as plain C++: every thread of a block is a fiber, blocks run one by one.
//
// Stricter than the hardware where that finds mistakes: a barrier that a thread never reaches ends the process, and
// threads and blocks run in opposite order every other time, so that a missing barrier shows.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulator {

enum class Wait { kNone, kWarp, kBlock };
void wait(Wait);
uint64_t& lane_slot(int lane);  // of the calling thread's warp
void run(dim3 grid, int threads, const std::function<void()>& kernel);

template <class T>
inline T exchange(T value, int from_lane) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&lane_slot(-1), &value, sizeof(T));
  wait(Wait::kWarp);
  std::memcpy(&value, &lane_slot(from_lane), sizeof(T));
  wait(Wait::kWarp);
  return value;
}

}  // namespace emulator

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { emulator::wait(emulator::Wait::kBlock); }
inline void __syncwarp() { emulator::wait(emulator::Wait::kWarp); }
inline void __threadfence() {}

template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value, lane);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return emulator::exchange(value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned, unsigned predicate) {
  unsigned votes = 0;
  emulator::exchange<uint64_t>(predicate != 0, 0);
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(emulator::lane_slot(lane) != 0) << lane;
  emulator::wait(emulator::Wait::kWarp);
  return votes;
}

template <class T>
inline T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
inline int atomicCAS(int* at, int expected, int value) {
  const int old = *at;
  if (old == expected) *at = value;
  return old;
}
template <class T>
inline T __ldcg(const T* at) {
  return *at;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace lrqk::cuda {

template <class... Params, class... Args>
inline void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t, const Args&... args) {
  emulator::run(grid, threads, [&] { kernel(args...); });
}

}  // namespace lrqk::cuda
