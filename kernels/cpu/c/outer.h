/* Linears in the form "outer": vectors run along the rows, and each is multiplied with one number of the weights. */

#pragma once
#include "numbers.h"

enum { AHEAD_OUTER = 256 /* bytes */, FLUSH = 512 /* numbers */ };
enum { BESIDE = LANES == 8 ? 2 : 0 /* rows, few enough for "dot" beside a whole vector of others */ };

/* x @ weight.T, as tile[column][row], of SUMS / vectors columns; where c has fewer the last repeats. x: (dim, rows), of
   which there are `vectors` vectors. */
INLINE void outer(int kind, int vectors, const float *x, struct columns c, float *tile) {
    vec sums[SUMS];
    float copies[SUMS][4 * LANES] __attribute__((aligned(64)));
    const int columns = SUMS / vectors;
    const long block = LANES * SPAN(kind), bytes = BYTES[kind];
    for (int n = 0; n < columns; n++) memset(tile + n * WIDTH, 0, vectors * LANES * sizeof *tile);
    for (long flush = 0; flush < c.dim; flush += FLUSH) { /* short sums: fp32 keeps them exact enough */
        const long end = least(flush + FLUSH, c.dim);
        UNROLLED for (int i = 0; i < SUMS; i++) sums[i] = (vec){0};
        for (long k = flush; k < end; k += block) {
            const long ahead = look_ahead(k * bytes, AHEAD_OUTER, c.dim * bytes, columns, c.stride * bytes);
            for (int n = 0; n < columns; n++) { /* a copy: columns may share one set of the cache, which holds fewer */
                const char *column = c.weight + (n < c.count ? n : c.count - 1) * c.stride * bytes;
                const ivec numbers = load(kind, column + k * bytes, c.dim - k);
                for (int j = 0; j < SPAN(kind); j++) *(vec *)(copies[n] + j * LANES) = unpack(kind, numbers, j);
                __builtin_prefetch(column + ahead, 0, 3);
            }
            for (long i = 0; i < block; i++) {
                vec rows[2];
                UNROLLED for (int v = 0; v < vectors; v++) rows[v] = *(const vec *)(x + ((k + i) * vectors + v) * LANES);
                UNROLLED for (int n = 0; n < columns; n++)
                    UNROLLED for (int v = 0; v < vectors; v++) sums[n * vectors + v] += copies[n][i] * rows[v];
            }
        }
        UNROLLED for (int n = 0; n < columns; n++)
            UNROLLED for (int v = 0; v < vectors; v++)
                *(vec *)(tile + n * WIDTH + v * LANES) += sums[n * vectors + v];
    }
}

/* Of the rows that are left, how many the next pass takes: those that fill a vector or two. */
static long rows_of_outer(long left) {
    if (left > BESIDE && left <= LANES + BESIDE) return least(left, LANES);
    return least(left, 2 * LANES);
}

/* A pass of up to two vectors of rows over columns. */
#define PASS_OUTER(NAME, KIND) \
    static void NAME(long rows, const float *x, const struct columns *c, float *tile) { \
        const int vectors = rows > LANES ? 2 : 1; \
        for (long n = 0; n < c->count; n += SUMS / vectors) \
            if (vectors == 1) outer(KIND, 1, x, columns_from(KIND, *c, n), tile + n * WIDTH); \
            else outer(KIND, 2, x, columns_from(KIND, *c, n), tile + n * WIDTH); \
    }
PASS_OUTER(outer_float32, FLOAT32)
PASS_OUTER(outer_bfloat16, BFLOAT16)
PASS_OUTER(outer_int8, INT8)
