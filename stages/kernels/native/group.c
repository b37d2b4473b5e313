/* How the ranks of a group wait for each other.
 *
 * What is written is seen before the flag that announces it (release), and read after the flag was seen (acquire). A
 * thread that waits spins for a while and then sleeps on its rank's bell, which whoever publishes rings if anybody
 * sleeps there. Every wait has an end: a deadline, and a word by which the others say that the job is ending. */
#include "group.h"
#include "relax.h"

#include <linux/futex.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum {
    LOOK = 32,         /* turns of a spinning loop between looks at the clock */
    NAP_NS = 20000000, /* between two looks at whether the job is ending */
};

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static _Atomic uint32_t *word_of(struct group *group, int rank, int place) {
    return (_Atomic uint32_t *)(group->windows[rank] + place);
}

static void nap(struct group *group, _Atomic uint64_t *word, uint64_t least) {
    struct timespec most = {0, NAP_NS};
    _Atomic uint32_t *asleep = word_of(group, group->rank, ASLEEP), *bell = word_of(group, group->rank, BELL);
    atomic_fetch_add(asleep, 1);
    uint32_t rung = atomic_load(bell);
    if (atomic_load(word) < least) syscall(SYS_futex, bell, FUTEX_WAIT, rung, &most, NULL, 0);
    atomic_fetch_sub(asleep, 1);
}

int group_wait(struct group *group, int rank, _Atomic uint64_t *word, uint64_t least) {
    int64_t began = 0;
    for (;;) {
        for (int turn = 0; turn < LOOK; turn++) {
            if (atomic_load_explicit(word, memory_order_acquire) >= least) return 0;
            RELAX();
        }
        if (atomic_load(&group->late) || atomic_load(word_of(group, group->rank, ABORT))) return 1;
        int64_t now = now_ns();
        if (!began) began = now;
        if (group->most_ns && now - began > group->most_ns) {
            atomic_store(&group->late, 1 + rank);
            return 1;
        }
        if (now - began >= group->spin_ns) nap(group, word, least);
    }
}

void group_publish(struct group *group, _Atomic uint64_t *word, uint64_t value) {
    atomic_store_explicit(word, value, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst); /* whoever does not see it yet is seen asleep */
    for (int rank = 0; rank < group->size; rank++) {
        if (!atomic_load(word_of(group, rank, ASLEEP))) continue;
        atomic_fetch_add(word_of(group, rank, BELL), 1);
        syscall(SYS_futex, word_of(group, rank, BELL), FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    }
}

/* Wait for the word at `place` of the window of `rank`, for `most_us` at most: 0 if it is `least` or more, 1 if the job
 * is ending, 2 if it is not there yet. */
EXPORT int pipeinfer_group_wait(struct group *group, int rank, int64_t place, uint64_t least, int64_t most_us) {
    struct group mine;
    memcpy(&mine, group, sizeof mine);
    mine.most_ns = most_us * 1000;
    int is_missing = group_wait(&mine, rank, (_Atomic uint64_t *)(group->windows[rank] + place), least);
    return !is_missing ? 0 : atomic_load(&mine.late) && !atomic_load(&group->late) ? 2 : 1;
}

EXPORT void pipeinfer_group_publish(struct group *group, int64_t place, uint64_t value) {
    group_publish(group, (_Atomic uint64_t *)(group->windows[group->rank] + place), value);
}

/* End all waits of all ranks. */
EXPORT void pipeinfer_group_abort(struct group *group) {
    for (int rank = 0; rank < group->size; rank++) atomic_store(word_of(group, rank, ABORT), 1);
}
