// SIMD vocabulary for AVX2 with FMA and F16C; the meaning of each name is in simd_avx512.h.
#pragma once

#include <immintrin.h>

#include "cpu/args.h"

#define LRQK_ISA avx2

namespace lrqk {
namespace avx2 {

using F = __m256;
using I = __m256i;
constexpr int W = 8;
constexpr int kMatmulRows = 6;

struct DenormalsOff {
  unsigned saved = _mm_getcsr();
  DenormalsOff() { _mm_setcsr(saved | 0x8040); }
  ~DenormalsOff() { _mm_setcsr(saved); }
};

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(F a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float maximum(F a) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
// The low 16 bits of 8 int32, side by side.
inline __m128i pack_low(I a) {
  const I masked = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
  const I packed = _mm256_packus_epi32(masked, masked);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline void store(bf16* p, F a) {
  const I bits = _mm256_castps_si256(a);
  const I lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  _mm_storeu_si128((__m128i*)p, pack_low(_mm256_srli_epi32(rounded, 16)));
}
inline void store(fp16* p, F a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <class T>
inline void load_pair(const T* p, F& a, F& b) {
  a = load(p);
  b = load(p + W);
}
inline void load_pair(const bf16* p, F& a, F& b) {
  const I x = _mm256_loadu_si256((const I*)p);
  a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
template <class T>
constexpr int pair_index(const T*, int half, int lane) {
  return half * W + lane;
}
constexpr int pair_index(const bf16*, int half, int lane) { return 2 * lane + half; }

inline F choose(F a, F b, F value, F other) {
  return _mm256_blendv_ps(other, value, _mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
inline uint32_t at_least(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
inline I count_at_least(I acc, F a, F b) {
  return _mm256_sub_epi32(acc, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
inline int compress(float* p, F a, uint32_t mask) {
  float lanes[W];
  store(lanes, a);
  int count = 0;
  for (; mask; mask &= mask - 1) p[count++] = lanes[__builtin_ctz(mask)];
  return count;
}
inline int compress_index(int32_t* p, int32_t base, uint32_t mask) {
  int count = 0;
  for (; mask; mask &= mask - 1) p[count++] = base + __builtin_ctz(mask);
  return count;
}

inline F exp2(F a) {
  a = max(a, set1(-127.0f));
  const F n = _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F f = sub(a, n);
  F p = set1(1.3333558e-3f);
  p = fma(p, f, set1(9.6181291e-3f));
  p = fma(p, f, set1(5.5504109e-2f));
  p = fma(p, f, set1(2.4022651e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  p = fma(p, f, set1(1.0f));
  const I power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(p, _mm256_castsi256_ps(power));
}

// The same to 1e-4, for what is rounded to bfloat16 afterwards.
inline F exp2_rough(F a) {
  a = max(a, set1(-127.0f));
  const F n = _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F f = sub(a, n);
  F p = set1(5.5171376e-2f);
  p = fma(p, f, set1(2.4261121e-1f));
  p = fma(p, f, set1(6.9326103e-1f));
  p = fma(p, f, set1(9.9992807e-1f));
  const I power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(p, _mm256_castsi256_ps(power));
}

inline I int_zero() { return _mm256_setzero_si256(); }
inline I int_set1(int32_t x) { return _mm256_set1_epi32(x); }
inline I max(I a, I b) { return _mm256_max_epi32(a, b); }
inline void store_words(void* p, I a) { _mm256_storeu_si256((I*)p, a); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline I load_words(const void* p) { return _mm256_loadu_si256((const I*)p); }
inline I even_bytes(I a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
inline I odd_bytes(I a) { return _mm256_srai_epi16(a, 8); }
inline I widen_bytes(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline void load_pair(const i8* p, F& a, F& b) {
  const I wide = widen_bytes(&p->value);
  a = to_float(_mm256_srai_epi32(_mm256_slli_epi32(wide, 16), 16));
  b = to_float(_mm256_srai_epi32(wide, 16));
}
template <int k>
inline F byte_to_float(I a) {
  return to_float(_mm256_srai_epi32(k < 3 ? _mm256_slli_epi32(a, 24 - 8 * k) : a, 24));
}
inline I broadcast_word(const int32_t* p) { return _mm256_set1_epi32(*p); }
inline I dot(I acc, I a, I b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
inline void store_pair_words(int32_t* p, F a) {
  const I rounded = _mm256_cvtps_epi32(a);
  const I low = _mm256_and_si256(rounded, _mm256_set1_epi32(0xffff));
  const I high = _mm256_slli_epi32(_mm256_shuffle_epi32(rounded, 0x4e), 16);
  _mm256_storeu_si256((I*)p, _mm256_or_si256(low, high));
}
inline void store_int16(int16_t* p, F a) { _mm_storeu_si128((__m128i*)p, pack_low(_mm256_cvtps_epi32(a))); }
inline void store_int8(int8_t* p, F a) {
  const __m128i words = pack_low(_mm256_cvtps_epi32(a));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

inline F round_to_bf16(F a) {
  const I rounded = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(0x8000));
  return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline I pack_bf16(F high, F low) {
  return _mm256_or_si256(_mm256_castps_si256(high), _mm256_srli_epi32(_mm256_castps_si256(low), 16));
}
inline F high_bf16(I a) {
  return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline F low_bf16(I a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }

inline F sum_each(const F* a) {
  F quad[2];
  for (int i = 0; i < 2; ++i) {
    const F x = add(_mm256_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm256_unpackhi_ps(a[4 * i], a[4 * i + 1]));
    const F y = add(_mm256_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm256_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
    const __m256d xd = _mm256_castps_pd(x), yd = _mm256_castps_pd(y);
    quad[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(xd, yd)), _mm256_castpd_ps(_mm256_unpackhi_pd(xd, yd)));
  }
  return add(_mm256_permute2f128_ps(quad[0], quad[1], 0x20), _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}
inline I sum_each(const I* a) {
  I quad[2];
  for (int i = 0; i < 2; ++i) {
    const I x = _mm256_hadd_epi32(a[4 * i], a[4 * i + 1]);
    const I y = _mm256_hadd_epi32(a[4 * i + 2], a[4 * i + 3]);
    quad[i] = _mm256_hadd_epi32(x, y);
  }
  return _mm256_add_epi32(_mm256_permute2x128_si256(quad[0], quad[1], 0x20),
                          _mm256_permute2x128_si256(quad[0], quad[1], 0x31));
}

}  // namespace avx2
}  // namespace lrqk
