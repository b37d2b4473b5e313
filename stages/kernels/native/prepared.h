/* Rows of activations as quantised weights need them: whole blocks of 32 inputs, as floats or as bytes with a scale. */
#ifndef PREPARED_H
#define PREPARED_H

#include "planes.h"

struct fact {
    float half[2]; /* the sums of a block's halves */
    float scale;   /* of bytes */
    int32_t sum[2]; /* of the bytes of each half */
};

/* Of a block, what all rows have lies side by side: x[blocks][rows][32], codes and facts likewise. */
struct prepared {
    const float *x;
    struct fact *facts;
    int8_t *codes; /* where activations are integers */
    int rows;
};

/* Bytes of memory for what is prepared of a row. */
static int64_t prepared_nbytes(int k) {
    int64_t blocks = (k + BLOCK_INPUTS - 1) / BLOCK_INPUTS;
    return blocks * ((int64_t)sizeof(struct fact) + BLOCK_INPUTS * 4);
}

INLINE void store_bytes(int8_t *to, vf low_bytes) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_castps_si512(low_bytes)));
#else
    float each[LANES];
    v_store(each, low_bytes);
    for (int i = 0; i < LANES; i++) to[i] = (int8_t)(uint8_t)bits_of(each[i]);
#endif
}

/* A block as bytes: x is about scale * code. The scale is not a number where one of x is not finite, and 0 where all are
 * nearly 0. Sizes are compared as whole numbers, which have the order of floats. */
static void quantize(const float *x, int8_t *codes, struct fact *fact) {
    const vf ROUND = v_set1(12582912.0f); /* 1.5 2^23: adding it rounds to whole numbers, ties to even */
    const vi SIZE = vi_set1(0x7fffffff);
    const int32_t bits = vi_highest(vi_max(vi_and(vi_load(x), SIZE), vi_and(vi_load(x + LANES), SIZE)));
    const float most = from_bits((uint32_t)bits);
    if (bits >= 0x7f800000 || most < 1e-30f) {
        memset(codes, 0, BLOCK_INPUTS);
        *fact = (struct fact){.scale = bits >= 0x7f800000 ? from_bits(0x7fc00000) : 0.0f};
        return;
    }
    vf factor = v_set1(127.0f / most);
    vf low = v_add(v_mul(v_load(x), factor), ROUND), high = v_add(v_mul(v_load(x + LANES), factor), ROUND);
    store_bytes(codes, low), store_bytes(codes + LANES, high);
    fact->scale = most / 127.0f;
    fact->sum[0] = (int32_t)v_sum(v_sub(low, ROUND)), fact->sum[1] = (int32_t)v_sum(v_sub(high, ROUND));
}

/* Prepare `rows` rows of x; `memory` has prepared_nbytes for each. What lies as it should stays where it is. */
static struct prepared prepare(const float *x, int64_t ldx, int k, int rows, int is_integer, char *memory) {
    const int blocks = (k + BLOCK_INPUTS - 1) / BLOCK_INPUTS, in_place = rows == 1 && k % BLOCK_INPUTS == 0;
    float *copies = (float *)memory;
    int8_t *codes = (int8_t *)memory;
    struct fact *facts = (struct fact *)(memory + (int64_t)blocks * rows * BLOCK_INPUTS * 4);
    for (int row = 0; row < rows; row++)
        for (int block = 0; block < blocks; block++) {
            const int64_t place = (int64_t)block * rows + row;
            const int begin = block * BLOCK_INPUTS, left = k - begin;
            const float *from = x + row * ldx + begin;
            float part[BLOCK_INPUTS], *to = is_integer ? part : copies + place * BLOCK_INPUTS;
            if (left < BLOCK_INPUTS) {
                for (int i = 0; i < BLOCK_INPUTS; i++) to[i] = i < left ? from[i] : 0.0f;
                from = to;
            } else if (!is_integer && !in_place) {
                memcpy(to, from, BLOCK_INPUTS * 4);
            }
            if (is_integer)
                quantize(from, codes + place * BLOCK_INPUTS, facts + place);
            else
                facts[place].half[0] = v_sum(v_load(from)), facts[place].half[1] = v_sum(v_load(from + LANES));
        }
    return (struct prepared){in_place ? x : copies, facts, codes, rows};
}

#endif
