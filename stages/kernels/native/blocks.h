/* Products of a few rows with packed weights: the innermost loops, and the tree that combines their sums. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "quantized.h"

#define LINE_BF16 64
#define LINE_HALF 64
#define LINE_FLOAT 128
#define LOW_BF16(p) bf16_low(p)
#define HIGH_BF16(p) bf16_high(p)
#define LOW_HALF(p) v_load_half((const uint16_t *)(p))
#define HIGH_HALF(p) v_load_half((const uint16_t *)(p) + 16)
#define LOW_FLOAT(p) v_load((const float *)(p))
#define HIGH_FLOAT(p) v_load((const float *)(p) + 16)
static const int LINE[] = {LINE_BF16, LINE_HALF, LINE_FLOAT, LINE_BF16};

typedef void block_of(const float *x, int64_t ldx, const char *w, int64_t panel, float *tile, int pairs);

/* What one line of weights adds to the sums of M rows: two multiply-adds each, in order of k. */
#define ADD_LINE(F, M)                                                                                                 \
    vf low = LOW_##F(line);                                                                                            \
    for (int m = 0; m < M; m++) sum[m][p] = v_fma(v_set1(x[m * ldx + 2 * k]), low, sum[m][p]);                         \
    vf high = HIGH_##F(line);                                                                                          \
    for (int m = 0; m < M; m++) sum[m][p] = v_fma(v_set1(x[m * ldx + 2 * k + 1]), high, sum[m][p])
#define ADD_BF16(M) ADD_LINE(BF16, M)
#define ADD_HALF(M) ADD_LINE(HALF, M)
#define ADD_FLOAT(M) ADD_LINE(FLOAT, M)

/* tile[M][P * 16] = x[M][2 * pairs] times P panels. */
#define BLOCK(F, M, P)                                                                                                 \
    static void block_##F##_##M##_##P(const float *x, int64_t ldx, const char *w, int64_t panel, float *tile,          \
                                      int pairs) {                                                                     \
        vf sum[M][P];                                                                                                  \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int p = 0; p < P; p++) sum[m][p] = v_zero();                                                          \
        for (int k = 0; k < pairs; k++)                                                                                \
            for (int p = 0; p < P; p++) {                                                                              \
                const char *line = w + p * panel + (int64_t)k * LINE_##F;                                              \
                for (int part = 0; part < LINE_##F; part += 64) v_prefetch(line + AHEAD / P + part);                   \
                ADD_##F(M);                                                                                            \
            }                                                                                                          \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int p = 0; p < P; p++) v_store(tile + m * TILE + p * PANEL, sum[m][p]);                               \
    }
#define BLOCKS(F)                                                                                                      \
    BLOCK(F, 1, 1)                                                                                                     \
    BLOCK(F, 1, 2) BLOCK(F, 1, 4) BLOCK(F, 2, 1) BLOCK(F, 2, 2) BLOCK(F, 3, 1) BLOCK(F, 4, 1) BLOCK(F, 5, 1)
#if REGISTERS == 32
#define WIDE_BLOCKS(F)                                                                                                 \
    BLOCKS(F)                                                                                                          \
    BLOCK(F, 2, 4)                                                                                                     \
    BLOCK(F, 3, 2)                                                                                                     \
    BLOCK(F, 3, 4)                                                                                                     \
    BLOCK(F, 4, 2)                                                                                                     \
    BLOCK(F, 4, 4) BLOCK(F, 5, 2) BLOCK(F, 5, 4) BLOCK(F, 6, 1) BLOCK(F, 6, 2) BLOCK(F, 8, 1) BLOCK(F, 8, 2)
WIDE_BLOCKS(BF16)
WIDE_BLOCKS(HALF)
WIDE_BLOCKS(FLOAT)
#define TABLE(F)                                                                                                       \
    {                                                                                                                  \
        [1] = {block_##F##_1_1, block_##F##_1_2, block_##F##_1_4},                                                     \
        [2] = {block_##F##_2_1, block_##F##_2_2, block_##F##_2_4},                                                     \
        [3] = {block_##F##_3_1, block_##F##_3_2, block_##F##_3_4},                                                     \
        [4] = {block_##F##_4_1, block_##F##_4_2, block_##F##_4_4},                                                     \
        [5] = {block_##F##_5_1, block_##F##_5_2, block_##F##_5_4},                                                     \
        [6] = {block_##F##_6_1, block_##F##_6_2},                                                                      \
        [8] = {block_##F##_8_1, block_##F##_8_2},                                                                      \
    }
static const int SPLIT[] = {0, 1, 2, 3, 4, 5, 6, 4, 8, 5, 5, 6, 6, 8}; /* the rows of the first block of so many */
#else
BLOCKS(BF16)
BLOCKS(HALF)
BLOCKS(FLOAT)
#define TABLE(F)                                                                                                       \
    {                                                                                                                  \
        [1] = {block_##F##_1_1, block_##F##_1_2, block_##F##_1_4},                                                     \
        [2] = {block_##F##_2_1, block_##F##_2_2},                                                                      \
        [3] = {block_##F##_3_1},                                                                                       \
        [4] = {block_##F##_4_1},                                                                                       \
        [5] = {block_##F##_5_1},                                                                                       \
    }
static const int SPLIT[] = {0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 5, 5, 4, 5};
#endif
#if defined(__AVX512BF16__)
#define HAS_DOT 1
#define LINE_DOT LINE_BF16
#define ADD_DOT(M)                                                                                                     \
    __m512bh both = (__m512bh)_mm512_loadu_si512(line);                                                                \
    for (int m = 0; m < M; m++)                                                                                        \
    sum[m][p] = _mm512_dpbf16_ps(sum[m][p], both, (__m512bh)_mm512_set1_epi32((int)bits_of(x[m * ldx + k])))
WIDE_BLOCKS(DOT)
#else
#define HAS_DOT 0
#endif
static block_of *const BLOCK_OF[4][9][3] = {
    [BF16] = TABLE(BF16),
    [HALF] = TABLE(HALF),
    [FLOAT] = TABLE(FLOAT),
#if HAS_DOT
    [DOT] = TABLE(DOT),
#endif
};

/* Pairs of bf16 from `pairs` pairs of floats in each row, for DOT. */
static void round_pairs(const float *x, int64_t ldx, int rows, int pairs, uint32_t *to) {
    for (int m = 0; m < rows; m++)
        for (int k = 0; k < pairs; k++) {
            const float *pair = x + m * ldx + 2 * k;
            to[m * (int64_t)pairs + k] = float_to_bf16(pair[0]) | (uint32_t)float_to_bf16(pair[1]) << 16;
        }
}

/* The rows of the next block where `rows` are left. */
static int next_block(int rows) { return SPLIT[rows < 13 ? rows : 13]; }

/* Bytes of a panel. */
static int64_t panel_nbytes(const struct linear *linear) {
    if (linear->format == QUANTIZED) return linear->packing->panel_nbytes;
    return (int64_t)((linear->k + 1) / 2) * LINE[linear->format];
}

/* The sums of one chain, of weights that are not quantised: see product. */
static void multiply_dense(const struct linear *linear, int leaf, int first, int panels, const float *x, int64_t ldx,
                           int rows, float *sums, uint32_t *rounded) {
    const int64_t line = LINE[linear->format], panel = panel_nbytes(linear);
    const char *w = (const char *)linear->weights + first * panel;
    int begin = linear->cuts[leaf] / 2, pairs = (linear->cuts[leaf + 1] + 1) / 2 - begin;
    const float *from = x + 2 * begin;
    int64_t ld = ldx;
    if (linear->format == DOT)
        round_pairs(from, ldx, rows, pairs, rounded), from = (const float *)rounded, ld = pairs;
    for (int m = 0; m < rows;) {
        int count = next_block(rows - m);
        block_of *const *blocks = BLOCK_OF[linear->format][count];
        for (int p = 0; p < panels;) {
            int step = panels - p >= 4 && blocks[2] ? 2 : panels - p >= 2 && blocks[1] ? 1 : 0;
            blocks[step](from + m * ld, ld, w + p * panel + begin * line, panel, sums + m * TILE + p * PANEL, pairs);
            p += 1 << step;
        }
        m += count;
    }
}

/* tile[rows][TILE] = x[rows] times `panels` panels from `first` on; rows <= BLOCK_ROWS, panels <= GROUP. `tile` has
 * room for four, `rounded` for the pairs of a leaf where the format is DOT. `prepared`: the rows, where weights are
 * quantised. */
static void product(const struct linear *linear, int first, int panels, const float *x, int64_t ldx, int rows,
                    float *tile, uint32_t *rounded, const struct prepared *prepared) {
    int depth = 0;
    for (int leaf = 0; leaf < LEAVES; leaf++) {
        float *sums = tile + depth++ * BLOCK_ROWS * TILE;
        if (linear->format == QUANTIZED)
            multiply_quantized(linear, first, panels, prepared, linear->cuts[leaf], linear->cuts[leaf + 1], sums);
        else
            multiply_dense(linear, leaf, first, panels, x, ldx, rows, sums, rounded);
        for (int done = leaf + 1; done % 2 == 0; done /= 2) { /* the tree: of two neighbours of one size their sum */
            float *left = tile + (--depth - 1) * BLOCK_ROWS * TILE, *right = left + BLOCK_ROWS * TILE;
            for (int m = 0; m < rows; m++)
                for (int c = m * TILE; c < m * TILE + panels * PANEL; c += LANES)
                    v_store(left + c, v_add(v_load(left + c), v_load(right + c)));
        }
    }
}

static int most_pairs(const struct linear *linear) {
    int most = 0;
    for (int leaf = 0; leaf < LEAVES; leaf++) {
        int pairs = (linear->cuts[leaf + 1] + 1) / 2 - linear->cuts[leaf] / 2;
        most = pairs > most ? pairs : most;
    }
    return most;
}

#endif
