/* Linear layers of few rows on the CPU, as fast as memory gives the weights.

   A linear lays its rows out once, normalised and in fp32. Then each thread computes columns of the result, some columns
   and all rows at a time, in one of three forms. "dot": vectors run along the dimension that is summed, for a few rows at
   once. "outer", for more rows where there are few registers: vectors run along the rows, and each is multiplied with one
   number of the weights. "amx", for more rows where the processor multiplies tiles of bf16: numbers of fp32 are sums of
   three of bf16. */

#include "amx.h"
#include "dot.h"
#include "outer.h"
#include "team.h"

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
        if (a->norm_gain.data) normalise(row, dim, a->eps, a->norm_gain, a->norm_bias, NULL);
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
