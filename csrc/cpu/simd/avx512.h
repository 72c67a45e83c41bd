// AVX-512 with VNNI: what generic.h needs of an instruction set. The meaning of each name is there.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "elements.h"

#define LRQK_ISA avx512
#define LRQK_NATIVE_COMPRESS
#define LRQK_NATIVE_POWER
#define LRQK_NATIVE_DOT_BYTES

namespace lrqk {
namespace avx512 {

using F = __m512;
using I = __m512i;
using M = __mmask16;
constexpr int W = 16;
constexpr int kMatmulRows = 12;

struct DenormalsOff {
  unsigned saved = _mm_getcsr();
  DenormalsOff() { _mm_setcsr(saved | 0x8040); }
  ~DenormalsOff() { _mm_setcsr(saved); }
};

inline F zero() { return _mm512_setzero_ps(); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float reduce_sum(F a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline void store(fp16* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline M ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t bits(M m) { return m; }
inline F if_then_else(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
inline I count_if(I count, M m) { return _mm512_mask_add_epi32(count, m, count, _mm512_set1_epi32(1)); }
inline int compress_store(float* p, F a, M m) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m, a));
  return __builtin_popcount(m);
}
inline int compress_store_index(int32_t* p, int32_t base, M m) {
  const I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(lanes, _mm512_set1_epi32(base))));
  return __builtin_popcount(m);
}

inline I zero_int() { return _mm512_setzero_si512(); }
inline I set_int(int32_t x) { return _mm512_set1_epi32(x); }
inline I to_bits(F a) { return _mm512_castps_si512(a); }
inline F from_bits(I a) { return _mm512_castsi512_ps(a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I round_to_int(F a) { return _mm512_cvtps_epi32(a); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
inline I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
inline I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
template <int n>
inline I shift_left(I a) {
  return _mm512_slli_epi32(a, n);
}
template <int n>
inline I shift_right(I a) {
  return _mm512_srai_epi32(a, n);
}
template <int n>
inline I shift_right_logical(I a) {
  return _mm512_srli_epi32(a, n);
}
template <int n>
inline I shift_left_16(I a) {
  return _mm512_slli_epi16(a, n);
}
template <int n>
inline I shift_right_16(I a) {
  return _mm512_srai_epi16(a, n);
}
inline I swap_pairs(I a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0x4e)); }
template <int k>
inline I spread_pair(I a) {
  const int32_t pair = 0x09080100 + k * 0x04040404;
  return _mm512_shuffle_epi8(a, _mm512_set1_epi32(pair));
}
inline I dot(I acc, I a, I b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));  // GCC 12 copies the accumulator of the intrinsic
  return acc;
}
inline I dot_bytes(I acc, I a, I b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
inline I transpose_bytes(I a) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(order));
}
inline I spread_bytes(const uint8_t* p) {
  const I order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_epi32(order, _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p)));
}
inline I sum_quads(const I* a) {
  const I low = _mm512_add_epi32(_mm512_shuffle_i32x4(a[0], a[1], 0x88), _mm512_shuffle_i32x4(a[0], a[1], 0xdd));
  const I high = _mm512_add_epi32(_mm512_shuffle_i32x4(a[2], a[3], 0x88), _mm512_shuffle_i32x4(a[2], a[3], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}
inline void store_quad_sums(int32_t* p, I a) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  _mm_storeu_si128((__m128i*)p, _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

inline I load_words(const void* p) { return _mm512_loadu_si512(p); }
inline void store_words(void* p, I a) { _mm512_storeu_si512(p, a); }
inline I widen_16(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline I widen_8(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_low_16(void* p, I a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }
inline void store_low_8(void* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }

struct Power {
  static constexpr bool kFloors = true;
  F exponent, fraction;
  explicit Power(F a) : exponent(a), fraction(_mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)) {}
  F times(F p) const { return _mm512_scalef_ps(p, exponent); }  // floors its exponent
};

inline F reduce_sum_each(const F* a) {
  F quad[4];
  for (int i = 0; i < 4; ++i) {
    const F x = add(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
    const F y = add(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
    const __m512d xd = _mm512_castps_pd(x), yd = _mm512_castps_pd(y);
    quad[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(xd, yd)), _mm512_castpd_ps(_mm512_unpackhi_pd(xd, yd)));
  }
  const F low = add(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
  const F high = add(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
inline I reduce_sum_each(const I* a) {
  I quad[4];
  for (int i = 0; i < 4; ++i) {
    const I x = add(_mm512_unpacklo_epi32(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_epi32(a[4 * i], a[4 * i + 1]));
    const I y =
        add(_mm512_unpacklo_epi32(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_epi32(a[4 * i + 2], a[4 * i + 3]));
    quad[i] = add(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  }
  const I low = add(_mm512_shuffle_i32x4(quad[0], quad[1], 0x88), _mm512_shuffle_i32x4(quad[0], quad[1], 0xdd));
  const I high = add(_mm512_shuffle_i32x4(quad[2], quad[3], 0x88), _mm512_shuffle_i32x4(quad[2], quad[3], 0xdd));
  return add(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

}  // namespace avx512
}  // namespace lrqk
