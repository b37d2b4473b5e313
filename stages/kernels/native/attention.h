/* Attention: keys and values into slots, and rows over lists of slots. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "exchange.h"
#include "linear.h"
#include "norms.h"

enum { POSITIONS = 256 }; /* positions of a chunk of attention */

enum { MOST_EXPONENT = 0x5d5e0b6b }; /* the bits of 1e18: see finite.py */

INLINE const char *slot_at(const void *states, const struct model *model, int head, int64_t slot) {
    int64_t nbytes = model->kv_format == FLOAT ? 4 : 2;
    return (const char *)states + ((int64_t)head * model->capacity + slot) * model->stride * nbytes;
}

INLINE vf load_state(const char *state, int format, int i) {
    return format == FLOAT  ? v_load((const float *)state + i)
           : format == BF16 ? v_load_bf16((const uint16_t *)state + i)
                            : v_load_half((const uint16_t *)state + i);
}

/* Write a head of keys or values; 0 for what a slot may not hold. Whether there was any. */
static int write_state(char *state, int format, const float *head, int size) {
    int is_bad = 0;
    for (int i = 0; i < size; i++) {
        int bad = (bits_of(head[i]) & 0x7fffffff) >= MOST_EXPONENT;
        float value = bad ? 0.0f : head[i];
        is_bad |= bad;
        if (format == FLOAT) {
            ((float *)state)[i] = value;
        } else if (format == BF16) {
            ((uint16_t *)state)[i] = float_to_bf16(value);
        } else {
            uint16_t half = float_to_half(value);
            if ((half & 0x7c00) == 0x7c00) half = 0, is_bad = 1;
            ((uint16_t *)state)[i] = half;
        }
    }
    return is_bad;
}

struct layer_job {
    const struct model *model;
    const struct layer *layer;
    struct rows *rows;
    struct cut qkv, output, gate_up, down;
    struct exchange added[2]; /* of `output` and `down`, in a group */
    int row_step;
    int64_t ld_hidden, ld_qkv, ld_mixed, ld_inner;
};

static void fault(struct rows *rows, int row) {
    if (!rows->faults[row]) rows->faults[row] = rows->layer + 1;
}

/* A row that is not finite is noted, and goes on as zeros. */
static void check_row(struct layer_job *job, int row) {
    struct rows *rows = job->rows;
    int hidden = job->model->hidden, is_finite = 1;
    float *x = rows->x + (int64_t)row * hidden;
    for (int i = 0; i < hidden; i++) is_finite &= (bits_of(x[i]) & 0x7f800000) != 0x7f800000;
    if (!is_finite) fault(rows, row);
    if (rows->faults[row]) memset(x, 0, (size_t)hidden * 4);
}

/* Norm, rotate and write the heads of a row. */
static void place_row(struct layer_job *job, int row) {
    const struct model *model = job->model;
    const struct layer *layer = job->layer;
    struct rows *rows = job->rows;
    int size = model->head_dim, nbytes = model->kv_format == FLOAT ? 4 : 2;
    const float *rotation = model->rotations + rows->positions[row] * size;
    float *heads = rows->wide + row * job->ld_qkv;
    for (int head = 0; head < model->heads + 2 * model->kv_heads; head++, heads += size) {
        int key = head - model->heads, value = key - model->kv_heads;
        if (value < 0) {
            const float *weight = key < 0 ? layer->query_norm : layer->key_norm;
            if (weight) norm(heads, weight, size, model->eps, heads);
            rotate(heads, rotation, size);
        }
        if (key >= 0) {
            const void *states = value < 0 ? layer->keys : layer->values;
            char *state = (char *)slot_at(states, model, value < 0 ? key : value, rows->slots[row]);
            if (write_state(state, model->kv_format, heads, size)) fault(rows, row);
            memset(state + size * nbytes, 0, (size_t)(model->stride - size) * nbytes);
        }
    }
}

/* The slots of a row in order of position. */
struct attended {
    const int64_t *canonical;
    const int64_t *own;
    int prefix, count;
};

INLINE int64_t slot_of(const struct attended *list, int place) {
    return place < list->prefix ? list->canonical[place] : list->own[place - list->prefix];
}

/* scores[j] = scale (q . key j), for `count` keys at `places` from `keys` on. */
INLINE void score(const float *q, const char *keys, const int64_t *places, int count, int stride, int format,
                  float scale, float *scores) {
    enum { STEP = 4 };
    int j = 0;
    for (; j + STEP <= count; j += STEP) {
        vf dot[STEP] = {v_zero(), v_zero(), v_zero(), v_zero()};
        for (int i = 0; i < stride; i += LANES) {
            vf part = v_load(q + i);
            for (int k = 0; k < STEP; k++) dot[k] = v_fma(part, load_state(keys + places[j + k], format, i), dot[k]);
        }
        for (int k = 0; k < STEP; k++) scores[j + k] = v_sum(dot[k]) * scale;
    }
    for (; j < count; j++) {
        vf dot = v_zero();
        for (int i = 0; i < stride; i += LANES)
            dot = v_fma(v_load(q + i), load_state(keys + places[j], format, i), dot);
        scores[j] = v_sum(dot) * scale;
    }
}

/* mixed[PARTS * LANES] = the values at `places` from `values` on, weighted. */
#define MIX(PARTS)                                                                                                     \
    INLINE void mix_##PARTS(const float *weights, const char *values, const int64_t *places, int count, int format,    \
                            float *mixed) {                                                                            \
        vf out[PARTS];                                                                                                 \
        for (int part = 0; part < PARTS; part++) out[part] = v_zero();                                                 \
        for (int j = 0; j < count; j++) {                                                                              \
            vf weight = v_set1(weights[j]);                                                                            \
            for (int part = 0; part < PARTS; part++)                                                                   \
                out[part] = v_fma(weight, load_state(values + places[j], format, part * LANES), out[part]);            \
        }                                                                                                              \
        for (int part = 0; part < PARTS; part++) v_store(mixed + part * LANES, out[part]);                             \
    }
MIX(1)
MIX(2)
MIX(4)

/* Replace `scores` by e^(score - highest), zeros up to whole lanes; the highest and the sum. */
static float soften(float *scores, int count, float *total) {
    int padded = ceiling(count, LANES) * LANES;
    for (int j = count; j < padded; j++) scores[j] = scores[0];
    vf lanes = v_load(scores);
    for (int j = LANES; j < padded; j += LANES) lanes = v_max(lanes, v_load(scores + j));
    float most = v_highest(lanes);
    for (int j = 0; j < padded; j += LANES) v_store(scores + j, v_exp(v_sub(v_load(scores + j), v_set1(most))));
    for (int j = count; j < padded; j++) scores[j] = 0.0f;
    vf sum = v_zero();
    for (int j = 0; j < padded; j += LANES) sum = v_add(sum, v_load(scores + j));
    *total = v_sum(sum);
    return most;
}

/* Attend with the queries of one key head [queries][stride] to `count` positions from `first` on: the highest score,
 * the sum of e^(score - highest) and the values weighted by them. The format is a constant where it is inlined. */
INLINE void attend_chunk(const struct model *model, const struct layer *layer, const struct attended *list, int head,
                         const float *q, int queries, int first, int count, int format, float *highest, float *total,
                         float *mixed) {
    int stride = model->stride, nbytes = format == FLOAT ? 4 : 2;
    int64_t places[POSITIONS];
    float scores[POSITIONS] __attribute__((aligned(64)));
    const char *keys = slot_at(layer->keys, model, head, 0), *values = slot_at(layer->values, model, head, 0);
    for (int j = 0; j < count; j++) places[j] = slot_of(list, first + j) * stride * nbytes;
    for (int g = 0; g < queries; g++, q += stride, mixed += stride) {
        score(q, keys, places, count, stride, format, model->scale, scores);
        highest[g] = soften(scores, count, total + g);
        for (int i = 0; i < stride;) {
            int parts = (stride - i) / LANES >= 4 ? 4 : (stride - i) / LANES >= 2 ? 2 : 1;
            const char *from = values + i * nbytes;
            if (parts == 4)
                mix_4(scores, from, places, count, format, mixed + i);
            else if (parts == 2)
                mix_2(scores, from, places, count, format, mixed + i);
            else
                mix_1(scores, from, places, count, format, mixed + i);
            i += parts * LANES;
        }
    }
}

/* The queries of one key head of a row, over all its positions. `partial`: for each chunk the highest scores, the
 * totals and the mixtures of all queries. */
static void attend(struct layer_job *job, int row, int head, float *partial) {
    const struct model *model = job->model;
    struct rows *rows = job->rows;
    int size = model->head_dim, stride = model->stride, queries = model->heads / model->kv_heads;
    int64_t begin = row ? rows->ends[row - 1] : 0;
    struct attended list = {rows->canonical[rows->sequence[row]], rows->ancestors + begin, (int)rows->prefix[row], 0};
    list.count = list.prefix + (int)(rows->ends[row] - begin);
    int chunks = ceiling(list.count, POSITIONS), part = queries * (2 + stride);
    float *q = partial + (int64_t)chunks * part;
    for (int g = 0; g < queries; g++) {
        memcpy(q + g * stride, rows->wide + row * job->ld_qkv + (head * queries + g) * size, (size_t)size * 4);
        memset(q + g * stride + size, 0, (size_t)(stride - size) * 4);
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        float *highest = partial + (int64_t)chunk * part;
        int first = chunk * POSITIONS, count = list.count - first < POSITIONS ? list.count - first : POSITIONS;
#define ATTEND(FORMAT)                                                                                                 \
    attend_chunk(model, job->layer, &list, head, q, queries, first, count, FORMAT, highest, highest + queries,         \
                 highest + 2 * queries)
        if (model->kv_format == FLOAT)
            ATTEND(FLOAT);
        else if (model->kv_format == BF16)
            ATTEND(BF16);
        else
            ATTEND(HALF);
    }
    for (int g = 0; g < queries; g++) {
        float most = partial[g], total = 0.0f, weights[LANES];
        for (int chunk = 1; chunk < chunks; chunk++) {
            float other = partial[(int64_t)chunk * part + g];
            most = other > most ? other : most;
        }
        float *out = rows->mixed + row * job->ld_mixed + (head * queries + g) * size;
        float *sums = partial + 2 * queries + g * stride; /* of the first chunk: the others are added to it */
        for (int chunk = 0; chunk < chunks; chunk++) {
            const float *found = partial + (int64_t)chunk * part;
            v_store(weights, v_exp(v_sub(v_set1(found[g]), v_set1(most))));
            float total_here = found[queries + g] * weights[0];
            total = total + total_here;
            const float *mixed = found + 2 * queries + g * stride;
            for (int i = 0; i < stride; i += LANES) {
                vf weighted = v_mul(v_load(mixed + i), v_set1(weights[0]));
                v_store(sums + i, chunk ? v_add(v_load(sums + i), weighted) : weighted);
            }
        }
        float inverse = 1.0f / total;
        for (int i = 0; i < size; i++) out[i] = sums[i] * inverse;
    }
}

#endif
