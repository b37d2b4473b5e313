/* The threads of this process that help with jobs. Whoever loads the library starts them (`pipeinfer_help`).
 *
 * A chunk is claimed by a compare-and-swap on its phase's word: the job's number in the upper half, the next chunk in
 * the lower. A thread that comes late holds the number of an ended job and can claim nothing. What waits spins for a
 * while and then sleeps on a futex; how long between jobs is what `pipeinfer_pool` was given. */
#include "pool.h"
#include "relax.h"

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum {
    LOOK = 32,         /* turns of a spinning loop between looks at the clock */
    IN_JOB_NS = 50000, /* a thread within a job has a core, and others are about to be done */
};

static struct {
    _Atomic uint32_t number; /* of the newest job */
    _Atomic uint32_t asleep; /* threads that sleep on `number` or on a phase */
    _Atomic int threads;
    _Atomic int is_taken; /* a job with helpers may be running */
    _Atomic int64_t spin_ns;
    struct job job;
    int helpers;           /* threads that may help with it, by number from 1 on */
    _Atomic int32_t *busy; /* NULL, or of all processes that share `cores` cores: threads at work */
    int32_t cores;
    _Alignas(64) struct {
        _Atomic uint64_t next;
        _Atomic uint32_t done;
        char apart[64 - 12];
    } phase[MAX_PHASES];
} pool = {.threads = 1};

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void sleep_on(_Atomic uint32_t *word, uint32_t value) {
    struct timespec most = {0, 2000000}; /* a missed wake costs this */
    atomic_fetch_add(&pool.asleep, 1);
    if (atomic_load(word) == value)
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, word == &pool.number ? NULL : &most, NULL, 0);
    atomic_fetch_sub(&pool.asleep, 1);
}

static void wake(_Atomic uint32_t *word) {
    if (atomic_load(&pool.asleep)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* Wait until `word` is no longer `value`, or for a while; sleep after `spin` nanoseconds of it. `until`: 0 at first. */
static void wait_on(_Atomic uint32_t *word, uint32_t value, int64_t spin, int64_t *until) {
    for (int turn = 0; turn < LOOK; turn++) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return;
        RELAX();
    }
    if (spin) {
        int64_t now = now_ns();
        if (!*until) *until = now + spin;
        if (now < *until) return;
    }
    sleep_on(word, value);
}

/* Claim a chunk of `phase` of job `number`; -1: there is none left, or the job has ended. */
static int claim(uint32_t number, int phase, int chunks) {
    uint64_t seen = atomic_load_explicit(&pool.phase[phase].next, memory_order_acquire);
    while ((uint32_t)(seen >> 32) == number && (int)(uint32_t)seen < chunks)
        if (atomic_compare_exchange_weak(&pool.phase[phase].next, &seen, seen + 1)) return (int)(uint32_t)seen;
    return -1;
}

static void help(uint32_t number, const struct job *job, int thread) {
    for (int phase = 0; phase < job->phases; phase++) {
        int chunk, chunks = job->chunks[phase];
        while ((chunk = claim(number, phase, chunks)) >= 0) {
            job->run(job->argument, phase, chunk, thread);
            if ((int)atomic_fetch_add(&pool.phase[phase].done, 1) + 1 == chunks) wake(&pool.phase[phase].done);
        }
        int64_t until = 0;
        for (uint32_t done; (int)(done = atomic_load(&pool.phase[phase].done)) < chunks;) {
            if (atomic_load(&pool.number) != number) return;
            wait_on(&pool.phase[phase].done, done, IN_JOB_NS, &until);
        }
    }
}

/* Take a core for each thread of a job: the calling one in any case, others while cores are free. How many others. */
static int take_cores(int helpers) {
    if (!pool.busy) return helpers;
    int idle = pool.cores - atomic_fetch_add(pool.busy, 1) - 1;
    helpers = idle < 0 ? 0 : idle < helpers ? idle : helpers;
    if (helpers) atomic_fetch_add(pool.busy, helpers);
    return helpers;
}

static void run_alone(const struct job *job) {
    for (int phase = 0; phase < job->phases; phase++)
        for (int chunk = 0; chunk < job->chunks[phase]; chunk++) job->run(job->argument, phase, chunk, 0);
}

static void run_together(const struct job *job, int helpers) {
    uint32_t number = atomic_load(&pool.number) + 1;
    for (int phase = 0; phase < MAX_PHASES; phase++) /* nobody may claim by what he reads of the job meanwhile */
        atomic_store_explicit(&pool.phase[phase].next, (uint64_t)number << 32 | INT32_MAX, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    pool.job = *job;
    pool.helpers = helpers;
    for (int phase = 0; phase < job->phases; phase++) {
        atomic_store_explicit(&pool.phase[phase].done, 0, memory_order_relaxed);
        atomic_store_explicit(&pool.phase[phase].next, (uint64_t)number << 32, memory_order_release);
    }
    atomic_store(&pool.number, number);
    wake(&pool.number);
    help(number, &pool.job, 0);
}

void pool_run(const struct job *job) {
    int is_free = !atomic_exchange(&pool.is_taken, 1); /* by another thread of this process, else */
    int threads = pool_threads();
    if (job->most_threads && job->most_threads < threads) threads = job->most_threads;
    int helpers = take_cores(is_free ? threads - 1 : 0);
    if (helpers)
        run_together(job, helpers);
    else
        run_alone(job);
    if (pool.busy) atomic_fetch_sub(pool.busy, 1 + helpers);
    if (is_free) atomic_store(&pool.is_taken, 0);
}

int pool_threads(void) { return atomic_load_explicit(&pool.threads, memory_order_relaxed); }

/* Cut jobs for `threads` threads; what waits spins for `spin_us` before it sleeps. */
EXPORT void pipeinfer_pool(int threads, int spin_us) {
    atomic_store(&pool.threads, threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads);
    atomic_store(&pool.spin_ns, spin_us * 1000LL);
    wake(&pool.number);
}

/* From now on take cores from those that `busy` counts, in memory that several processes share; NULL: from nobody. */
EXPORT void pipeinfer_share(int32_t *busy, int cores) {
    pool.busy = (_Atomic int32_t *)busy;
    pool.cores = cores;
}

/* The life of thread `thread` (from 1 on): help for ever, and sleep while jobs are cut for fewer threads. There is one
 * of each number, whoever starts it: it has memory of its own in a job. */
EXPORT void pipeinfer_help(int thread) {
    static _Atomic int is_there[MAX_THREADS];
    if (thread < 1 || thread >= MAX_THREADS || atomic_exchange(&is_there[thread], 1)) return;
    uint32_t number = atomic_load(&pool.number);
    for (;;) {
        int64_t until = 0;
        while (atomic_load(&pool.number) == number) {
            if (thread >= pool_threads() || thread > pool.helpers)
                sleep_on(&pool.number, number);
            else
                wait_on(&pool.number, number, atomic_load_explicit(&pool.spin_ns, memory_order_relaxed), &until);
        }
        number = atomic_load(&pool.number);
        struct job job = pool.job;
        if (thread <= pool.helpers) help(number, &job, thread);
    }
}
