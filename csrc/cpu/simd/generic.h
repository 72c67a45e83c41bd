// The SIMD vocabulary of the kernels, in the manner of google/highway and, as far as they go, with its names.
//
// A source file includes the instruction set first: avx512.h, avx2.h or portable.h, which define what differs between
// them. Everything else is here, once. A header that is opened by itself (by an editor, say) gets the portable set.
//
//   F, I, M            W floats; W int32 or 2 W int16; one truth value per lane of F
//   kMatmulRows        rows of a register tile that is 2 W wide
//   DenormalsOff       for its scope: denormals cost a microcode assist each, and weights below 1e-38 mean nothing here
//   zero set           every lane alike                      add sub mul div max abs
//   mul_add(a, b, c)   a b + c                               reduce_sum reduce_max   over the lanes
//   reduce_sum_each(a) lane i is the sum of all lanes of a[i], for W vectors of F or of I
//   load store         W elements of float or fp16 (here: bf16), as floats
//   ge(a, b)           a >= b                                bits(m)    one bit per lane
//   if_then_else(m, yes, no)                                 count_if(count, m)   count + 1 where m
//   zero_int set_int add bit_and bit_or bit_xor              on int32
//   shift_left<n> shift_right<n> shift_right_logical<n>      of int32; shift_left_16<n> shift_right_16<n> of int16
//   to_bits from_bits  the same bits as I, as F              to_float round_to_int   convert; to nearest even
//   swap_pairs         of each four int32 the first two with the last two
//   spread_pair<k>     of each four numbers below 2^15 in int32, those at k and k + 2 as int16, four times
//   sum_quads(a)       words 4 i ... 4 i + 3 are the sums of the words k, 4 + k, 8 + k, ... of a[i], for W / 4 vectors
//   dot(acc, a, b)     acc + the sums of two neighbouring int16 products
//   dot_bytes(acc, a, b)             acc + the sums of four neighbouring products of uint8 in a and int8 in b
//   transpose_bytes                  of each four words, as a 4 x 4 matrix of bytes
//   spread_bytes                     W bytes, each four of them four times: words 4 i ... 4 i + 3 have bytes 4 i ... 4 i + 3
//   store_quad_sums(p, a)            p[k] is the sum of the words k, 4 + k, 8 + k, ... of a
//   load_words store_words           any 4 W bytes
//   widen_16 widen_8                 W uint16 as int32, 2 W int8 as int16
//   store_low_16 store_low_8         the low bits of each int32, side by side
#pragma once

#ifndef LRQK_ISA
#include "cpu/simd/portable.h"
#endif

#include <cstdint>

#include "elements.h"

// Before loops over arrays of vectors, which have to become registers.
#define LRQK_UNROLL _Pragma("GCC unroll 16")

namespace lrqk {
namespace LRQK_ISA {

inline I set_high_mask() { return set_int(static_cast<int32_t>(0xffff0000u)); }

inline F load(const bf16* p) { return from_bits(shift_left<16>(widen_16(&p->bits))); }
inline void store(bf16* p, F a) {
  const I lowest = bit_and(shift_right<16>(to_bits(a)), set_int(1));  // ties go to even
  store_low_16(p, shift_right<16>(add(to_bits(a), add(lowest, set_int(0x7fff)))));
}
inline void store_int16(int16_t* p, F a) { store_low_16(p, round_to_int(a)); }
inline void store_int8(int8_t* p, F a) { store_low_8(p, round_to_int(a)); }
inline void store_uint8(uint8_t* p, F a) { store_low_8(p, round_to_int(a)); }

// 2 W elements in an order of the type's own, which pair_index tells.
template <class T>
inline void load_pair(const T* p, F& a, F& b) {
  a = load(p);
  b = load(p + W);
}
inline void load_pair(const bf16* p, F& a, F& b) {
  const I words = load_words(p);
  a = from_bits(shift_left<16>(words));
  b = from_bits(bit_and(words, set_high_mask()));
}
inline void load_pair(const i8* p, F& a, F& b) {
  const I wide = widen_8(&p->value);
  a = to_float(shift_right<16>(shift_left<16>(wide)));
  b = to_float(shift_right<16>(wide));
}
template <class T>
constexpr int pair_index(const T*, int half, int lane) {
  return half * W + lane;
}
constexpr int pair_index(const bf16*, int half, int lane) { return 2 * lane + half; }

// The int8 at even and at odd places of each int16.
inline I even_bytes(I a) { return shift_right_16<8>(shift_left_16<8>(a)); }
inline I odd_bytes(I a) { return shift_right_16<8>(a); }
#ifndef LRQK_NATIVE_DOT_BYTES
inline I dot_bytes(I acc, I a, I b) {
  const I low = set_int(0x00ff00ff);
  acc = dot(acc, bit_and(a, low), even_bytes(b));
  return dot(acc, bit_and(shift_right_16<8>(a), low), odd_bytes(b));
}
#endif

// The int8 at place k of each word.
template <int k>
inline F byte_to_float(I a) {
  return to_float(shift_right<24>(k < 3 ? shift_left<24 - 8 * k>(a) : a));
}
// For 4 values per word: lane 4 w holds (a[4w], a[4w+2]) and lane 4 w + 1 holds (a[4w+1], a[4w+3]) as int16 pairs.
inline void store_pair_words(int32_t* p, F a) {
  const I rounded = round_to_int(a);
  store_words(p, bit_or(bit_and(rounded, set_int(0xffff)), shift_left<16>(swap_pairs(rounded))));
}

// To bfloat16 precision, still as float32.
inline F round_to_bf16(F a) { return from_bits(bit_and(add(to_bits(a), set_int(0x8000)), set_high_mask())); }
// Two such values in one word.
inline I pack_bf16(F high, F low) { return bit_or(to_bits(high), shift_right_logical<16>(to_bits(low))); }
inline F high_bf16(I a) { return from_bits(bit_and(a, set_high_mask())); }
inline F low_bf16(I a) { return from_bits(shift_left<16>(a)); }
inline F bf16_at(I a, int i) { return i % 2 ? low_bf16(a) : high_bf16(a); }

#ifndef LRQK_NATIVE_COMPRESS
// Writes the lanes of `m` side by side; returns how many. May write up to W elements.
inline int compress_store(float* p, F a, M m) {
  float lanes[W];
  store(lanes, a);
  int count = 0;
  for (uint32_t left = bits(m); left; left &= left - 1) p[count++] = lanes[__builtin_ctz(left)];
  return count;
}
// As compress_store, for base + lane.
inline int compress_store_index(int32_t* p, int32_t base, M m) {
  int count = 0;
  for (uint32_t left = bits(m); left; left &= left - 1) p[count++] = base + __builtin_ctz(left);
  return count;
}
#endif

#ifndef LRQK_NATIVE_POWER
// 2^a in two parts: a - n for a whole number n, and the multiplication with 2^n. With kFloors, a - n is in [0, 1), else
// in [-1/2, 1/2].
struct Power {
  static constexpr bool kFloors = false;
  I exponent;
  F fraction;
  explicit Power(F a) {
    a = max(a, set(-127.0f));
    exponent = round_to_int(a);
    fraction = sub(a, to_float(exponent));
  }
  F times(F p) const { return mul(p, from_bits(shift_left<23>(add(exponent, set_int(127))))); }
};
#endif

template <int N>
inline F polynomial(F x, const float (&highest_first)[N]) {
  F p = set(highest_first[0]);
  LRQK_UNROLL
  for (int i = 1; i < N; ++i) p = mul_add(p, x, set(highest_first[i]));
  return p;
}

// 2^a for a <= 127, to 4e-6; results below 2^-126 may be anything down to 0.
inline F exp2(F a) {
  // The minimax polynomial of relative error on [0, 1) (9e-8), and Taylor's, (ln 2)^k / k!, around 0.
  constexpr float kOnUnit[] = {1.8775767e-3f, 8.9893397e-3f, 5.5826318e-2f,
                               2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f};
  constexpr float kAroundZero[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
  const Power power(a);
  return power.times(polynomial(power.fraction, Power::kFloors ? kOnUnit : kAroundZero));
}

// The same to 1e-4, for what is rounded to bfloat16 afterwards.
inline F exp2_rough(F a) {
  // Minimax polynomials of relative error on [0, 1) and on [-1/2, 1/2], 7.5e-5 each.
  constexpr float kOnUnit[] = {7.8024108e-2f, 2.2606790e-1f, 6.9583317e-1f, 9.9992526e-1f};
  constexpr float kAroundZero[] = {5.5171376e-2f, 2.4261121e-1f, 6.9326103e-1f, 9.9992807e-1f};
  const Power power(a);
  return power.times(polynomial(power.fraction, Power::kFloors ? kOnUnit : kAroundZero));
}

// Hyperbolic tangent to a few units in the last place: the minimax quotient of Eigen's float kernel.
inline F tanh(F a) {
  constexpr float kLargest = 7.90531110763549805f;  // from where on the quotient is 1
  constexpr float kOdd[] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                            5.12229709037114e-08f,  1.48572235717979e-05f, 6.37261928875436e-04f,
                            4.89352455891786e-03f};
  constexpr float kEven[] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f,
                             4.89352518554385e-03f};
  a = max(a, set(-kLargest));
  a = if_then_else(ge(a, set(kLargest)), set(kLargest), a);
  const F square = mul(a, a);
  return div(mul(a, polynomial(square, kOdd)), polynomial(square, kEven));
}

// cap tanh(a / cap).
inline F soft_cap(F a, float cap) { return mul(tanh(mul(a, set(1.0f / cap))), set(cap)); }

}  // namespace LRQK_ISA
}  // namespace lrqk
