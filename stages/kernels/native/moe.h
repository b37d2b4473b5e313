/* Layers with experts: a router chooses some for each row, and the row gets the weighted sum of their outputs.
 *
 * Each output of an expert has memory of its own, and a row's outputs are added in a fixed order, its best expert first.
 * So the sum does not depend on who computed an output, when, or beside which other rows. */
#ifndef MOE_H
#define MOE_H

#include "attention.h"

enum { SORT = 2, GATHER, EXPERTS_UP, EXPERTS_DOWN, OUTPUT_PHASES }; /* after the router's product and the choice by it */

struct expert_job {
    struct layer_job of; /* without its layer */
    const struct experts *experts;
    const struct routes *routes;
    struct cut router;
    int pieces[OUTPUT_PHASES]; /* chunks of one expert in EXPERTS_UP and EXPERTS_DOWN */
    int active;                /* experts that have rows */
    const float *from[MOST_RANKS]; /* outputs of each rank's experts */
};

/* The softmax of a row's scores; its best experts, the lower of equal ones first, and their weights. */
static void choose_experts(struct expert_job *job, int row) {
    const struct experts *experts = job->experts;
    const float TAKEN = -1.0f;
    float *scores = job->routes->scores + (int64_t)row * ceiling(experts->count, PANEL) * PANEL;
    float *weights = job->routes->weights + (int64_t)row * experts->chosen, total, sum = 0.0f;
    int32_t *found = job->routes->expert + (int64_t)row * experts->chosen;
    soften(scores, experts->count, &total);
    for (int k = 0; k < experts->chosen; k++) {
        int best = -1;
        for (int e = 0; e < experts->count; e++) /* what is not a number is never above another, but may be left over */
            if (scores[e] != TAKEN && (best < 0 || scores[e] > scores[best])) best = e;
        found[k] = best;
        weights[k] = scores[best] / total;
        sum = sum + weights[k];
        scores[best] = TAKEN;
    }
    for (int k = 0; k < experts->chosen && experts->is_normalised; k++) weights[k] = weights[k] / sum;
}

/* List the outputs of the experts that are here, expert by expert. */
static void sort_outputs(struct expert_job *job) {
    const struct experts *experts = job->experts;
    const struct routes *routes = job->routes;
    int outputs = job->of.rows->count * experts->chosen;
    int32_t *starts = routes->starts; /* of expert e at e + 1 while members are written, and then at e */
    memset(starts, 0, (size_t)(experts->count + 2) * sizeof *starts);
    for (int i = 0; i < outputs; i++) starts[routes->expert[i] + 2]++;
    for (int e = 0; e < experts->count; e++) {
        if (e < experts->first || e >= experts->end) starts[e + 2] = 0;
        starts[e + 2] += starts[e + 1];
    }
    for (int i = 0; i < outputs; i++) {
        int e = routes->expert[i];
        if (e >= experts->first && e < experts->end) routes->members[starts[e + 1]++] = i;
    }
    job->active = 0;
    for (int e = experts->first; e < experts->end; e++)
        if (starts[e + 1] > starts[e]) routes->active[job->active++] = e;
}

static void gather(struct expert_job *job, int chunk) {
    const struct routes *routes = job->routes;
    int step = job->of.row_step * job->experts->chosen, last = routes->starts[job->experts->count];
    int64_t ld = job->of.ld_hidden;
    for (int i = chunk * step; i < (chunk + 1) * step && i < last; i++)
        memcpy(routes->gathered + i * ld, job->of.rows->normed + routes->members[i] / job->experts->chosen * ld,
               (size_t)ld * 4);
}

struct outputs {
    float *y;
    int64_t ld;
    const int32_t *members;
};

static void finish_output(void *to, const struct linear *linear, const float *tile, int row, int column, int columns) {
    struct outputs *outputs = to;
    struct target target = {outputs->y, outputs->ld};
    finish_store(&target, linear, tile, outputs->members[row], column, columns);
}

/* A chunk of a product with one expert, of all rows that have it. */
static void multiply_expert(struct expert_job *job, int phase, int chunk) {
    const struct routes *routes = job->routes;
    int place = chunk / job->pieces[phase], piece = chunk % job->pieces[phase];
    if (place >= job->active) return;
    int expert = routes->active[place], begin = routes->starts[expert], rows = routes->starts[expert + 1] - begin;
    int here = expert - job->experts->first;
    float *inner = routes->inner + begin * job->of.ld_inner;
    if (phase == EXPERTS_UP) {
        struct target target = {inner, job->of.ld_inner};
        multiply_chunk(job->experts->gate_up + here, &job->of.gate_up, piece,
                       routes->gathered + begin * job->of.ld_hidden, job->of.ld_hidden, rows, finish_gated, &target);
    } else {
        struct outputs outputs = {routes->outputs, job->of.ld_hidden, routes->members + begin};
        multiply_chunk(job->experts->down + here, &job->of.down, piece, inner, job->of.ld_inner, rows, finish_output,
                       &outputs);
    }
}

static void output_phase(void *argument, int phase, int chunk, int thread) {
    struct expert_job *job = argument;
    int begin = chunk * job->of.row_step, end = begin + job->of.row_step, count = job->of.rows->count;
    struct target scores = {job->routes->scores, ceiling(job->experts->count, PANEL) * PANEL};
    switch (phase) {
    case 0:
        multiply_chunk(job->experts->router, &job->router, chunk, job->of.rows->normed, job->of.ld_hidden, count,
                       finish_store, &scores);
        break;
    case 1:
        for (int row = begin; row < end && row < count; row++) choose_experts(job, row);
        break;
    case SORT: sort_outputs(job); break;
    case GATHER: gather(job, chunk); break;
    default: multiply_expert(job, phase, chunk);
    }
}

/* Route all rows, and compute the outputs of the experts that are here. */
static void compute_outputs(struct expert_job *work) {
    const struct experts *experts = work->experts;
    int rows = work->of.rows->count, here = experts->end - experts->first;
    int row_chunks = ceiling(rows, work->of.row_step), most = rows * experts->chosen;
    struct job job = {OUTPUT_PHASES, {0, row_chunks, 1, row_chunks}, output_phase, work};
    most = most < here ? most : here; /* experts with rows */
    work->router = cut(experts->router, 1, job.chunks);
    if (most) {
        work->of.gate_up = cut(experts->gate_up, 2, work->pieces + EXPERTS_UP);
        work->of.down = cut(experts->down, 1, work->pieces + EXPERTS_DOWN);
        work->of.ld_inner = ceiling(experts->gate_up->columns, 2 * PANEL) * PANEL;
        for (int phase = EXPERTS_UP; phase <= EXPERTS_DOWN; phase++) job.chunks[phase] = most * work->pieces[phase];
    }
    pool_run(&job);
}

/* The rank of the group that has expert `expert`. */
static int owner_of(const struct expert_job *job, int expert) {
    int rank = 0, ranks = job->of.rows->group ? job->of.rows->group->size : 1;
    while (job->experts->count * (rank + 1) / ranks <= expert) rank++;
    return rank;
}

/* Add to a row what its experts made of it, the best one first. */
static void combine_row(struct expert_job *job, int row) {
    int hidden = job->of.model->hidden, chosen = job->experts->chosen;
    int64_t ld = job->of.ld_hidden;
    const float *weights = job->routes->weights + (int64_t)row * chosen;
    const int32_t *expert = job->routes->expert + (int64_t)row * chosen;
    int64_t first = (int64_t)row * chosen * ld;
    float *x = job->of.rows->x + (int64_t)row * hidden;
    for (int i = 0; i < hidden; i += LANES) {
        vf sum = v_zero();
        for (int k = 0; k < chosen; k++)
            sum = v_fma(v_set1(weights[k]), v_load(job->from[owner_of(job, expert[k])] + first + k * ld + i), sum);
        if (hidden - i >= LANES) {
            v_store(x + i, v_add(v_load(x + i), sum));
        } else {
            float each[LANES];
            v_store(each, sum);
            for (int j = 0; i + j < hidden; j++) x[i + j] += each[j];
        }
    }
}

static void combine_phase(void *argument, int phase, int chunk, int thread) {
    struct expert_job *job = argument;
    int begin = chunk * job->of.row_step, end = begin + job->of.row_step;
    for (int row = begin; row < end && row < job->of.rows->count; row++) {
        combine_row(job, row);
        check_row(&job->of, row);
    }
}

/* Add the outputs of all experts, wherever they were computed, to the rows. */
static void combine_outputs(struct expert_job *work) {
    struct job job = {1, {ceiling(work->of.rows->count, work->of.row_step)}, combine_phase, work};
    pool_run(&job);
}

/* In a group every rank routes all rows and computes the outputs of its own experts, which all then add up: outputs
 * travel by windows, as many rows at a time as a slot has room for. */
static void experts_in_group(struct expert_job *work, struct rows *rows, const struct routes *routes) {
    struct group *group = rows->group;
    int most = group->most_rows / work->experts->chosen;
    for (int begin = 0; begin < rows->count; begin += most) {
        struct rows block = *rows;
        struct routes places = *routes;
        uint64_t epoch = ++group->epoch;
        block.count = rows->count - begin < most ? rows->count - begin : most;
        block.x += (int64_t)begin * work->of.model->hidden;
        block.normed += (int64_t)begin * work->of.ld_hidden;
        block.faults += begin;
        places.outputs = group_slot(group, group->rank, 0, epoch);
        work->of.rows = &block, work->routes = &places;
        compute_outputs(work);
        group_publish(group, group_flag(group, group->rank, 0, epoch, 0), epoch);
        for (int rank = 0; rank < group->size; rank++) {
            if (group_wait(group, rank, group_flag(group, rank, 0, epoch, 0), epoch)) return;
            work->from[rank] = group_slot(group, rank, 0, epoch);
        }
        combine_outputs(work);
    }
}

/* Where `parts` are given: with phase 0 the outputs are written to this rank's part, with phase 1 all are added. */
static void experts(const struct model *model, const struct experts *experts, const struct routes *routes,
                    struct rows *rows) {
    struct expert_job work = {.of = {.model = model, .rows = rows}, .experts = experts, .routes = routes};
    struct routes places = *routes;
    int threads = pool_threads();
    work.of.row_step = rows->count < 2 * threads ? rows->count : ceiling(rows->count, 2 * threads);
    work.of.ld_hidden = ceiling(model->hidden, PANEL) * PANEL;
    if (rows->group && !rows->parts) {
        experts_in_group(&work, rows, routes);
        return;
    }
    work.from[0] = routes->outputs;
    for (int rank = 0; rows->parts && rank < rows->group->size; rank++)
        work.from[rank] = rows->parts + rank * rows->count * experts->chosen * work.of.ld_hidden;
    if (rows->parts) places.outputs = (float *)work.from[rows->group->rank], work.routes = &places;
    if (!rows->first) compute_outputs(&work);
    if (rows->end > 1) combine_outputs(&work);
}

#endif
