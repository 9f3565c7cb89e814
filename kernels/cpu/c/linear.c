/* Linear layers on the CPU: of few rows as fast as memory gives the weights, of many as fast as products can be added.

   A linear lays its rows out once, normalised and in fp32, up to WIDTH at a time. Then each thread computes columns of the
   result, some columns and all rows at a time, in one of three forms. "dot": vectors run along the dimension that is
   summed, for a few rows at once. "outer", for more rows where there are few registers: vectors run along the rows, and
   each is multiplied with one number of the weights. "amx", for more rows where the processor multiplies tiles of bf16:
   numbers of fp32 are sums of three of bf16. */

#include "amx.h"
#include "dot.h"
#include "outer.h"
#include "team.h"

enum { NONE, GELU, SWIGLU };
enum { MATRICES = 3 }; /* whose results stand side by side */

struct linear {
    struct matrix x, out; /* (rows, dim), (rows, all columns) */
    struct weight weight[MATRICES];
    struct vector bias[MATRICES], stream_gain, norm_gain, norm_bias;
    const float *stream, *residual; /* (rows, dim), (rows, all columns), contiguous */
    float *total; /* (rows, dim): the sum with the stream */
    long columns[MATRICES], rows, dim, activation; /* columns of the result; SWIGLU makes them of twice as many rows */
    long alike; /* a row's result does not depend on how many there are: always in the form "dot" */
    double eps;
};
MIRRORED(linear, 44);

enum { AHEAD_NEXT = 12 << 10 /* bytes */, ROWS_OF_PASS = MOST_DOTS < 8 ? MOST_DOTS : 8, GROUP = 24 /* columns that passes of rows share in a cache */ };

/* The form of a linear; "dot" of bf16 may round x. */
enum { IS_DOT, IS_ROUNDED_DOT, IS_OUTER, IS_AMX };
long form(long kind, long rows) {
    if (amx && rows > (kind == FLOAT32 ? MOST_DOTS : 6)) return IS_AMX;
    if (LANES != 16 && rows > MOST_DOTS) return IS_OUTER;
    return HAS_PAIRS && kind == BFLOAT16 && rows > 6 ? IS_ROUNDED_DOT : IS_DOT;
}

/* The most rows that a linear has here; beyond them PyTorch is as fast. */
long most_rows(long kind) {
    if (LANES == 8) return 1 << 16;
    if (LANES != 16) return 4 * LANES;
    return kind == FLOAT32 ? 8 * WIDTH : form(kind, WIDTH) == IS_AMX ? WIDTH : 4 * WIDTH;
}

/* How x is laid out for a linear's form: rows in fp32, and as the form reads them. */
struct layout {
    long form, kind, span, rows, dim;
    long block, padded, stride; /* numbers that are read at once; numbers of a row in whole blocks, and from row to row */
    long x_stride; /* of the rows in fp32 */
    int is_dot, has_words; /* "dot", rounded or not; of 16 bits */
    int is_there; /* x is what it is to be in fp32 */
    int alone; /* each thread lays all rows out for itself, without a meeting */
    float *x, *laid; /* (rows, stride); for "dot" the same, or (rows, padded) words behind their scales; else by columns */
    float *tiles; /* of this thread */
};

/* Of `rows` rows, how many are computed at a time. */
static long rows_at_once(long rows) {
    const long times = (rows + WIDTH - 1) / WIDTH;
    return ((rows + times - 1) / times + 15) / 16 * 16;
}

/* Parts of the dimension that is summed, of each of which all tiles of x stay in a cache. */
static long parts_of_sum(long rows, long padded) { return ((rows + 15) / 16 * 16 * padded * 6 - 1) / CACHED + 1; }

/* Numbers of a tile of the results of one matrix, and what a thread keeps its columns in: two of them, and copies. */
enum { TILE = (LANES == 16 ? 32 : MOST_OUTER) * WIDTH, TILES = 2 * TILE + (LANES == 16 ? 0 : COPIES * APART_OUTER) };

/* Numbers of room that a linear needs. */
static long room_of_thread(long rows, long dim) { return 2 * rows * (dim + 4 * LANES + BETWEEN) + WIDTH; }
static long room(long rows, long dim, long columns, long threads) {
    const long alone = threads * room_of_thread(least(rows, MOST_DOTS), dim); /* a last layer's */
    const long padded = dim + 4 * LANES, once = rows_at_once(rows) + LANES;
    const long sums = amx && parts_of_sum(once, padded) > 1 ? (columns + 32 * threads) * 2 * WIDTH : 0;
    const long tiled = amx ? once * (padded + BETWEEN + 3 * padded / 2) + sums : 0;
    return threads * TILES + larger(larger(tiled, room_of_thread(once, dim)), alone);
}

static struct layout layout_of(const struct linear *a, float *room, const struct member *me) {
    float *const rows = room + me->threads * TILES;
    struct layout l = {.kind = a->weight[0].matrix.kind, .rows = a->rows, .dim = a->dim};
    l.form = a->alike ? IS_DOT : form(l.kind, l.rows);
    l.span = SPAN(l.kind);
    l.is_dot = l.form == IS_DOT || l.form == IS_ROUNDED_DOT;
    l.has_words = HAS_WORDS && l.is_dot && l.kind == INT8;
    l.alone = l.is_dot && l.rows <= MOST_DOTS;
    l.block = l.form == IS_AMX ? DEPTH : LANES * l.span;
    l.padded = (l.dim + l.block - 1) / l.block * l.block;
    l.stride = l.padded + BETWEEN;
    l.tiles = room + me->thread * TILES;
    l.x = l.alone ? rows + me->thread * room_of_thread(l.rows, l.dim) : rows;
    l.laid = l.is_dot && (l.span == 1 || l.form == IS_ROUNDED_DOT) ? l.x : l.x + l.rows * l.stride;
    l.is_there = l.form == IS_OUTER && a->x.kind == FLOAT32 && !a->stream && !a->norm_gain.data && l.dim == l.padded;
    l.x_stride = l.is_there ? a->x.stride : l.stride;
    if (l.is_there) l.x = (float *)a->x.data;
    return l;
}

/* A row of a matrix in fp32, and zeros up to `padded`. */
static void widen(const struct matrix *t, long row, long dim, long padded, float *x) {
    const char *p = t->data + row * t->stride * BYTES[t->kind];
    if (t->kind == FLOAT32) memcpy(x, p, dim * sizeof *x);
    else for (long k = 0; k < dim; k++) ((uint32_t *)x)[k] = (uint32_t)((const uint16_t *)p)[k] << 16;
    memset(x + dim, 0, (padded - dim) * sizeof *x);
}

/* `(x - mean) / sqrt(variance + eps) * gain + bias + added`, in place; x: (dim, and zeros to a whole vector). bias and
   added may be NULL. */
static void normalise(float *x, long dim, double eps, struct vector gain, struct vector bias, const float *added) {
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
    for (k = 0; k < dim; k++) x[k] = (x[k] - mean) * rstd * number(gain, k);
    if (bias.data) for (k = 0; k < dim; k++) x[k] += number(bias, k);
    if (added) for (k = 0; k < dim; k++) x[k] += added[k];
}

/* Rows of x: widened, the sum with the stream, normalised; for "dot" also as it reads them. A member makes some of them. */
static void lay_rows(const struct linear *a, const struct layout *l, const struct member *me) {
    const long begin = l->alone ? 0 : begin_of(me, l->rows), end = l->alone ? l->rows : end_of(me, l->rows), dim = l->dim;
    for (long m = begin; m < end; m++) {
        float *row = l->x + m * l->stride, *laid = l->laid + m * l->stride;
        widen(&a->x, m, dim, l->padded, row);
        if (a->stream) {
            normalise(row, dim, a->eps, a->stream_gain, (struct vector){0}, a->stream + m * dim);
            if (!l->alone || !me->thread) memcpy(a->total + m * dim, row, dim * sizeof *row);
        }
        if (a->norm_gain.data) normalise(row, dim, a->eps, a->norm_gain, a->norm_bias, NULL);
        if (l->form == IS_ROUNDED_DOT) round_row(row, l->padded);
        else if (l->has_words) l->laid[m] = to_words(row, l->padded, (int16_t *)(l->laid + WIDTH) + m * l->padded);
        else if (l->is_dot && l->span > 1)
            for (long k = 0; k < l->padded; k += l->block)
                for (long j = 0; j < l->span; j++) /* see SPAN */
                    for (long i = 0; i < LANES; i++) laid[k + j * LANES + i] = row[k + i * l->span + j];
    }
}

/* Where number i of the block at k lies, see SPAN. */
INLINE long place_of(const struct layout *l, long k, long i) { return k + i % l->span * LANES + i / l->span; }

/* Numbers k to k + block of all rows for "outer": panels of rows_of_outer, each (padded, rows to a whole vector), but
   (rows, stride) as for "dot" where they are few. */
static void lay_outer(const struct layout *l, long k) {
    for (long m = 0, rows; m < l->rows; m += rows) {
        rows = rows_of_outer(l->rows - m);
        const int is_dot = rows <= BESIDE;
        const long width = is_dot ? rows : rows <= LANES ? LANES : 2 * LANES;
#if LANES == 8
        for (long n = 0; n < width && !is_dot; n += 8)
            for (long i = 0; i < l->block; i += 8) {
                vec numbers[8];
                UNROLLED for (int j = 0; j < 8; j++)
                    numbers[j] = n + j < rows ? *(const vec *)(l->x + (m + n + j) * l->x_stride + k + i) : (vec){0};
                transpose(numbers);
                UNROLLED for (int j = 0; j < 8; j++)
                    *(vec *)(l->laid + m * l->padded + place_of(l, k, i + j) * width + n) = numbers[j];
            }
        if (!is_dot) continue;
#endif
        for (long i = 0; i < l->block; i++) {
            const long place = place_of(l, k, i);
            const float *x = l->x + m * l->x_stride + k + i;
            float *laid = l->laid + m * l->padded + (is_dot ? place : place * width);
            for (long n = 0; n < rows; n++) laid[is_dot ? n * l->stride : n] = x[n * l->x_stride];
            for (long n = rows; n < width; n++) laid[n] = 0;
        }
    }
}

/* The rows for "outer" and "amx", of which a member lays some blocks. */
static void lay_columns(const struct layout *l, const struct member *me) {
    const long blocks = l->padded / l->block, groups = (l->rows + 15) / 16;
    for (long k = begin_of(me, blocks) * l->block; k < end_of(me, blocks) * l->block; k += l->block) {
        uint16_t *tiles = (uint16_t *)l->laid + k / DEPTH * groups * PARTS(l->kind) * PART;
        if (l->form == IS_AMX) tiles_of_rows(l->kind, l->x, l->rows, l->stride, k, tiles);
        else lay_outer(l, k);
    }
}

/* Rows of a pass of "dot": all, or as many as share their columns in registers best. */
static long rows_of_pass(long rows) {
    const long passes = rows > MOST_DOTS ? (rows + ROWS_OF_PASS - 1) / ROWS_OF_PASS : 1;
    return (rows + passes - 1) / passes;
}

static void product_dot(const struct layout *l, const struct columns *c, long after, float *tile) {
    const long kind = l->kind, each = rows_of_pass(l->rows);
    for (long m = 0; m < l->rows; m += each, tile += each * ROW_STEP) {
        const long rows = least(l->rows - m, each);
        const float *x = l->laid + m * l->stride;
        if (kind == FLOAT32) pass_float32(rows, x, c, after, tile);
        else if (l->form == IS_ROUNDED_DOT) pass_rounded(rows, x, c, after, tile);
        else if (kind == BFLOAT16) pass_bfloat16(rows, x, c, after, tile);
        else if (!HAS_WORDS) pass_int8(rows, x, c, after, tile);
        else pass_words(rows, l->laid + m, (const int16_t *)(l->laid + WIDTH) + m * l->padded, c, after, tile);
    }
}

static void product_outer(const struct layout *l, const struct columns *c, long after, float *tile) {
    const long kind = l->kind, few = l->rows % LANES, m = l->rows - few;
    outer(kind, l->rows, l->laid, l->padded, c, after, l->tiles + 2 * TILE, tile);
    if (few && few <= BESIDE)
        (kind == FLOAT32 ? pass_float32 : kind == BFLOAT16 ? pass_bfloat16 : pass_int8)(
            few, l->laid + m * l->padded, c, after, tile + m);
}

/* A tile of x @ weight.T, of all rows and few columns; "amx" may have numbers `begin` to `end` of the sums alone. */
static void product(const struct layout *l, const struct columns *c, long begin, long end, long after, float *tile) {
    if (l->form == IS_AMX) product_amx(l->kind, l->rows, (const uint16_t *)l->laid, *c, begin, end, tile);
    else if (LANES != 16 && l->form == IS_OUTER) product_outer(l, c, after, tile);
    else product_dot(l, c, after, tile);
}

INLINE long all_columns(const struct linear *a) { return a->columns[0] + a->columns[1] + a->columns[2]; }

INLINE vec activated(long activation, vec y, vec gate) {
    if (activation == GELU) return gelu(y);
    return activation == SWIGLU ? (vec)(y * (gate / (1 + exponential(-gate)))) : y;
}

#if LANES == 16
#define MASK(left) ((left) >= 16 ? 0xffff : (1 << (left)) - 1)

/* A vector of numbers, of which `left` are there. */
INLINE vec numbers(struct vector v, long i, long left) {
    if (v.kind == FLOAT32) return (vec)_mm512_maskz_loadu_ps(MASK(left), (const float *)v.data + i);
    vec values = {0};
    for (long lane = 0; lane < LANES && lane < left; lane++) values[lane] = number(v, i + lane);
    return values;
}

/* Scale, bias, activation and residual of `count` results of a matrix from its row n on: tile[row][column], of "dot" on
   AVX-512, to `out` from a column on. */
static void finish_rows(const struct linear *a, int matrix, long column, long n, long count, float *tile,
                        const float *gates) {
    const struct vector scale = a->weight[matrix].scale, bias = a->bias[matrix];
    const long all = all_columns(a), gate = a->columns[matrix] + n;
    for (long i = 0; i < count; i += LANES) {
        const long left = count - i;
        vec scales = (vec){0} + 1, biases = {0}, gate_scales = scales, gate_biases = {0};
        if (scale.data) scales = numbers(scale, n + i, left);
        if (bias.data) biases = numbers(bias, n + i, left);
        if (a->activation == SWIGLU && scale.data) gate_scales = numbers(scale, gate + i, left);
        if (a->activation == SWIGLU && bias.data) gate_biases = numbers(bias, gate + i, left);
        for (long m = 0; m < a->rows; m++) {
            vec y = *(const vec *)(tile + m * ROW_STEP + i) * scales + biases;
            if (a->activation)
                y = activated(a->activation, y, *(const vec *)(gates + m * ROW_STEP + i) * gate_scales + gate_biases);
            if (a->residual) y += numbers((struct vector){(const char *)(a->residual + m * all), FLOAT32}, column + i, left);
            if (a->out.kind == FLOAT32)
                _mm512_mask_storeu_ps((float *)a->out.data + m * a->out.stride + column + i, MASK(left), (__m512)y);
            else
                for (long lane = 0; lane < LANES && lane < left; lane++) store(a->out, m, column + i + lane, y[lane]);
        }
    }
}

#else
#define finish_rows finish
#endif

/* The same of the other forms: tile[column][row]. */
static void finish(const struct linear *a, int matrix, long column, long n, long count, float *tile, const float *gates) {
    const struct vector scale = a->weight[matrix].scale, bias = a->bias[matrix];
    const long all = all_columns(a), gate = a->columns[matrix];
    for (long i = 0; i < count; i++, n++)
        for (long m = i * WIDTH; m < i * WIDTH + a->rows; m += LANES) {
            vec y = *(const vec *)(tile + m);
            if (scale.data) y *= number(scale, n);
            if (bias.data) y += number(bias, n);
            vec gating = {0};
            if (a->activation == SWIGLU) {
                gating = *(const vec *)(gates + m);
                if (scale.data) gating *= number(scale, gate + n);
                if (bias.data) gating += number(bias, gate + n);
            }
            *(vec *)(tile + m) = activated(a->activation, y, gating);
        }
    long m = 0;
#if LANES == 8
    for (; m + 8 <= a->rows; m += 8) {
        long i = 0;
        for (; i + 8 <= count; i += 8) {
            vec block[8];
            UNROLLED for (int j = 0; j < 8; j++) block[j] = *(const vec *)(tile + (i + j) * WIDTH + m);
            transpose(block);
            for (long j = 0; j < 8; j++) {
                if (a->residual) block[j] += *(const vec *)(a->residual + (m + j) * all + column + i);
                store_vector(a->out, m + j, column + i, block[j]);
            }
        }
        for (; i < count; i++)
            for (long j = m; j < m + 8; j++)
                store(a->out, j, column + i, tile[i * WIDTH + j] + (a->residual ? a->residual[j * all + column + i] : 0));
    }
#endif
    for (; m < a->rows; m++) {
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
            store(a->out, m, column + i, tile[i * WIDTH + m] + (a->residual ? a->residual[m * all + column + i] : 0));
    }
}

/* Columns that a member computes before it finishes them. */
static long columns_at_once(const struct layout *l, long columns, long threads) {
    const long rows = l->rows;
    const int are_many = columns >= 8 * GROUP * threads && (rows > 4 || l->has_words); /* `finish` costs less of more */
    if (l->form == IS_AMX) return TILE_COLUMNS(l->kind);
    if (l->alone && !are_many) return DOT_COLUMNS(rows);
    if (l->is_dot) return GROUP;
    const long most = least(MOST_OUTER, ((rows - 1) / (2 * LANES) + 1) * COPIES);
    const long parts = (columns - 1) / (threads * most) + 1; /* of each thread */
    return ((columns - 1) / (threads * parts * COPIES) + 1) * COPIES;
}

/* A member's columns of the results of one matrix, which stand in `out` from a column on. */
static void matrix_of_team(const struct linear *a, const struct layout *l, int matrix, long column,
                           const struct member *me) {
    const struct matrix *w = &a->weight[matrix].matrix;
    const long all = a->columns[matrix], unit = columns_at_once(l, all, me->threads), units = (all + unit - 1) / unit;
    const long first = begin_of(me, units) * unit, last = least(all, end_of(me, units) * unit);
    const long bytes = w->stride * BYTES[l->kind], pass = l->alone ? DOT_COLUMNS(l->rows) : unit;
    const long after = bytes ? pass * ((AHEAD_NEXT - 1) / (pass * bytes) + 1) : 0; /* columns to read meanwhile */
    const long parts = l->form == IS_AMX ? parts_of_sum(l->rows, l->padded) : 1;
    const long part = (l->padded / l->block + parts - 1) / parts * l->block;
    float *kept = l->laid + (l->rows + 15) / 16 * 24 * l->padded + 2 * first * WIDTH; /* all sums, behind the tiles of x */
    for (long begin = 0; begin < l->padded; begin += part)
        for (long n = first; n < last; n += unit) {
            const long end = least(begin + part, l->padded);
            struct columns c = {w->data + n * bytes, w->stride, least(last - n, unit), l->dim};
            float *sums = parts > 1 ? kept + 2 * (n - first) * WIDTH : l->tiles;
            float *gates = parts > 1 ? sums + unit * WIDTH : l->tiles + TILE;
            for (int gating = 0; gating <= (a->activation == SWIGLU); gating++, c.weight += all * bytes)
                product(l, &c, begin, end, after, gating ? gates : sums);
            if (end == l->padded) (l->is_dot ? finish_rows : finish)(a, matrix, column + n, n, c.count, sums, gates);
        }
}

/* A linear of up to WIDTH rows by all threads of a team, in the room that it needs. */
static void rows_of_team(const struct linear *a, float *room, const struct member *me) {
    const struct layout layout = layout_of(a, room, me);
    if (!layout.is_there) {
        lay_rows(a, &layout, me);
        if (!layout.alone) meet(me);
    }
    if (!layout.is_dot) {
        lay_columns(&layout, me);
        meet(me);
    }
    for (long n = 0; n < 2 * TILE / WIDTH; n++) /* lanes without a row stay zero */
        memset(layout.tiles + n * WIDTH, 0, least((layout.rows + LANES - 1) / LANES * LANES, WIDTH) * sizeof(float));
    if (layout.form == IS_AMX) begin_amx();
    for (long matrix = 0, column = 0; matrix < MATRICES; column += a->columns[matrix++])
        matrix_of_team(a, &layout, matrix, column, me);
    if (layout.form == IS_AMX) end_amx();
    meet(me);
}

/* A linear by all threads of a team, which have finished when they meet again. */
static void linear_of_team(const struct linear *a, float *room, const struct member *me) {
    const long once = rows_at_once(a->rows);
    for (long m = 0; m < a->rows; m += once) {
        struct linear part = *a;
        part.rows = least(a->rows - m, once);
        part.x.data += m * a->x.stride * BYTES[a->x.kind];
        part.out.data += m * a->out.stride * BYTES[a->out.kind];
        if (a->stream) part.stream += m * a->dim, part.total += m * a->dim;
        if (a->residual) part.residual += m * all_columns(a);
        rows_of_team(&part, room, me);
    }
}

struct linear_call {
    const struct linear *linear;
    float *room;
};

static void linear_by_member(const void *argument, const struct member *me) {
    const struct linear_call *call = argument;
    linear_of_team(call->linear, call->room, me);
}

static void *allocate(long numbers) { return allocate_bytes(numbers * sizeof(float)); }

int linear(const struct linear *a, long threads) {
    const long most = a->columns[0] > a->columns[1] ? a->columns[0] : a->columns[1];
    const struct linear_call call = {.linear = a, .room = allocate(room(a->rows, a->dim, most, threads))};
    if (!call.room) return 1;
    in_team(linear_by_member, &call, threads);
    free(call.room);
    return 0;
}
