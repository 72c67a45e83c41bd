// GCC and Clang vector extensions, for any machine (NEON on Arm): what generic.h needs of an instruction set. The
// meaning of each name is there.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "elements.h"

#define LRQK_ISA portable

namespace lrqk {
namespace portable {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int16_t Short __attribute__((vector_size(16)));
struct M {
  I lanes;  // all bits or none
};
constexpr int W = 4;
constexpr int kMatmulRows = 6;

struct DenormalsOff {
  DenormalsOff() {}
};

template <class V>
inline V load_bytes(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline I zero_int() { return I{}; }
inline I set_int(int32_t x) { return I{x, x, x, x}; }
inline I to_bits(F a) { return (I)a; }
inline F from_bits(I a) { return (F)a; }
inline F to_float(I a) { return __builtin_convertvector(a, F); }
inline I add(I a, I b) { return a + b; }
inline I bit_and(I a, I b) { return a & b; }
inline I bit_or(I a, I b) { return a | b; }
inline I bit_xor(I a, I b) { return a ^ b; }
template <int n>
inline I shift_left(I a) {
  return a << n;
}
template <int n>
inline I shift_right(I a) {
  return a >> n;
}
template <int n>
inline I shift_right_logical(I a) {
  return (I)((U)a >> n);
}
template <int n>
inline I shift_left_16(I a) {
  return (I)((Short)a << n);
}
template <int n>
inline I shift_right_16(I a) {
  return (I)((Short)a >> n);
}
inline I swap_pairs(I a) { return I{a[2], a[3], a[0], a[1]}; }
template <int k>
inline I spread_pair(I a) {
  return set_int(a[k] | a[k + 2] << 16);
}
inline I sum_quads(const I* a) { return a[0]; }
#ifdef __SSE2__
// It has this product, and none of 32 bits.
inline I dot(I acc, I a, I b) { return acc + (I)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
inline I dot(I acc, I a, I b) { return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16); }
#endif
inline I transpose_bytes(I a) {
  uint8_t from[16], to[16];
  std::memcpy(from, &a, sizeof(a));
  for (int i = 0; i < 16; ++i) to[i] = from[i % 4 * 4 + i / 4];
  return load_bytes<I>(to);
}
inline I spread_bytes(const uint8_t* p) {
  const int32_t word = load_bytes<int32_t>(p);
  return set_int(word);
}
inline void store_quad_sums(int32_t* p, I a) { std::memcpy(p, &a, sizeof(a)); }

inline I load_words(const void* p) { return load_bytes<I>(p); }
inline void store_words(void* p, I a) { std::memcpy(p, &a, sizeof(a)); }
inline I widen_16(const uint16_t* p) { return I{p[0], p[1], p[2], p[3]}; }
inline I widen_8(const int8_t* p) { return (I)Short{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
inline void store_low_16(void* p, I a) {
  for (int i = 0; i < W; ++i) static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(a[i]);
}
inline void store_low_8(void* p, I a) {
  for (int i = 0; i < W; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(a[i]);
}

inline F zero() { return F{}; }
inline F set(float x) { return F{x, x, x, x}; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F abs(F a) { return from_bits(to_bits(a) & set_int(0x7fffffff)); }
inline F mul_add(F a, F b, F c) { return a * b + c; }
inline float reduce_sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float reduce_max(F a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
inline I round_to_int(F a) {
  const F magic = set(12582912.0f);  // 1.5 * 2^23: its addition leaves whole numbers in the low bits
  return to_bits(a + magic) - to_bits(magic);
}
inline F load(const float* p) { return load_bytes<F>(p); }
inline F load(const fp16* p) {
  const I half = widen_16(&p->bits);
  const I sign = (half & 0x8000) << 16, rest = half & 0x7fff;
  // Move exponent and mantissa into place; the factor moves the exponent's bias, for denormals as well.
  const F value = from_bits(rest << 13) * set(0x1p112f);
  const I special = rest > 0x7bff;
  const I magnitude = (special & ((rest << 13) | 0x7f800000)) | (~special & to_bits(value));
  return from_bits(magnitude | sign);
}
inline void store(float* p, F a) { std::memcpy(p, &a, sizeof(a)); }
inline void store(fp16* p, F a) {
  const I sign = (to_bits(a) >> 16) & 0x8000;
  const F size = abs(a);
  const I magnitude = to_bits(size);
  // Too small for a normal half: let float addition round to a multiple of its least denormal.
  const I denormal = to_bits(size + set(0.5f)) - to_bits(set(0.5f));
  const I normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const I is_denormal = magnitude < (113 << 23), is_infinite = magnitude >= 0x477ff000;
  const I is_nan = magnitude > 0x7f800000;
  I half = (is_denormal & denormal) | (~is_denormal & normal);
  half = (is_infinite & 0x7c00) | (~is_infinite & half);
  half = (is_nan & 0x7e00) | (~is_nan & half);
  store_low_16(p, half | sign);
}

inline M ge(F a, F b) { return {a >= b}; }
inline uint32_t bits(M m) { return (m.lanes[0] & 1) | (m.lanes[1] & 2) | (m.lanes[2] & 4) | (m.lanes[3] & 8); }
inline F if_then_else(M m, F yes, F no) { return m.lanes ? yes : no; }
inline I count_if(I count, M m) { return count - m.lanes; }

inline F reduce_sum_each(const F* a) {
  return F{reduce_sum(a[0]), reduce_sum(a[1]), reduce_sum(a[2]), reduce_sum(a[3])};
}
inline I reduce_sum_each(const I* a) {
  I total;
  for (int i = 0; i < W; ++i) total[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
  return total;
}

}  // namespace portable
}  // namespace lrqk
