/* A linear layer whose inputs are spread over the ranks of a group, fused with what follows: every rank multiplies its
 * part of the inputs, and the sum of all parts, the bias and what was there before end on every rank with the same bits.
 *
 * Each rank has some of the 8 chains of a sum over the inputs (see struct linear), with zeros for the others: the parts
 * of all ranks, combined by the rest of the tree, are what one rank alone computes.
 *
 * Work goes by tiles of columns. A thread that has multiplied a tile publishes it. In one shot every rank adds up every
 * tile; in two shots each tile has an owner, who adds it up and publishes the result. A rank first multiplies the tiles
 * of others, then its own; there is no barrier at the end. */
#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "group.h"
#include "linear.h"

struct exchange {
    struct group *group;
    const struct linear *linear;
    struct cut cut;
    int tiles, begin, count; /* of the columns; the rows begin, ..., begin + count - 1 of the pass */
    int two_shot, own, owned; /* whether it takes two shots; the first tile of this rank, and how many it has */
    uint64_t epoch;
    int64_t ld; /* of a slot's rows */
};

/* The next exchange of `group`; `step` panels are a tile. All ranks come to the same tiles. */
static struct exchange next_exchange(struct group *group, const struct linear *linear, int step, int begin, int count) {
    struct exchange exchange = {group, linear, {ceiling(linear->columns, PANEL), step}, 0, begin, count};
    exchange.tiles = ceiling(exchange.cut.panels, step);
    exchange.epoch = ++group->epoch;
    exchange.ld = (int64_t)exchange.cut.panels * PANEL;
    exchange.two_shot = group->two_shot_floats && exchange.ld * count >= group->two_shot_floats;
    exchange.own = exchange.tiles * group->rank / group->size;
    exchange.owned = exchange.tiles * (group->rank + 1) / group->size - exchange.own;
    return exchange;
}

static void finish_part(void *to, const struct linear *linear, const float *tile, int row, int column, int columns) {
    struct target *target = to;
    for (int c = 0; c < columns; c += LANES) v_store(target->y + row * target->ld + column + c, v_load(tile + c));
}

/* y[0 ... count - 1] += the parts of all ranks and the bias, from `column` on. Of ranks that are neighbours the sum, of
 * such sums that are neighbours the sum ... */
static void add_parts(const struct linear *linear, const float *const *parts, int size, int column, int count,
                      float *y) {
    for (int c = 0; c < count; c += LANES) {
        vf sum[MOST_RANKS];
        for (int rank = 0; rank < size; rank++) sum[rank] = v_load(parts[rank] + c);
        for (int step = 1; step < size; step *= 2)
            for (int rank = 0; rank + step < size; rank += 2 * step) sum[rank] = v_add(sum[rank], sum[rank + step]);
        if (linear->bias) sum[0] = v_add(sum[0], v_load(linear->bias + column + c));
        if (count - c >= LANES) {
            v_store(y + c, v_add(v_load(y + c), sum[0]));
        } else {
            float each[LANES];
            v_store(each, sum[0]);
            for (int i = 0; c + i < count; i++) y[c + i] += each[i];
        }
    }
}

static int last_column(const struct exchange *exchange, int tile) {
    int end = (tile + 1) * exchange->cut.step * PANEL;
    return end < exchange->linear->columns ? end : exchange->linear->columns;
}

static void multiply_tile(const struct exchange *exchange, int tile, const float *x, int64_t ldx) {
    struct group *group = exchange->group;
    struct target part = {group_slot(group, group->rank, 0, exchange->epoch), exchange->ld};
    multiply_chunk(exchange->linear, &exchange->cut, tile, x + exchange->begin * ldx, ldx, exchange->count, finish_part,
                   &part);
    group_publish(group, group_flag(group, group->rank, 0, exchange->epoch, tile), exchange->epoch);
}

/* Add tile `tile` of all ranks to y [rows][ldy]; its owner lets others see the result. */
static void add_tile(const struct exchange *exchange, int tile, float *y, int64_t ldy) {
    struct group *group = exchange->group;
    int column = tile * exchange->cut.step * PANEL, columns = last_column(exchange, tile) - column;
    for (int rank = 0; rank < group->size; rank++)
        if (group_wait(group, rank, group_flag(group, rank, 0, exchange->epoch, tile), exchange->epoch)) return;
    for (int row = 0; row < exchange->count; row++) {
        const float *parts[MOST_RANKS];
        int64_t at = row * exchange->ld + column;
        float *to = y + (exchange->begin + row) * ldy + column;
        for (int rank = 0; rank < group->size; rank++) parts[rank] = group_slot(group, rank, 0, exchange->epoch) + at;
        add_parts(exchange->linear, parts, group->size, column, columns, to);
        if (exchange->two_shot)
            memcpy(group_slot(group, group->rank, 1, exchange->epoch) + at, to, (size_t)columns * 4);
    }
    if (exchange->two_shot)
        group_publish(group, group_flag(group, group->rank, 1, exchange->epoch, tile), exchange->epoch);
}

/* Take tile `tile` from its owner. */
static void take_tile(const struct exchange *exchange, int tile, float *y, int64_t ldy) {
    struct group *group = exchange->group;
    int column = tile * exchange->cut.step * PANEL, columns = last_column(exchange, tile) - column, owner = 0;
    while (exchange->tiles * (owner + 1) / group->size <= tile) owner++;
    if (group_wait(group, owner, group_flag(group, owner, 1, exchange->epoch, tile), exchange->epoch)) return;
    const float *from = group_slot(group, owner, 1, exchange->epoch) + column;
    for (int row = 0; row < exchange->count; row++)
        memcpy(y + (exchange->begin + row) * ldy + column, from + row * exchange->ld, (size_t)columns * 4);
}

/* Chunk `chunk` of 2 * tiles: first all tiles are multiplied, then all are added up or taken. Chunks are begun in order,
 * and one that is multiplied waits for nobody. */
static void exchange_chunk(const struct exchange *exchange, int chunk, const float *x, int64_t ldx, float *y,
                           int64_t ldy) {
    int turn = chunk % exchange->tiles, tile = turn;
    if (exchange->two_shot) tile = (exchange->own + (chunk < exchange->tiles ? exchange->owned : 0) + turn) % exchange->tiles;
    if (chunk < exchange->tiles)
        multiply_tile(exchange, tile, x, ldx);
    else if (!exchange->two_shot || turn < exchange->owned)
        add_tile(exchange, tile, y, ldy);
    else
        take_tile(exchange, tile, y, ldy);
}

#endif
