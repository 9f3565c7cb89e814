/* Linears in the form "amx": the processor multiplies tiles of bf16. A tile holds 16 rows of 64 bytes; tiles 0 to 3 are
   sums of 16 columns and 16 rows each, 4 to 6 the parts of 16 columns of weights, 32 numbers of each, and 7 one part of
   as much of x.

   A number of fp32 is the sum of three of bf16, of 8 bits each. Of the nine products of two such sums those of the order
   of fp32's rounding are left out. Weights of bf16 or int8 have one part, and x two then: 16 bits, rounded. Numbers that
   are not finite give NaN. */

#pragma once
#include "numbers.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

enum { PART = 512 /* numbers of a tile */, DEPTH = 32 /* numbers of a column in it */ };
enum { AHEAD_AMX = 512, AHEAD_ROWS = 128, CACHED = 5 << 18 }; /* bytes */
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

/* The upper halves of a and b side by side, as tiles hold pairs of numbers, and in the next tiles those of what is left of
   them: their parts. */
INLINE void split(int parts, __m512 a, __m512 b, uint16_t *tile) {
    const __m512i upper = _mm512_set1_epi32(-65536);
    for (int i = 0; i < parts; i++, tile += PART) {
        const __m512i half = _mm512_set1_epi32(parts == 2 && i ? 1 << 15 : 0); /* rounds; three parts leave nothing */
        const __m512i first = _mm512_add_epi32(_mm512_castps_si512(a), half);
        const __m512i second = _mm512_add_epi32(_mm512_castps_si512(b), half);
        _mm512_store_si512(tile, _mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second, upper, 0xf8)); /* | & */
        a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(first, upper)));
        b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(second, upper)));
    }
}

/* Which number of DEPTH stands first in pair i, and how far behind it the second. */
#define PAIR(kind, i) ((kind) == BFLOAT16 ? 2 * (i) : (i))
#define PAIR_STEP(kind) ((kind) == BFLOAT16 ? 1 : 16)

/* Numbers k to k + DEPTH of 16 columns, or fewer and zeros, as tiles: (parts, 16, DEPTH). */
INLINE void tiles_of_weight(int kind, struct columns c, long k, uint16_t *tiles) {
    const long left = c.dim - k, bytes = BYTES[kind];
    const long ahead = look_ahead(k * bytes, AHEAD_AMX, c.dim * bytes, 16, c.stride * bytes);
    char copy[16][DEPTH * 4] __attribute__((aligned(64)));
    long step = c.stride * bytes;
    const char *p = c.weight + k * bytes;
    if (c.count < 16 || left < DEPTH) {
        memset(copy, 0, sizeof copy);
        for (int i = 0; i < c.count && i < 16; i++) memcpy(copy[i], p + i * step, least(left, DEPTH) * bytes);
        p = copy[0], step = sizeof copy[0];
    }
    UNROLLED for (int i = 0; i < 16; i++, p += step, tiles += DEPTH) {
        for (long line = 0; line < DEPTH * bytes; line += 64)
            __builtin_prefetch(c.weight + i * c.stride * bytes + ahead + line, 0, 2);
        if (kind == FLOAT32) split(3, _mm512_loadu_ps(p), _mm512_loadu_ps(p + 64), tiles);
        else if (kind == BFLOAT16) _mm512_store_si512(tiles, _mm512_loadu_si512(p));
        else
            split(1, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))),
                  _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16)))), tiles);
    }
}

/* Numbers k to k + DEPTH of rows of x, `stride` numbers apart, as tiles: (groups of 16 rows, parts, 16, DEPTH). */
static void tiles_of_rows(int kind, const float *x, long rows, long stride, long k, uint16_t *tiles) {
    for (long first = 0; first < rows; first += 16, tiles += PARTS(kind) * PART) {
        int32_t place[16];
        for (int n = 0; n < 16; n++) place[n] = first + n < rows ? n * stride : 0; /* some number: its sums go nowhere */
        const __m512i places = _mm512_loadu_si512(place);
        const float *row = x + first * stride + k;
        for (int i = 0; i < 16; i++)
            split(PARTS(kind), _mm512_i32gather_ps(places, row + PAIR(kind, i), 4),
                  _mm512_i32gather_ps(places, row + PAIR(kind, i) + PAIR_STEP(kind), 4), tiles + i * DEPTH);
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

INLINE void clear_sums(void) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }

/* Add the sums of `sides` times 16 columns and `groups` times 16 rows to tile[column][row], or store them at first. */
INLINE void store_sums(int sides, int groups, int first, float *tile) {
    float sums[4][16][16] __attribute__((aligned(64)));
    _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64); _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
    for (int n = 0; n < 16 * sides; n++)
        for (int group = 0; group < groups; group++) {
            vec *place = (vec *)(tile + n * WIDTH + group * 16), total = first ? (vec){0} : *place;
            *place = total + *(vec *)sums[sides * group + n / 16][n % 16];
        }
}

/* tile[column][row] of 16 columns and `groups` times 16 rows, for numbers `begin` to `end` of the dimension that is
   summed; unless that is the first of them they are added. x: (numbers / DEPTH, groups, parts, 16, DEPTH). The next tiles
   of weights are stored well before they are loaded. */
INLINE void multiply(int kind, int groups, const uint16_t *x, struct columns c, long begin, long end, float *tile) {
    uint16_t parts[2][3 * PART] __attribute__((aligned(64)));
    clear_sums();
    tiles_of_weight(kind, c, begin, parts[0]);
    x += begin / DEPTH * groups * PARTS(kind) * PART;
    for (long k = begin, odd = 0; k < end; k += DEPTH, odd = !odd, x += groups * PARTS(kind) * PART) {
        if (k + DEPTH < end) tiles_of_weight(kind, c, k + DEPTH, parts[!odd]);
        LOAD_TILE(4, parts[odd]);
        if (kind == FLOAT32) { LOAD_TILE(5, parts[odd] + PART); LOAD_TILE(6, parts[odd] + 2 * PART); }
        PRODUCTS(kind, 0, x)
        if (groups > 1) { PRODUCTS(kind, 1, x + PARTS(kind) * PART) }
        if (groups > 2) { PRODUCTS(kind, 2, x + 2 * PARTS(kind) * PART) }
        if (groups > 3) { PRODUCTS(kind, 3, x + 3 * PARTS(kind) * PART) }
    }
    store_sums(1, groups, !begin, tile);
}

/* As `multiply`, of 32 columns of bf16, straight from where they lie, which share each tile of x; it has `all` groups. */
INLINE void multiply_two(int groups, long all, const uint16_t *x, struct columns c, long begin, long end, float *tile) {
    clear_sums();
    x += begin / DEPTH * all * 2 * PART;
    for (long k = begin; k < end; k += DEPTH, x += all * 2 * PART) {
        const long ahead = look_ahead(2 * k, AHEAD_ROWS, 2 * c.dim, 32, 2 * c.stride);
        UNROLLED for (int i = 0; i < 32; i++) __builtin_prefetch(c.weight + i * c.stride * 2 + ahead, 0, 3);
        LOAD_ROWS(4, c.weight + k * 2, c.stride * 2);
        LOAD_ROWS(5, c.weight + k * 2 + 32 * c.stride, c.stride * 2);
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
    store_sums(2, groups, !begin, tile);
}

INLINE void multiply_groups(int kind, long groups, const uint16_t *x, struct columns c, long begin, long end, float *tile) {
    switch (groups) {
    case 1: multiply(kind, 1, x, c, begin, end, tile); return;
    case 2: multiply(kind, 2, x, c, begin, end, tile); return;
    case 3: multiply(kind, 3, x, c, begin, end, tile); return;
    default: multiply(kind, 4, x, c, begin, end, tile);
    }
}

/* As `multiply`, of up to TILE_COLUMNS columns and any rows. */
static void product_amx(long kind, long rows, const uint16_t *x, struct columns c, long begin, long end, float *tile) {
    const long groups = (rows + 15) / 16;
    if (kind == FLOAT32) multiply_groups(FLOAT32, groups, x, c, begin, end, tile);
    else if (kind == INT8) multiply_groups(INT8, groups, x, c, begin, end, tile);
    else if (c.dim % DEPTH == 0 && c.count == 32)
        for (long g = 0; g < groups; g += 2)
            if (groups - g > 1) multiply_two(2, groups, x + g * 2 * PART, c, begin, end, tile + g * 16);
            else multiply_two(1, groups, x + g * 2 * PART, c, begin, end, tile + g * 16);
    else
        for (long n = 0; n < c.count; n += 16)
            multiply_groups(BFLOAT16, groups, x, columns_from(BFLOAT16, c, n), begin, end, tile + n * WIDTH);
}
#else
static void begin_amx(void) {}
static void end_amx(void) {}
static void tiles_of_rows(int kind, const float *x, long rows, long stride, long k, uint16_t *tiles) {}
static void product_amx(long kind, long rows, const uint16_t *x, struct columns c, long begin, long end, float *tile) {}
#endif
