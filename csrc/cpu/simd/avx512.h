// SIMD vocabulary for AVX-512 with VNNI; simd_avx2.h and simd_portable.h offer the same names.
#pragma once

#include <immintrin.h>

#include "cpu/args.h"

#define LRQK_ISA avx512

namespace lrqk {
namespace avx512 {

using F = __m512;   // W floats
using I = __m512i;  // W int32, or 2 W int16
constexpr int W = 16;
constexpr int kMatmulRows = 12;  // rows of a register tile that is 2 W wide

// Denormals cost a microcode assist each, and weights below 1e-38 mean nothing here.
struct DenormalsOff {
  unsigned saved = _mm_getcsr();
  DenormalsOff() { _mm_setcsr(saved | 0x8040); }
  ~DenormalsOff() { _mm_setcsr(saved); }
};

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float maximum(F a) { return _mm512_reduce_max_ps(a); }

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline void store(bf16* p, F a) {
  const I bits = _mm512_castps_si512(a);
  const I lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store(fp16* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 2 W elements in an order of the type's own, which pair_index tells.
template <class T>
inline void load_pair(const T* p, F& a, F& b) {
  a = load(p);
  b = load(p + W);
}
inline void load_pair(const bf16* p, F& a, F& b) {
  const I x = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
template <class T>
constexpr int pair_index(const T*, int half, int lane) {
  return half * W + lane;
}
constexpr int pair_index(const bf16*, int half, int lane) { return 2 * lane + half; }

// value where a >= b, else other.
inline F choose(F a, F b, F value, F other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), other, value);
}
// a >= b, one bit per lane.
inline uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// acc + 1 in the lanes where a >= b.
inline I count_at_least(I acc, F a, F b) {
  return _mm512_mask_add_epi32(acc, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), acc, _mm512_set1_epi32(1));
}
// Writes the lanes of `mask` side by side; returns how many. May write up to W places.
inline int compress(float* p, F a, uint32_t mask) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), a));
  return __builtin_popcount(mask);
}
// As compress, for base + lane.
inline int compress_index(int32_t* p, int32_t base, uint32_t mask) {
  const I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const I index = _mm512_add_epi32(lanes, _mm512_set1_epi32(base));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), index));
  return __builtin_popcount(mask);
}

// 2^a for a <= 127; results below 2^-126 may be anything down to 0.
inline F exp2(F a) {
  const F f = _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // a - floor(a)
  F p = set1(1.8775767e-3f);
  p = fma(p, f, set1(8.9893397e-3f));
  p = fma(p, f, set1(5.5826318e-2f));
  p = fma(p, f, set1(2.4015361e-1f));
  p = fma(p, f, set1(6.9315308e-1f));
  p = fma(p, f, set1(9.9999994e-1f));
  return _mm512_scalef_ps(p, a);  // floors its exponent
}

// The same to 1e-4, for what is rounded to bfloat16 afterwards.
inline F exp2_rough(F a) {
  const F f = _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = set1(7.8024108e-2f);
  p = fma(p, f, set1(2.2606790e-1f));
  p = fma(p, f, set1(6.9583317e-1f));
  p = fma(p, f, set1(9.9992526e-1f));
  return _mm512_scalef_ps(p, a);
}

inline I int_zero() { return _mm512_setzero_si512(); }
inline I int_set1(int32_t x) { return _mm512_set1_epi32(x); }
inline I max(I a, I b) { return _mm512_max_epi32(a, b); }
inline void store_words(void* p, I a) { _mm512_storeu_si512(p, a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I load_words(const void* p) { return _mm512_loadu_si512(p); }
// The int8 at even and at odd places of each int16.
inline I even_bytes(I a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
inline I odd_bytes(I a) { return _mm512_srai_epi16(a, 8); }
inline I widen_bytes(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
// 2 W elements in the order of bfloat16.
inline void load_pair(const i8* p, F& a, F& b) {
  const I wide = widen_bytes(&p->value);
  a = to_float(_mm512_srai_epi32(_mm512_slli_epi32(wide, 16), 16));
  b = to_float(_mm512_srai_epi32(wide, 16));
}
// The int8 at place k of each word.
template <int k>
inline F byte_to_float(I a) {
  return to_float(_mm512_srai_epi32(k < 3 ? _mm512_slli_epi32(a, 24 - 8 * k) : a, 24));
}
inline I broadcast_word(const int32_t* p) { return _mm512_set1_epi32(*p); }
// acc + the sums of two neighbouring int16 products.
inline I dot(I acc, I a, I b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));  // GCC 12 copies the accumulator of the intrinsic
  return acc;
}
// For 4 values per word: lane 4 w holds (a[4w], a[4w+2]) and lane 4 w + 1 holds (a[4w+1], a[4w+3]) as int16 pairs.
inline void store_pair_words(int32_t* p, F a) {
  const I rounded = _mm512_cvtps_epi32(a);
  const I low = _mm512_and_si512(rounded, _mm512_set1_epi32(0xffff));
  const I high = _mm512_slli_epi32(_mm512_shuffle_epi32(rounded, static_cast<_MM_PERM_ENUM>(0x4e)), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(low, high));
}
inline void store_int16(int16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a)));
}
inline void store_int8(int8_t* p, F a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))); }

// To bfloat16 precision, still as float32.
inline F round_to_bf16(F a) {
  const I rounded = _mm512_add_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Two such values in one word.
inline I pack_bf16(F high, F low) {
  return _mm512_or_si512(_mm512_castps_si512(high), _mm512_srli_epi32(_mm512_castps_si512(low), 16));
}
inline F high_bf16(I a) {
  return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline F low_bf16(I a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }

// Lane i of the result is the sum of all lanes of a[i].
inline F sum_each(const F* a) {
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
inline I sum_each(const I* a) {
  I quad[4];
  for (int i = 0; i < 4; ++i) {
    const I x = _mm512_add_epi32(_mm512_unpacklo_epi32(a[4 * i], a[4 * i + 1]),
                                 _mm512_unpackhi_epi32(a[4 * i], a[4 * i + 1]));
    const I y = _mm512_add_epi32(_mm512_unpacklo_epi32(a[4 * i + 2], a[4 * i + 3]),
                                 _mm512_unpackhi_epi32(a[4 * i + 2], a[4 * i + 3]));
    quad[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  }
  const I low = _mm512_add_epi32(_mm512_shuffle_i32x4(quad[0], quad[1], 0x88),
                                 _mm512_shuffle_i32x4(quad[0], quad[1], 0xdd));
  const I high = _mm512_add_epi32(_mm512_shuffle_i32x4(quad[2], quad[3], 0x88),
                                  _mm512_shuffle_i32x4(quad[2], quad[3], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

}  // namespace avx512
}  // namespace lrqk
