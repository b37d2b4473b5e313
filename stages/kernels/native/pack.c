/* Packs quantised weights: see struct packing. Once for any instruction set. */
#include "kernels.h"
#include "planes.h"

#define EXPORT __attribute__((visibility("default")))

/* Vector i of a block: the codes of 16 outputs and 4 inputs; zeros where there are none. */
static void gather(const uint8_t *codes, int outputs, int64_t inputs, int64_t k, uint32_t vectors[8][PANEL]) {
    memset(vectors, 0, 8 * sizeof *vectors);
    int64_t left = inputs - k < BLOCK_INPUTS ? inputs - k : BLOCK_INPUTS;
    for (int lane = 0; lane < PANEL && lane < outputs; lane++) {
        uint32_t row[BLOCK_INPUTS / 4] = {0};
        if (left == BLOCK_INPUTS)
            memcpy(row, codes + lane * inputs + k, BLOCK_INPUTS);
        else
            memcpy(row, codes + lane * inputs + k, (size_t)left);
        for (int i = 0; i < BLOCK_INPUTS / 4; i++) vectors[i][lane] = row[i];
    }
}

/* A plane `n` bits wide of the bits from `from` on of all codes. Returns where the next one begins. */
static uint32_t *write_plane(uint32_t vectors[8][PANEL], int n, int from, uint32_t *to) {
    const int each = 8 / n;
    const uint32_t mask = 0x01010101u * ((1u << n) - 1);
    for (int line = 0; line < 8 / each; line++, to += PANEL)
        for (int lane = 0; lane < PANEL; lane++) {
            uint32_t bits = 0;
            for (int i = 0; i < each; i++) bits |= (vectors[line * each + i][lane] >> from & mask) << i * n;
            to[lane] = bits;
        }
    return to;
}

static void write_block(uint32_t vectors[8][PANEL], int bits, uint32_t *to) {
    for (int plane = bits == 8 ? 8 : 4; bits; plane /= 2)
        if (bits >= plane) to = write_plane(vectors, plane, bits -= plane, to);
}

/* 16 numbers of `size` bytes each, of the rows of from [outputs][columns], column `column`; zeros where there are none. */
static void write_column(const void *from, int outputs, int columns, int column, int size, char *to) {
    for (int lane = 0; lane < PANEL && lane < outputs && column < columns; lane++)
        memcpy(to + lane * size, (const char *)from + ((int64_t)lane * columns + column) * size, (size_t)size);
}

/* What is packed: codes [outputs][inputs]; for each span scales, and minima or NULL; for each group bytes, or NULL. */
struct parts {
    const uint8_t *codes;
    const void *scales, *minima, *factors, *minimum_factors, *zeros;
};

static void write_header(const struct packing *of, const struct parts *parts, int first, int outputs, int inputs, int k,
                         char *to) {
    int size = of->scale_format == FLOAT ? 4 : 2, spans = (inputs + of->span - 1) / of->span;
    int groups = (inputs + of->group - 1) / of->group, end = k + of->record;
    memset(to, 0, (size_t)of->header_nbytes);
    for (int span = k / of->span, i = 0; span * of->span < end; span++, i++) {
        int64_t from = (int64_t)first * spans * size;
        write_column((const char *)parts->scales + from, outputs - first, spans, span, size, to + i * PANEL * size);
        if (of->minima)
            write_column((const char *)parts->minima + from, outputs - first, spans, span, size,
                         to + of->minima + i * PANEL * size);
    }
    const void *const tables[] = {parts->factors, parts->minimum_factors, parts->zeros};
    const int places[] = {of->factors, of->minimum_factors, of->zeros};
    for (int table = 0; table < 3; table++)
        for (int group = k / of->group, i = 0; places[table] && group * of->group < end; group++, i++)
            write_column((const char *)tables[table] + (int64_t)first * groups, outputs - first, groups, group, 1,
                         to + places[table] + i * PANEL);
}

/* Panels from `first` on, every `turn`-th, get the rows of a quantised matrix. */
EXPORT void pipeinfer_pack_quantized(const struct packing *of, const struct parts *parts, int outputs, int inputs,
                                     int first, int turn, void *panels) {
    uint32_t vectors[8][PANEL];
    for (int begin = 0; begin < outputs; begin += PANEL) {
        char *panel = (char *)panels + (first + begin / PANEL * (int64_t)turn) * of->panel_nbytes;
        for (int k = 0; k < inputs; k += BLOCK_INPUTS) {
            char *record = panel + (int64_t)(k / of->record) * of->record_nbytes;
            if (k % of->record == 0) write_header(of, parts, begin, outputs, inputs, k, record);
            gather(parts->codes + (int64_t)begin * inputs, outputs - begin, inputs, k, vectors);
            char *codes = record + of->header_nbytes + (int64_t)(k % of->record / BLOCK_INPUTS) * of->bits * 64;
            write_block(vectors, of->bits, (uint32_t *)codes);
        }
    }
}
