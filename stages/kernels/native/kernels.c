/* The kernels of one instruction set: this file is compiled once for each, under another VARIANT.
 *
 * A row's numbers depend on its own tokens alone. Lanes are output columns, so every output of a linear layer is the
 * same sums in the same order for any number of rows and threads; attention goes through a row's slots in order of
 * position, in chunks of fixed size. */
#include "attention.h"
#include "head.h"
#include "moe.h"
#include "roofs.h"

static void norm_rows(struct layer_job *job, const float *weight, int begin, int end) {
    int hidden = job->model->hidden;
    for (int row = begin; row < end; row++)
        norm(job->rows->x + (int64_t)row * hidden, weight, hidden, job->model->eps,
             job->rows->normed + row * job->ld_hidden);
}

/* Add to x what `linear` makes of `from`: alone, by windows, or as one of the parts that others have written. */
static void multiply_and_add(struct layer_job *job, int half, int chunk, const float *from, int64_t ld) {
    struct rows *rows = job->rows;
    const struct linear *linear = half ? &job->layer->down : &job->layer->output;
    const struct cut *cut = half ? &job->down : &job->output;
    struct target x = {rows->x, job->model->hidden};
    if (!rows->group) {
        multiply_chunk(linear, cut, chunk, from, ld, rows->count, finish_add, &x);
    } else if (rows->parts) {
        struct target part = {rows->parts + rows->group->rank * rows->count * job->ld_hidden, job->ld_hidden};
        multiply_chunk(linear, cut, chunk, from, ld, rows->count, finish_part, &part);
    } else {
        exchange_chunk(&job->added[half], chunk, from, ld, x.y, x.ld);
    }
}

/* Where the parts of all ranks have been brought together: add them. */
static void add_brought(struct layer_job *job, int half, int begin, int end) {
    struct rows *rows = job->rows;
    if (!rows->parts) return;
    for (int row = begin; row < end; row++) {
        const float *parts[MOST_RANKS];
        for (int rank = 0; rank < rows->group->size; rank++)
            parts[rank] = rows->parts + ((int64_t)rank * rows->count + row) * job->ld_hidden;
        add_parts(half ? &job->layer->down : &job->layer->output, parts, rows->group->size, 0, job->model->hidden,
                  rows->x + (int64_t)row * job->model->hidden);
    }
}

static void begin_exchange(struct layer_job *work, struct job *job, int half, int begin, int count) {
    const struct layer *layer = work->layer;
    int step = half ? layer->down_tile : layer->output_tile;
    work->added[half] = next_exchange(work->rows->group, half ? &layer->down : &layer->output, step, begin, count);
    job->chunks[half ? DOWN : OUTPUT] = 2 * work->added[half].tiles;
}

static void layer_phase(void *argument, int phase, int chunk, int thread) {
    struct layer_job *job = argument;
    const struct model *model = job->model;
    const struct layer *layer = job->layer;
    struct rows *rows = job->rows;
    int begin = chunk * job->row_step, end = begin + job->row_step < rows->count ? begin + job->row_step : rows->count;
    struct target wide = {rows->wide, job->ld_qkv}, inner = {rows->wide, job->ld_inner};
    switch (phase) {
    case 0: norm_rows(job, layer->attention_norm, begin, end); break;
    case 1:
        multiply_chunk(&layer->qkv, &job->qkv, chunk, rows->normed, job->ld_hidden, rows->count, finish_store, &wide);
        break;
    case 2:
        for (int row = begin; row < end; row++) place_row(job, row);
        break;
    case 3: {
        float *partial = rows->partial + thread * rows->partial_size;
        attend(job, chunk / model->kv_heads, chunk % model->kv_heads, partial);
        break;
    }
    case OUTPUT: multiply_and_add(job, 0, chunk, rows->mixed, job->ld_mixed); break;
    case 5:
        add_brought(job, 0, begin, end);
        norm_rows(job, layer->mlp_norm, begin, end);
        break;
    case 6:
        multiply_chunk(&layer->gate_up, &job->gate_up, chunk, rows->normed, job->ld_hidden, rows->count, finish_gated,
                       &inner);
        break;
    case DOWN: multiply_and_add(job, 1, chunk, rows->wide, job->ld_inner); break;
    default:
        add_brought(job, 1, begin, end);
        for (int row = begin; row < end; row++) check_row(job, row);
    }
}

/* Do the phases from `first` to before `end` that the rows are to go through. */
static void run_phases(const struct rows *rows, const struct job *whole, int first, int end) {
    struct job job = *whole;
    for (int phase = 0; phase < job.phases; phase++)
        if (phase < first || phase >= end || phase < rows->first || phase >= rows->end) job.chunks[phase] = 0;
    pool_run(&job);
}

/* An exchange of more rows than a slot has: block by block. */
static void run_exchange(struct layer_job *work, struct job *job, int phase) {
    struct rows *rows = work->rows;
    int half = phase == DOWN, most = rows->group->most_rows;
    if (phase < rows->first || phase >= rows->end || phase >= job->phases) return;
    for (int begin = 0; begin < rows->count; begin += most) {
        begin_exchange(work, job, half, begin, rows->count - begin < most ? rows->count - begin : most);
        run_phases(rows, job, phase, phase + 1);
    }
}

static void run_in_group(struct layer_job *work, struct job *job) {
    struct rows *rows = work->rows;
    if (rows->count > rows->group->most_rows) {
        run_phases(rows, job, 0, OUTPUT);
        run_exchange(work, job, OUTPUT);
        run_phases(rows, job, OUTPUT + 1, DOWN);
        run_exchange(work, job, DOWN);
        run_phases(rows, job, DOWN + 1, PHASES);
        return;
    }
    for (int half = 0; half < 2; half++) {
        int phase = half ? DOWN : OUTPUT;
        if (phase >= rows->first && phase < rows->end && phase < job->phases) begin_exchange(work, job, half, 0, rows->count);
    }
    run_phases(rows, job, 0, PHASES);
}

static void layer(const struct model *model, const struct layer *layer, struct rows *rows) {
    struct layer_job work = {.model = model, .layer = layer, .rows = rows};
    struct job job = {PHASES, {0}, layer_phase, &work, rows->threads};
    int threads = pool_threads();
    work.row_step = rows->count < 2 * threads ? rows->count : ceiling(rows->count, 2 * threads);
    work.ld_hidden = ceiling(model->hidden, PANEL) * PANEL;
    work.ld_qkv = ceiling(layer->qkv.columns, PANEL) * PANEL;
    work.ld_mixed = ceiling(layer->output.k, PANEL) * PANEL;
    work.ld_inner = ceiling(layer->gate_up.columns, 2 * PANEL) * PANEL;
    for (int phase = 0; phase < PHASES; phase++) job.chunks[phase] = ceiling(rows->count, work.row_step);
    work.qkv = cut(&layer->qkv, 1, job.chunks + 1);
    job.chunks[3] = rows->count * model->kv_heads;
    work.output = cut(&layer->output, 1, job.chunks + OUTPUT);
    if (layer->gate_up.columns) {
        work.gate_up = cut(&layer->gate_up, 2, job.chunks + 6);
        work.down = cut(&layer->down, 1, job.chunks + DOWN);
    } else {
        job.phases = OUTPUT + 2; /* `experts` does the rest */
    }
    if (rows->group && !rows->parts)
        run_in_group(&work, &job);
    else
        run_phases(rows, &job, 0, PHASES);
}

static void attention_phase(void *argument, int phase, int chunk, int thread) {
    struct layer_job *job = argument;
    attend(job, chunk / job->model->kv_heads, chunk % job->model->kv_heads,
           job->rows->partial + thread * job->rows->partial_size);
}

static void attention(const struct model *model, const struct layer *layer, struct rows *rows) {
    struct layer_job work = {.model = model, .layer = layer, .rows = rows};
    struct job job = {1, {rows->count * model->kv_heads}, attention_phase, &work, rows->threads};
    work.ld_qkv = work.ld_mixed = (int64_t)model->heads * model->head_dim;
    pool_run(&job);
}

#define TABLE_NAME_OF(VARIANT) pipeinfer_kernels_##VARIANT
#define TABLE_NAME(VARIANT) TABLE_NAME_OF(VARIANT)
#define TEXT_OF(VARIANT) #VARIANT
#define TEXT(VARIANT) TEXT_OF(VARIANT)
const struct kernels TABLE_NAME(VARIANT) = {TEXT(VARIANT), HAS_DOT,         linear, layer,    attention, choose, embed,
                                            choose_among,  choose_in_group, spread, read_all, multiply,  experts};
