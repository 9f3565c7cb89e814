/* Linears in the form "amx". A tile of the processor holds 16 rows of 64 bytes; tiles 0 to 3 are sums of 16 columns and 16 rows
   each, 4 to 6 the parts of 16 columns of weights, 32 numbers of each, and 7 one part of as much of x.

   A number of fp32 is the sum of three of bf16, of 8 bits each. Of the nine products of two such sums those of the order
   of fp32's rounding are left out. Weights of bf16 or int8 have one part, and x two then: 16 bits, rounded. Numbers that
   are not finite give NaN. */

#pragma once
#include "numbers.h"

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
