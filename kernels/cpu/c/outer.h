/* Linears in the form "outer": vectors run along the rows, and each is multiplied with one number of the weights.

   Some columns of the weights, a part of the sum at a time, meet all rows while they are in a cache: panels of rows, whose
   sums with a few columns fit in registers. Those of fp32 are read where they lie, others unpacked before. What is read
   next of the weights is fetched meanwhile. */

#pragma once
#include "dot.h"

enum { FLUSH = 256 /* numbers: short sums, which fp32 keeps exact enough, and which fit in a cache with what they read */ };
enum { BESIDE = LANES == 8 ? 2 : 0 /* rows, few enough for "dot" beside a whole vector of others */ };
enum { OUTER_COLUMNS = SUMS / 2 /* whose sums with a panel fit in registers */, COPIES = 2 * OUTER_COLUMNS };
enum { MOST_OUTER = 4 * COPIES /* of a unit */ };
enum { APART_OUTER = FLUSH + 4 * LANES /* numbers from column to column, which a cache keeps in different places then */ };
enum { LINE = 64 /* bytes */ };

/* Weights that are read next: `count` columns, of each `bytes`. */
struct ahead {
    const char *weight;
    long stride, count, bytes;
};

/* Of the rows that are left, how many the next panel takes: those that fill a vector or two. */
static long rows_of_outer(long left) {
    if (left > BESIDE && left <= LANES + BESIDE) return least(left, LANES);
    return least(left, 2 * LANES);
}

/* Adds x @ weight.T to tile[column][row], or begins it, for a part of the sum: x (length, rows), of which there are
   `vectors` vectors, by columns that are `apart`. It fetches what is ahead line by line. */
INLINE void panel(int vectors, int columns, int begins, const float *x, const float *weights, long apart, long length,
                  struct ahead ahead, float *tile) {
    vec sums[SUMS];
    const float *column[SUMS];
    UNROLLED for (int n = 0; n < columns; n++) column[n] = weights + n * apart;
    UNROLLED for (int i = 0; i < columns * vectors; i++) sums[i] = (vec){0};
    const long lines = ahead.bytes / LINE, each = lines ? (length - 1) / lines + 1 : length;
    for (long k = 0, byte = 0; k < length; byte += LINE) {
        for (long n = 0; n < ahead.count; n++) __builtin_prefetch(ahead.weight + n * ahead.stride + byte, 0, 3);
        for (const long end = least(k + each, length); k < end; k++) {
            vec rows[2];
            UNROLLED for (int v = 0; v < vectors; v++) rows[v] = *(const vec *)(x + (k * vectors + v) * LANES);
            UNROLLED for (int n = 0; n < columns; n++)
                UNROLLED for (int v = 0; v < vectors; v++) sums[n * vectors + v] += column[n][k] * rows[v];
        }
    }
    UNROLLED for (int n = 0; n < columns; n++)
        UNROLLED for (int v = 0; v < vectors; v++) {
            vec *total = (vec *)(tile + n * WIDTH + v * LANES);
            if (!begins) sums[n * vectors + v] += *total;
            *total = sums[n * vectors + v];
        }
}

/* A function each, which keeps all sums in registers. */
#define PANEL(NAME, VECTORS, COLUMNS) \
    static __attribute__((noinline)) void NAME(int begins, const float *x, const float *weights, long apart, long length, \
                                               struct ahead ahead, float *tile) { \
        panel(VECTORS, COLUMNS, begins, x, weights, apart, length, ahead, tile); \
    }
PANEL(panel_of_one, 1, COPIES)
PANEL(panel_of_two, 2, OUTER_COLUMNS)

/* Numbers `begin` to `end` of columns from n on, unpacked: copies[column][number]; behind c's last it repeats. */
INLINE void copy_columns(int kind, const struct columns *c, long n, long columns, long begin, long end, float *copies) {
    for (const long last = n + columns; n < last; n++, copies += APART_OUTER) {
        const char *column = c->weight + least(n, c->count - 1) * c->stride * BYTES[kind];
        for (long k = begin; k < end; k += LANES * SPAN(kind)) {
            const ivec numbers = load(kind, column + k * BYTES[kind], c->dim - k);
            for (int j = 0; j < SPAN(kind); j++) *(vec *)(copies + k - begin + j * LANES) = unpack(kind, numbers, j);
        }
    }
}

/* x @ weight.T of up to MOST_OUTER columns, as tile[column][row]. x: panels of rows_of_outer, each (padded, rows to a whole
   vector), until few rows are left; `after` is how many columns later others are, to be read meanwhile. */
static void outer(long kind, long rows, const float *x, long padded, const struct columns *c, long after, float *copies,
                  float *tile) {
    const long bytes = BYTES[kind], pitch = c->stride * bytes, block = LANES * SPAN(kind);
    const long panels = (rows - 1) / (2 * LANES) + 1;
    for (long begin = 0, end; begin < padded; begin = end) {
        end = least(begin + FLUSH, padded);
        const long next = end < padded ? end : 0;
        struct ahead ahead = {c->weight + next * bytes + (next ? 0 : after * pitch), pitch};
        ahead.bytes = (least(next + FLUSH, c->dim / block * block) - next) * bytes;
        for (long n = 0; n < c->count; n += COPIES) {
            const int is_direct = kind == FLOAT32 && end <= c->dim && n + COPIES <= c->count;
            const float *weights = is_direct ? (const float *)c->weight + n * c->stride + begin : copies;
            const long apart = is_direct ? c->stride : APART_OUTER;
            if (kind == BFLOAT16) copy_columns(BFLOAT16, c, n, COPIES, begin, end, copies);
            else if (kind == INT8) copy_columns(INT8, c, n, COPIES, begin, end, copies);
            else if (!is_direct) copy_columns(FLOAT32, c, n, COPIES, begin, end, copies);
            for (long m = 0, here, fetched = 0; m < rows && (here = rows_of_outer(rows - m)) > BESIDE; m += here) {
                const int vectors = here > LANES ? 2 : 1;
                const float *part = x + m * padded + begin * vectors * LANES;
                const long until = COPIES * (m / (2 * LANES) + 1) / panels;
                ahead.count = until - fetched, fetched = until;
                float *const place = tile + n * WIDTH + m, *const second = place + OUTER_COLUMNS * WIDTH;
                if (vectors == 1) panel_of_one(!begin, part, weights, apart, end - begin, ahead, place);
                else {
                    const struct ahead none = {ahead.weight};
                    panel_of_two(!begin, part, weights, apart, end - begin, ahead, place);
                    panel_of_two(!begin, part, weights + OUTER_COLUMNS * apart, apart, end - begin, none, second);
                }
                ahead.weight += ahead.count * pitch;
            }
        }
    }
}
