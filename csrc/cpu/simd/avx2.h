// AVX2 with FMA and F16C: what generic.h needs of an instruction set. The meaning of each name is there.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "elements.h"

#define LRQK_ISA avx2

namespace lrqk {
namespace avx2 {

using F = __m256;
using I = __m256i;
using M = __m256;
constexpr int W = 8;
constexpr int kMatmulRows = 6;

struct DenormalsOff {
  unsigned saved = _mm_getcsr();
  DenormalsOff() { _mm_setcsr(saved | 0x8040); }
  ~DenormalsOff() { _mm_setcsr(saved); }
};

inline F zero() { return _mm256_setzero_ps(); }
inline F set(float x) { return _mm256_set1_ps(x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
inline F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float reduce_sum(F a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float reduce_max(F a) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
inline void store(fp16* p, F a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline M ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline uint32_t bits(M m) { return _mm256_movemask_ps(m); }
inline F if_then_else(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
inline I count_if(I count, M m) { return _mm256_sub_epi32(count, _mm256_castps_si256(m)); }

inline I zero_int() { return _mm256_setzero_si256(); }
inline I set_int(int32_t x) { return _mm256_set1_epi32(x); }
inline I to_bits(F a) { return _mm256_castps_si256(a); }
inline F from_bits(I a) { return _mm256_castsi256_ps(a); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline I round_to_int(F a) { return _mm256_cvtps_epi32(a); }
inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
inline I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
inline I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
template <int n>
inline I shift_left(I a) {
  return _mm256_slli_epi32(a, n);
}
template <int n>
inline I shift_right(I a) {
  return _mm256_srai_epi32(a, n);
}
template <int n>
inline I shift_right_logical(I a) {
  return _mm256_srli_epi32(a, n);
}
template <int n>
inline I shift_left_16(I a) {
  return _mm256_slli_epi16(a, n);
}
template <int n>
inline I shift_right_16(I a) {
  return _mm256_srai_epi16(a, n);
}
inline I swap_pairs(I a) { return _mm256_shuffle_epi32(a, 0x4e); }
template <int k>
inline I spread_pair(I a) {
  return _mm256_shuffle_epi8(a, _mm256_set1_epi32(0x09080100 + k * 0x04040404));
}
inline I dot(I acc, I a, I b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
inline I transpose_bytes(I a) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(order));
}
inline I spread_bytes(const uint8_t* p) {
  const I order = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)p)), order);
}
inline I sum_quads(const I* a) {
  return _mm256_add_epi32(_mm256_permute2x128_si256(a[0], a[1], 0x20), _mm256_permute2x128_si256(a[0], a[1], 0x31));
}
inline void store_quad_sums(int32_t* p, I a) {
  _mm_storeu_si128((__m128i*)p, _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}

inline I load_words(const void* p) { return _mm256_loadu_si256((const I*)p); }
inline void store_words(void* p, I a) { _mm256_storeu_si256((I*)p, a); }
inline I widen_16(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline I widen_8(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
// The low 16 bits of 8 int32, side by side.
inline __m128i low_16(I a) {
  const I masked = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
  const I packed = _mm256_packus_epi32(masked, masked);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline void store_low_16(void* p, I a) { _mm_storeu_si128((__m128i*)p, low_16(a)); }
inline void store_low_8(void* p, I a) {
  const __m128i low = _mm_and_si128(low_16(a), _mm_set1_epi16(0xff));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(low, low));
}

inline F reduce_sum_each(const F* a) {
  F quad[2];
  for (int i = 0; i < 2; ++i) {
    const F x = add(_mm256_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm256_unpackhi_ps(a[4 * i], a[4 * i + 1]));
    const F y = add(_mm256_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm256_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
    const __m256d xd = _mm256_castps_pd(x), yd = _mm256_castps_pd(y);
    quad[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(xd, yd)), _mm256_castpd_ps(_mm256_unpackhi_pd(xd, yd)));
  }
  return add(_mm256_permute2f128_ps(quad[0], quad[1], 0x20), _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}
inline I reduce_sum_each(const I* a) {
  I quad[2];
  for (int i = 0; i < 2; ++i) {
    const I x = _mm256_hadd_epi32(a[4 * i], a[4 * i + 1]);
    const I y = _mm256_hadd_epi32(a[4 * i + 2], a[4 * i + 3]);
    quad[i] = _mm256_hadd_epi32(x, y);
  }
  return add(_mm256_permute2x128_si256(quad[0], quad[1], 0x20), _mm256_permute2x128_si256(quad[0], quad[1], 0x31));
}

}  // namespace avx2
}  // namespace lrqk
