/* The output head: the best token of a row, and the embedding of a tied model. */
#ifndef HEAD_H
#define HEAD_H

#include "group.h"
#include "linear.h"
#include "noise.h"
#include "norms.h"

enum { HEAD_BLOCK = 256 }; /* columns of a block of logits */

/* The number of row `lane` of a panel and input k. */
static float dense_number(const struct linear *linear, const char *w, int lane, int k) {
    const char *pair = w + k / 2 * LINE[linear->format];
    return linear->format == BF16 || linear->format == DOT
               ? from_bits((uint32_t)((const uint16_t *)pair)[2 * lane + k % 2] << 16)
           : linear->format == HALF ? half_to_float(((const uint16_t *)pair)[PANEL * (k % 2) + lane])
                                    : ((const float *)pair)[PANEL * (k % 2) + lane];
}

static void embed(const struct linear *linear, const int64_t *tokens, int32_t count, float *x) {
    for (int row = 0; row < count; row++) {
        const char *w = (const char *)linear->weights + tokens[row] / PANEL * panel_nbytes(linear);
        float *to = x + (int64_t)row * linear->k;
        int lane = (int)(tokens[row] % PANEL);
        if (linear->format == QUANTIZED)
            embed_quantized(linear, w, lane, to);
        else
            for (int k = 0; k < linear->k; k++) to[k] = dense_number(linear, w, lane, k);
    }
}

struct head_job {
    const struct head *head;
    const float *x;
    float *normed, *logits;
    int count, blocks, ld;
    struct best *best;
};

struct scores {
    float *values;
    int first;
};

static void finish_scores(void *to, const struct linear *linear, const float *tile, int row, int column, int columns) {
    struct scores *scores = to;
    for (int c = 0; c < columns; c += LANES)
        v_store(scores->values + row * HEAD_BLOCK + column - scores->first + c, biased(linear, tile, column, c));
}

/* The highest of `count` logits, the first of equal ones; the sum of e^(logit - highest), not a number where a logit is
 * infinite or none. Whole lanes beyond `count` are written. */
static struct best highest_of(float *logits, int first, int count) {
    int most = 0, whole = ceiling(count, LANES) * LANES;
    vf total = v_zero();
    for (int c = 1; c < count; c++)
        if (logits[c] > logits[most]) most = c;
    vf highest = v_set1(logits[most]);
    for (int c = count; c < whole; c++) logits[c] = 0.0f;
    for (int c = 0; c < whole; c += LANES) {
        float each[LANES];
        vf these = v_load(logits + c);
        v_store(each, v_exp(v_sub(these, highest)));
        for (int i = count - c; i < LANES; i++) each[i] = 0.0f;
        total = v_add(total, v_load(each));
    }
    return (struct best){logits[most], logits[most], logits[most], v_sum(total), first + most};
}

/* The token with the highest logit / temperature + noise. A token's noise is made only where it could win: noise g is
 * above b with probability 1 - e^(-e^-b), which is less than e^-b. */
static void draw_from(const float *logits, int first, int count, float temperature, uint64_t seed, int64_t position,
                      struct best *best) {
    float scaled[HEAD_BLOCK] = {0}, chance[HEAD_BLOCK];
    uint64_t words[HEAD_BLOCK];
    for (int c = 0; c < count; c++) scaled[c] = logits[c] / temperature;
    for (int c = 0; c < count; c += 4) philox((uint64_t)(first + c) / 4 + 1, (uint64_t)position, seed, words + c);
    int known = best->token - first; /* with the highest logit: what it scores is a bound for the others */
    double least = (double)scaled[known] + gumbel(uniform(words[known]));
    best->score = least;
    for (int c = 0; c < count; c += LANES)
        v_store(chance + c, v_mul(v_set1(1.01f), v_exp(v_sub(v_load(scaled + c), v_set1((float)least)))));
    for (int c = 0; c < count; c++) {
        double u = uniform(words[c]);
        if (1.0 - u > (double)chance[c]) continue;
        double score = (double)scaled[c] + gumbel(u);
        if (score > best->score || (score == best->score && first + c < best->token))
            best->score = score, best->token = first + c, best->logit = logits[c];
    }
}

static void head_phase(void *argument, int phase, int chunk, int thread) {
    struct head_job *job = argument;
    const struct head *head = job->head;
    const struct linear *linear = head->linear;
    if (phase == 0) {
        norm(job->x + (int64_t)chunk * linear->k, head->norm, linear->k, head->eps,
             job->normed + (int64_t)chunk * job->ld);
        return;
    }
    float values[BLOCK_ROWS * HEAD_BLOCK] __attribute__((aligned(64)));
    int first = chunk * HEAD_BLOCK, count = head->limit - first < HEAD_BLOCK ? head->limit - first : HEAD_BLOCK;
    struct cut cut = {ceiling(first + count, PANEL), HEAD_BLOCK / PANEL};
    struct scores scores = {values, first};
    for (int m = 0; m < job->count; m += BLOCK_ROWS) {
        int rows = job->count - m < BLOCK_ROWS ? job->count - m : BLOCK_ROWS;
        multiply_chunk(linear, &cut, chunk, job->normed + (int64_t)m * job->ld, job->ld, rows, finish_scores, &scores);
        for (int row = m; row < m + rows; row++) {
            float *logits = values + (row - m) * HEAD_BLOCK;
            struct best *best = job->best + (int64_t)row * job->blocks + chunk;
            if (job->logits) memcpy(job->logits + (int64_t)row * head->limit + first, logits, (size_t)count * 4);
            *best = highest_of(logits, head->first + first, count);
            if (head->temperatures && head->temperatures[row] > 0.0f)
                draw_from(logits, head->first + first, count, head->temperatures[row], head->seeds[row],
                          head->positions[row], best);
        }
    }
}

/* The blocks of a row in order: the best of all, and the sum of e^(logit - highest). */
static struct chosen combine(const struct best *found, int blocks) {
    struct best best = found[0];
    float highest = found[0].highest;
    struct chosen chosen = {0};
    for (int block = 1; block < blocks; block++) {
        if (found[block].score > best.score) best = found[block];
        highest = found[block].highest > highest ? found[block].highest : highest;
    }
    for (int block = 0; block < blocks; block++) {
        float factor[LANES];
        v_store(factor, v_exp(v_set1(found[block].highest - highest)));
        double part = (double)found[block].total * (double)factor[0];
        chosen.total = chosen.total + part;
    }
    chosen.token = best.token, chosen.logit = best.logit, chosen.highest = highest;
    return chosen;
}

/* The blocks that `count` rows have in this rank's part of the vocabulary. */
static int find_best(const struct head *head, const float *x, int32_t count, float *normed, struct best *blocks,
                     float *logits) {
    struct head_job work = {.head = head, .x = x, .normed = normed, .logits = logits, .count = count, .best = blocks};
    work.blocks = ceiling(head->limit, HEAD_BLOCK), work.ld = ceiling(head->linear->k, PANEL) * PANEL;
    struct job job = {2, {count, work.blocks}, head_phase, &work};
    pool_run(&job);
    return work.blocks;
}

static void choose(const struct head *head, const float *x, int32_t count, float *normed, struct best *blocks,
                   struct chosen *chosen, float *logits) {
    int each = find_best(head, x, count, normed, blocks, logits);
    if (!chosen) return;
    for (int row = 0; row < count; row++) chosen[row] = combine(blocks + (int64_t)row * each, each);
}

/* `chosen` of all parts of the vocabulary, in their order: found[part] are [count][blocks[part]]. */
static void choose_among(const struct best *const *found, const int32_t *blocks, int32_t parts, int32_t count,
                         struct best *scratch, struct chosen *chosen) {
    for (int row = 0; row < count; row++) {
        int all = 0;
        for (int part = 0; part < parts; all += blocks[part++])
            memcpy(scratch + all, found[part] + (int64_t)row * blocks[part], (size_t)blocks[part] * sizeof *scratch);
        chosen[row] = combine(scratch, all);
    }
}

/* The same where the vocabulary is spread over a group: only the best of each block travel, and the logits where they
 * are wanted, to the first rank's `logits`. `blocks`: of each rank. Each rank's part has `limits` tokens. */
static void choose_in_group(const struct head *head, struct group *group, const float *x, int32_t count, float *normed,
                            const int32_t *blocks, const int32_t *limits, struct best *scratch, struct chosen *chosen,
                            float *logits) {
    uint64_t epoch = ++group->epoch;
    const struct best *found[MOST_RANKS];
    find_best(head, x, count, normed, (struct best *)group_slot(group, group->rank, 0, epoch),
              logits ? group_slot(group, group->rank, 1, epoch) : NULL);
    group_publish(group, group_flag(group, group->rank, 0, epoch, 0), epoch);
    if (group->rank) { /* until the first rank has read them: nobody may come two exchanges ahead of another */
        group_wait(group, 0, group_flag(group, 0, 0, epoch, 1), epoch);
        return;
    }
    int64_t ld = 0, first = 0;
    for (int rank = 0; rank < group->size; rank++) {
        if (group_wait(group, rank, group_flag(group, rank, 0, epoch, 0), epoch)) return;
        found[rank] = (const struct best *)group_slot(group, rank, 0, epoch);
        ld += limits[rank];
    }
    choose_among(found, blocks, group->size, count, scratch, chosen);
    for (int rank = 0; logits && rank < group->size; first += limits[rank++])
        for (int row = 0; row < count; row++)
            memcpy(logits + row * ld + first, group_slot(group, rank, 1, epoch) + (int64_t)row * limits[rank],
                   (size_t)limits[rank] * 4);
    group_publish(group, group_flag(group, 0, 0, epoch, 1), epoch);
}

/* Rows of x [count][hidden] that ranks of a group have: owners[row] has row `row`; then all have all. */
static void spread(struct group *group, const int32_t *owners, int32_t count, int32_t hidden, float *x) {
    for (int begin = 0; begin < count; begin += group->most_rows) {
        int end = begin + group->most_rows < count ? begin + group->most_rows : count;
        uint64_t epoch = ++group->epoch;
        float *mine = group_slot(group, group->rank, 0, epoch);
        for (int row = begin; row < end; row++)
            if (owners[row] == group->rank)
                memcpy(mine + (int64_t)(row - begin) * hidden, x + (int64_t)row * hidden, (size_t)hidden * 4);
        group_publish(group, group_flag(group, group->rank, 0, epoch, 0), epoch);
        for (int rank = 0; rank < group->size; rank++)
            if (group_wait(group, rank, group_flag(group, rank, 0, epoch, 0), epoch)) return;
        for (int row = begin; row < end; row++)
            if (owners[row] != group->rank)
                memcpy(x + (int64_t)row * hidden,
                       group_slot(group, owners[row], 0, epoch) + (int64_t)(row - begin) * hidden, (size_t)hidden * 4);
    }
}

#endif
