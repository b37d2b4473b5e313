/* The noise of a draw: Gumbel noise of a token at a position, as in stages/kernels/sampling.py. */
#ifndef NOISE_H
#define NOISE_H

#include "lanes.h"

/* Philox4x64-10 (Salmon et al., SC'11): four words of `counter` with the key `seed`. */
INLINE void philox(uint64_t counter, uint64_t position, uint64_t seed, uint64_t words[4]) {
    uint64_t c[4] = {counter, position, 0, 0}, key[2] = {seed, 0};
    for (int round = 0; round < 10; round++) {
        unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c[0];
        unsigned __int128 b = (unsigned __int128)0xCA5A826395121157u * c[2];
        uint64_t next[4] = {(uint64_t)(b >> 64) ^ c[1] ^ key[0], (uint64_t)b, (uint64_t)(a >> 64) ^ c[3] ^ key[1],
                            (uint64_t)a};
        memcpy(c, next, sizeof next);
        key[0] += 0x9E3779B97F4A7C15u, key[1] += 0xBB67AE8584CAA73Bu;
    }
    memcpy(words, c, sizeof c);
}

/* The natural logarithm of a normal positive number. */
static double logarithm(double a) {
    uint64_t bits;
    memcpy(&bits, &a, 8);
    int64_t exponent = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    if (bits > 0x3ff6a09e667f3bcdu) bits -= 0x10000000000000u, exponent++; /* from 0.71 to 1.41 */
    memcpy(&a, &bits, 8);
    double s = (a - 1.0) / (a + 1.0), z = s * s, sum = 0.0;
    for (int power = 23; power >= 3; power -= 2) { /* log a = 2 (s + s^3 / 3 + s^5 / 5 + ...) */
        sum = sum + 1.0 / power;
        sum = sum * z;
    }
    double part = s * sum, low = (double)exponent * 1.90821492927058770002e-10;
    double mantissa = 2.0 * (s + part);
    return (double)exponent * 6.93147180369123816490e-01 + (low + mantissa);
}

/* A number between 0 and 1 from the upper 52 bits of a word. */
INLINE double uniform(uint64_t word) { return ((double)(word >> 12) + 0.5) * 0x1p-52; }

INLINE double gumbel(double u) { return -logarithm(-logarithm(u)); }

#endif
