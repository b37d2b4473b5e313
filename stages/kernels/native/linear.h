/* Linear layers: chunks of work, and what becomes of a tile of results. */
#ifndef LINEAR_H
#define LINEAR_H

#include "blocks.h"
#include "pool.h"

enum {
    CHUNK_BYTES = 32 * 1024,    /* least weights of a chunk of work */
    PREPARED_BYTES = 512 * 1024 /* of rows that are prepared at a time, if they are more than 8 */
};

/* How a linear layer is cut into chunks of work: `unit` panels stay together. */
struct cut {
    int panels, step;
};

static struct cut cut(const struct linear *linear, int unit, int *chunks) {
    struct cut cut = {ceiling(linear->columns, PANEL), 0};
    int64_t nbytes = 0;
    for (const struct linear *part = linear; part; part = part->next) nbytes += part->panels * panel_nbytes(part);
    int most = 4 * pool_threads(), wanted = nbytes / CHUNK_BYTES < most ? nbytes / CHUNK_BYTES : most;
    int step = ceiling(cut.panels, wanted < 1 ? 1 : wanted);
    unit = step >= GROUP ? GROUP : unit;
    cut.step = ceiling(step, unit) * unit;
    *chunks = ceiling(cut.panels, cut.step);
    return cut;
}

typedef void finish_of(void *to, const struct linear *linear, const float *tile, int row, int column, int columns);

/* What the parts of a layer have in common: whether activations are to be prepared, and as what. */
struct needs {
    int floats, integers, rounded;
};

INLINE struct needs needs_of(const struct linear *linear) {
    struct needs needs = {0};
    for (; linear; linear = linear->next) {
        int is_quantized = linear->format == QUANTIZED;
        needs.integers |= is_quantized && linear->is_integer;
        needs.floats |= is_quantized && !linear->is_integer;
        needs.rounded |= linear->format == DOT;
    }
    return needs;
}

/* How many of `rows` rows are prepared at a time. */
INLINE int rows_at_a_time(const struct linear *linear, struct needs needs, int rows) {
    if (!needs.floats && !needs.integers) return rows;
    int64_t most = PREPARED_BYTES / prepared_nbytes(linear->k);
    most = most < 8 ? 8 : most > BLOCK_ROWS ? BLOCK_ROWS : most;
    return rows < most ? rows : (int)most;
}

/* Chunk `chunk` of x times the linear layer; `finish` takes each row's columns of a tile. */
INLINE void multiply_chunk(const struct linear *linear, const struct cut *cut, int chunk, const float *x, int64_t ldx,
                           int rows, finish_of *finish, void *to) {
    struct needs needs = needs_of(linear);
    int at_a_time = rows_at_a_time(linear, needs, rows), kinds = needs.floats + needs.integers;
    float tile[4 * BLOCK_ROWS * TILE] __attribute__((aligned(64)));
    uint32_t rounded[needs.rounded ? BLOCK_ROWS * most_pairs(linear) : 1];
    char memory[kinds ? kinds * at_a_time * prepared_nbytes(linear->k) : 1] __attribute__((aligned(64)));
    struct prepared prepared[2];
    int end = (chunk + 1) * cut->step < cut->panels ? (chunk + 1) * cut->step : cut->panels;
    for (int begin = 0; begin < rows; begin += at_a_time) {
        int some = rows - begin < at_a_time ? rows - begin : at_a_time;
        if (needs.floats) prepared[0] = prepare(x + begin * ldx, ldx, linear->k, some, 0, memory);
        if (needs.integers)
            prepared[1] = prepare(x + begin * ldx, ldx, linear->k, some, 1,
                                  memory + needs.floats * at_a_time * prepared_nbytes(linear->k));
        for (int p = chunk * cut->step, panels; p < end; p += panels) {
            const struct linear *part = linear;
            int first = p;
            for (; part->next && first >= part->panels; part = part->next) first -= part->panels;
            panels = part->next && part->panels - first < end - p ? part->panels - first : end - p;
            panels = panels < GROUP ? panels : GROUP;
            for (int m = begin; m < begin + some; m += BLOCK_ROWS) {
                int count = begin + some - m < BLOCK_ROWS ? begin + some - m : BLOCK_ROWS;
                product(part, first, panels, x + m * ldx, ldx, count, tile, rounded, prepared + part->is_integer);
                for (int row = 0; row < count; row++)
                    finish(to, linear, tile + row * TILE, m + row, p * PANEL, panels * PANEL);
            }
        }
    }
}

struct target {
    float *y;
    int64_t ld;
};

INLINE vf biased(const struct linear *linear, const float *tile, int column, int c) {
    vf sum = v_load(tile + c);
    return linear->bias ? v_add(sum, v_load(linear->bias + column + c)) : sum;
}

static void finish_store(void *to, const struct linear *linear, const float *tile, int row, int column, int columns) {
    struct target *target = to;
    for (int c = 0; c < columns; c += LANES)
        v_store(target->y + row * target->ld + column + c, biased(linear, tile, column, c));
}

static void finish_add(void *to, const struct linear *linear, const float *tile, int row, int column, int columns) {
    struct target *target = to;
    float *y = target->y + row * target->ld + column;
    int left = linear->columns - column;
    for (int c = 0; c < columns; c += LANES, left -= LANES) {
        vf sum = biased(linear, tile, column, c);
        if (left >= LANES) {
            v_store(y + c, v_add(v_load(y + c), sum));
        } else {
            float each[LANES];
            v_store(each, sum);
            for (int i = 0; i < left; i++) y[c + i] += each[i];
        }
    }
}

/* The columns are 16 of the gate, 16 of up, ...: gate sigmoid(gate) up. */
static void finish_gated(void *to, const struct linear *linear, const float *tile, int row, int column, int columns) {
    struct target *target = to;
    for (int c = 0; c < columns; c += 2 * LANES) {
        vf gate = biased(linear, tile, column, c), up = biased(linear, tile, column, c + LANES);
        vf sigmoid = v_div(v_set1(1.0f), v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), gate))));
        v_store(target->y + row * target->ld + (column + c) / 2, v_mul(v_mul(gate, sigmoid), up));
    }
}

struct linear_job {
    const struct linear *linear;
    struct cut cut;
    const float *x;
    int64_t ldx;
    int rows;
    struct target target;
};

static void linear_phase(void *argument, int phase, int chunk, int thread) {
    struct linear_job *job = argument;
    multiply_chunk(job->linear, &job->cut, chunk, job->x, job->ldx, job->rows, finish_store, &job->target);
}

static void linear(const struct linear *linear, const float *x, int64_t ldx, int32_t rows, float *y, int64_t ldy) {
    struct linear_job work = {linear, {0}, x, ldx, rows, {y, ldy}};
    struct job job = {1, {0}, linear_phase, &work};
    work.cut = cut(linear, 1, job.chunks);
    pool_run(&job);
}

#endif
