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

static void layer_phase(void *argument, int phase, int chunk, int thread) {
    struct layer_job *job = argument;
    const struct model *model = job->model;
    const struct layer *layer = job->layer;
    struct rows *rows = job->rows;
    int begin = chunk * job->row_step, end = begin + job->row_step < rows->count ? begin + job->row_step : rows->count;
    struct target x = {rows->x, model->hidden}, wide = {rows->wide, job->ld_qkv}, inner = {rows->wide, job->ld_inner};
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
    case 4:
        multiply_chunk(&layer->output, &job->output, chunk, rows->mixed, job->ld_mixed, rows->count, finish_add, &x);
        break;
    case 5: norm_rows(job, layer->mlp_norm, begin, end); break;
    case 6:
        multiply_chunk(&layer->gate_up, &job->gate_up, chunk, rows->normed, job->ld_hidden, rows->count, finish_gated,
                       &inner);
        break;
    case 7:
        multiply_chunk(&layer->down, &job->down, chunk, rows->wide, job->ld_inner, rows->count, finish_add, &x);
        break;
    default:
        for (int row = begin; row < end; row++) check_row(job, row);
    }
}

static void layer(const struct model *model, const struct layer *layer, struct rows *rows) {
    struct layer_job work = {.model = model, .layer = layer, .rows = rows};
    struct job job = {9, {0}, layer_phase, &work, rows->threads};
    int threads = pool_threads();
    work.row_step = rows->count < 2 * threads ? rows->count : ceiling(rows->count, 2 * threads);
    work.ld_hidden = ceiling(model->hidden, PANEL) * PANEL;
    work.ld_qkv = ceiling(layer->qkv.columns, PANEL) * PANEL;
    work.ld_mixed = ceiling(layer->output.k, PANEL) * PANEL;
    work.ld_inner = ceiling(layer->gate_up.columns, 2 * PANEL) * PANEL;
    for (int phase = 0; phase < 9; phase++) job.chunks[phase] = ceiling(rows->count, work.row_step);
    work.qkv = cut(&layer->qkv, 1, job.chunks + 1);
    job.chunks[3] = rows->count * model->kv_heads;
    work.output = cut(&layer->output, 1, job.chunks + 4);
    if (layer->gate_up.columns) {
        work.gate_up = cut(&layer->gate_up, 2, job.chunks + 6);
        work.down = cut(&layer->down, 1, job.chunks + 7);
    } else {
        job.phases = 6; /* `experts` does the rest */
    }
    pool_run(&job);
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
const struct kernels TABLE_NAME(VARIANT) = {TEXT(VARIANT), HAS_DOT, linear,   layer,   attention,
                                            choose,        embed,   read_all, multiply, experts};
