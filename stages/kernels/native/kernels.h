/* What is handed to the kernels, and the table of kernels that each instruction set has. The sizes and order of all
 * members are repeated in stages/kernels/library.py. */
#ifndef KERNELS_H
#define KERNELS_H

#include <stdint.h>

enum {
    BF16,
    HALF,
    FLOAT,
    DOT,
    QUANTIZED
}; /* formats of weights, the first three also of keys and values. DOT is BF16 whose products are
      taken by an instruction for pairs of bf16, of activations that are rounded to it */
enum { INTEGER, E3M2, E4M3, E3M0, KINDS }; /* what codes of quantised weights are: see stages/quantization/matrix.py */
enum { LEAVES = 8 }; /* parts of a sum, combined by a binary tree */
enum { PANEL = 16 }; /* output columns of a panel of weights */
enum {
    OUTPUT = 4, /* phases of a layer: attention's output is added, */
    DOWN = 7,   /* the MLP's is, */
    PHASES = 9, /* and how many there are */
};

/* How a panel of quantised weights lies in memory: record after record, each of `record` inputs, the last one shorter. A
 * record is a header of whole lines of 64 bytes, then the codes of its blocks of 32 inputs, 64 * `bits` bytes each (see
 * planes.h). The header has, for 16 outputs each: scales of spans, minima of spans, factors of groups, factors of
 * minima, zero points; what is not there begins at 0. The last three are bytes. */
struct packing {
    int32_t bits, kind, scale_format;
    int32_t group, span, record; /* inputs; all are multiples of 32, but for groups and spans of 16 */
    int32_t parts;               /* 2 where a block has two groups, else 1 */
    int32_t zero;                /* of all codes */
    int32_t minima, factors, minimum_factors, zeros;
    int32_t header_nbytes, record_nbytes;
    int64_t panel_nbytes;
};

/* y = x W^T + bias. Panels of 16 columns lie one after the other; in a panel, for each pair of k, a line: 16 dwords
 * with w[k] low and w[k + 1] high (BF16), or 16 w[k] and 16 w[k + 1]. Missing columns and an odd k are filled with
 * zeros. A sum over k is 8 chains of fused multiply-adds, from cuts[i] to cuts[i + 1], each in order of k. Quantised
 * weights are added block by block: see quantized.h. */
struct linear {
    const void *weights;
    const float *bias;            /* NULL, or whole panels */
    const struct packing *packing; /* of QUANTIZED weights */
    const struct linear *next;    /* NULL, or the columns that follow the first `panels`, of another format */
    int32_t format, columns, k, cuts[LEAVES + 1];
    int32_t panels;
    int32_t is_integer; /* whether activations become bytes, for exact dot products with integer codes */
};

struct layer {
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm; /* the last two: NULL, or [head_dim] */
    struct linear qkv, output, gate_up, down;                       /* gate_up: panels of gate and up take turns; no
                                                                       columns where a layer has experts */
    void *keys, *values;                                            /* [kv_heads][capacity][stride] */
    int32_t output_tile, down_tile; /* panels of a tile of an exchange, where a group computes the layer */
};

struct model {
    int32_t hidden, heads, kv_heads, head_dim, stride, inner, capacity, kv_format;
    float eps, scale;
    const float *rotations; /* [capacity][head_dim]: cosines, then sines, of head_dim / 2 */
};

/* The rows of a pass. Row r attends to the first prefix[r] slots of canonical[sequence[r]], then to those of ancestors
 * between ends[r - 1] and ends[r]. */
struct rows {
    int32_t count;
    const int64_t *slots, *positions, *sequence, *prefix, *ancestors, *ends;
    const int64_t *const *canonical;
    float *x;      /* [count][hidden]: what enters a layer, then what leaves it */
    float *normed; /* scratch: [count][hidden], then [count][inner], queries ..., each row padded to whole panels */
    float *wide, *mixed, *partial;
    int64_t partial_size; /* floats of `partial` that each thread has */
    int32_t threads;      /* for so many */
    int32_t *faults;      /* [count]: set to `layer` + 1 where it is 0 and numbers are not finite */
    int32_t layer;
    int32_t first, end;   /* the phases of the layer that are to be done: PHASES for all */
    /* Where a group computes the layer: by windows, or, if `parts` is not NULL, in calls that end with the phases OUTPUT
     * and DOWN, after which the caller brings together what each rank has put into parts[rank][count][hidden, padded]. */
    struct group *group;
    float *parts;
};

/* The experts of a layer. Those from `first` on and before `end` are here: gate_up[0] and down[0] are of `first`. */
struct experts {
    const struct linear *router, *gate_up, *down;
    int32_t count, first, end;
    int32_t chosen;        /* how many a row has */
    int32_t is_normalised; /* whether a row's weights are divided by their sum */
};

/* Which experts the rows of a pass have, and what those made of them: memory of a pass. Output `row * chosen + k` is that
 * of the row's k-th best expert. */
struct routes {
    float *scores;  /* [count of rows][count of experts in whole panels] */
    float *weights; /* [outputs] */
    int32_t *expert, *members; /* [outputs]: of each its expert; the outputs that are computed here, expert by expert */
    int32_t *starts, *active;  /* [count of experts + 2], where each one's members begin; [count], those with members */
    float *gathered, *inner;   /* [outputs][hidden] and [outputs][inner] in whole panels, in the order of members */
    float *outputs;            /* [outputs][hidden] in whole panels */
};

/* An output head, and how it chooses after each row: the highest logit, or by noise where the row's temperature is not
 * 0 (see noise.h). */
struct head {
    const struct linear *linear;
    const float *norm;
    const int64_t *positions;  /* [rows], of the tokens that are drawn */
    const uint64_t *seeds;     /* [rows] */
    const float *temperatures; /* [rows], or NULL where all are 0 */
    float eps;
    int32_t limit; /* no token from here on */
    int32_t first; /* token, of the linear layer's columns: a multiple of 256 */
};

/* Of a row and a block of columns. */
struct best {
    double score;
    float logit, highest, total; /* the best token's, the highest, the sum of e^(logit - highest) */
    int32_t token;
};

/* Of a row. */
struct chosen {
    double total;
    int64_t token;
    float logit, highest;
};

struct kernels {
    const char *name;
    int32_t has_dot;
    void (*linear)(const struct linear *linear, const float *x, int64_t ldx, int32_t rows, float *y, int64_t ldy);
    void (*layer)(const struct model *model, const struct layer *layer, struct rows *rows);
    /* Attention alone: the queries of rows->wide [count][heads * head_dim], rotated, over slots that are written;
     * rows->mixed of the same shape. Of `layer` it reads the keys and values. */
    void (*attention)(const struct model *model, const struct layer *layer, struct rows *rows);
    /* What to choose after `count` rows of x [count][hidden]; logits [count][limit] where they are wanted. */
    void (*head)(const struct head *head, const float *x, int32_t count, float *normed, struct best *blocks,
                 struct chosen *chosen, float *logits);
    void (*embed)(const struct linear *linear, const int64_t *tokens, int32_t count, float *x);
    void (*choose_among)(const struct best *const *found, const int32_t *blocks, int32_t parts, int32_t count,
                         struct best *scratch, struct chosen *chosen);
    void (*choose_in_group)(const struct head *head, struct group *group, const float *x, int32_t count, float *normed,
                            const int32_t *blocks, const int32_t *limits, struct best *scratch, struct chosen *chosen,
                            float *logits);
    void (*spread)(struct group *group, const int32_t *owners, int32_t count, int32_t hidden, float *x);
    double (*read)(const void *memory, int64_t nbytes);
    double (*multiply)(int64_t steps, float seed);
    /* What follows `layer` in a layer with experts: adds to rows->x what they make of rows->normed. */
    void (*experts)(const struct model *model, const struct experts *experts, const struct routes *routes,
                    struct rows *rows);
};

#endif
