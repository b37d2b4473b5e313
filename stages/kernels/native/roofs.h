/* What this machine can do: bytes read and multiply-adds per second. */
#ifndef ROOFS_H
#define ROOFS_H

#include "blocks.h"
#include "pool.h"

struct read_job {
    const char *memory;
    int64_t part;
    float sums[MAX_THREADS * 4];
    float seed;
    int64_t steps;
};

static void read_phase(void *argument, int phase, int chunk, int thread) {
    struct read_job *job = argument;
    const char *mine = job->memory + chunk * GROUP * job->part;
    vf sum[GROUP] = {v_zero(), v_zero(), v_zero(), v_zero()};
    for (int64_t k = 0; k < job->part; k += 64)
        for (int i = 0; i < GROUP; i++) {
            v_prefetch(mine + i * job->part + k + AHEAD / GROUP);
            sum[i] = v_max(sum[i], v_load((const float *)(mine + i * job->part + k)));
        }
    for (int i = 0; i < GROUP; i++) job->sums[chunk % (MAX_THREADS * 4)] += v_sum(sum[i]);
}

/* Read `nbytes` with all threads, four streams each. */
static double read_all(const void *memory, int64_t nbytes) {
    struct read_job work = {.memory = memory};
    struct job job = {1, {4 * pool_threads()}, read_phase, &work};
    work.part = nbytes / job.chunks[0] / GROUP / 64 * 64;
    pool_run(&job);
    return (double)work.part * GROUP * job.chunks[0];
}

static void multiply_phase(void *argument, int phase, int chunk, int thread) {
    struct read_job *job = argument;
    vf sum[REGISTERS == 32 ? 12 : 6], a = v_set1(job->seed), b = v_set1(0.5f);
    const int chains = sizeof sum / sizeof sum[0];
    for (int i = 0; i < chains; i++) sum[i] = v_set1((float)i);
    for (int64_t step = 0; step < job->steps; step++)
        for (int i = 0; i < chains; i++) sum[i] = v_fma(sum[i], b, a);
    for (int i = 1; i < chains; i++) sum[0] = v_add(sum[0], sum[i]);
    job->sums[chunk] = v_sum(sum[0]);
}

/* `steps` steps of independent chains of multiply-adds in each thread; how many multiply-adds that was. */
static double multiply(int64_t steps, float seed) {
    struct read_job work = {.steps = steps, .seed = seed};
    struct job job = {1, {pool_threads()}, multiply_phase, &work};
    pool_run(&job);
    return (double)steps * (REGISTERS == 32 ? 12 : 6) * LANES * job.chunks[0];
}

#endif
