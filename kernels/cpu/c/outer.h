/* Linears in the form "outer": vectors run along the rows, and each is multiplied with one number of the weights. */

#pragma once
#include "numbers.h"

#if LANES != 16
/* The same for rows laid out as x[k][row], in `vectors` vectors. */
INLINE void outer(int kind, int vectors, const float *x, const struct linear *a, const char *weight, long stride,
                  long count, float *tile) {
    vec sums[SUMS];
    float wide[SUMS][4 * LANES] __attribute__((aligned(64)));
    const int columns = SUMS / vectors;
    const long block = LANES * SPAN(kind);
    for (int n = 0; n < columns; n++) memset(tile + n * WIDTH, 0, vectors * LANES * sizeof *tile);
    for (long flush = 0; flush < a->dim; flush += FLUSH) { /* short sums: fp32 keeps them exact enough */
        const long end = flush + FLUSH < a->dim ? flush + FLUSH : a->dim;
        UNROLLED for (int i = 0; i < SUMS; i++) sums[i] = (vec){0};
        for (long k = flush; k < end; k += block) {
            const long bytes = BYTES[kind], ahead = look_ahead(k * bytes, AHEAD_OUTER, a->dim * bytes, columns, stride * bytes);
            for (int n = 0; n < columns; n++) { /* a copy: columns may share one set of the cache, which holds fewer */
                const char *column = weight + (n < count ? n : count - 1) * stride * BYTES[kind];
                const ivec own = load(kind, column + k * BYTES[kind], a->dim - k);
                for (int j = 0; j < SPAN(kind); j++) *(vec *)(wide[n] + j * LANES) = part(kind, own, j);
                __builtin_prefetch(column + ahead, 0, 3);
            }
            for (long i = 0; i < block; i++) {
                vec some[2];
                UNROLLED for (int v = 0; v < vectors; v++) some[v] = *(const vec *)(x + ((k + i) * vectors + v) * LANES);
                UNROLLED for (int n = 0; n < columns; n++)
                    UNROLLED for (int v = 0; v < vectors; v++) sums[n * vectors + v] += wide[n][i] * some[v];
            }
        }
        UNROLLED for (int n = 0; n < columns; n++)
            UNROLLED for (int v = 0; v < vectors; v++)
                *(vec *)(tile + n * WIDTH + v * LANES) += sums[n * vectors + v];
    }
}
#else
INLINE void outer(int kind, int vectors, const float *x, const struct linear *a, const char *weight, long stride,
                  long count, float *tile) {}
#endif

#define OUTER(KIND) \
    if (rows <= LANES) outer(KIND, 1, x, a, weight + n * stride * BYTES[kind], stride, count - n, tile + n * WIDTH); \
    else outer(KIND, 2, x, a, weight + n * stride * BYTES[kind], stride, count - n, tile + n * WIDTH);

/* Of the rows that are left, how many the next pass of "outer" takes: those that fill a vector or two. */
static long rows_of_outer(long left) {
    if (left > BESIDE && left <= LANES + BESIDE) return left < LANES ? left : LANES;
    return left < 2 * LANES ? left : 2 * LANES;
}
