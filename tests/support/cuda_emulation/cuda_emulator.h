// Runs the CUDA kernels on a CPU, compiled as plain C++: every thread of a block is a fiber, blocks run one by one.
//
// Stricter than the hardware where that finds mistakes: a barrier that a thread never reaches ends the process, and
// threads and blocks run in opposite order every other time, so that a missing barrier shows.
//
// With LRQK_FIND_RACES (race_emulator.cpp), for programs under ThreadSanitizer: several blocks at a time, in random
// interleavings, and what orders memory on a GPU is all that orders it: __syncthreads, __syncwarp, and an atomic between
// two fences. Shuffles and ballots order nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#ifdef LRQK_FIND_RACES
#define LRQK_OF_BLOCK thread_local  // a block is a thread of the system, its threads are fibers
#else
#define LRQK_OF_BLOCK
#endif
#undef __shared__
#define __shared__ static LRQK_OF_BLOCK
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulator {

enum class Wait { kNone, kWarp, kBlock };
void wait(Wait);
uint64_t exchange_bits(uint64_t bits, int from_lane);  // of the calling thread's warp
unsigned vote(bool);
void run(dim3 grid, int threads, const std::function<void()>& kernel);
#ifdef LRQK_FIND_RACES
void fence();
int begin_atomic(void* at, size_t size);  // the order of memory that the next atomic has
#endif

template <class T>
inline T exchange(T value, int from_lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange_bits(bits, from_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

extern LRQK_OF_BLOCK uint3 threadIdx, blockIdx;
extern LRQK_OF_BLOCK dim3 blockDim, gridDim;

inline void __syncthreads() { emulator::wait(emulator::Wait::kBlock); }
inline void __syncwarp() { emulator::wait(emulator::Wait::kWarp); }
#ifdef LRQK_FIND_RACES
inline void __threadfence() { emulator::fence(); }
#else
inline void __threadfence() {}
#endif

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
inline unsigned __ballot_sync(unsigned, unsigned predicate) { return emulator::vote(predicate != 0); }

#ifdef LRQK_FIND_RACES
template <class T>
inline T atomicAdd(T* at, T value) {
  const bool is_release = emulator::begin_atomic(at, sizeof(T)) == __ATOMIC_RELEASE;
  return is_release ? __atomic_fetch_add(at, value, __ATOMIC_RELEASE) : __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline int atomicCAS(int* at, int expected, int value) {
  emulator::begin_atomic(at, sizeof(int));
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
#else
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
#endif
template <class T>
inline T __ldcg(const T* at) {
  return *at;
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return sum;
}
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyintf(value)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
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
