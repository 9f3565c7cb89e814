/* Numbers of fp32, bf16 and int8, vectors of them, and functions of a vector. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

/* Python has a mirror of the struct in structs.py, of so many fields of 8 bytes. */
#define MIRRORED(name, fields) \
    _Static_assert(sizeof(struct name) == 8 * (fields), "structs.py mirrors struct " #name); \
    const long size_of_##name = sizeof(struct name)

static const long BYTES[] = {4, 2, 1};

struct vector {
    const char *data; /* NULL where it is not given */
    long kind;
};
MIRRORED(vector, 2);

struct matrix {
    const char *data;
    long kind, stride; /* of rows, in numbers */
};
MIRRORED(matrix, 3);

struct weight {
    struct matrix matrix;
    struct vector scale; /* of each row, where it is quantised */
};
MIRRORED(weight, 5);

enum { MATRICES = 3 }; /* whose results stand side by side */

struct linear {
    struct matrix x, out;
    struct weight weight[MATRICES];
    struct vector bias[MATRICES], stream_gain, norm_gain, norm_bias;
    const float *stream, *residual; /* of contiguous rows, as is the sum with the stream */
    float *total;
    long columns[MATRICES], rows, dim, activation; /* columns of the result; SWIGLU makes them of twice as many rows */
    double eps;
};
MIRRORED(linear, 43);

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
