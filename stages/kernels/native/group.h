/* Ranks of one host that compute a stage together, through memory that all of them see: a window of each rank. */
#ifndef GROUP_H
#define GROUP_H

#include <stdatomic.h>
#include <stdint.h>

enum {
    MOST_RANKS = 8,
    MOST_TILES = 32, /* of an exchange */
    SHOTS = 2,       /* partial sums, and what their owner made of them */
    SLOTS = 2,       /* exchanges take turns: nobody writes a slot before all have read it, two exchanges ago */
    APART = 64,      /* bytes between words of different writers or readers */
};

/* Where things are in a window, in bytes. Repeated in stages/kernels/group.py. */
enum {
    ASLEEP = 0,        /* threads of the rank that sleep on its bell */
    BELL = APART,      /* rung for them */
    ABORT = 2 * APART, /* not 0: stop waiting */
    FLAGS = 512,       /* [SHOTS][SLOTS][MOST_TILES]: the last exchange of which the tile is there */
    DATA = 16384,      /* [SHOTS][SLOTS] of slot_nbytes */
};

struct group {
    int32_t rank, size;
    int32_t most_rows;       /* of an exchange */
    _Atomic int32_t late;    /* 1 + the rank that did not come; no wait takes any time from then on */
    int64_t spin_ns;         /* how long a thread that waits spins, before it sleeps */
    int64_t most_ns;         /* how long a rank may take to come; 0: for ever */
    int64_t slot_nbytes;
    int64_t two_shot_floats; /* an exchange of so many numbers or more takes two shots; 0: none does */
    uint64_t epoch;          /* exchanges so far, the same on all ranks */
    char *windows[MOST_RANKS];
};

/* Wait until `word`, of rank `rank`, is `least` or more. 0 if it is, 1 if the rank is late or the job is ending. */
int group_wait(struct group *group, int rank, _Atomic uint64_t *word, uint64_t least);

/* Let the others see `value` in `word`, and all that was written before. */
void group_publish(struct group *group, _Atomic uint64_t *word, uint64_t value);

static inline _Atomic uint64_t *group_flag(struct group *group, int rank, int shot, uint64_t epoch, int tile) {
    int64_t index = (shot * SLOTS + (int64_t)(epoch % SLOTS)) * MOST_TILES + tile;
    return (_Atomic uint64_t *)(group->windows[rank] + FLAGS + index * APART);
}

static inline float *group_slot(struct group *group, int rank, int shot, uint64_t epoch) {
    return (float *)(group->windows[rank] + DATA + (shot * SLOTS + (int64_t)(epoch % SLOTS)) * group->slot_nbytes);
}

#endif
