/* Products of rows with quantised weights.
 *
 * Sums are defined per block of 32 inputs, or per half of one where a group has 16, so that they depend neither on the
 * size of groups and records nor on where a matrix was cut:
 *     float activations:  part = the sum over the block of x number(code), each a fused multiply-add, in order;
 *                         sum = fma(scale, part, sum);             sum = fma(minimum, -(the sum of x), sum).
 *     integer activations: x is s q for bytes q; part = the sum of q (code - zero), an exact integer;
 *                         sum = fma(part, scale s, sum);           sum = fma(minimum, -(s times the sum of q), sum).
 * A few rows unpack codes in registers. Many rows share what one of them unpacks into a small buffer. */
#ifndef QUANTIZED_H
#define QUANTIZED_H

#include "planes.h"
#include "prepared.h"
#include "tiles.h"

enum { MANY_ROWS = 8 };

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

/* Of a half of a block, or of all of it where it has one part: what the 16 outputs have. */
struct terms {
    vf scale, minimum;
    vi zero;
};

INLINE vf scale_of(const struct packing *of, const char *header, const struct place *place, int half) {
    const int second = half * BLOCK_INPUTS / 2, group = place->group + (second && of->group <= second);
    vf scale = load_scales(header, of->scale_format, place->span + (second && of->span <= second));
    return of->factors ? v_mul(scale, vi_float(vi_load_i8(header + of->factors + group * PANEL))) : scale;
}

INLINE vf minimum_of(const struct packing *of, const char *header, const struct place *place, int half) {
    const int second = half * BLOCK_INPUTS / 2, group = place->group + (second && of->group <= second);
    if (!of->minima) return v_zero();
    vf minimum = load_scales(header + of->minima, of->scale_format, place->span + (second && of->span <= second));
    if (!of->minimum_factors) return minimum;
    return v_mul(minimum, vi_float(vi_load_i8(header + of->minimum_factors + group * PANEL)));
}

INLINE vi zero_of(const struct packing *of, const char *header, const struct place *place, int half) {
    const int second = half * BLOCK_INPUTS / 2, group = place->group + (second && of->group <= second);
    return of->zeros ? vi_load_u8(header + of->zeros + group * PANEL) : vi_set1(of->zero);
}

INLINE struct terms terms_of(const struct packing *of, const char *header, const struct place *place, int half) {
    return (struct terms){scale_of(of, header, place, half), minimum_of(of, header, place, half),
                          zero_of(of, header, place, half)};
}

/* The sum with a part of a block: its half `half`, or all of it where it has one part. */
INLINE vf with_float_part(const struct terms *terms, int has_minima, int parts, int half, vf part,
                          const struct fact *fact, vf sum) {
    sum = v_fma(terms->scale, part, sum);
    if (!has_minima) return sum;
    float x = parts == 2 ? fact->half[half] : fact->half[0] + fact->half[1];
    return v_fma(terms->minimum, v_set1(-x), sum);
}

INLINE vf with_integer_part(const struct terms *terms, int has_minima, int parts, int half, vi part,
                            const struct fact *fact, vf sum) {
    sum = v_fma(vi_float(part), v_mul(terms->scale, v_set1(fact->scale)), sum);
    if (!has_minima) return sum;
    float x = (float)(parts == 2 ? fact->sum[half] : fact->sum[0] + fact->sum[1]) * fact->scale;
    return v_fma(terms->minimum, v_set1(-x), sum);
}

/* What an integer part begins with: the zero point times the sum of q, less. */
INLINE vi first_part(vi zero, int parts, int half, const struct fact *fact) {
    return vi_mul(vi_set1(-(parts == 2 ? fact->sum[half] : fact->sum[0] + fact->sum[1])), zero);
}

typedef void few_rows_of(const struct packing *of, const struct prepared *x, int row, const char *w, int begin, int end,
                         float *tile);

/* A line of codes: into the second cache long before it is used, into the first one a little before. */
enum { SOON = 2048, LATER = 8192 };
INLINE void prefetch_line(const char *from) { v_prefetch_second(from + LATER), v_prefetch(from); }

INLINE void prefetch(const char *from, int nbytes) {
    for (int i = 0; i < nbytes; i += 64) prefetch_line(from + i);
}

/* The sums of M rows, from `row` on, and P panels, of a chain from `begin` to `end`. VECTOR and NUMBER are of
 * planes.h. */
#define FLOAT_INPUT(KIND, M, i, byte)                                                                                  \
    {                                                                                                                  \
        vf number = NUMBER_##KIND(codes, byte, zero[p]);                                                               \
        for (int m = 0; m < M; m++)                                                                                    \
            part[m][p] = v_fma(v_set1(from[m * BLOCK_INPUTS + 4 * (i) + byte]), number, part[m][p]);                   \
    }
#define FLOAT_STEP(BITS, KIND, M, P, i)                                                                                \
    for (int p = 0; p < P; p++) {                                                                                      \
        if (i < BITS) prefetch_line(w + p * panel + place.codes + SOON / P + (i)*64);                                  \
        vi codes = VECTOR_##BITS(w + p * panel + place.codes, i);                                                      \
        FLOAT_INPUT(KIND, M, i, 0) FLOAT_INPUT(KIND, M, i, 1) FLOAT_INPUT(KIND, M, i, 2) FLOAT_INPUT(KIND, M, i, 3)    \
    }
#define INTEGER_STEP(BITS, KIND, M, P, i)                                                                              \
    for (int p = 0; p < P; p++) {                                                                                      \
        if (i < BITS) prefetch_line(w + p * panel + place.codes + SOON / P + (i)*64);                                  \
        vi vector = VECTOR_##BITS(w + p * panel + place.codes, i);                                                     \
        for (int m = 0; m < M; m++)                                                                                    \
            part[m][p] = vi_dot(part[m][p], vector, vi_set1(from[m * (BLOCK_INPUTS / 4) + i]), BITS <= 6);             \
    }
#define FLOAT_BEGIN(M, half)                                                                                           \
    zero[p] = shifted_zero(zero_of(of, w + p * panel + place.header, &place, half));                                   \
    for (int m = 0; m < M; m++) part[m][p] = v_zero()
#define INTEGER_BEGIN(M, half)                                                                                         \
    vi zero_point = zero_of(of, w + p * panel + place.header, &place, half);                                           \
    for (int m = 0; m < M; m++) part[m][p] = first_part(zero_point, parts, half, fact + m)
#define FLOAT_END(M, half)                                                                                             \
    struct terms terms = terms_of(of, w + p * panel + place.header, &place, half);                                     \
    for (int m = 0; m < M; m++)                                                                                        \
    sum[m][p] = with_float_part(&terms, has_minima, parts, half, part[m][p], fact + m, sum[m][p])
#define INTEGER_END(M, half)                                                                                           \
    struct terms terms = terms_of(of, w + p * panel + place.header, &place, half);                                     \
    for (int m = 0; m < M; m++)                                                                                        \
    sum[m][p] = with_integer_part(&terms, has_minima, parts, half, part[m][p], fact + m, sum[m][p])
#define FLOAT_PART vf
#define INTEGER_PART vi
#define FLOAT_FROM const float *from = x->x + at * BLOCK_INPUTS
#define INTEGER_FROM const int32_t *from = (const int32_t *)(x->codes + at * BLOCK_INPUTS)
#define HALF_OF(BITS, KIND, A, M, P, first)                                                                            \
    A##_STEP(BITS, KIND, M, P, first) A##_STEP(BITS, KIND, M, P, first + 1) A##_STEP(BITS, KIND, M, P, first + 2)      \
        A##_STEP(BITS, KIND, M, P, first + 3)
#define FEW_ROWS(BITS, KIND, A, M, P)                                                                                  \
    static void few_##BITS##_##KIND##_##A##_##M##_##P(const struct packing *of, const struct prepared *x, int row,     \
                                                      const char *w, int begin, int end, float *tile) {                \
        const int64_t panel = of->panel_nbytes;                                                                        \
        const int parts = of->parts, has_minima = of->minima != 0;                                                     \
        vf sum[M][P], zero[P];                                                                                         \
        A##_PART part[M][P];                                                                                           \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int p = 0; p < P; p++) sum[m][p] = zero[p] = v_zero();                                                \
        for (int k = begin; k < end; k += BLOCK_INPUTS) {                                                              \
            struct place place = place_of(of, k);                                                                      \
            const int64_t at = (int64_t)(k / BLOCK_INPUTS) * x->rows + row;                                            \
            const struct fact *fact = x->facts + at;                                                                   \
            A##_FROM;                                                                                                  \
            int is_first = k == begin || place.codes - place.header == of->header_nbytes;                              \
            for (int p = 0; p < P; p++) {                                                                              \
                const char *ahead = w + p * panel + SOON / P;                                                          \
                if (is_first) prefetch(ahead + place.header, of->header_nbytes);                                       \
                A##_BEGIN(M, 0);                                                                                       \
            }                                                                                                          \
            HALF_OF(BITS, KIND, A, M, P, 0)                                                                            \
            if (parts == 2)                                                                                            \
                for (int p = 0; p < P; p++) {                                                                          \
                    A##_END(M, 0);                                                                                     \
                    A##_BEGIN(M, 1);                                                                                   \
                }                                                                                                      \
            HALF_OF(BITS, KIND, A, M, P, 4)                                                                            \
            for (int p = 0; p < P; p++) {                                                                              \
                A##_END(M, parts - 1);                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int p = 0; p < P; p++) v_store(tile + m * TILE + p * PANEL, sum[m][p]);                               \
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

/* What a block of one panel adds to the sums of M rows. `x`, `q`, `fact`: of the first of them. */
#define FLOAT_ROWS(M)                                                                                                  \
    static void float_rows_##M(const struct packing *of, const struct terms *terms, const float *x,                    \
                               const struct fact *fact, const void *expanded, float *tile) {                           \
        const int parts = of->parts, inputs = BLOCK_INPUTS / parts, has_minima = of->minima != 0;                      \
        const float *numbers = expanded;                                                                               \
        for (int half = 0, i = 0; half < parts; half++) {                                                              \
            const struct terms mine = terms[half];                                                                     \
            vf part[M];                                                                                                \
            for (int m = 0; m < M; m++) part[m] = v_zero();                                                            \
            for (; i < (half + 1) * inputs; i++) {                                                                     \
                vf number = v_load(numbers + i * PANEL);                                                               \
                for (int m = 0; m < M; m++) part[m] = v_fma(v_set1(x[m * BLOCK_INPUTS + i]), number, part[m]);         \
            }                                                                                                          \
            for (int m = 0; m < M; m++) {                                                                              \
                vf sum = v_load(tile + m * TILE);                                                                      \
                v_store(tile + m * TILE, with_float_part(&mine, has_minima, parts, half, part[m], fact + m, sum));     \
            }                                                                                                          \
        }                                                                                                              \
    }
#define INTEGER_ROWS(M, SIZE, SMALL)                                                                                   \
    static void SIZE##_rows_##M(const struct packing *of, const struct terms *terms, const int32_t *q,                 \
                                const struct fact *fact, const void *expanded, float *tile) {                          \
        const int parts = of->parts, vectors = BLOCK_INPUTS / 4 / parts, has_minima = of->minima != 0;                 \
        const char *bytes = expanded;                                                                                  \
        for (int half = 0, i = 0; half < parts; half++) {                                                              \
            const struct terms mine = terms[half];                                                                     \
            vi part[M];                                                                                                \
            for (int m = 0; m < M; m++) part[m] = first_part(mine.zero, parts, half, fact + m);                        \
            for (; i < (half + 1) * vectors; i++) {                                                                    \
                vi vector = vi_load(bytes + i * 64);                                                                   \
                for (int m = 0; m < M; m++)                                                                            \
                    part[m] = vi_dot(part[m], vector, vi_set1(q[m * BLOCK_INPUTS / 4 + i]), SMALL);                    \
            }                                                                                                          \
            for (int m = 0; m < M; m++) {                                                                              \
                vf sum = v_load(tile + m * TILE);                                                                      \
                v_store(tile + m * TILE, with_integer_part(&mine, has_minima, parts, half, part[m], fact + m, sum));   \
            }                                                                                                          \
        }                                                                                                              \
    }
#define ROWS(M) FLOAT_ROWS(M) INTEGER_ROWS(M, small, 1) INTEGER_ROWS(M, large, 0)
#define ROWS_CASE(M)                                                                                                   \
    if (!is_integer)                                                                                                   \
        float_rows_##M(of, terms, x->x + place * BLOCK_INPUTS, x->facts + place, expanded, tile);                      \
    else if (of->bits <= 6)                                                                                            \
        small_rows_##M(of, terms, (const int32_t *)(x->codes + place * BLOCK_INPUTS), x->facts + place, expanded, tile); \
    else                                                                                                               \
        large_rows_##M(of, terms, (const int32_t *)(x->codes + place * BLOCK_INPUTS), x->facts + place, expanded, tile)

#if defined(__AVX2__)
#define ALL_OF(BITS, KIND, A) FEW_ROWS(BITS, KIND, A, 1, 1) FEW_ROWS(BITS, KIND, A, 1, 2) MORE(BITS, KIND, A)
#else /* arrays instead of registers: loops that are not unrolled do as well */
#define ALL_OF(BITS, KIND, A)
#endif
#define WITH_FLOATS(BITS, KIND) ALL_OF(BITS, KIND, FLOAT) EXPAND(BITS, KIND)
#define FEW(BITS, KIND, A, M, P) few_##BITS##_##KIND##_##A##_##M##_##P
#if defined(__AVX512F__)
#define MORE(BITS, KIND, A)                                                                                            \
    FEW_ROWS(BITS, KIND, A, 1, 4)                                                                                      \
    FEW_ROWS(BITS, KIND, A, 2, 4) FEW_ROWS(BITS, KIND, A, 3, 2) FEW_ROWS(BITS, KIND, A, 4, 2)
#define FEW_OF(BITS, KIND, A)                                                                                          \
    {                                                                                                                  \
        {FEW(BITS, KIND, A, 1, 1), FEW(BITS, KIND, A, 1, 2), FEW(BITS, KIND, A, 1, 4)},                                \
            {[2] = FEW(BITS, KIND, A, 2, 4)}, {[1] = FEW(BITS, KIND, A, 3, 2)}, {[1] = FEW(BITS, KIND, A, 4, 2)}       \
    }
ROWS(8)
#elif defined(__AVX2__)
#define MORE(BITS, KIND, A)
#define FEW_OF(BITS, KIND, A) {{FEW(BITS, KIND, A, 1, 1), FEW(BITS, KIND, A, 1, 2)}}
#else
#define FEW_OF(BITS, KIND, A) {{0}}
#endif
ROWS(1)
ROWS(2)
ROWS(4)
WITH_FLOATS(2, INTEGER)
WITH_FLOATS(3, INTEGER)
WITH_FLOATS(4, INTEGER)
WITH_FLOATS(5, INTEGER)
WITH_FLOATS(6, INTEGER)
WITH_FLOATS(8, INTEGER)
WITH_FLOATS(6, E3M2)
WITH_FLOATS(8, E4M3)
WITH_FLOATS(4, E3M0)
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
/* By activations, kind and bits: for 1 to 4 rows, of 1, 2 and 4 panels. */
static few_rows_of *const FEW_ROWS_OF[2][KINDS][9][4][3] = {
    {[INTEGER] = {[2] = FEW_OF(2, INTEGER, FLOAT), [3] = FEW_OF(3, INTEGER, FLOAT), [4] = FEW_OF(4, INTEGER, FLOAT),
                  [5] = FEW_OF(5, INTEGER, FLOAT), [6] = FEW_OF(6, INTEGER, FLOAT), [8] = FEW_OF(8, INTEGER, FLOAT)},
     [E3M2] = {[6] = FEW_OF(6, E3M2, FLOAT)},
     [E4M3] = {[8] = FEW_OF(8, E4M3, FLOAT)},
     [E3M0] = {[4] = FEW_OF(4, E3M0, FLOAT)}},
    {[INTEGER] = {[2] = FEW_OF(2, INTEGER, INTEGER), [3] = FEW_OF(3, INTEGER, INTEGER),
                  [4] = FEW_OF(4, INTEGER, INTEGER), [5] = FEW_OF(5, INTEGER, INTEGER),
                  [6] = FEW_OF(6, INTEGER, INTEGER), [8] = FEW_OF(8, INTEGER, INTEGER)}},
};
static expand_of *const EXPAND_OF[2][KINDS][9] = {
    {[INTEGER] = {[2] = expand_2_INTEGER_FLOAT, [3] = expand_3_INTEGER_FLOAT, [4] = expand_4_INTEGER_FLOAT,
                  [5] = expand_5_INTEGER_FLOAT, [6] = expand_6_INTEGER_FLOAT, [8] = expand_8_INTEGER_FLOAT},
     [E3M2] = {[6] = expand_6_E3M2_FLOAT},
     [E4M3] = {[8] = expand_8_E4M3_FLOAT},
     [E3M0] = {[4] = expand_4_E3M0_FLOAT}},
    {[INTEGER] = {[2] = expand_2_INTEGER_INTEGER, [3] = expand_3_INTEGER_INTEGER, [4] = expand_4_INTEGER_INTEGER,
                  [5] = expand_5_INTEGER_INTEGER, [6] = expand_6_INTEGER_INTEGER}},
};
/* What a block adds to the sums of as many of `rows` rows as go together, and how many those are. */
static int add_rows(const struct packing *of, int is_integer, const struct terms *terms, const struct prepared *x,
                    int64_t place, const void *expanded, int rows, float *tile) {
#if defined(__AVX512F__)
    if (rows >= 8) {
        ROWS_CASE(8);
        return 8;
    }
#endif
    if (rows >= 4) {
        ROWS_CASE(4);
        return 4;
    }
    if (rows >= 2) {
        ROWS_CASE(2);
        return 2;
    }
    ROWS_CASE(1);
    return 1;
}

/* The sums of all rows and one panel, of a chain from `begin` to `end`. */
static void multiply_rows(const struct linear *linear, const struct prepared *x, const char *w, int begin, int end,
                          float *tile) {
    const struct packing *of = linear->packing;
    const int is_integer = linear->is_integer, rows = x->rows;
    expand_of *expand = EXPAND_OF[is_integer][of->kind][of->bits];
    float expanded[BLOCK_INPUTS * PANEL] __attribute__((aligned(64)));
    for (int m = 0; m < rows; m++) v_store(tile + m * TILE, v_zero());
    for (int k = begin; k < end; k += BLOCK_INPUTS) {
        struct place place = place_of(of, k);
        const char *header = w + place.header, *codes = w + place.codes;
        if (place.codes - place.header == of->header_nbytes) prefetch(header + SOON, of->header_nbytes);
        prefetch(codes + SOON, of->bits * 64);
        struct terms terms[2] = {terms_of(of, header, &place, 0), terms_of(of, header, &place, of->parts - 1)};
        vf zero[2] = {shifted_zero(terms[0].zero), shifted_zero(terms[1].zero)};
        if (expand) expand(codes, zero, expanded);
        for (int m = 0; m < rows;)
            m += add_rows(of, is_integer, terms, x, (int64_t)(k / BLOCK_INPUTS) * rows + m,
                          expand ? (const void *)expanded : codes, rows - m, tile + m * TILE);
    }
}

/* The sums of all rows and `panels` panels from `first` on, of one chain. */
static void multiply_quantized(const struct linear *linear, int first, int panels, const struct prepared *x, int begin,
                               int end, float *tile) {
    const struct packing *of = linear->packing;
    const char *w = (const char *)linear->weights + first * of->panel_nbytes;
    few_rows_of *const(*few)[3] = FEW_ROWS_OF[linear->is_integer][of->kind][of->bits];
    if (!few[0][0] || (x->rows > 1 && !few[1][2]) || x->rows >= MANY_ROWS) {
        for (int p = 0; p < panels; p++)
            multiply_rows(linear, x, w + p * of->panel_nbytes, begin, end, tile + p * PANEL);
        return;
    }
    for (int row = 0, rows; row < x->rows; row += rows) {
        rows = x->rows - row < 4 ? x->rows - row : 4;
        for (int p = 0, step; p < panels; p += 1 << step) {
            for (step = 2; step && (1 << step > panels - p || !few[rows - 1][step]);) step--;
            const char *from = w + p * of->panel_nbytes;
            float *to = tile + row * TILE + p * PANEL;
            if (few[rows - 1][step])
                few[rows - 1][step](of, x, row, from, begin, end, to);
            else /* one panel is left */
                for (int m = 0; m < rows; m++) few[0][0](of, x, row + m, from, begin, end, to + m * TILE);
        }
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
