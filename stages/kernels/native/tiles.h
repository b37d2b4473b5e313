/* Sizes of the work that the innermost loops do at a time. */
#ifndef TILES_H
#define TILES_H

#include "kernels.h"

enum {
    GROUP = 4,            /* panels that are worked on together */
    TILE = GROUP * PANEL, /* columns of a tile of results */
    BLOCK_ROWS = 40,      /* rows of a tile */
    AHEAD = 4096,         /* bytes that are prefetched, of all panels together */
};

static int ceiling(int a, int b) { return (a + b - 1) / b; }

#endif
