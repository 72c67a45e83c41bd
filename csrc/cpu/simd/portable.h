// SIMD vocabulary in GCC and Clang vector extensions, for any machine (NEON on Arm); the meaning of each name is
// in simd_avx512.h.
#pragma once

#include <cstring>

#include "cpu/args.h"

#define LRQK_ISA portable

namespace lrqk {
namespace portable {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int kMatmulRows = 6;

struct DenormalsOff {
  DenormalsOff() {}
};

inline F from_bits(I a) { return (F)a; }
inline I to_bits(F a) { return (I)a; }
inline I splat(int32_t x) { return I{x, x, x, x}; }

inline F zero() { return F{}; }
inline F set1(float x) { return F{x, x, x, x}; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F abs(F a) { return from_bits(to_bits(a) & splat(0x7fffffff)); }
inline F fma(F a, F b, F c) { return a * b + c; }
inline float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float maximum(F a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}

template <class V>
inline V load_bytes(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
inline I widen(const uint16_t* p) { return I{p[0], p[1], p[2], p[3]}; }

inline F load(const float* p) { return load_bytes<F>(p); }
inline F load(const bf16* p) { return from_bits(widen(&p->bits) << 16); }
inline F load(const fp16* p) {
  const I half = widen(&p->bits);
  const I sign = (half & 0x8000) << 16, rest = half & 0x7fff;
  // Move exponent and mantissa into place; the factor moves the exponent's bias, for denormals as well.
  const F value = from_bits(rest << 13) * set1(0x1p112f);
  const I special = rest > 0x7bff;
  const I bits = (special & ((rest << 13) | 0x7f800000)) | (~special & to_bits(value));
  return from_bits(bits | sign);
}

inline void store(float* p, F a) { std::memcpy(p, &a, sizeof(a)); }
inline void store(bf16* p, F a) {
  const I bits = to_bits(a);
  const I rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
  for (int i = 0; i < W; ++i) p[i].bits = static_cast<uint16_t>(rounded[i]);
}
inline void store(fp16* p, F a) {
  const I sign = (to_bits(a) >> 16) & 0x8000;
  const F size = abs(a);
  const I bits = to_bits(size);
  // Too small for a normal half: let float addition round to a multiple of its least denormal.
  const I denormal = to_bits(size + set1(0.5f)) - to_bits(set1(0.5f));
  const I normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const I is_denormal = bits < (113 << 23), is_infinite = bits >= 0x477ff000, is_nan = bits > 0x7f800000;
  I half = (is_denormal & denormal) | (~is_denormal & normal);
  half = (is_infinite & 0x7c00) | (~is_infinite & half);
  half = (is_nan & 0x7e00) | (~is_nan & half);
  for (int i = 0; i < W; ++i) p[i].bits = static_cast<uint16_t>(half[i] | sign[i]);
}

template <class T>
inline void load_pair(const T* p, F& a, F& b) {
  a = load(p);
  b = load(p + W);
}
inline void load_pair(const bf16* p, F& a, F& b) {
  const I x = load_bytes<I>(p);
  a = from_bits(x << 16);
  b = from_bits(x & splat(static_cast<int32_t>(0xffff0000u)));
}
template <class T>
constexpr int pair_index(const T*, int half, int lane) {
  return half * W + lane;
}
constexpr int pair_index(const bf16*, int half, int lane) { return 2 * lane + half; }

inline F choose(F a, F b, F value, F other) { return a >= b ? value : other; }
inline uint32_t at_least(F a, F b) {
  const I is = a >= b;
  return (is[0] & 1) | (is[1] & 2) | (is[2] & 4) | (is[3] & 8);
}
inline I count_at_least(I acc, F a, F b) { return acc - (I)(a >= b); }
inline int compress(float* p, F a, uint32_t mask) {
  int count = 0;
  for (int i = 0; i < W; ++i) {
    p[count] = a[i];
    count += mask >> i & 1;
  }
  return count;
}
inline int compress_index(int32_t* p, int32_t base, uint32_t mask) {
  int count = 0;
  for (int i = 0; i < W; ++i) {
    p[count] = base + i;
    count += mask >> i & 1;
  }
  return count;
}

inline I round_to_int(F a) {
  const F magic = set1(12582912.0f);  // 1.5 * 2^23: its addition leaves whole numbers in the low bits
  return to_bits(a + magic) - to_bits(magic);
}
inline F to_float(I a) { return __builtin_convertvector(a, F); }

inline F exp2(F a) {
  a = max(a, set1(-127.0f));
  const I n = round_to_int(a);
  const F f = a - to_float(n);
  F p = set1(1.3333558e-3f);
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * from_bits((n + 127) << 23);
}

// The same to 1e-4, for what is rounded to bfloat16 afterwards.
inline F exp2_rough(F a) {
  a = max(a, set1(-127.0f));
  const I n = round_to_int(a);
  const F f = a - to_float(n);
  F p = set1(5.5171376e-2f);
  p = p * f + 2.4261121e-1f;
  p = p * f + 6.9326103e-1f;
  p = p * f + 9.9992807e-1f;
  return p * from_bits((n + 127) << 23);
}

inline I int_zero() { return I{}; }
inline I load_words(const void* p) { return load_bytes<I>(p); }
inline I int_set1(int32_t x) { return splat(x); }
inline I max(I a, I b) { return a > b ? a : b; }
inline void store_words(void* p, I a) { std::memcpy(p, &a, sizeof(a)); }
typedef int16_t Short __attribute__((vector_size(16)));
inline I even_bytes(I a) { return (I)(((Short)a << 8) >> 8); }
inline I odd_bytes(I a) { return (I)((Short)a >> 8); }
inline I widen_bytes(const int8_t* p) { return (I)Short{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
inline void load_pair(const i8* p, F& a, F& b) {
  const I wide = widen_bytes(&p->value);
  a = to_float((wide << 16) >> 16);
  b = to_float(wide >> 16);
}
template <int k>
inline F byte_to_float(I a) {
  return to_float((a << (24 - 8 * k)) >> 24);
}
inline I broadcast_word(const int32_t* p) { return splat(*p); }
inline I dot(I acc, I a, I b) { return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16); }
inline void store_pair_words(int32_t* p, F a) {
  const I r = round_to_int(a);
  const I words = {(r[0] & 0xffff) | (r[2] << 16), (r[1] & 0xffff) | (r[3] << 16), 0, 0};
  std::memcpy(p, &words, sizeof(words));
}
inline void store_int16(int16_t* p, F a) {
  const I r = round_to_int(a);
  for (int i = 0; i < W; ++i) p[i] = static_cast<int16_t>(r[i]);
}
inline void store_int8(int8_t* p, F a) {
  const I r = round_to_int(a);
  for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(r[i]);
}

inline F round_to_bf16(F a) { return from_bits((to_bits(a) + 0x8000) & splat(static_cast<int32_t>(0xffff0000u))); }
inline I pack_bf16(F high, F low) { return to_bits(high) | ((to_bits(low) >> 16) & 0xffff); }
inline F high_bf16(I a) { return from_bits(a & splat(static_cast<int32_t>(0xffff0000u))); }
inline F low_bf16(I a) { return from_bits(a << 16); }

inline F sum_each(const F* a) { return F{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])}; }
inline I sum_each(const I* a) {
  I total;
  for (int i = 0; i < 4; ++i) total[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
  return total;
}

}  // namespace portable
}  // namespace lrqk
