/* Sixteen virtual lanes of float, on any instruction set, with the same bits on each that has fused multiply-add.
 *
 * A vector is one register of AVX-512, two of AVX2, or an array that the compiler vectorises as it can. Every operation
 * works lane by lane, but for the folds, whose order is fixed: lane i + lane i + 8, then + 4, + 2, + 1. */
#ifndef LANES_H
#define LANES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    if (rest >= 0x0f800000) return from_bits(sign | 0x7f800000 | rest); /* infinity, or not a number */
    return from_bits(sign | bits_of(from_bits(rest) * 0x1p112f));
}

/* Round to nearest, ties to even; what is not a number stays one. */
INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE uint16_t float_to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x47800000) return (uint16_t)(sign | 0x7c00); /* beyond 65536; what rounds up to it carries below */
    if (size < 0x38800000) {                                  /* subnormal: the addition rounds */
        float sum = from_bits(size) + 0.5f;
        return (uint16_t)(sign | (bits_of(sum) - 0x3f000000));
    }
    return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vf;
INLINE vf v_set1(float a) { return _mm512_set1_ps(a); }
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); } /* b where one is not a number */
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/* a 2^n for whole n, both factors normal */
INLINE vf v_scale(vf a, vf n) {
    __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(a, _mm512_castsi512_ps(exponent));
}
INLINE vf bf16_low(const void *line) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(line), 16)); }
INLINE vf bf16_high(const void *line) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(line), _mm512_set1_epi32((int)0xffff0000)));
}
INLINE vf v_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
INLINE vf v_load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE __m256 fold_half(vf a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
INLINE void v_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
INLINE void v_prefetch_second(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
INLINE void relax(void) { _mm_pause(); }
#define REGISTERS 32
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
typedef struct {
    __m256 l, h;
} vf;
INLINE vf v_set1(float a) { return (vf){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INLINE vf v_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void v_store(float *p, vf a) { _mm256_storeu_ps(p, a.l), _mm256_storeu_ps(p + 8, a.h); }
INLINE vf v_add(vf a, vf b) { return (vf){_mm256_add_ps(a.l, b.l), _mm256_add_ps(a.h, b.h)}; }
INLINE vf v_sub(vf a, vf b) { return (vf){_mm256_sub_ps(a.l, b.l), _mm256_sub_ps(a.h, b.h)}; }
INLINE vf v_mul(vf a, vf b) { return (vf){_mm256_mul_ps(a.l, b.l), _mm256_mul_ps(a.h, b.h)}; }
INLINE vf v_div(vf a, vf b) { return (vf){_mm256_div_ps(a.l, b.l), _mm256_div_ps(a.h, b.h)}; }
INLINE vf v_max(vf a, vf b) { return (vf){_mm256_max_ps(a.l, b.l), _mm256_max_ps(a.h, b.h)}; }
INLINE vf v_min(vf a, vf b) { return (vf){_mm256_min_ps(a.l, b.l), _mm256_min_ps(a.h, b.h)}; }
INLINE vf v_fma(vf a, vf b, vf c) { return (vf){_mm256_fmadd_ps(a.l, b.l, c.l), _mm256_fmadd_ps(a.h, b.h, c.h)}; }
INLINE __m256 scale_8(__m256 a, __m256 n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
INLINE vf v_scale(vf a, vf n) { return (vf){scale_8(a.l, n.l), scale_8(a.h, n.h)}; }
INLINE __m256i line_8(const void *p, int part) { return _mm256_loadu_si256((const __m256i *)p + part); }
INLINE vf bf16_low(const void *line) {
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(line_8(line, 0), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(line_8(line, 1), 16))};
}
INLINE vf bf16_high(const void *line) {
    __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    return (vf){_mm256_castsi256_ps(_mm256_and_si256(line_8(line, 0), mask)),
                _mm256_castsi256_ps(_mm256_and_si256(line_8(line, 1), mask))};
}
INLINE __m256 bf16_8(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
INLINE vf v_load_bf16(const uint16_t *p) { return (vf){bf16_8(p), bf16_8(p + 8)}; }
INLINE vf v_load_half(const uint16_t *p) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8)))};
}
INLINE __m256 fold_half(vf a) { return _mm256_add_ps(a.l, a.h); }
INLINE void v_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
INLINE void v_prefetch_second(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
INLINE void relax(void) { _mm_pause(); }
#define REGISTERS 16
#else
typedef struct {
    float f[LANES];
} vf;
#define EACH(expression)                                                                                               \
    vf out;                                                                                                            \
    for (int i = 0; i < LANES; i++) out.f[i] = (expression);                                                           \
    return out
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c)) /* other bits than with fused multiply-add */
#endif
INLINE vf v_set1(float a) { EACH(a); }
INLINE vf v_load(const float *p) { EACH(p[i]); }
INLINE void v_store(float *p, vf a) { memcpy(p, a.f, sizeof a.f); }
INLINE vf v_add(vf a, vf b) { EACH(a.f[i] + b.f[i]); }
INLINE vf v_sub(vf a, vf b) { EACH(a.f[i] - b.f[i]); }
INLINE vf v_mul(vf a, vf b) { EACH(a.f[i] * b.f[i]); }
INLINE vf v_div(vf a, vf b) { EACH(a.f[i] / b.f[i]); }
INLINE vf v_max(vf a, vf b) { EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
INLINE vf v_min(vf a, vf b) { EACH(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
INLINE vf v_fma(vf a, vf b, vf c) { EACH(MULTIPLY_ADD(a.f[i], b.f[i], c.f[i])); }
INLINE vf v_scale(vf a, vf n) { EACH(a.f[i] * from_bits((uint32_t)((int32_t)n.f[i] + 127) << 23)); }
INLINE vf bf16_low(const void *line) {
    const uint16_t *w = line;
    EACH(from_bits((uint32_t)w[2 * i] << 16));
}
INLINE vf bf16_high(const void *line) {
    const uint16_t *w = line;
    EACH(from_bits((uint32_t)w[2 * i + 1] << 16));
}
INLINE vf v_load_bf16(const uint16_t *p) { EACH(from_bits((uint32_t)p[i] << 16)); }
INLINE vf v_load_half(const uint16_t *p) { EACH(half_to_float(p[i])); }
INLINE void v_prefetch(const void *p) { __builtin_prefetch(p); }
INLINE void v_prefetch_second(const void *p) { __builtin_prefetch(p, 0, 2); }
INLINE void relax(void) {}
#define REGISTERS 32
#endif

#if defined(__AVX2__) && defined(__FMA__)
INLINE float v_sum(vf a) {
    __m256 eight = fold_half(a);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#else
INLINE float v_sum(vf a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a.f[i] += a.f[i + half];
    return a.f[0];
}
#endif

INLINE vf v_zero(void) { return v_set1(0.0f); }

INLINE float v_highest(vf a) {
    float each[LANES], most;
    v_store(each, a);
    most = each[0];
    for (int i = 1; i < LANES; i++) most = each[i] > most ? each[i] : most;
    return most;
}

/* e^a within 2 units in the last place; a is held to -87 .. 88. */
INLINE vf v_exp(vf a) {
    const float ROUND = 12582912.0f;                    /* 1.5 2^23: adding it rounds to whole numbers */
    a = v_min(v_set1(88.0f), v_max(v_set1(-87.0f), a)); /* in this order what is not a number stays one */
    vf n = v_sub(v_fma(a, v_set1(1.44269504f), v_set1(ROUND)), v_set1(ROUND));
    vf r = v_fma(n, v_set1(-0.693145752f), a);
    r = v_fma(n, v_set1(-1.42860677e-6f), r);
    vf sum = v_set1(1.0f / 5040);
    sum = v_fma(sum, r, v_set1(1.0f / 720));
    sum = v_fma(sum, r, v_set1(1.0f / 120));
    sum = v_fma(sum, r, v_set1(1.0f / 24));
    sum = v_fma(sum, r, v_set1(1.0f / 6));
    sum = v_fma(sum, r, v_set1(0.5f));
    sum = v_fma(sum, r, v_set1(1.0f));
    sum = v_fma(sum, r, v_set1(1.0f));
    return v_scale(sum, n);
}

#endif
