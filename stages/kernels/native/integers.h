/* Sixteen lanes of 32 bits: codes of weights, and exact dot products of bytes. As lanes.h, on any instruction set. */
#ifndef INTEGERS_H
#define INTEGERS_H

#include "lanes.h"

/* Lane by lane: vi_shift moves towards bit 0 by a constant, or up where that is negative; vi_bits is a & mask | more.
 *
 * vi_dot(sum, codes, x): sum + the four codes (unsigned bytes) of the lane times the four bytes (signed) of x. Where
 * codes are `small`, below 64, pairs of products fit in 16 bits. */
#if defined(__AVX512F__)
typedef __m512i vi;
INLINE vi vi_set1(int32_t a) { return _mm512_set1_epi32(a); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
INLINE vi vi_load_u8(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
INLINE vi vi_load_i8(const void *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi vi_bits(vi a, vi mask, vi more) { return _mm512_ternarylogic_epi32(a, mask, more, 0xea); }
INLINE vi vi_shift(vi a, int n) { return n < 0 ? _mm512_slli_epi32(a, -n) : n ? _mm512_srli_epi32(a, n) : a; }
INLINE vi vi_signed_shift(vi a, int n) { return _mm512_srai_epi32(a, n); }
INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
INLINE vf vi_float(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vf vi_as_float(vi a) { return _mm512_castsi512_ps(a); }
INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
INLINE int32_t vi_highest(vi a) { return _mm512_reduce_max_epi32(a); }
#if defined(__AVX512VNNI__)
INLINE vi vi_dot(vi sum, vi codes, vi x, int small) { return _mm512_dpbusd_epi32(sum, codes, x); }
#else
INLINE vi vi_dot(vi sum, vi codes, vi x, int small) {
    if (small)
        return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
    vi even = _mm512_madd_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(255)),
                                _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    vi odd = _mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
}
#endif
#elif defined(__AVX2__) && defined(__FMA__)
typedef struct {
    __m256i l, h;
} vi;
#define BOTH(operation, a, b) ((vi){operation((a).l, (b).l), operation((a).h, (b).h)})
INLINE vi vi_set1(int32_t a) { return (vi){_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
INLINE vi vi_load(const void *p) { return (vi){line_8(p, 0), line_8(p, 1)}; }
INLINE void vi_store(void *p, vi a) {
    _mm256_storeu_si256((__m256i *)p, a.l), _mm256_storeu_si256((__m256i *)p + 1, a.h);
}
INLINE vi vi_load_u8(const void *p) {
    return (vi){_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)((const char *)p + 8)))};
}
INLINE vi vi_load_i8(const void *p) {
    return (vi){_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)), _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const char *)p + 8)))};
}
INLINE vi vi_and(vi a, vi b) { return BOTH(_mm256_and_si256, a, b); }
INLINE vi vi_or(vi a, vi b) { return BOTH(_mm256_or_si256, a, b); }
INLINE vi vi_bits(vi a, vi mask, vi more) { return vi_or(vi_and(a, mask), more); }
INLINE vi vi_shift(vi a, int n) {
    return n < 0 ? (vi){_mm256_slli_epi32(a.l, -n), _mm256_slli_epi32(a.h, -n)}
           : n   ? (vi){_mm256_srli_epi32(a.l, n), _mm256_srli_epi32(a.h, n)}
                 : a;
}
INLINE vi vi_signed_shift(vi a, int n) { return (vi){_mm256_srai_epi32(a.l, n), _mm256_srai_epi32(a.h, n)}; }
INLINE vi vi_mul(vi a, vi b) { return BOTH(_mm256_mullo_epi32, a, b); }
INLINE vf vi_float(vi a) { return (vf){_mm256_cvtepi32_ps(a.l), _mm256_cvtepi32_ps(a.h)}; }
INLINE vf vi_as_float(vi a) { return (vf){_mm256_castsi256_ps(a.l), _mm256_castsi256_ps(a.h)}; }
INLINE vi vi_max(vi a, vi b) { return BOTH(_mm256_max_epi32, a, b); }
INLINE int32_t vi_highest(vi a) {
    __m256i eight = _mm256_max_epi32(a.l, a.h);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1)));
}
INLINE __m256i dot_8(__m256i sum, __m256i codes, __m256i x, int small) {
    if (small)
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
INLINE vi vi_dot(vi sum, vi codes, vi x, int small) {
    return (vi){dot_8(sum.l, codes.l, x.l, small), dot_8(sum.h, codes.h, x.h, small)};
}
#else
typedef struct {
    int32_t i[LANES];
} vi;
#define EACH_INTEGER(expression)                                                                                       \
    vi out;                                                                                                            \
    for (int i = 0; i < LANES; i++) out.i[i] = (int32_t)(expression);                                                  \
    return out
INLINE vi vi_set1(int32_t a) { EACH_INTEGER(a); }
INLINE vi vi_load(const void *p) {
    vi out;
    memcpy(&out, p, sizeof out);
    return out;
}
INLINE void vi_store(void *p, vi a) { memcpy(p, &a, sizeof a); }
INLINE vi vi_load_u8(const void *p) { EACH_INTEGER(((const uint8_t *)p)[i]); }
INLINE vi vi_load_i8(const void *p) { EACH_INTEGER(((const int8_t *)p)[i]); }
INLINE vi vi_and(vi a, vi b) { EACH_INTEGER(a.i[i] & b.i[i]); }
INLINE vi vi_or(vi a, vi b) { EACH_INTEGER(a.i[i] | b.i[i]); }
INLINE vi vi_bits(vi a, vi mask, vi more) { EACH_INTEGER((a.i[i] & mask.i[i]) | more.i[i]); }
INLINE vi vi_shift(vi a, int n) { EACH_INTEGER(n < 0 ? (uint32_t)a.i[i] << -n : (uint32_t)a.i[i] >> n); }
INLINE vi vi_signed_shift(vi a, int n) { EACH_INTEGER(a.i[i] >> n); }
INLINE vi vi_mul(vi a, vi b) { EACH_INTEGER(a.i[i] * b.i[i]); }
INLINE vf vi_float(vi a) { EACH((float)a.i[i]); }
INLINE vf vi_as_float(vi a) { EACH(from_bits((uint32_t)a.i[i])); }
INLINE vi vi_max(vi a, vi b) { EACH_INTEGER(a.i[i] > b.i[i] ? a.i[i] : b.i[i]); }
INLINE int32_t vi_highest(vi a) {
    for (int i = 1; i < LANES; i++) a.i[0] = a.i[i] > a.i[0] ? a.i[i] : a.i[0];
    return a.i[0];
}
INLINE vi vi_dot(vi sum, vi codes, vi x, int small) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 32; j += 8)
            sum.i[i] += (int32_t)((uint32_t)codes.i[i] >> j & 255) * (int8_t)((uint32_t)x.i[i] >> j & 255);
    return sum;
}
#endif

INLINE vi vi_byte4(int byte) { return vi_set1((int32_t)(0x01010101u * (uint32_t)byte)); }

#endif
