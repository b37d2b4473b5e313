/* Norms and rotary embedding. */
#ifndef NORMS_H
#define NORMS_H

#include "lanes.h"

static float rms_inverse(const float *x, int count, float eps) {
    vf sum = v_zero();
    float tail[LANES] = {0};
    int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) sum = v_fma(v_load(x + i), v_load(x + i), sum);
    for (int i = whole; i < count; i++) tail[i - whole] = x[i];
    sum = v_fma(v_load(tail), v_load(tail), sum);
    return 1.0f / __builtin_sqrtf(v_sum(sum) / (float)count + eps);
}

/* y = x / rms(x) * weight, and zeros up to whole panels; y may be x where there are none. */
static void norm(const float *x, const float *weight, int count, float eps, float *y) {
    float inverse = rms_inverse(x, count, eps);
    int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES)
        v_store(y + i, v_mul(v_mul(v_load(x + i), v_set1(inverse)), v_load(weight + i)));
    for (int i = whole; i < count; i++) y[i] = x[i] * inverse * weight[i];
}

/* Rotate the pairs i and i + size / 2 of a head in place. */
static void rotate(float *head, const float *rotation, int size) {
    int half = size / 2, whole = half / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) {
        vf a = v_load(head + i), b = v_load(head + half + i), c = v_load(rotation + i), s = v_load(rotation + half + i);
        v_store(head + i, v_sub(v_mul(a, c), v_mul(b, s)));
        v_store(head + half + i, v_add(v_mul(b, c), v_mul(a, s)));
    }
    for (int i = whole; i < half; i++) {
        float a = head[i], b = head[half + i], c = rotation[i], s = rotation[half + i];
        float ac = a * c, bs = b * s, bc = b * c, as = a * s;
        head[i] = ac - bs, head[half + i] = bc + as;
    }
}

#endif
