/* A job is some phases, each of some chunks of work. Any thread may do any chunk; a phase begins once the one before is
 * done. A job ends as soon as its chunks are done: it never waits for a thread that has not come to help. */
#ifndef POOL_H
#define POOL_H

enum { MAX_PHASES = 16, MAX_THREADS = 256 };

struct job {
    int phases;
    int chunks[MAX_PHASES];
    void (*run)(void *argument, int phase, int chunk, int thread);
    void *argument;
    int most_threads; /* no thread from this number on helps; 0: any may */
};

/* Do `job` on the calling thread and on those that help. They help one thread at a time; others compute alone. */
void pool_run(const struct job *job);

/* Threads that jobs are cut for, the calling one among them. */
int pool_threads(void);

#endif
