/* Linear layers of few rows, attention behind a cached prefix, whole blocks of both, and steps of a run, on the CPU, as
   fast as memory gives the weights. `cpu_library.py` compiles this, `cpu.py` and `cpu_blocks.py` call it.

   A linear lays its rows out once, normalised and in fp32. Then each thread computes columns of the result, some columns
   and all rows at a time, in one of three forms. "dot": vectors run along the dimension that is summed, for a few rows at
   once. "outer", for more rows where there are few registers: vectors run along the rows, and each is multiplied with one
   number of the weights. "amx", for more rows where the processor multiplies tiles of bf16: numbers of fp32 are sums of
   three of bf16. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "team.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

#if defined(__AVX512F__)
#define LANES 16
#define SUMS 27 /* vectors that fit in registers beside the operands */
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define SUMS 12
#elif defined(__aarch64__)
#define LANES 4
#define SUMS 24
#else
#error "neither AVX2 nor NEON"
#endif

#if LANES == 16 /* "dot" gives some columns of a row together; else, as the other forms, all rows of a column */
enum { ROW_STEP = 32, COLUMN_STEP = 1 };
#else
enum { ROW_STEP = 1, COLUMN_STEP = 64 };
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 24")
#endif
#if LANES == 16
#define HOLD(some) __asm__("" : "+v"(some)) /* in a register: GCC would read it again for each column */
#else
#define HOLD(some)
#endif

enum { FLOAT32, BFLOAT16, INT8 }; /* kinds of numbers */
enum { NONE, GELU, SWIGLU };
enum { WIDTH = 64 /* rows of a tile */, GROUP = 24 /* columns that several passes of rows share in a cache */ };
enum { BETWEEN = 5 * LANES /* numbers between rows of x, which a cache keeps in different places then */ };
enum { BESIDE = LANES == 8 ? 2 : 0 /* rows, few enough for "dot" beside a whole vector of others */, FLUSH = 512 /* numbers */ };
enum { AHEAD_OUTER = 256, AHEAD_AMX = 512, AHEAD_ROWS = 128, AHEAD_NEXT = 12 << 10, CACHED = 5 << 18 }; /* bytes */
#if defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
enum { AHEAD_DOT = 512, READS_NEXT = 1 }; /* these processors read faster from one place than from several */
#else
enum { AHEAD_DOT = 2048, READS_NEXT = 0 };
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static const long BYTES[] = {4, 2, 1};

struct vector {
    const char *data; /* NULL where it is not given */
    long kind;
};

struct matrix {
    const char *data;
    long kind, stride; /* of rows, in numbers */
};

struct weight {
    struct matrix matrix;
    struct vector scale; /* of each row, where it is quantised */
};

enum { MATRICES = 3 }; /* whose results stand side by side */

struct linear {
    struct matrix x, out;
    struct weight weight[MATRICES];
    struct vector bias[MATRICES], stream_gain, gain, norm_bias;
    const float *stream, *residual; /* of contiguous rows, as is the sum with the stream */
    float *total;
    long columns[MATRICES], rows, dim, activation; /* columns of the result; SWIGLU makes them of twice as many rows */
    double eps;
};

/* Weights come in blocks of one vector of memory, LANES * SPAN numbers. Part j of a block holds its numbers j, j + SPAN,
   j + 2 * SPAN, …, which takes a shift or two; x is laid out in that order. */
#define SPAN(kind) ((kind) == FLOAT32 ? 1 : (kind) == BFLOAT16 ? 2 : 4)

INLINE ivec load(int kind, const char *p, long left) {
    if (left >= LANES * SPAN(kind)) return *(const ivec *)p;
    ivec some = {0};
    memcpy(&some, p, left * BYTES[kind]);
    return some;
}

INLINE vec part(int kind, ivec block, int j) {
    if (kind == FLOAT32) return (vec)block;
    if (kind == INT8) return __builtin_convertvector(block << (24 - 8 * j) >> 24, vec);
    if (j) return (vec)(block & -65536);
    return (vec)(block << 16);
}

static inline float at(struct vector v, long i) {
    union { uint32_t bits; float value; } u;
    if (v.kind == FLOAT32) return ((const float *)v.data)[i];
    u.bits = (uint32_t)((const uint16_t *)v.data)[i] << 16;
    return u.value;
}

static inline void put(struct matrix t, long row, long column, float value) {
    const union { float value; uint32_t bits; } u = {value};
    const long i = row * t.stride + column;
    if (t.kind == FLOAT32) ((float *)t.data)[i] = value;
    else ((uint16_t *)t.data)[i] = value != value ? 0x7fc0 : (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16; /* nearest */
}

INLINE float sum(vec v) {
    float parts[LANES];
    memcpy(parts, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) parts[i] += parts[i + width];
    return parts[0];
}

/* The sum of the numbers of each of columns * rows vectors, of which those of a column lie together, at their places. */
INLINE void sum_all(int rows, int columns, const vec *sums, float *tile) {
#if LANES == 16
    /* 16 sums at once, of four rows: quarters, then numbers, of several vectors side by side, and their sums. */
#define ADD_SIDES(kind, a, b, low, high) \
    ((__m512)_mm512_shuffle_##kind(a, b, low) + (__m512)_mm512_shuffle_##kind(a, b, high))
#define ADD_PAIRED(a, b) (_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b))
    UNROLLED for (int m = 0; m < rows; m += 4) {
        __m512 quarters[4];
        UNROLLED for (int n = 0; n < 4; n++) {
            __m512 own[4]; /* of lanes n, n + 4, … of the result */
            UNROLLED for (int i = 0; i < 4; i++)
                own[i] = m + i < rows && n < columns ? (__m512)sums[n * rows + m + i] : _mm512_setzero_ps();
            const __m512 front = ADD_SIDES(f32x4, own[0], own[1], 0x44, 0xee);
            const __m512 back = ADD_SIDES(f32x4, own[2], own[3], 0x44, 0xee);
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

INLINE vec choose(ivec condition, vec yes, vec no) { return (vec)((condition & (ivec)yes) | (~condition & (ivec)no)); }

/* To 1e-7 of its value: 2**n times a Taylor sum within ±ln(2) / 2. */
INLINE vec exponential(vec x) {
    const vec low = (vec){0} - 87, high = (vec){0} + 88;
    x = choose(x < low, low, choose(x > high, high, x)); /* NaN stays */
    const vec n = (x * 1.44269504f + 12582912.f) - 12582912.f; /* rounded: the last bit of this number counts ones */
    x = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln(2) in two parts (Cody & Waite) */
    vec y = x * (1 / 5040.f) + 1 / 720.f;
    y = y * x + 1 / 120.f;
    y = y * x + 1 / 24.f;
    y = y * x + 1 / 6.f;
    y = y * x + 0.5f;
    y = y * x + 1;
    y = y * x + 1;
    return y * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

/* x * (1 + erf(x / sqrt(2))) / 2, with erf to 1.5e-7 (Abramowitz & Stegun 7.1.26). */
INLINE vec gelu(vec x) {
    const vec size = choose(x < 0, -x, x) * 0.70710678f, t = 1 / (size * 0.3275911f + 1);
    vec tail = t * 1.061405429f - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    tail = tail * t * exponential(-size * size) * 0.5f;
    return x * choose(x < 0, tail, 1 - tail);
}

/* What to prefetch while at some byte of columns: what is read some bytes later, perhaps of the columns after these. */
INLINE long look_ahead(long at, long bytes, long length, long columns, long stride) {
    at += bytes;
    return at < length ? at : at - length + columns * stride;
}

/* Products of bf16 and their sums in pairs are the fastest where there are instructions for them; x is rounded to bf16
   then, as PyTorch does, but not for rows so few that they are computed while memory is read. */
#if defined(__AVX512BF16__)
#define ADD_PRODUCTS(sums, x, y) (vec)_mm512_dpbf16_ps((__m512)(sums), (__m512bh)(x), (__m512bh)(y))
enum { HAS_PAIRS = 1 };

/* A row as bf16, in place. */
static void round_row(float *x, long padded) {
    for (long k = 0; k < padded; k += LANES) {
        const __m256bh some = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + k));
        memcpy((uint16_t *)x + k, &some, sizeof some);
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
        const ivec own = load(kind, column[n], left);
        for (int m = 0; m < rows; m++) {
            const float *row = x + m * apart;
            vec some = {0};
            if (rounded) some = ADD_PRODUCTS(some, own, *(const vec *)row);
            else for (int j = 0; j < SPAN(kind); j++) some += part(kind, own, j) * *(const vec *)(row + j * LANES);
            tile[n * COLUMN_STEP + m * ROW_STEP] += sum(some);
        }
    }
}

/* x @ weight.T of some columns of the weight, of which there are `count`: the last repeats. Rows of
   `x` are `padded + BETWEEN` apart; with `rounded` they are bf16. */
INLINE void dot(int kind, int rounded, int rows, int columns, const float *x, const struct linear *a, const char *weight,
                long stride, long count, long after, float *tile) {
    vec sums[SUMS];
    const char *column[4];
    const long block = LANES * SPAN(kind), left = a->dim % block, whole = a->dim - left;
    const long apart = whole + (left ? block : 0) + BETWEEN, length = whole * BYTES[kind], line = LANES * 4;
    const char *next = weight + after * stride * BYTES[kind]; /* line by line, as if they stood in one place */
    UNROLLED for (int n = 0; n < columns; n++) column[n] = weight + (n < count ? n : count - 1) * stride * BYTES[kind];
    UNROLLED for (int i = 0; i < columns * rows; i++) sums[i] = (vec){0};
    for (long at = 0; at < length; at += line, x += rounded ? block / 2 : block, next += columns * line) {
        const long ahead = look_ahead(at, AHEAD_DOT, length, columns, stride * BYTES[kind]);
        ivec own[4];
        UNROLLED for (int n = 0; n < columns; n++) {
            own[n] = *(const ivec *)(column[n] + at);
            __builtin_prefetch(column[n] + ahead, 0, 3);
            if (READS_NEXT) __builtin_prefetch(next + n * line, 0, 2);
        }
        for (int j = 0; j < (rounded ? 1 : SPAN(kind)); j++) {
            vec parts[4];
            UNROLLED for (int n = 0; n < columns; n++) parts[n] = rounded ? (vec)own[n] : part(kind, own[n], j);
            UNROLLED for (int m = 0; m < rows; m++) {
                vec some = *(const vec *)(x + m * apart + j * LANES);
                HOLD(some);
                UNROLLED for (int n = 0; n < columns; n++) {
                    vec *to = &sums[n * rows + m];
                    if (rounded) *to = ADD_PRODUCTS(*to, parts[n], some);
                    else *to += parts[n] * some;
                }
            }
        }
    }
    sum_all(rows, columns, sums, tile);
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
static float to_words(const float *x, long padded, int16_t *to) {
    vec most = {0};
    for (long k = 0; k < padded; k += LANES) {
        const vec some = *(const vec *)(x + k), size = choose(some < 0, -some, some);
        most = choose(size > most | size != size, size, most); /* NaN stays */
    }
    float largest = 0;
    for (int i = 0; i < LANES; i++) if (!(most[i] <= largest)) largest = most[i] == most[i] ? most[i] : INFINITY;
    if (!(largest < INFINITY)) return NAN;
    const float fit = 2147483647.f / 256 / (padded / (2 * LANES)), range = fit < 32767 ? fit : 32767;
    const float factor = largest > 0 ? range / largest : 0;
    for (long k = 0; k < padded; k++) to[k] = (int16_t)lrintf(x[k] * factor);
    return largest / range;
}

#ifdef ADD_PAIRS
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

INLINE void dot_words(int rows, int columns, const float *scale, const int16_t *x, const struct linear *a,
                      const char *weight, long stride, long count, long after, float *tile) {
    const long block = 4 * LANES, left = a->dim % block, length = a->dim - left, padded = length + (left ? block : 0);
    const char *column[4], *next = weight + after * stride;
    ivec sums[SUMS]; /* of `words`, GCC would copy them back and forth */
    UNROLLED for (int n = 0; n < columns; n++) column[n] = weight + (n < count ? n : count - 1) * stride;
    UNROLLED for (int i = 0; i < columns * rows; i++) sums[i] = (ivec){0};
    for (long k = 0; k < length; k += block, x += block, next += columns * block) {
        const long ahead = look_ahead(k, AHEAD_DOT, length, columns, stride);
        UNROLLED for (int n = 0; n < columns; n++) {
            __builtin_prefetch(column[n] + ahead, 0, 3);
            if (READS_NEXT) __builtin_prefetch(next + n * block, 0, 2);
        }
        UNROLLED for (int half = 0; half < 2; half++) {
            words own[4];
            UNROLLED for (int n = 0; n < columns; n++) own[n] = WORDS(column[n] + k + half * 2 * LANES);
            UNROLLED for (int m = 0; m < rows; m++) {
                words some = LOAD_WORDS(x + m * padded + half * 2 * LANES);
                HOLD(some);
                UNROLLED for (int n = 0; n < columns; n++)
                    sums[n * rows + m] = (ivec)ADD_PAIRS((words)sums[n * rows + m], own[n], some);
            }
        }
    }
    vec wide[SUMS];
    UNROLLED for (int n = 0; n < columns; n++)
        UNROLLED for (int m = 0; m < rows; m++)
            wide[n * rows + m] = __builtin_convertvector(sums[n * rows + m], vec) * scale[m];
    sum_all(rows, columns, wide, tile);
    if (left) {
        UNROLLED for (int n = 0; n < columns; n++) column[n] += length;
        rest_of_dot_words(rows, columns, scale, x, padded, column, left, tile);
    }
}
enum { HAS_WORDS = 1 };
#else
INLINE void dot_words(int rows, int columns, const float *scale, const int16_t *x, const struct linear *a,
                      const char *weight, long stride, long count, long after, float *tile) {}
enum { HAS_WORDS = 0 };
#endif

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

/* The form of tiles. A tile of the processor holds 16 rows of 64 bytes; tiles 0 to 3 are sums of 16 columns and 16 rows
   each, 4 to 6 the parts of 16 columns of weights, 32 numbers of each, and 7 one part of as much of x.

   A number of fp32 is the sum of three of bf16, of 8 bits each. Of the nine products of two such sums those of the order
   of fp32's rounding are left out. Weights of bf16 or int8 have one part, and x two then: 16 bits, rounded. Numbers that
   are not finite give NaN. */
enum { PART = 512 /* numbers of a tile */, DEPTH = 32 /* numbers of a column in it */ };
#define TILE_COLUMNS(kind) ((kind) == BFLOAT16 ? 32 : 16) /* at once */
#define PARTS(kind) ((kind) == FLOAT32 ? 3 : 2) /* of x */

static int amx; /* whether the system lets us */

#if HAS_AMX
__attribute__((constructor)) static void ask_for_amx(void) { amx = !syscall(SYS_arch_prctl, 0x1023, 18); }

static void begin_amx(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shapes = {1, 0};
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
    _tile_loadconfig(&shapes);
}
static void end_amx(void) { _tile_release(); }

/* The upper halves of a and b side by side, as tiles hold pairs of numbers, and in `to + i * PART` those of what is left
   of them: their parts. */
INLINE void split(int parts, __m512 a, __m512 b, uint16_t *to) {
    const __m512i upper = _mm512_set1_epi32(-65536);
    for (int i = 0; i < parts; i++, to += PART) {
        const __m512i half = _mm512_set1_epi32(parts == 2 && i ? 1 << 15 : 0); /* rounds; three parts leave nothing */
        const __m512i first = _mm512_add_epi32(_mm512_castps_si512(a), half);
        const __m512i second = _mm512_add_epi32(_mm512_castps_si512(b), half);
        _mm512_store_si512(to, _mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second, upper, 0xf8)); /* | & */
        a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(first, upper)));
        b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(second, upper)));
    }
}

/* Which number of DEPTH stands first in pair i, and how far behind it the second. */
#define PAIR(kind, i) ((kind) == BFLOAT16 ? 2 * (i) : (i))
#define PAIR_STEP(kind) ((kind) == BFLOAT16 ? 1 : 16)

/* Numbers k to k + DEPTH of 16 columns of a weight, of which there are `count`, as tiles. */
INLINE void lay(int kind, const struct linear *a, const char *weight, long stride, long count, long k, uint16_t *to) {
    const long left = a->dim - k, bytes = BYTES[kind];
    const long ahead = look_ahead(k * bytes, AHEAD_AMX, a->dim * bytes, 16, stride * bytes);
    char some[16][DEPTH * 4] __attribute__((aligned(64)));
    long step = stride * bytes;
    const char *p = weight + k * bytes;
    if (count < 16 || left < DEPTH) {
        memset(some, 0, sizeof some);
        for (int i = 0; i < count && i < 16; i++) memcpy(some[i], p + i * step, (left < DEPTH ? left : DEPTH) * bytes);
        p = some[0], step = sizeof some[0];
    }
    UNROLLED for (int i = 0; i < 16; i++, p += step, to += 32) {
        for (long line = 0; line < DEPTH * bytes; line += 64)
            __builtin_prefetch(weight + i * stride * bytes + ahead + line, 0, 2);
        if (kind == FLOAT32) split(3, _mm512_loadu_ps(p), _mm512_loadu_ps(p + 64), to);
        else if (kind == BFLOAT16) _mm512_store_si512(to, _mm512_loadu_si512(p));
        else
            split(1, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))),
                  _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16)))), to);
    }
}

/* Rows of x, `stride` numbers apart, from k to k + DEPTH as tiles: of 16 rows each part, then of the next. */
static void lay_rows(int kind, const float *x, long rows, long stride, long k, uint16_t *to) {
    for (long first = 0; first < rows; first += 16, to += PARTS(kind) * PART) {
        int32_t place[16];
        for (int n = 0; n < 16; n++) place[n] = first + n < rows ? n * stride : 0; /* some number: its sums go nowhere */
        const __m512i places = _mm512_loadu_si512(place);
        const float *from = x + first * stride + k;
        for (int i = 0; i < 16; i++)
            split(PARTS(kind), _mm512_i32gather_ps(places, from + PAIR(kind, i), 4),
                  _mm512_i32gather_ps(places, from + PAIR(kind, i) + PAIR_STEP(kind), 4), to + i * 32);
    }
}

/* GCC's own macro does not say that it reads memory. */
#define LOAD_ROWS(tile, p, bytes) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(p), "r"(bytes) : "memory")
#define LOAD_TILE(tile, p) LOAD_ROWS(tile, p, 64L)

/* Add the products of a tile of x and one of weights. */
#define PRODUCTS(kind, sum, x) \
    LOAD_TILE(7, x); \
    _tile_dpbf16ps(sum, 4, 7); \
    if (kind == FLOAT32) { _tile_dpbf16ps(sum, 5, 7); _tile_dpbf16ps(sum, 6, 7); } \
    LOAD_TILE(7, x + PART); \
    _tile_dpbf16ps(sum, 4, 7); \
    if (kind == FLOAT32) { _tile_dpbf16ps(sum, 5, 7); LOAD_TILE(7, x + 2 * PART); _tile_dpbf16ps(sum, 4, 7); }

/* tile[column][row] of 16 columns and `groups` times 16 rows, for numbers `begin` to `end` of the dimension that is
   summed; unless that is the first of them they are added. The next tiles of weights are stored well before they are loaded. */
INLINE void multiply(int kind, int groups, const uint16_t *x, const struct linear *a, const char *weight, long stride,
                     long count, long begin, long end, float *tile) {
    uint16_t parts[2][3 * PART] __attribute__((aligned(64)));
    float sums[4][16][16] __attribute__((aligned(64)));
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    lay(kind, a, weight, stride, count, begin, parts[0]);
    x += begin / DEPTH * groups * PARTS(kind) * PART;
    for (long k = begin, odd = 0; k < end; k += DEPTH, odd = !odd, x += groups * PARTS(kind) * PART) {
        if (k + DEPTH < end) lay(kind, a, weight, stride, count, k + DEPTH, parts[!odd]);
        LOAD_TILE(4, parts[odd]);
        if (kind == FLOAT32) { LOAD_TILE(5, parts[odd] + PART); LOAD_TILE(6, parts[odd] + 2 * PART); }
        PRODUCTS(kind, 0, x)
        if (groups > 1) { PRODUCTS(kind, 1, x + PARTS(kind) * PART) }
        if (groups > 2) { PRODUCTS(kind, 2, x + 2 * PARTS(kind) * PART) }
        if (groups > 3) { PRODUCTS(kind, 3, x + 3 * PARTS(kind) * PART) }
    }
    _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64); _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
    for (int n = 0; n < 16; n++)
        for (int group = 0; group < groups; group++) {
            vec *to = (vec *)(tile + n * WIDTH + group * 16), total = begin ? *to : (vec){0};
            *to = total + *(vec *)sums[group][n];
        }
}

/* The same for 32 columns of bf16, straight from where they lie, which share each tile of x. */
INLINE void multiply_two(int groups, long all, const uint16_t *x, const struct linear *a, const char *weight, long stride,
                         long begin, long end, float *tile) {
    float sums[4][16][16] __attribute__((aligned(64)));
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    x += begin / DEPTH * all * 2 * PART;
    for (long k = begin; k < end; k += DEPTH, x += all * 2 * PART) {
        const long ahead = look_ahead(2 * k, AHEAD_ROWS, 2 * a->dim, 32, 2 * stride);
        UNROLLED for (int i = 0; i < 32; i++) __builtin_prefetch(weight + i * stride * 2 + ahead, 0, 3);
        LOAD_ROWS(4, weight + k * 2, stride * 2);
        LOAD_ROWS(5, weight + k * 2 + 32 * stride, stride * 2);
        for (int part = 0; part < 2; part++) {
            LOAD_TILE(6, x + part * PART);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (groups > 1) {
                LOAD_TILE(7, x + (2 + part) * PART);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64); _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
    for (int n = 0; n < 32; n++)
        for (int group = 0; group < groups; group++) {
            vec *to = (vec *)(tile + n * WIDTH + group * 16), total = begin ? *to : (vec){0};
            *to = total + *(vec *)sums[2 * group + n / 16][n % 16];
        }
}

INLINE void multiply_rows(int kind, const uint16_t *x, const struct linear *a, const char *weight, long stride,
                          long count, long begin, long end, float *tile) {
    switch ((a->rows + 15) / 16) {
    case 1: multiply(kind, 1, x, a, weight, stride, count, begin, end, tile); return;
    case 2: multiply(kind, 2, x, a, weight, stride, count, begin, end, tile); return;
    case 3: multiply(kind, 3, x, a, weight, stride, count, begin, end, tile); return;
    default: multiply(kind, 4, x, a, weight, stride, count, begin, end, tile);
    }
}

static void product_amx(long kind, const uint16_t *x, const struct linear *a, const char *weight, long stride,
                        long count, long begin, long end, float *tile) {
    if (kind == FLOAT32) multiply_rows(FLOAT32, x, a, weight, stride, count, begin, end, tile);
    else if (kind == INT8) multiply_rows(INT8, x, a, weight, stride, count, begin, end, tile);
    else if (a->dim % DEPTH == 0 && count == 32) {
        const long all = (a->rows + 15) / 16;
        for (long g = 0; g < all; g += 2)
            if (all - g > 1) multiply_two(2, all, x + g * 2 * PART, a, weight, stride, begin, end, tile + g * 16);
            else multiply_two(1, all, x + g * 2 * PART, a, weight, stride, begin, end, tile + g * 16);
    } else
        for (; count > 0; weight += 32 * stride, tile += 16 * WIDTH, count -= 16)
            multiply_rows(BFLOAT16, x, a, weight, stride, count, begin, end, tile);
}
#else
static void begin_amx(void) {}
static void end_amx(void) {}
static void lay_rows(int kind, const float *x, long rows, long stride, long k, uint16_t *to) {}
static void product_amx(long kind, const uint16_t *x, const struct linear *a, const char *weight, long stride,
                        long count, long begin, long end, float *tile) {}
#endif

enum { MOST_DOTS = LANES != 16 ? 6 : READS_NEXT ? 9 : 12, ROWS_OF_PASS = 8 };

/* Whether x is rounded to bf16, where the form is "dot". */
INLINE int rounds(long kind, long rows) { return HAS_PAIRS && kind == BFLOAT16 && rows > 6; }

/* Whether the form is "outer", or "amx". */
INLINE int is_outer(long rows) { return LANES != 16 && rows > MOST_DOTS; }
INLINE int has_tiles(long kind, long rows) { return amx && rows > (kind == FLOAT32 ? MOST_DOTS : 6); }

/* The form of a linear; "dot" of bf16 may round x. */
enum { IS_DOT, IS_ROUNDED_DOT, IS_OUTER, IS_AMX };
long form(long kind, long rows) {
    return has_tiles(kind, rows) ? IS_AMX : is_outer(rows) ? IS_OUTER : rounds(kind, rows) ? IS_ROUNDED_DOT : IS_DOT;
}

/* Columns of a pass, whose sums fit in registers. */
#define DOT_COLUMNS(rows) ((rows) * 4 <= SUMS ? 4 : (rows) * 3 <= SUMS ? 3 : 2)

/* A pass of up to MOST_DOTS rows over a group of columns. */
#define PASS(ROWS, CALL, ...) \
    case ROWS: \
        for (long n = 0; n < count; n += DOT_COLUMNS(ROWS)) \
            CALL(__VA_ARGS__, a, weight + n * stride * BYTES[kind], stride, count - n, after, tile + n * COLUMN_STEP); \
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
    static __attribute__((noinline)) void NAME(long rows, const float *x, const struct linear *a, const char *weight, \
                                               long stride, long count, long after, float *tile) { \
        const int kind = KIND, rounded = ROUNDED; \
        switch (rows) { ALL(DOT) } \
    }
PASSES(pass_float32, FLOAT32, 0)
PASSES(pass_bfloat16, BFLOAT16, 0)
PASSES(pass_rounded, BFLOAT16, 1)
PASSES(pass_int8, INT8, 0)

static __attribute__((noinline)) void pass_words(long rows, const float *scale, const int16_t *x, const struct linear *a,
                                                 const char *weight, long stride, long count, long after, float *tile) {
    const int kind = INT8;
    switch (rows) { ALL(DOT_WORDS) }
}

#define OUTER(KIND) \
    if (rows <= LANES) outer(KIND, 1, x, a, weight + n * stride * BYTES[kind], stride, count - n, tile + n * WIDTH); \
    else outer(KIND, 2, x, a, weight + n * stride * BYTES[kind], stride, count - n, tile + n * WIDTH);

/* Of the rows that are left, how many the next pass of "outer" takes: those that fill a vector or two. */
static long rows_of_outer(long left) {
    if (left > BESIDE && left <= LANES + BESIDE) return left < LANES ? left : LANES;
    return left < 2 * LANES ? left : 2 * LANES;
}

/* Rows of a pass: all, or as many as share their columns in registers best. */
static long rows_of_pass(long rows) {
    const long passes = rows > MOST_DOTS ? (rows + ROWS_OF_PASS - 1) / ROWS_OF_PASS : 1;
    return (rows + passes - 1) / passes;
}

/* `count` columns of a group, some rows at a time: see `rows_of_team` for how x is laid out. */
static void product(long kind, const float *x, const struct linear *a, const char *weight, long stride, long count,
                    long after, float *tile) {
    const long block = LANES * SPAN(kind), padded = (a->dim + block - 1) / block * block, each = rows_of_pass(a->rows);
    if (is_outer(a->rows)) {
        for (long left = a->rows, rows; left; left -= rows, x += rows * padded, tile += rows) {
            rows = rows_of_outer(left);
            if (rows > BESIDE) {
                for (long n = 0; n < count; n += SUMS / (rows > LANES ? 2 : 1))
                    if (kind == FLOAT32) { OUTER(FLOAT32) } else if (kind == BFLOAT16) { OUTER(BFLOAT16) } else { OUTER(INT8) }
            } else if (kind == FLOAT32) pass_float32(rows, x, a, weight, stride, count, after, tile);
            else if (kind == BFLOAT16) pass_bfloat16(rows, x, a, weight, stride, count, after, tile);
            else pass_int8(rows, x, a, weight, stride, count, after, tile);
        }
        return;
    }
    for (long m = 0; m < a->rows; m += each, tile += each * ROW_STEP) {
        const long rows = a->rows - m < each ? a->rows - m : each;
        const float *own = x + m * (padded + BETWEEN);
        if (kind == FLOAT32) pass_float32(rows, own, a, weight, stride, count, after, tile);
        else if (rounds(kind, a->rows)) pass_rounded(rows, own, a, weight, stride, count, after, tile);
        else if (kind == BFLOAT16) pass_bfloat16(rows, own, a, weight, stride, count, after, tile);
        else if (!HAS_WORDS) pass_int8(rows, own, a, weight, stride, count, after, tile);
        else pass_words(rows, x + m, (const int16_t *)(x + WIDTH) + m * padded, a, weight, stride, count, after, tile);
    }
}

INLINE vec activated(long activation, vec y, vec gate) {
    if (activation == GELU) return gelu(y);
    return activation == SWIGLU ? (vec)(y * (gate / (1 + exponential(-gate)))) : y;
}

#if LANES == 16
#define MASK(left) ((left) >= 16 ? 0xffff : (1 << (left)) - 1)

/* Some numbers, of which `left` are there. */
INLINE vec some_of(struct vector v, long i, long left) {
    if (v.kind == FLOAT32) return (vec)_mm512_maskz_loadu_ps(MASK(left), (const float *)v.data + i);
    vec found = {0};
    for (long lane = 0; lane < LANES && lane < left; lane++) found[lane] = at(v, i + lane);
    return found;
}

/* Scale, bias, activation and residual of `count` results of one matrix from row `n` of it on, and their place; of "dot"
   on AVX-512, which has them row by row. */
static void finish_rows(const struct linear *a, int which, long column, long n, long count, float *tile,
                        const float *gates) {
    const struct vector scale = a->weight[which].scale, bias = a->bias[which];
    const long all = a->columns[0] + a->columns[1] + a->columns[2], gate = a->columns[which];
    for (long i = 0; i < count; i += LANES) {
        const long left = count - i;
        vec of[4] = {(vec){0} + 1, {0}, (vec){0} + 1, {0}};
        if (scale.data) of[0] = some_of(scale, n + i, left);
        if (bias.data) of[1] = some_of(bias, n + i, left);
        if (a->activation == SWIGLU && scale.data) of[2] = some_of(scale, gate + n + i, left);
        if (a->activation == SWIGLU && bias.data) of[3] = some_of(bias, gate + n + i, left);
        for (long m = 0; m < a->rows; m++) {
            vec y = *(const vec *)(tile + m * ROW_STEP + i) * of[0] + of[1];
            if (a->activation) y = activated(a->activation, y, *(const vec *)(gates + m * ROW_STEP + i) * of[2] + of[3]);
            if (a->residual) y += some_of((struct vector){(const char *)(a->residual + m * all + column), FLOAT32}, i, left);
            if (a->out.kind == FLOAT32)
                _mm512_mask_storeu_ps((float *)a->out.data + m * a->out.stride + column + i, MASK(left), (__m512)y);
            else
                for (long lane = 0; lane < LANES && lane < left; lane++) put(a->out, m, column + i + lane, y[lane]);
        }
    }
}

#else
#define finish_rows finish
#endif

/* The same of the other forms, which have them column by column. */
static void finish(const struct linear *a, int which, long column, long n, long count, float *tile, const float *gates) {
    const struct vector scale = a->weight[which].scale, bias = a->bias[which];
    const long all = a->columns[0] + a->columns[1] + a->columns[2], gate = a->columns[which];
    for (long i = 0; i < count; i++, n++)
        for (long m = i * WIDTH; m < i * WIDTH + a->rows; m += LANES) {
            vec y = *(const vec *)(tile + m);
            if (scale.data) y *= at(scale, n);
            if (bias.data) y += at(bias, n);
            vec z = {0};
            if (a->activation == SWIGLU) {
                z = *(const vec *)(gates + m);
                if (scale.data) z *= at(scale, gate + n);
                if (bias.data) z += at(bias, gate + n);
            }
            *(vec *)(tile + m) = activated(a->activation, y, z);
        }
    for (long m = 0; m < a->rows; m++) {
        long i = 0;
#if LANES == 16
        const ivec places = (ivec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * WIDTH;
        for (; i + 16 <= count && a->out.kind == FLOAT32; i += 16) {
            vec y = (vec)_mm512_i32gather_ps((__m512i)places, tile + i * WIDTH + m, 4);
            if (a->residual) y += *(const vec *)(a->residual + m * all + column + i);
            *(vec *)((float *)a->out.data + m * a->out.stride + column + i) = y;
        }
#endif
        for (; i < count; i++)
            put(a->out, m, column + i, tile[i * WIDTH + m] + (a->residual ? a->residual[m * all + column + i] : 0));
    }
}

/* A row in fp32, and zeros up to `padded`. */
static void widen(const struct matrix *t, long row, long dim, long padded, float *to) {
    const char *p = t->data + row * t->stride * BYTES[t->kind];
    if (t->kind == FLOAT32) memcpy(to, p, dim * sizeof *to);
    else for (long k = 0; k < dim; k++) ((uint32_t *)to)[k] = (uint32_t)((const uint16_t *)p)[k] << 16;
    memset(to + dim, 0, (padded - dim) * sizeof *to);
}

/* `(x - mean) / sqrt(variance + eps) * gain + bias + after`, in place; bias and after may be NULL. */
static void normalise(float *x, long dim, double eps, struct vector gain, struct vector bias, const float *after) {
    vec total = {0};
    long k;
    for (k = 0; k < dim; k += LANES) total += *(vec *)(x + k); /* zeros follow the last */
    const float mean = sum(total) / dim;
    total = (vec){0};
    for (k = 0; k + LANES <= dim; k += LANES) {
        const vec centred = *(vec *)(x + k) - mean;
        total += centred * centred;
    }
    float variance = sum(total);
    for (; k < dim; k++) variance += (x[k] - mean) * (x[k] - mean);
    const float rstd = 1 / sqrtf(variance / dim + eps);
    for (k = 0; k < dim; k++) x[k] = (x[k] - mean) * rstd * at(gain, k);
    if (bias.data) for (k = 0; k < dim; k++) x[k] += at(bias, k);
    if (after) for (k = 0; k < dim; k++) x[k] += after[k];
}

/* The most rows that a linear has here; beyond them PyTorch is as fast. */
long most_rows(long kind) {
    if (LANES != 16) return 4 * LANES;
    return kind == FLOAT32 ? 8 * WIDTH : has_tiles(kind, WIDTH) ? WIDTH : 4 * WIDTH;
}

/* Of `rows` rows, how many are computed at a time. */
static long rows_at_once(long rows) {
    const long times = (rows + WIDTH - 1) / WIDTH;
    return ((rows + times - 1) / times + 15) / 16 * 16;
}

/* Parts of the dimension that is summed, of each of which all tiles of x stay in a cache. */
static long parts_of_sum(long rows, long padded) { return ((rows + 15) / 16 * 16 * padded * 6 - 1) / CACHED + 1; }

/* Numbers of room that a linear needs: for the fewest rows each thread lays them out for itself, without a meeting. */
static long room_of_thread(long rows, long dim) { return 2 * rows * (dim + 4 * LANES + BETWEEN) + WIDTH; }
static long room(long rows, long dim, long columns, long threads) {
    const long few = rows < MOST_DOTS ? rows : MOST_DOTS, own = threads * room_of_thread(few, dim); /* a last layer's */
    const long padded = dim + 4 * LANES, once = rows_at_once(rows) + LANES;
    const long sums = amx && parts_of_sum(once, padded) > 1 ? (columns + 32 * threads) * 2 * WIDTH : 0;
    const long shared = amx ? once * (padded + BETWEEN + 3 * padded / 2) + sums : room_of_thread(once, dim);
    return shared > own ? shared : own;
}

/* A linear of few rows by all threads of a team, in `x`, the room that it needs. */
static void rows_of_team(const struct linear *a, float *x, const struct member *me) {
    const long threads = me->threads, thread = me->thread, rows = a->rows, dim = a->dim;
    const long kind = a->weight[0].matrix.kind, span = SPAN(kind), the_form = form(kind, rows);
    const int tiles = the_form == IS_AMX, dots = !tiles && the_form != IS_OUTER, rounded = the_form == IS_ROUNDED_DOT;
    const int alone = dots && rows <= MOST_DOTS, words = HAS_WORDS && dots && kind == INT8;
    const long block = tiles ? DEPTH : LANES * span, padded = (dim + block - 1) / block * block, blocks = padded / block;
    const long stride = padded + BETWEEN;
    if (alone) x += thread * room_of_thread(rows, dim);
    float *laid = dots && (span == 1 || rounded) ? x : x + rows * stride;

    const long begin = alone ? 0 : rows * thread / threads, end = alone ? rows : rows * (thread + 1) / threads;
    for (long m = begin; m < end; m++) {
        float *row = x + m * stride;
        widen(&a->x, m, dim, padded, row);
        if (a->stream) {
            normalise(row, dim, a->eps, a->stream_gain, (struct vector){0}, a->stream + m * dim);
            if (!alone || !thread) memcpy(a->total + m * dim, row, dim * sizeof *row);
        }
        if (a->gain.data) normalise(row, dim, a->eps, a->gain, a->norm_bias, NULL);
        if (rounded) round_row(row, padded);
        else if (words) laid[m] = to_words(row, padded, (int16_t *)(laid + WIDTH) + m * padded);
        else if (dots && span > 1)
            for (long k = 0; k < padded; k += block)
                for (long j = 0; j < span; j++) /* see SPAN */
                    for (long i = 0; i < LANES; i++) laid[m * stride + k + j * LANES + i] = row[k + i * span + j];
    }
    if (!alone) meet(me);
    if (!dots) {
        for (long k = blocks * thread / threads * block; k < blocks * (thread + 1) / threads * block; k += block) {
            if (tiles) lay_rows(kind, x, rows, stride, k, (uint16_t *)laid + k / DEPTH * ((rows + 15) / 16) * PARTS(kind) * PART);
            else for (long m = 0, some; m < rows; m += some) {
                some = rows_of_outer(rows - m);
                const int dot = some <= BESIDE;
                const long width = dot ? some : some <= LANES ? LANES : 2 * LANES;
                for (long n = 0; n < width; n++)
                    for (long i = 0; i < block; i++) {
                        const long at = k + i % span * LANES + i / span, to = dot ? n * stride + at : at * width + n;
                        laid[m * padded + to] = n < some ? x[(m + n) * stride + k + i] : 0;
                    }
            }
        }
        meet(me);
    }
    float some[2][32 * WIDTH] __attribute__((aligned(64))) = {{0}}; /* lanes without a row stay zero */
    const long parts = tiles ? parts_of_sum(rows, padded) : 1, part = (blocks + parts - 1) / parts * block;
    if (tiles) begin_amx();
    for (long which = 0, before = 0; which < MATRICES; before += a->columns[which++]) {
        const struct matrix *w = &a->weight[which].matrix;
        const long columns = a->columns[which], row = w->stride * BYTES[kind];
        const int together = !alone || (columns >= 8 * GROUP * threads && (rows > 4 || words)); /* `finish` costs less of more */
        const long unit = tiles ? TILE_COLUMNS(kind) : !together ? DOT_COLUMNS(rows)
                        : dots || rows > 2 * LANES ? GROUP : rows > LANES + BESIDE ? SUMS / 2 : SUMS;
        const long pass = alone ? DOT_COLUMNS(rows) : unit; /* columns whose lines are read while others are computed */
        const long after = row ? pass * ((AHEAD_NEXT - 1) / (pass * row) + 1) : 0;
        const long units = (columns + unit - 1) / unit;
        const long first = units * thread / threads * unit, last = units * (thread + 1) / threads * unit;
        const long stop = columns < last ? columns : last;
        float *own = laid + (rows + 15) / 16 * 24 * padded + 2 * first * WIDTH; /* all sums, behind the tiles of x */
        for (long k = 0; k < padded; k += part)
            for (long n = first; n < stop; n += unit) {
                const long count = stop - n < unit ? stop - n : unit, to = k + part < padded ? k + part : padded;
                float *const kept = own + 2 * (n - first) * WIDTH, *sums[2] = {some[0], some[1]};
                if (parts > 1) sums[0] = kept, sums[1] = kept + unit * WIDTH;
                for (int gates = 0; gates < (a->activation == SWIGLU ? 2 : 1); gates++) {
                    const char *weight = w->data + (n + gates * columns) * row;
                    if (tiles) product_amx(kind, (uint16_t *)laid, a, weight, w->stride, count, k, to, sums[gates]);
                    else product(kind, laid, a, weight, w->stride, count, after, sums[gates]);
                }
                if (to == padded) (dots && LANES == 16 ? finish_rows : finish)(a, which, before + n, n, count, sums[0], sums[1]);
            }
    }
    if (tiles) end_amx();
    meet(me);
}

/* A linear by all threads of a team, which have finished when they meet again. */
static void linear_of_team(const struct linear *a, float *x, const struct member *me) {
    const long once = rows_at_once(a->rows), all = a->columns[0] + a->columns[1] + a->columns[2];
    for (long m = 0; m < a->rows; m += once) {
        struct linear some = *a;
        some.rows = a->rows - m < once ? a->rows - m : once;
        some.x.data += m * a->x.stride * BYTES[a->x.kind];
        some.out.data += m * a->out.stride * BYTES[a->out.kind];
        if (a->stream) some.stream += m * a->dim, some.total += m * a->dim;
        if (a->residual) some.residual += m * all;
        rows_of_team(&some, x, me);
    }
}

struct linear_call {
    const struct linear *linear;
    float *x;
};

static void linear_by_member(const void *argument, const struct member *me) {
    const struct linear_call *call = argument;
    linear_of_team(call->linear, call->x, me);
}

/* This and what else returns a number: 0, or 1 where there is no memory. */
int linear(const struct linear *a, long threads) {
    const long most = a->columns[0] > a->columns[1] ? a->columns[0] : a->columns[1];
    const struct linear_call call = {a, aligned_alloc(64, (room(a->rows, a->dim, most, threads) * sizeof(float) + 63) / 64 * 64)};
    if (!call.x) return 1;
    in_team(linear_by_member, &call, threads);
    free(call.x);
    return 0;
}

struct cache { /* keys or values of the prefix, fp32 */
    const float *data;
    long prompt, token, head; /* strides */
};

struct decode {
    struct matrix q, k, v, out; /* strides of tokens; heads lie side by side */
    struct cache prefix_k, prefix_v;
    const float *bias, *mask, *cos, *sin;
    long q_row, kv_row, rows, seq, suffix, heads, kv_heads, dim_head, prompts, prefix, width, cosine;
    double scale;
};

/* A head of a suffix token, rotated, then of length 1 with `cosine`, then times `scale`. */
static void prepare(const struct decode *a, struct matrix t, long from, long token, float scale, float *to) {
    const long dim = a->dim_head;
    const float *cos = a->cos + token * a->width, *sin = a->sin + token * a->width;
    for (long d = 0; d < dim; d++) to[d] = at((struct vector){t.data, t.kind}, from + d);
    for (long d = 0; d < a->width; d += 2) {
        const float x = to[d], y = to[d + 1];
        to[d] = x * cos[d] + y * sin[d];
        to[d + 1] = y * cos[d + 1] + x * sin[d + 1];
    }
    if (a->cosine) {
        vec squares = {0};
        float square = 0;
        long d = 0;
        for (; d + LANES <= dim; d += LANES) squares += *(vec *)(to + d) * *(vec *)(to + d);
        for (; d < dim; d++) square += to[d] * to[d];
        scale /= fmaxf(sqrtf(square + sum(squares)), 1e-12f);
    }
    for (long d = 0; d < dim; d++) to[d] *= scale;
}

/* Attention of up to LANES queries that share their keys, a lane for each; own keys and values are prepared. */
static void attend(const struct decode *a, long row, long kv_head, long first, const float *own_keys, const float *own_values) {
    const long group = a->heads / a->kv_heads, count = group * a->seq - first < LANES ? group * a->seq - first : LANES;
    const long dim = a->dim_head, prompt = row / (a->rows / a->prompts), keys = a->prefix + a->suffix;
    const float *of_bias[LANES], *key[keys + 3], *value[keys];
    float query[dim];
    vec laid[dim], weight[keys + 3], most = {0}, total = {0};
    long token[LANES];

    memset(laid, 0, sizeof laid);
    for (long lane = 0; lane < count; lane++) {
        const long s = (first + lane) / group, head = kv_head * group + (first + lane) % group;
        token[lane] = a->suffix - a->seq + s;
        of_bias[lane] = a->bias + (token[lane] * a->heads + head) * keys;
        prepare(a, a->q, row * a->q_row + s * a->q.stride + head * dim, token[lane], a->scale, query);
        for (long d = 0; d < dim; d++) laid[d][lane] = query[d];
    }
    for (long j = 0; j < a->prefix; j++) {
        key[j] = a->prefix_k.data + prompt * a->prefix_k.prompt + j * a->prefix_k.token + kv_head * a->prefix_k.head;
        value[j] = a->prefix_v.data + prompt * a->prefix_v.prompt + j * a->prefix_v.token + kv_head * a->prefix_v.head;
    }
    for (long j = 0; j < a->suffix; j++)
        key[a->prefix + j] = own_keys + j * dim, value[a->prefix + j] = own_values + j * dim;
    key[keys] = key[keys + 1] = key[keys + 2] = key[0]; /* four at a time */
    memset(weight, 0, sizeof weight);
    for (long lane = 0; lane < count; lane++) {
        if (a->bias) for (long j = 0; j < keys; j++) weight[j][lane] = of_bias[lane][j];
        else for (long j = a->prefix + token[lane] + 1; j < keys; j++) weight[j][lane] = -INFINITY;
    }
    for (long j = 0; j < keys; j += 4) {
        vec sums[4] = {{0}};
        for (long d = 0; d < dim; d++) UNROLLED for (int i = 0; i < 4; i++) sums[i] += key[j + i][d] * laid[d];
        UNROLLED for (int i = 0; i < 4; i++) weight[j + i] += sums[i];
    }
    for (long j = 0; j < keys; j++) {
        if (a->mask && j < a->prefix) weight[j] += a->mask[prompt * a->prefix + j];
        most = j ? choose(weight[j] > most, weight[j], most) : weight[0];
    }
    for (long j = 0; j < keys; j++) total += weight[j] = exponential(weight[j] - most);
    total = 1 / total;
    for (long d = 0; d < dim; d += 8) {
        vec sums[8] = {{0}};
        const long here = dim - d < 8 ? dim - d : 8;
        if (here == 8)
            for (long j = 0; j < keys; j++) UNROLLED for (int i = 0; i < 8; i++) sums[i] += value[j][d + i] * weight[j];
        else
            for (long j = 0; j < keys; j++) for (long i = 0; i < here; i++) sums[i] += value[j][d + i] * weight[j];
        for (long i = 0; i < here; i++) laid[d + i] = sums[i] * total;
    }
    for (long lane = 0; lane < count; lane++) {
        const long s = (first + lane) / group, head = kv_head * group + (first + lane) % group;
        for (long d = 0; d < dim; d++) put(a->out, row * a->seq + s, head * dim + d, laid[d][lane]);
    }
}

/* Attention of suffix tokens over a prefix and themselves, by all threads of a team. */
static void decode_of_team(const struct decode *a, const struct member *me) {
    const long parts = (a->heads / a->kv_heads * a->seq + LANES - 1) / LANES, all = a->rows * a->kv_heads * parts;
    const long threads = me->threads, thread = me->thread, dim = a->dim_head;
    float keys[a->suffix][dim], values[a->suffix][dim];
    for (long i = all * thread / threads, known = -1; i < all * (thread + 1) / threads; i++) {
        const long row = i / parts / a->kv_heads, kv_head = i / parts % a->kv_heads;
        const long from = row * a->kv_row + kv_head * dim;
        for (long j = 0; j < a->suffix && known != i / parts; j++) {
            prepare(a, a->k, from + j * a->k.stride, j, 1, keys[j]);
            for (long d = 0; d < dim; d++) values[j][d] = at((struct vector){a->v.data, a->v.kind}, from + j * a->v.stride + d);
        }
        known = i / parts;
        attend(a, row, kv_head, i % parts * LANES, keys[0], values[0]);
    }
    meet(me);
}

static void decode_by_member(const void *argument, const struct member *me) { decode_of_team(argument, me); }

void decode_attention(const struct decode *a, long threads) { in_team(decode_by_member, a, threads); }

struct block {
    struct weight q, k, v, out, expand, contract; /* without v, k has the values' rows behind the keys' */
    struct vector q_bias, k_bias, v_bias, out_bias, expand_bias, contract_bias;
    struct vector gain, norm_bias, out_gain, ff_gain, ff_norm_bias, inner_gain;
};

struct blocks {
    const float *x; /* (rows * suffix, dim) */
    float *out; /* (rows * outputs, columns); without outputs raw keys and values (depth, rows * suffix, 2, kv_heads, dim_head) */
    const struct block *blocks; /* and where there is a head one more: q, of a norm of rows divided by their maximum */
    long depth, dim, inner, outputs, head, columns, activation, of_k, of_v; /* strides of the caches from layer to layer */
    struct decode attention; /* of layer 0, without q, k, v, out */
    double eps;
};

/* Memory for what blocks give each other: (tokens, width) each. */
struct scratch {
    float *linears, *projected, *mixed, *hidden, *stream, *merged, *total;
};

/* False where there is none; else `linears` is to be freed. */
static int get_scratch(const struct blocks *a, long threads, struct scratch *s) {
    const struct decode *decode = &a->attention;
    const long own = decode->heads * decode->dim_head, shared = decode->kv_heads * decode->dim_head, dim = a->dim;
    const long tokens = decode->rows * decode->suffix, width = own + 2 * shared;
    long widest = a->inner > own ? a->inner : own;
    widest = widest > dim ? widest : dim;
    widest = widest > a->columns ? widest : a->columns;
    const long for_linears = (room(tokens, widest, widest > 2 * shared ? widest : 2 * shared, threads) + 15) / 16 * 16;
    const long need = for_linears + tokens * (width + own + a->inner + 3 * dim);
    if (!(s->linears = aligned_alloc(64, (need * sizeof(float) + 63) / 64 * 64))) return 0;
    s->projected = s->linears + for_linears;
    s->mixed = s->projected + tokens * width;
    s->hidden = s->mixed + tokens * own;
    s->stream = s->hidden + tokens * a->inner;
    s->merged = s->stream + tokens * dim;
    s->total = s->merged + tokens * dim;
    return 1;
}

/* All blocks, and the head, by all threads of a team, of the tokens in `stream`, which they overwrite. */
static void blocks_of_team(const struct blocks *a, const struct scratch *s, const struct member *me) {
    struct decode decode = a->attention;
    const long own = decode.heads * decode.dim_head, shared = decode.kv_heads * decode.dim_head, dim = a->dim;
    const long rows = decode.rows * decode.suffix, width = own + 2 * shared, outputs = a->outputs, suffix = decode.suffix;
    float *const y = s->projected, *const mixed = s->mixed, *const hidden = s->hidden, *const stream = s->stream;
    float *const o = s->merged, *const total = s->total, *const scratch = s->linears;
    for (long i = 0; i < a->depth; i++) {
        const struct block *b = a->blocks + i;
        const int last = i == a->depth - 1;
        const long left = last ? decode.rows * outputs : rows;
        const struct linear project = {
            {(char *)stream, FLOAT32, dim}, {(char *)y, FLOAT32, width}, {b->q, b->k, b->v}, {b->q_bias, b->k_bias, b->v_bias},
            {0}, b->gain, b->norm_bias, NULL, NULL, NULL,
            {own, b->v.matrix.data ? shared : 2 * shared, b->v.matrix.data ? shared : 0}, rows, dim, NONE, a->eps};
        linear_of_team(&project, scratch, me);
        if (!outputs) {
            for (long r = rows * me->thread / me->threads; r < rows * (me->thread + 1) / me->threads; r++)
                memcpy(a->out + (i * rows + r) * 2 * shared, y + r * width + own, 2 * shared * sizeof *y);
            if (last) break;
        }
        if (last && outputs < suffix && !me->thread) { /* which is read when all have met behind attention */
            for (long r = 0; r < decode.rows; r++)
                memmove(stream + r * outputs * dim, stream + ((r + 1) * suffix - outputs) * dim, outputs * dim * sizeof *stream);
        }
        decode.seq = last ? outputs : suffix;
        decode.q = (struct matrix){(char *)(y + (last ? (suffix - outputs) * width : 0)), FLOAT32, width};
        decode.k = (struct matrix){(char *)(y + own), FLOAT32, width};
        decode.v = (struct matrix){(char *)(y + own + shared), FLOAT32, width};
        decode.out = (struct matrix){(char *)mixed, FLOAT32, own};
        decode.q_row = decode.kv_row = suffix * width;
        decode.prefix_k.data = a->attention.prefix_k.data + i * a->of_k;
        decode.prefix_v.data = a->attention.prefix_v.data + i * a->of_v;
        decode_of_team(&decode, me);
        const int normed = b->out_gain.data != NULL;
        const struct linear merge = {
            {(char *)mixed, FLOAT32, own}, {(char *)(normed ? o : total), FLOAT32, dim}, {b->out}, {b->out_bias},
            {0}, {0}, {0}, NULL, normed ? NULL : stream, NULL, {dim}, left, own, NONE, a->eps};
        linear_of_team(&merge, scratch, me);
        const struct linear expand = {
            {(char *)(normed ? o : total), FLOAT32, dim}, {(char *)hidden, FLOAT32, a->inner}, {b->expand}, {b->expand_bias},
            b->out_gain, b->ff_gain, b->ff_norm_bias, normed ? stream : NULL, NULL, total,
            {a->inner}, left, dim, a->activation, a->eps};
        linear_of_team(&expand, scratch, me);
        const struct linear contract = {
            {(char *)hidden, FLOAT32, a->inner}, {(char *)(last && !a->head ? a->out : stream), FLOAT32, dim}, {b->contract}, {b->contract_bias},
            {0}, b->inner_gain, {0}, NULL, total, NULL, {dim}, left, a->inner, NONE, a->eps};
        linear_of_team(&contract, scratch, me);
        if (!last || !a->head) continue;
        for (long r = left * me->thread / me->threads; r < left * (me->thread + 1) / me->threads; r++) {
            float most = stream[r * dim];
            for (long k = 1; k < dim; k++) most = stream[r * dim + k] > most ? stream[r * dim + k] : most;
            for (long k = 0; k < dim; k++) stream[r * dim + k] /= most;
        }
        meet(me);
        const struct linear head = {
            {(char *)stream, FLOAT32, dim}, {(char *)a->out, FLOAT32, a->columns}, {b[1].q}, {b[1].q_bias},
            {0}, b[1].gain, b[1].norm_bias, NULL, NULL, NULL, {a->columns}, left, dim, NONE, a->eps};
        linear_of_team(&head, scratch, me);
    }
}

struct blocks_call {
    const struct blocks *blocks;
    struct scratch scratch;
};

static void blocks_by_member(const void *argument, const struct member *me) {
    const struct blocks_call *call = argument;
    blocks_of_team(call->blocks, &call->scratch, me);
}

int run_blocks(const struct blocks *a, long threads) {
    struct blocks_call call = {.blocks = a};
    if (!get_scratch(a, threads, &call.scratch)) return 1;
    memcpy(call.scratch.stream, a->x, a->attention.rows * a->attention.suffix * a->dim * sizeof(float));
    in_team(blocks_by_member, &call, threads);
    free(call.scratch.linears);
    return 0;
}

enum { AS_IT_IS, RANGE, LENGTH }; /* of a clean estimate: limited to a radius, or scaled to it */

struct run {
    struct blocks blocks; /* of rows that hold as many samples as there are outputs; x and out are found here */
    const float *time, *null, *coefficients; /* of each step: a row's first tokens; predictions; six numbers */
    struct vector query;
    float *x, *x0; /* (samples, dim), in place */
    long clamp;
    double cond_scale, radius;
};

/* Products and sums apart, as PyTorch rounds them. */
#ifdef __clang__
#define UNFUSED
#define UNFUSED_HERE _Pragma("clang fp contract(off)")
#else
#define UNFUSED __attribute__((optimize("fp-contract=off")))
#define UNFUSED_HERE
#endif

/* Guidance, prediction to clean estimate, its clamp and the solver's update of a sample. */
static UNFUSED void update(const struct run *a, const float *noise, long index, long sample, float *pred) {
    UNFUSED_HERE
    const long dim = a->blocks.dim, first = sample * dim;
    const float scale = a->cond_scale, radius = a->radius, *null = a->null + index * dim, *of = a->coefficients + index * 6;
    float *x = a->x + first, *x0 = a->x0 + first, square = 0;
    for (long k = 0; k < dim; k++) {
        const float clean = of[0] * x[k] + of[1] * (null[k] + (pred[k] - null[k]) * scale);
        pred[k] = a->clamp != RANGE ? clean : clean > radius ? radius : clean < -radius ? -radius : clean; /* NaN stays */
    }
    if (a->clamp == LENGTH) {
        for (long k = 0; k < dim; k++) square += pred[k] * pred[k];
        const float length = sqrtf(square), fit = radius / (length < 1e-12f ? 1e-12f : length);
        for (long k = 0; k < dim; k++) pred[k] *= fit;
    }
    for (long k = 0; k < dim; k++) {
        x[k] = of[2] * x[k] + of[3] * pred[k] + of[4] * x0[k] + (noise ? of[5] * noise[first + k] : 0);
        x0[k] = pred[k];
    }
}

struct steps_call {
    const struct run *run;
    struct scratch scratch;
    float *predictions; /* (samples, dim) */
    const float *const *noise; /* of each step: (samples, dim), or NULL */
    long first, count;
};

/* The tokens of a row: of the time, its samples, and as many queries. */
static void make_tokens(const struct run *a, long index, long row, float *to) {
    const long dim = a->blocks.dim, samples = a->blocks.outputs, times = a->blocks.attention.suffix - 2 * samples;
    memcpy(to, a->time + index * times * dim, times * dim * sizeof *to);
    memcpy(to += times * dim, a->x + row * samples * dim, samples * dim * sizeof *to);
    to += samples * dim;
    for (long sample = 0; sample < samples; sample++, to += dim)
        for (long k = 0; k < dim; k++) to[k] = at(a->query, k);
}

static void steps_by_member(const void *argument, const struct member *me) {
    const struct steps_call *call = argument;
    const struct run *a = call->run;
    const long rows = a->blocks.attention.rows, suffix = a->blocks.attention.suffix, dim = a->blocks.dim;
    const long begin = rows * me->thread / me->threads, end = rows * (me->thread + 1) / me->threads; /* of its own */
    struct blocks blocks = a->blocks;
    blocks.out = call->predictions;
    for (long i = 0; i < call->count; i++) {
        for (long row = begin; row < end; row++)
            make_tokens(a, call->first + i, row, call->scratch.stream + row * suffix * dim);
        meet(me);
        blocks_of_team(&blocks, &call->scratch, me);
        for (long sample = begin * blocks.outputs; sample < end * blocks.outputs; sample++)
            update(a, call->noise[i], call->first + i, sample, call->predictions + sample * dim);
    }
}

/* Some steps of a run from the first on: tokens, all blocks, and what the solver makes of them. */
int run_steps(const struct run *a, const float *const *noise, long first, long count, long threads) {
    struct steps_call call = {.run = a, .noise = noise, .first = first, .count = count};
    const long numbers = a->blocks.attention.rows * a->blocks.outputs * a->blocks.dim;
    if (!get_scratch(&a->blocks, threads, &call.scratch)) return 1;
    const int failed = !(call.predictions = aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64));
    if (!failed) in_team(steps_by_member, &call, threads);
    free(call.predictions);
    free(call.scratch.linears);
    return failed;
}
