/* Linears in the form "dot": vectors run along the dimension that is summed, for a few rows at once. */

#pragma once
#include "numbers.h"

#if LANES == 16 /* the results of a row stand together; else, as in the other forms, those of a column */
enum { ROW_STEP = 32, COLUMN_STEP = 1 };
#else
enum { ROW_STEP = 1, COLUMN_STEP = WIDTH };
#endif
enum { BETWEEN = 5 * LANES /* numbers between rows of x, which a cache keeps in different places then */ };
#if defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
enum { AHEAD_DOT = 512 /* bytes */, READS_NEXT = 1 }; /* these processors read faster from one place than from several */
#else
enum { AHEAD_DOT = 2048 /* bytes */, READS_NEXT = 0 };
#endif
enum { MOST_DOTS = LANES != 16 ? 6 : READS_NEXT ? 9 : 12 }; /* rows of a pass */

/* The sum of the numbers of each of columns * rows vectors, of which those of a column lie together, at their places. */
INLINE void sum_vectors(int rows, int columns, const vec *sums, float *tile) {
#if LANES == 16
    /* 16 sums at once, of four rows: quarters, then numbers, of several vectors side by side, and their sums. */
#define ADD_SIDES(kind, a, b, low, high) \
    ((__m512)_mm512_shuffle_##kind(a, b, low) + (__m512)_mm512_shuffle_##kind(a, b, high))
#define ADD_PAIRED(a, b) (_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b))
    UNROLLED for (int m = 0; m < rows; m += 4) {
        __m512 quarters[4];
        UNROLLED for (int n = 0; n < 4; n++) {
            __m512 row[4]; /* of lanes n, n + 4, … of the result */
            UNROLLED for (int i = 0; i < 4; i++)
                row[i] = m + i < rows && n < columns ? (__m512)sums[n * rows + m + i] : _mm512_setzero_ps();
            const __m512 front = ADD_SIDES(f32x4, row[0], row[1], 0x44, 0xee);
            const __m512 back = ADD_SIDES(f32x4, row[2], row[3], 0x44, 0xee);
            quarters[n] = ADD_SIDES(f32x4, front, back, 0x88, 0xdd);
        }
        const __m512 front = ADD_PAIRED(quarters[0], quarters[1]), back = ADD_PAIRED(quarters[2], quarters[3]);
        const __m512 all = ADD_SIDES(pd, (__m512d)front, (__m512d)back, 0x00, 0xff);
        float lanes[16];
        memcpy(lanes, &all, sizeof lanes);
        UNROLLED for (int i = 0; i < 4; i++) /* what is beyond the last column is overwritten, or nobody reads it */
            if (m + i < rows) memcpy(tile + (m + i) * ROW_STEP, lanes + 4 * i, 4 * sizeof *lanes);
    }
#else
    UNROLLED for (int n = 0; n < columns; n++)
        UNROLLED for (int m = 0; m < rows; m++) tile[n * COLUMN_STEP + m * ROW_STEP] = sum(sums[n * rows + m]);
#endif
}

/* Products of bf16 and their sums in pairs are the fastest where there are instructions for them; x is rounded to bf16
   then, as PyTorch does, but not for rows so few that they are computed while memory is read. */
#if defined(__AVX512BF16__)
#define ADD_PRODUCTS(sums, x, y) (vec)_mm512_dpbf16_ps((__m512)(sums), (__m512bh)(x), (__m512bh)(y))
enum { HAS_PAIRS = 1 };

/* A row as bf16, in place. */
static void round_row(float *x, long padded) {
    for (long k = 0; k < padded; k += LANES) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + k));
        memcpy((uint16_t *)x + k, &rounded, sizeof rounded);
    }
}
#else
#define ADD_PRODUCTS(sums, x, y) (sums)
enum { HAS_PAIRS = 0 };
static void round_row(float *x, long padded) {}
#endif

/* What the numbers behind the last whole block add to `dot`, of `left` numbers. */
static __attribute__((noinline)) void rest_of_dot(int kind, int rounded, int rows, int columns, const float *x, long apart,
                                                  const char *const *column, long left, float *tile) {
    for (int n = 0; n < columns; n++) {
        const ivec block = load(kind, column[n], left);
        for (int m = 0; m < rows; m++) {
            const float *row = x + m * apart;
            vec total = {0};
            if (rounded) total = ADD_PRODUCTS(total, block, *(const vec *)row);
            else for (int j = 0; j < SPAN(kind); j++) total += unpack(kind, block, j) * *(const vec *)(row + j * LANES);
            tile[n * COLUMN_STEP + m * ROW_STEP] += sum(total);
        }
    }
}

/* x @ weight.T, (rows, columns), where c has fewer columns the last repeats. x: (rows, whole blocks), rows BETWEEN numbers
   further apart; with `rounded` it is bf16. `after` is how many columns later others are, to be read meanwhile. */
INLINE void dot(int kind, int rounded, int rows, int columns, const float *x, struct columns c, long after, float *tile) {
    vec sums[SUMS];
    const char *column[4];
    const long block = LANES * SPAN(kind), left = c.dim % block, whole = c.dim - left;
    const long apart = whole + (left ? block : 0) + BETWEEN, length = whole * BYTES[kind], line = LANES * 4;
    const char *next = c.weight + after * c.stride * BYTES[kind]; /* line by line, as if they stood in one place */
    UNROLLED for (int n = 0; n < columns; n++)
        column[n] = c.weight + (n < c.count ? n : c.count - 1) * c.stride * BYTES[kind];
    UNROLLED for (int i = 0; i < columns * rows; i++) sums[i] = (vec){0};
    for (long byte = 0; byte < length; byte += line, x += rounded ? block / 2 : block, next += columns * line) {
        const long ahead = look_ahead(byte, AHEAD_DOT, length, columns, c.stride * BYTES[kind]);
        ivec blocks[4];
        UNROLLED for (int n = 0; n < columns; n++) {
            blocks[n] = *(const narrow_vec *)(column[n] + byte);
            __builtin_prefetch(column[n] + ahead, 0, 3);
            if (READS_NEXT) __builtin_prefetch(next + n * line, 0, 2);
        }
        for (int j = 0; j < (rounded ? 1 : SPAN(kind)); j++) {
            vec weights[4];
            UNROLLED for (int n = 0; n < columns; n++) weights[n] = rounded ? (vec)blocks[n] : unpack(kind, blocks[n], j);
            UNROLLED for (int m = 0; m < rows; m++) {
                vec row = *(const vec *)(x + m * apart + j * LANES);
                HOLD(row);
                UNROLLED for (int n = 0; n < columns; n++) {
                    vec *total = &sums[n * rows + m];
                    if (rounded) *total = ADD_PRODUCTS(*total, weights[n], row);
                    else *total += weights[n] * row;
                }
            }
        }
    }
    sum_vectors(rows, columns, sums, tile);
    if (left) {
        UNROLLED for (int n = 0; n < columns; n++) column[n] += length;
        rest_of_dot(kind, rounded, rows, columns, x, apart, column, left, tile);
    }
}

/* Products of 16 bits and their sums in pairs are the fastest for int8 where there are instructions for it; x is rounded
   to 16 bits then, of which each row has a scale. */
#if defined(__AVX512BW__)
typedef __m512i words;
#define WORDS(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD_WORDS(p) _mm512_loadu_si512(p)
#if defined(__AVX512VNNI__)
#define ADD_PAIRS(sums, x, y) _mm512_dpwssd_epi32(sums, x, y)
#else
#define ADD_PAIRS(sums, x, y) _mm512_add_epi32(sums, _mm512_madd_epi16(x, y))
#endif
#elif defined(__AVX2__) && !defined(__AVX512F__)
typedef __m256i words;
#define WORDS(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_WORDS(p) _mm256_loadu_si256((const __m256i *)(p))
#define ADD_PAIRS(sums, x, y) _mm256_add_epi32(sums, _mm256_madd_epi16(x, y))
#endif

/* A row as `padded` numbers of 16 bits, and their scale. Sums of products with int8 stay below 2**31. */
static float to_words(const float *x, long padded, int16_t *words) {
    vec most = {0};
    for (long k = 0; k < padded; k += LANES) {
        const vec value = *(const vec *)(x + k), size = choose(value < 0, -value, value);
        most = choose((size > most) | (size != size), size, most); /* NaN stays */
    }
    float largest = 0;
    for (int i = 0; i < LANES; i++) if (!(most[i] <= largest)) largest = most[i] == most[i] ? most[i] : INFINITY;
    if (!(largest < INFINITY)) return NAN;
    const float fit = 2147483647.f / 256 / (padded / (2 * LANES)), range = fit < 32767 ? fit : 32767;
    const float factor = largest > 0 ? range / largest : 0;
    for (long k = 0; k < padded; k++) words[k] = (int16_t)lrintf(x[k] * factor);
    return largest / range;
}

#ifdef ADD_PAIRS
enum { HAS_WORDS = 1 };

/* What the numbers behind the last whole block add to `dot_words`, of `left` numbers. */
static __attribute__((noinline)) void rest_of_dot_words(int rows, int columns, const float *scale, const int16_t *x,
                                                        long padded, const char *const *column, long left, float *tile) {
    for (int n = 0; n < columns; n++)
        for (int m = 0; m < rows; m++) {
            int32_t total = 0;
            for (long k = 0; k < left; k++) total += (int8_t)column[n][k] * x[m * padded + k];
            tile[n * COLUMN_STEP + m * ROW_STEP] += total * scale[m];
        }
}

/* As `dot`, of int8 and x: (rows, whole blocks) of 16 bits, times the scale of each row. */
INLINE void dot_words(int rows, int columns, const float *scale, const int16_t *x, struct columns c, long after,
                      float *tile) {
    const long block = 4 * LANES, left = c.dim % block, length = c.dim - left, padded = length + (left ? block : 0);
    const char *column[4], *next = c.weight + after * c.stride;
    ivec sums[SUMS]; /* of `words`, GCC would copy them back and forth */
    UNROLLED for (int n = 0; n < columns; n++) column[n] = c.weight + (n < c.count ? n : c.count - 1) * c.stride;
    UNROLLED for (int i = 0; i < columns * rows; i++) sums[i] = (ivec){0};
    for (long k = 0; k < length; k += block, x += block, next += columns * block) {
        const long ahead = look_ahead(k, AHEAD_DOT, length, columns, c.stride);
        UNROLLED for (int n = 0; n < columns; n++) {
            __builtin_prefetch(column[n] + ahead, 0, 3);
            if (READS_NEXT) __builtin_prefetch(next + n * block, 0, 2);
        }
        UNROLLED for (int half = 0; half < 2; half++) {
            words weights[4];
            UNROLLED for (int n = 0; n < columns; n++) weights[n] = WORDS(column[n] + k + half * 2 * LANES);
            UNROLLED for (int m = 0; m < rows; m++) {
                words row = LOAD_WORDS(x + m * padded + half * 2 * LANES);
                HOLD(row);
                UNROLLED for (int n = 0; n < columns; n++)
                    sums[n * rows + m] = (ivec)ADD_PAIRS((words)sums[n * rows + m], weights[n], row);
            }
        }
    }
    vec scaled[SUMS];
    UNROLLED for (int n = 0; n < columns; n++)
        UNROLLED for (int m = 0; m < rows; m++)
            scaled[n * rows + m] = __builtin_convertvector(sums[n * rows + m], vec) * scale[m];
    sum_vectors(rows, columns, scaled, tile);
    if (left) {
        UNROLLED for (int n = 0; n < columns; n++) column[n] += length;
        rest_of_dot_words(rows, columns, scale, x, padded, column, left, tile);
    }
}
#else
enum { HAS_WORDS = 0 };
#define dot_words(...)
#endif

/* Columns of a pass, whose sums fit in registers. */
#define DOT_COLUMNS(rows) ((rows) * 4 <= SUMS ? 4 : (rows) * 3 <= SUMS ? 3 : 2)

/* A pass of so many rows over columns. */
#define PASS(ROWS, CALL, ...) \
    case ROWS: \
        for (long n = 0; n < c.count; n += DOT_COLUMNS(ROWS)) \
            CALL(__VA_ARGS__, columns_from(kind, c, n), after, tile + n * COLUMN_STEP); \
        return;
#define DOT(ROWS) PASS(ROWS, dot, kind, rounded, ROWS, DOT_COLUMNS(ROWS), x)
#define DOT_WORDS(ROWS) PASS(ROWS, dot_words, ROWS, DOT_COLUMNS(ROWS), scale, x)
#if LANES == 16
#define ALL(OF) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
#else
#define ALL(OF) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6)
#endif

/* A function each: of one with all these loops GCC keeps less in registers. */
#define PASSES(NAME, KIND, ROUNDED) \
    static __attribute__((noinline)) void NAME(long rows, const float *x, const struct columns *all, long after, \
                                               float *tile) { \
        const int kind = KIND, rounded = ROUNDED; \
        const struct columns c = *all; \
        switch (rows) { ALL(DOT) } \
    }
PASSES(pass_float32, FLOAT32, 0)
PASSES(pass_bfloat16, BFLOAT16, 0)
PASSES(pass_rounded, BFLOAT16, 1)
PASSES(pass_int8, INT8, 0)

static __attribute__((noinline)) void pass_words(long rows, const float *scale, const int16_t *x,
                                                 const struct columns *all, long after, float *tile) {
    const int kind = INT8;
    const struct columns c = *all;
    switch (rows) { ALL(DOT_WORDS) }
}
