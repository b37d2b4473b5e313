/* Products of rows with quantised weights.
 *
 * Sums are defined per block of 32 inputs, or per half of one where a group has 16, so that they depend neither on the
 * size of groups and records nor on where a matrix was cut:
 *     float activations:  part = the sum over the block of x number(code), each a fused multiply-add, in order;
 *                         sum = fma(scale, part, sum);             sum = fma(minimum, -(the sum of x), sum).
 *     integer activations: x is s q for bytes q; part = the sum of q (code - zero), an exact integer;
 *                         sum = fma(part, scale s, sum);           sum = fma(minimum, -(s times the sum of q), sum).
 * One row unpacks codes in registers. Several rows share what one of them unpacks into a small buffer. */
#ifndef QUANTIZED_H
#define QUANTIZED_H

#include "planes.h"
#include "prepared.h"
#include "tiles.h"

/* Where a block lies in its panel. */
struct place {
    int64_t header, codes; /* bytes from the panel's beginning */
    int group, span;       /* of its first half, in the record */
};

INLINE struct place place_of(const struct packing *of, int k) {
    unsigned record = (unsigned)k / (unsigned)of->record, within = (unsigned)k - record * (unsigned)of->record;
    int64_t header = (int64_t)record * of->record_nbytes;
    return (struct place){header, header + of->header_nbytes + (int64_t)(within / BLOCK_INPUTS) * of->bits * 64,
                          (int)(within / (unsigned)of->group), (int)(within / (unsigned)of->span)};
}

INLINE vf load_scales(const char *from, int format, int index) {
    return format == HALF    ? v_load_half((const uint16_t *)from + index * PANEL)
           : format == FLOAT ? v_load((const float *)from + index * PANEL)
                             : v_load_bf16((const uint16_t *)from + index * PANEL);
}

/* Of half `half` of the block at `place`: scales, minima and zero points of the 16 outputs. */
INLINE vf scale_of(const struct packing *of, const char *header, const struct place *place, int half) {
    int second = half * BLOCK_INPUTS / 2, group = place->group + (second && of->group <= second);
    vf scale = load_scales(header, of->scale_format, place->span + (second && of->span <= second));
    return of->factors ? v_mul(scale, vi_float(vi_load_i8(header + of->factors + group * PANEL))) : scale;
}

INLINE vf minimum_of(const struct packing *of, const char *header, const struct place *place, int half) {
    int second = half * BLOCK_INPUTS / 2, group = place->group + (second && of->group <= second);
    vf minimum = load_scales(header + of->minima, of->scale_format, place->span + (second && of->span <= second));
    if (!of->minimum_factors) return minimum;
    return v_mul(minimum, vi_float(vi_load_i8(header + of->minimum_factors + group * PANEL)));
}

INLINE vi zero_of(const struct packing *of, const char *header, const struct place *place, int half) {
    int second = half * BLOCK_INPUTS / 2, group = place->group + (second && of->group <= second);
    return of->zeros ? vi_load_u8(header + of->zeros + group * PANEL) : vi_set1(of->zero);
}

/* The sum with a part of a block: its half `half`, or all of it where it has one part. */
INLINE vf with_float_part(const struct packing *of, const char *header, const struct place *place, int half, vf part,
                          const struct fact *fact, vf sum) {
    sum = v_fma(scale_of(of, header, place, half), part, sum);
    if (!of->minima) return sum;
    float x = of->parts == 2 ? fact->half[half] : fact->half[0] + fact->half[1];
    return v_fma(minimum_of(of, header, place, half), v_set1(-x), sum);
}

INLINE vf with_integer_part(const struct packing *of, const char *header, const struct place *place, int half, vi part,
                            const struct fact *fact, vf sum) {
    sum = v_fma(vi_float(part), v_mul(scale_of(of, header, place, half), v_set1(fact->scale)), sum);
    if (!of->minima) return sum;
    float x = (float)(of->parts == 2 ? fact->sum[half] : fact->sum[0] + fact->sum[1]) * fact->scale;
    return v_fma(minimum_of(of, header, place, half), v_set1(-x), sum);
}

/* What an integer part begins with: the zero point times the sum of q, less. */
INLINE vi first_part(const struct packing *of, const char *header, const struct place *place, int half,
                     const struct fact *fact) {
    int q = of->parts == 2 ? fact->sum[half] : fact->sum[0] + fact->sum[1];
    return vi_mul(vi_set1(-q), zero_of(of, header, place, half));
}

typedef void one_row_of(const struct packing *of, const struct prepared *x, int row, const char *w, int begin, int end,
                        float *tile);

INLINE void prefetch(const char *from, int nbytes) {
    for (int i = 0; i < nbytes; i += 64) v_prefetch(from + i);
}

/* The sums of one row and P panels, of a chain from `begin` to `end`. VECTOR and NUMBER are of planes.h. */
#define FLOAT_STEP(BITS, KIND, P, i)                                                                                   \
    for (int p = 0; p < P; p++) {                                                                                      \
        vi codes = VECTOR_##BITS(w + p * panel + place.codes, i);                                                      \
        part[p] = v_fma(v_set1(from[4 * (i)]), NUMBER_##KIND(codes, 0, zero[p]), part[p]);                             \
        part[p] = v_fma(v_set1(from[4 * (i) + 1]), NUMBER_##KIND(codes, 1, zero[p]), part[p]);                         \
        part[p] = v_fma(v_set1(from[4 * (i) + 2]), NUMBER_##KIND(codes, 2, zero[p]), part[p]);                         \
        part[p] = v_fma(v_set1(from[4 * (i) + 3]), NUMBER_##KIND(codes, 3, zero[p]), part[p]);                         \
    }
#define INTEGER_STEP(BITS, KIND, P, i)                                                                                 \
    for (int p = 0; p < P; p++)                                                                                        \
        part[p] = vi_dot(part[p], VECTOR_##BITS(w + p * panel + place.codes, i), vi_set1(from[i]), BITS <= 6);
#define FLOAT_BEGIN(half)                                                                                              \
    zero[p] = shifted_zero(zero_of(of, w + p * panel + place.header, &place, half));                                   \
    part[p] = v_zero()
#define INTEGER_BEGIN(half) part[p] = first_part(of, w + p * panel + place.header, &place, half, fact)
#define FLOAT_END(half)                                                                                                \
    sum[p] = with_float_part(of, w + p * panel + place.header, &place, half, part[p], fact, sum[p])
#define INTEGER_END(half)                                                                                              \
    sum[p] = with_integer_part(of, w + p * panel + place.header, &place, half, part[p], fact, sum[p])
#define FLOAT_PART vf
#define INTEGER_PART vi
#define FLOAT_FROM const float *from = block_of_row(x, row, k)
#define INTEGER_FROM const int32_t *from = (const int32_t *)(x->codes + (int64_t)row * x->padded + k)
#define ONE_ROW(BITS, KIND, A, P)                                                                                      \
    static void one_##BITS##_##KIND##_##A##_##P(const struct packing *of, const struct prepared *x, int row,           \
                                                const char *w, int begin, int end, float *tile) {                      \
        const int64_t panel = of->panel_nbytes;                                                                        \
        vf sum[P], zero[P];                                                                                            \
        A##_PART part[P];                                                                                              \
        for (int p = 0; p < P; p++) sum[p] = zero[p] = v_zero();                                                       \
        for (int k = begin; k < end; k += BLOCK_INPUTS) {                                                              \
            struct place place = place_of(of, k);                                                                      \
            const struct fact *fact = x->facts + (int64_t)row * x->blocks + k / BLOCK_INPUTS;                          \
            A##_FROM;                                                                                                  \
            int is_first = k == begin || place.codes - place.header == of->header_nbytes;                              \
            for (int p = 0; p < P; p++) {                                                                              \
                const char *ahead = w + p * panel + AHEAD / P;                                                         \
                if (is_first) prefetch(ahead + place.header, of->header_nbytes);                                       \
                prefetch(ahead + place.codes, BITS * 64);                                                              \
                A##_BEGIN(0);                                                                                          \
            }                                                                                                          \
            A##_STEP(BITS, KIND, P, 0) A##_STEP(BITS, KIND, P, 1) A##_STEP(BITS, KIND, P, 2) A##_STEP(BITS, KIND, P, 3) \
            if (of->parts == 2)                                                                                        \
                for (int p = 0; p < P; p++) {                                                                          \
                    A##_END(0);                                                                                        \
                    A##_BEGIN(1);                                                                                      \
                }                                                                                                      \
            A##_STEP(BITS, KIND, P, 4) A##_STEP(BITS, KIND, P, 5) A##_STEP(BITS, KIND, P, 6) A##_STEP(BITS, KIND, P, 7) \
            for (int p = 0; p < P; p++) A##_END(of->parts - 1);                                                        \
        }                                                                                                              \
        for (int p = 0; p < P; p++) v_store(tile + p * PANEL, sum[p]);                                                 \
    }

/* The codes of a block as numbers [32][16], or as vectors of bytes. */
#if defined(__AVX2__)
#define EIGHT(STEP, BITS, KIND)                                                                                        \
    STEP(BITS, KIND, 0)                                                                                                \
    STEP(BITS, KIND, 1)                                                                                                \
    STEP(BITS, KIND, 2) STEP(BITS, KIND, 3) STEP(BITS, KIND, 4) STEP(BITS, KIND, 5) STEP(BITS, KIND, 6) STEP(BITS, KIND, 7)
#else
#define EIGHT(STEP, BITS, KIND)                                                                                        \
    for (int i = 0; i < 8; i++) STEP(BITS, KIND, i)
#endif
#define EXPAND_STEP(BITS, KIND, i)                                                                                     \
    {                                                                                                                  \
        vi vector = VECTOR_##BITS(codes, i);                                                                           \
        float *numbers = (float *)to + (i)*4 * PANEL;                                                                  \
        v_store(numbers, NUMBER_##KIND(vector, 0, zero[(i) / 4]));                                                     \
        v_store(numbers + PANEL, NUMBER_##KIND(vector, 1, zero[(i) / 4]));                                             \
        v_store(numbers + 2 * PANEL, NUMBER_##KIND(vector, 2, zero[(i) / 4]));                                         \
        v_store(numbers + 3 * PANEL, NUMBER_##KIND(vector, 3, zero[(i) / 4]));                                         \
    }
#define BYTES_STEP(BITS, KIND, i) vi_store((char *)to + (i)*64, VECTOR_##BITS(codes, i));
#define EXPAND(BITS, KIND)                                                                                             \
    static void expand_##BITS##_##KIND##_FLOAT(const char *codes, const vf *zero, void *to) {                          \
        EIGHT(EXPAND_STEP, BITS, KIND)                                                                                 \
    }
#define EXPAND_BYTES(BITS)                                                                                             \
    static void expand_##BITS##_INTEGER_INTEGER(const char *codes, const vf *zero, void *to) {                         \
        EIGHT(BYTES_STEP, BITS, INTEGER)                                                                               \
    }
typedef void expand_of(const char *codes, const vf *zero, void *to);

/* What a block of one panel adds to the sums of M rows, the first of them `row`. `small`: see vi_dot. */
#define FLOAT_ROWS(M)                                                                                                  \
    static void float_rows_##M(const struct packing *of, const char *header, const struct place *place,                \
                               const struct prepared *x, int row, int k, const void *expanded, int small,              \
                               float *tile) {                                                                          \
        const int inputs = BLOCK_INPUTS / of->parts;                                                                   \
        const float *from[M], *numbers = expanded;                                                                     \
        for (int m = 0; m < M; m++) from[m] = block_of_row(x, row + m, k);                                             \
        for (int half = 0, i = 0; half < of->parts; half++) {                                                          \
            vf part[M];                                                                                                \
            for (int m = 0; m < M; m++) part[m] = v_zero();                                                            \
            for (; i < (half + 1) * inputs; i++) {                                                                     \
                vf number = v_load(numbers + i * PANEL);                                                               \
                for (int m = 0; m < M; m++) part[m] = v_fma(v_set1(from[m][i]), number, part[m]);                      \
            }                                                                                                          \
            for (int m = 0; m < M; m++) {                                                                              \
                const struct fact *fact = x->facts + (int64_t)(row + m) * x->blocks + k / BLOCK_INPUTS;                \
                float *to = tile + m * TILE;                                                                           \
                v_store(to, with_float_part(of, header, place, half, part[m], fact, v_load(to)));                      \
            }                                                                                                          \
        }                                                                                                              \
    }
#define INTEGER_ROWS(M)                                                                                                \
    static void integer_rows_##M(const struct packing *of, const char *header, const struct place *place,              \
                                 const struct prepared *x, int row, int k, const void *expanded, int small,            \
                                 float *tile) {                                                                        \
        const int vectors = BLOCK_INPUTS / 4 / of->parts;                                                              \
        const int32_t *from[M];                                                                                        \
        const struct fact *fact[M];                                                                                    \
        const char *bytes = expanded;                                                                                  \
        for (int m = 0; m < M; m++) {                                                                                  \
            from[m] = (const int32_t *)(x->codes + (int64_t)(row + m) * x->padded + k);                                \
            fact[m] = x->facts + (int64_t)(row + m) * x->blocks + k / BLOCK_INPUTS;                                    \
        }                                                                                                              \
        for (int half = 0, i = 0; half < of->parts; half++) {                                                          \
            vi part[M];                                                                                                \
            for (int m = 0; m < M; m++) part[m] = first_part(of, header, place, half, fact[m]);                        \
            if (small)                                                                                                 \
                for (; i < (half + 1) * vectors; i++) {                                                                \
                    vi vector = vi_load(bytes + i * 64);                                                               \
                    for (int m = 0; m < M; m++) part[m] = vi_dot(part[m], vector, vi_set1(from[m][i]), 1);             \
                }                                                                                                      \
            else                                                                                                       \
                for (; i < (half + 1) * vectors; i++) {                                                                \
                    vi vector = vi_load(bytes + i * 64);                                                               \
                    for (int m = 0; m < M; m++) part[m] = vi_dot(part[m], vector, vi_set1(from[m][i]), 0);             \
                }                                                                                                      \
            for (int m = 0; m < M; m++) {                                                                              \
                float *to = tile + m * TILE;                                                                           \
                v_store(to, with_integer_part(of, header, place, half, part[m], fact[m], v_load(to)));                 \
            }                                                                                                          \
        }                                                                                                              \
    }
typedef void rows_of(const struct packing *of, const char *header, const struct place *place, const struct prepared *x,
                     int row, int k, const void *expanded, int small, float *tile);

#if defined(__AVX2__)
#define ALL_OF(BITS, KIND, A) ONE_ROW(BITS, KIND, A, 1) ONE_ROW(BITS, KIND, A, 2) MORE_PANELS(BITS, KIND, A)
#else /* arrays instead of registers: loops that are not unrolled do as well */
#define ALL_OF(BITS, KIND, A)
#endif
#define WITH_FLOATS(BITS, KIND) ALL_OF(BITS, KIND, FLOAT) EXPAND(BITS, KIND)
#if defined(__AVX512F__)
#define MORE_PANELS(BITS, KIND, A) ONE_ROW(BITS, KIND, A, 4)
#define ONE_OF(BITS, KIND, A) {one_##BITS##_##KIND##_##A##_1, one_##BITS##_##KIND##_##A##_2, one_##BITS##_##KIND##_##A##_4}
enum { MOST_TOGETHER = 8 };
FLOAT_ROWS(8)
INTEGER_ROWS(8)
#elif defined(__AVX2__)
#define MORE_PANELS(BITS, KIND, A)
#define ONE_OF(BITS, KIND, A) {one_##BITS##_##KIND##_##A##_1, one_##BITS##_##KIND##_##A##_2}
enum { MOST_TOGETHER = 4 };
#else
#define ONE_OF(BITS, KIND, A) {0}
enum { MOST_TOGETHER = 4 };
#endif
FLOAT_ROWS(1)
FLOAT_ROWS(2)
FLOAT_ROWS(4)
INTEGER_ROWS(1)
INTEGER_ROWS(2)
INTEGER_ROWS(4)
WITH_FLOATS(2, INTEGER)
WITH_FLOATS(3, INTEGER)
WITH_FLOATS(4, INTEGER)
WITH_FLOATS(5, INTEGER)
WITH_FLOATS(6, INTEGER)
WITH_FLOATS(8, INTEGER)
WITH_FLOATS(6, E3M2)
WITH_FLOATS(8, E4M3)
ALL_OF(2, INTEGER, INTEGER)
ALL_OF(3, INTEGER, INTEGER)
ALL_OF(4, INTEGER, INTEGER)
ALL_OF(5, INTEGER, INTEGER)
ALL_OF(6, INTEGER, INTEGER)
ALL_OF(8, INTEGER, INTEGER)
EXPAND_BYTES(2)
EXPAND_BYTES(3)
EXPAND_BYTES(4)
EXPAND_BYTES(5)
EXPAND_BYTES(6)
static one_row_of *const ONE_ROW_OF[2][3][9][3] = {
    {[INTEGER] = {[2] = ONE_OF(2, INTEGER, FLOAT), [3] = ONE_OF(3, INTEGER, FLOAT), [4] = ONE_OF(4, INTEGER, FLOAT),
                  [5] = ONE_OF(5, INTEGER, FLOAT), [6] = ONE_OF(6, INTEGER, FLOAT), [8] = ONE_OF(8, INTEGER, FLOAT)},
     [E3M2] = {[6] = ONE_OF(6, E3M2, FLOAT)},
     [E4M3] = {[8] = ONE_OF(8, E4M3, FLOAT)}},
    {[INTEGER] = {[2] = ONE_OF(2, INTEGER, INTEGER), [3] = ONE_OF(3, INTEGER, INTEGER),
                  [4] = ONE_OF(4, INTEGER, INTEGER), [5] = ONE_OF(5, INTEGER, INTEGER),
                  [6] = ONE_OF(6, INTEGER, INTEGER), [8] = ONE_OF(8, INTEGER, INTEGER)}},
};
static expand_of *const EXPAND_OF[2][3][9] = {
    {[INTEGER] = {[2] = expand_2_INTEGER_FLOAT, [3] = expand_3_INTEGER_FLOAT, [4] = expand_4_INTEGER_FLOAT,
                  [5] = expand_5_INTEGER_FLOAT, [6] = expand_6_INTEGER_FLOAT, [8] = expand_8_INTEGER_FLOAT},
     [E3M2] = {[6] = expand_6_E3M2_FLOAT},
     [E4M3] = {[8] = expand_8_E4M3_FLOAT}},
    {[INTEGER] = {[2] = expand_2_INTEGER_INTEGER, [3] = expand_3_INTEGER_INTEGER, [4] = expand_4_INTEGER_INTEGER,
                  [5] = expand_5_INTEGER_INTEGER, [6] = expand_6_INTEGER_INTEGER}},
};
static rows_of *const ROWS_OF[2][9] = {
#if defined(__AVX512F__)
    {[1] = float_rows_1, [2] = float_rows_2, [4] = float_rows_4, [8] = float_rows_8},
    {[1] = integer_rows_1, [2] = integer_rows_2, [4] = integer_rows_4, [8] = integer_rows_8},
#else
    {[1] = float_rows_1, [2] = float_rows_2, [4] = float_rows_4},
    {[1] = integer_rows_1, [2] = integer_rows_2, [4] = integer_rows_4},
#endif
};

/* The sums of `rows` rows and one panel, of a chain from `begin` to `end`. */
static void multiply_rows(const struct linear *linear, const struct prepared *x, int row, int rows, const char *w,
                          int begin, int end, float *tile) {
    const struct packing *of = linear->packing;
    const int is_integer = linear->is_integer;
    expand_of *expand = EXPAND_OF[is_integer][of->kind][of->bits];
    float expanded[BLOCK_INPUTS * PANEL] __attribute__((aligned(64)));
    for (int m = 0; m < rows; m++) v_store(tile + m * TILE, v_zero());
    for (int k = begin; k < end; k += BLOCK_INPUTS) {
        struct place place = place_of(of, k);
        const char *header = w + place.header, *codes = w + place.codes;
        const void *found = codes;
        if (place.codes - place.header == of->header_nbytes) prefetch(header + AHEAD, of->header_nbytes);
        prefetch(codes + AHEAD, of->bits * 64);
        if (expand) {
            vf zero[2] = {v_zero(), v_zero()};
            for (int half = 0; half < 2 && !is_integer; half++)
                zero[half] = shifted_zero(zero_of(of, header, &place, of->parts == 2 ? half : 0));
            expand(codes, zero, expanded);
            found = expanded;
        }
        for (int m = 0, count; m < rows; m += count) {
            count = MOST_TOGETHER;
            while (count > rows - m) count /= 2;
            ROWS_OF[is_integer][count](of, header, &place, x, row + m, k, found, of->bits <= 6, tile + m * TILE);
        }
    }
}

/* The sums of `rows` rows, the first of them `row`, and `panels` panels from `first` on, of one chain. */
static void multiply_quantized(const struct linear *linear, int first, int panels, const struct prepared *x, int row,
                               int rows, int begin, int end, float *tile) {
    const struct packing *of = linear->packing;
    const char *w = (const char *)linear->weights + first * of->panel_nbytes;
    one_row_of *const *one = ONE_ROW_OF[linear->is_integer][of->kind][of->bits];
    const int is_one = rows == 1 && one[0];
    for (int p = 0; p < panels;) {
        int step = !is_one ? 0 : panels - p >= 4 && one[2] ? 2 : panels - p >= 2 ? 1 : 0;
        if (!is_one)
            multiply_rows(linear, x, row, rows, w + p * of->panel_nbytes, begin, end, tile + p * PANEL);
        else
            one[step](of, x, row, w + p * of->panel_nbytes, begin, end, tile + p * PANEL);
        p += 1 << step;
    }
}

/* Row `lane` of the panel w as numbers: scale times number, less the minimum, each rounded. */
static void embed_quantized(const struct linear *linear, const char *w, int lane, float *to) {
    const struct packing *of = linear->packing;
    expand_of *expand = EXPAND_OF[0][of->kind][of->bits];
    float numbers[BLOCK_INPUTS * PANEL] __attribute__((aligned(64)));
    for (int k = 0; k < linear->k; k += BLOCK_INPUTS) {
        struct place place = place_of(of, k);
        const char *header = w + place.header;
        vf zero[2], scale[2], minimum[2];
        for (int half = 0; half < 2; half++) {
            int part = of->parts == 2 ? half : 0;
            zero[half] = shifted_zero(zero_of(of, header, &place, part));
            scale[half] = scale_of(of, header, &place, part);
            minimum[half] = of->minima ? minimum_of(of, header, &place, part) : v_zero();
        }
        expand(w + place.codes, zero, numbers);
        for (int i = 0; i < BLOCK_INPUTS && k + i < linear->k; i++) {
            float all[LANES];
            vf product = v_mul(scale[i / 16], v_load(numbers + i * PANEL));
            v_store(all, of->minima ? v_sub(product, minimum[i / 16]) : product);
            to[k + i] = all[lane];
        }
    }
}

#endif
