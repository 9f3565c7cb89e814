/* Whole blocks of linears and attention, and the head behind them. */

#include "attention.c"
#include "linear.c"

struct block {
    struct weight q, k, v, out, expand, contract; /* without v, k has the values' rows behind the keys' */
    struct vector q_bias, k_bias, v_bias, out_bias, expand_bias, contract_bias;
    struct vector norm_gain, norm_bias, out_gain, ff_gain, ff_bias, inner_gain;
};
MIRRORED(block, 54);

struct blocks {
    const float *x; /* (rows * suffix, dim) */
    float *out; /* (rows * outputs, columns); without outputs raw keys and values (depth, rows * suffix, 2, kv_heads, dim_head) */
    const struct block *blocks; /* and where there is a head one more: q, of a norm of rows divided by their maximum */
    long depth, dim, inner, outputs, head, columns, activation, prefix_layer; /* the caches' stride from layer to layer */
    struct decode attention; /* of layer 0, without q, k, v, out */
    double eps;
};
MIRRORED(blocks, 41);

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
            {0}, b->norm_gain, b->norm_bias, NULL, NULL, NULL,
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
        decode.q = (char *)(y + (last ? (suffix - outputs) * width : 0));
        decode.k = (char *)(y + own);
        decode.v = (char *)(y + own + shared);
        decode.out = (char *)mixed;
        decode.q_row = decode.kv_row = suffix * width;
        decode.q_token = decode.kv_token = width;
        decode.prefix_k = a->attention.prefix_k + i * a->prefix_layer;
        decode.prefix_v = a->attention.prefix_v + i * a->prefix_layer;
        decode_of_team(&decode, me);
        const int normed = b->out_gain.data != NULL;
        const struct linear merge = {
            {(char *)mixed, FLOAT32, own}, {(char *)(normed ? o : total), FLOAT32, dim}, {b->out}, {b->out_bias},
            {0}, {0}, {0}, NULL, normed ? NULL : stream, NULL, {dim}, left, own, NONE, a->eps};
        linear_of_team(&merge, scratch, me);
        const struct linear expand = {
            {(char *)(normed ? o : total), FLOAT32, dim}, {(char *)hidden, FLOAT32, a->inner}, {b->expand}, {b->expand_bias},
            b->out_gain, b->ff_gain, b->ff_bias, normed ? stream : NULL, NULL, total,
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
            {0}, b[1].norm_gain, b[1].norm_bias, NULL, NULL, NULL, {a->columns}, left, dim, NONE, a->eps};
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
