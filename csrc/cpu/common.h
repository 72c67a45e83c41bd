// What every kernel shares: scratch memory, parallel loops, the types behind a DType.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/args.h"
#include "cpu/scratch.h"
#include "cpu/simd/generic.h"

namespace lrqk {

constexpr float kMasked = -1e30f;  // a score that stands for minus infinity and survives subtraction
constexpr float kLog2e = 1.44269504088896340736f;

namespace LRQK_ISA {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Not those of <algorithm>: their code would be shared between instruction sets, and come from any of them.
template <class T>
constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T max(T a, T b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// task(i) for every i < n, on all threads.
template <class Task>
inline void for_each(const Parallel& parallel, int64_t n, const Task& task) {
  if (n <= 0) return;
  parallel.run(
      n,
      [](int64_t index, void* context) {
        DenormalsOff guard;
        (*static_cast<const Task*>(context))(index);
      },
      const_cast<void*>(static_cast<const void*>(&task)));
}

// Hands out aligned pieces of one scratch block; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }
  bool is_counting() const { return !base_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

template <class T>
struct Tag {
  using type = T;
};
// call(Tag<T>{}) with the element type of `dtype`.
template <class Call>
inline void with_type(DType dtype, const Call& call) {
  if (dtype == DType::kFloat32) call(Tag<float>{});
  if (dtype == DType::kBFloat16) call(Tag<bf16>{});
  if (dtype == DType::kFloat16) call(Tag<fp16>{});
}

// call(Tag<Count<B>>, first) for blocks of 4, 2 and 1 heads that make up `heads`.
template <int B>
struct Count {
  static constexpr int value = B;
};
template <class Call>
inline void for_head_blocks(int heads, const Call& call) {
  int g = 0;
  for (; g + 4 <= heads; g += 4) call(Count<4>{}, g);
  if (heads & 2) {
    call(Count<2>{}, g);
    g += 2;
  }
  if (heads & 1) call(Count<1>{}, g);
}

}  // namespace LRQK_ISA
}  // namespace lrqk
