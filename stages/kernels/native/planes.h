/* Codes of quantised weights, from bit planes to bytes and floats.
 *
 * A block is 32 inputs of the 16 outputs of a panel. Its codes are eight vectors of bytes: vector i is 16 dwords, one of
 * each output, with the codes of inputs 4i to 4i + 3. A vector of 8 bits is a line of 64 bytes. Fewer bits lie in planes
 * of 4, 2 and 1 bits, the highest bits of a code in the first plane (Quant-LLM, ATC'24): lines of 64 bytes whose lowest
 * bits are those of one vector, the next ones those of the next vector. */
#ifndef PLANES_H
#define PLANES_H

#include "integers.h"
#include "kernels.h"

enum { BLOCK_INPUTS = 32 };

/* The lowest bits of a plane `n` bits wide that vector i has, moved up to bit `at` of each byte. */
INLINE vi field(const char *plane, int n, int i, int at) {
    int each = 8 / n;
    return vi_and(vi_shift(vi_load(plane + i / each * 64), i % each * n - at), vi_byte4(((1 << n) - 1) << at));
}

#define VECTOR_8(codes, i) vi_load((codes) + (i)*64)
#define VECTOR_6(codes, i) vi_or(field(codes, 4, i, 2), field((codes) + 256, 2, i, 0))
#define VECTOR_5(codes, i) vi_or(field(codes, 4, i, 1), field((codes) + 256, 1, i, 0))
#define VECTOR_4(codes, i) field(codes, 4, i, 0)
#define VECTOR_3(codes, i) vi_or(field(codes, 2, i, 1), field((codes) + 128, 1, i, 0))
#define VECTOR_2(codes, i) field(codes, 2, i, 0)

enum { SHIFTED = 0x47000000 }; /* of 2^15: a code in bits 8 to 15 of its mantissa is added to it */

/* What is subtracted from codes, in lanes: 2^15 + zero. */
INLINE vf shifted_zero(vi zero) { return vi_as_float(vi_or(vi_shift(zero, -8), vi_set1(SHIFTED))); }

/* Byte j of each lane less the zero point. Exact. */
INLINE vf integer_number(vi codes, int j, vf zero) {
    return v_sub(vi_as_float(vi_bits(vi_shift(codes, 8 * j - 8), vi_set1(0xff00), vi_set1(SHIFTED))), zero);
}

/* Byte j as a small float of `n` bits below the sign, none to three of them the mantissa's: sign and the others are moved
 * to where a float has them, and the exponent is corrected by a power of two. */
INLINE vf small_float(vi codes, int j, int n, int gap, float power) {
    vi moved = vi_signed_shift(vi_shift(codes, 8 * j + n + 1 - 32), gap);
    vi mask = vi_set1((int32_t)(0x80000000u | ((1u << n) - 1) << (31 - n - gap)));
    return v_mul(vi_as_float(vi_and(moved, mask)), v_set1(power));
}

#define NUMBER_INTEGER(codes, j, zero) integer_number(codes, j, zero)
#define NUMBER_E3M2(codes, j, zero) small_float(codes, j, 5, 5, 0x1p124f)
#define NUMBER_E3M0(codes, j, zero) small_float(codes, j, 3, 5, 0x1p124f)
#define NUMBER_E4M3(codes, j, zero) small_float(codes, j, 7, 4, 0x1p120f)

#endif
