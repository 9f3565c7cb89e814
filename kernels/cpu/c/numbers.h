/* Numbers of fp32, bf16 and int8, vectors of them, and functions of a vector. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
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

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 24")
#endif
#if LANES == 16
#define HOLD(vector) __asm__("" : "+v"(vector)) /* in a register: GCC would read it again for each column */
#else
#define HOLD(vector)
#endif

enum { FLOAT32, BFLOAT16, INT8 }; /* kinds of numbers */
enum { WIDTH = LANES == 8 ? 128 : 64 /* rows of a tile */ };

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef ivec narrow_vec __attribute__((aligned(1))); /* numbers of 16 or 8 bits, which begin anywhere */

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

/* Columns of a result: `count` rows of a weight, `stride` numbers apart, of `dim` numbers each. */
struct columns {
    const char *weight;
    long stride, count, dim;
};

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long larger(long a, long b) { return a > b ? a : b; }

INLINE struct columns columns_from(int kind, struct columns all, long first) {
    return (struct columns){all.weight + first * all.stride * BYTES[kind], all.stride, all.count - first, all.dim};
}

/* Weights come in blocks of one vector of memory, LANES * SPAN numbers. `unpack(kind, block, j)` is a vector of its numbers
   j, j + SPAN, j + 2 * SPAN, …, which takes a shift or two; x is laid out in that order. */
#define SPAN(kind) ((kind) == FLOAT32 ? 1 : (kind) == BFLOAT16 ? 2 : 4)

/* A block of which `left` numbers are there, and zeros. */
INLINE ivec load(int kind, const char *p, long left) {
    if (left >= LANES * SPAN(kind)) return *(const narrow_vec *)p;
    ivec block = {0};
    memcpy(&block, p, left * BYTES[kind]);
    return block;
}

INLINE vec unpack(int kind, ivec block, int j) {
    if (kind == FLOAT32) return (vec)block;
    if (kind == INT8) return __builtin_convertvector(block << (24 - 8 * j) >> 24, vec);
    if (j) return (vec)(block & -65536);
    return (vec)(block << 16);
}

static inline float number(struct vector v, long i) {
    union { uint32_t bits; float value; } u;
    if (v.kind == FLOAT32) return ((const float *)v.data)[i];
    u.bits = (uint32_t)((const uint16_t *)v.data)[i] << 16;
    return u.value;
}

static inline void store(struct matrix t, long row, long column, float value) {
    const union { float value; uint32_t bits; } u = {value};
    const long i = row * t.stride + column;
    if (t.kind == FLOAT32) ((float *)t.data)[i] = value;
    else ((uint16_t *)t.data)[i] = value != value ? 0x7fc0 : (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16; /* nearest */
}

typedef uint16_t half_vec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE void store_vector(struct matrix t, long row, long column, vec v) {
    const long i = row * t.stride + column;
    const ivec bits = (ivec)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    if (t.kind == FLOAT32) *(vec *)((float *)t.data + i) = v;
    else *(half_vec *)((uint16_t *)t.data + i) = __builtin_convertvector(((v != v) & 0x7fc0) | ((v == v) & rounded), half_vec);
}

INLINE float sum(vec v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

#if LANES == 8
/* Rows and columns of 8 vectors change places. */
INLINE void transpose(vec *v) {
    __m256 pairs[8], fours[8];
    UNROLLED for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
    }
    UNROLLED for (int i = 0; i < 8; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    UNROLLED for (int i = 0; i < 4; i++) {
        v[i] = (vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        v[i + 4] = (vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}
#endif

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

/* What to prefetch while at a byte of columns: what is read `ahead` bytes later, perhaps of the columns after these. */
INLINE long look_ahead(long byte, long ahead, long length, long columns, long stride) {
    byte += ahead;
    return byte < length ? byte : byte - length + columns * stride;
}
