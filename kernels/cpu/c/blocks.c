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
    const float *x; /* (tokens, dim), rows * suffix or as `attention.starts` has it */
    float *out; /* (rows * outputs, columns), or without outputs raw keys and values: (depth, tokens, 2 * of_kv) */
    const struct block *blocks; /* and where there is a head one more: q, of a norm of rows divided by their maximum */
    long depth, dim, inner, outputs, head, columns, activation, prefix_layer; /* the caches' stride from layer to layer */
    long alike; /* see `linear` */
    struct decode attention; /* of layer 0, without q, k, v, out */
    double eps;
};
MIRRORED(blocks, 44);

/* Memory for what blocks give each other, and its widths. */
struct scratch {
    long tokens, of_q, of_kv, width; /* numbers of a token's queries, of its keys, and of its queries, keys and values */
    float *room; /* of linears */
    float *projected, *mixed; /* (tokens, width); (tokens, of_q): what attention gives */
    float *hidden; /* (tokens, inner): of the feed-forward */
    float *stream, *merged, *total; /* (tokens, dim): the residual stream; attention's linear; the stream behind that */
    char *of_attention;
};

/* False where there is none; else `room` is to be freed. */
static int get_scratch(const struct blocks *a, long threads, struct scratch *s) {
    const struct decode *decode = &a->attention;
    s->tokens = decode->starts ? decode->starts[decode->rows] : decode->rows * decode->suffix;
    s->of_q = decode->heads * decode->dim_head;
    s->of_kv = decode->kv_heads * decode->dim_head;
    s->width = s->of_q + 2 * s->of_kv;
    const long widest = larger(larger(a->inner, s->of_q), larger(a->dim, a->columns));
    const long of_room = (room(s->tokens, widest, larger(widest, 2 * s->of_kv), threads) + 15) / 16 * 16;
    const long numbers = (of_room + s->tokens * (s->width + s->of_q + a->inner + 3 * a->dim) + 15) / 16 * 16;
    s->room = allocate_bytes(numbers * sizeof(float) + bytes_of_attentions(decode, threads));
    if (!s->room) return 0;
    s->of_attention = (char *)(s->room + numbers);
    s->projected = s->room + of_room;
    s->mixed = s->projected + s->tokens * s->width;
    s->hidden = s->mixed + s->tokens * s->of_q;
    s->stream = s->hidden + s->tokens * a->inner;
    s->merged = s->stream + s->tokens * a->dim;
    s->total = s->merged + s->tokens * a->dim;
    return 1;
}

INLINE struct matrix floats(const float *data, long stride) { return (struct matrix){(const char *)data, FLOAT32, stride}; }

/* Queries of all tokens, if any, keys and values: stream (tokens, dim) -> projected (tokens, width). */
static void project(const struct blocks *a, const struct block *b, int asks, const struct scratch *s,
                    const struct member *me) {
    const int has_v = b->v.matrix.data != NULL;
    const long of_q = asks ? s->of_q : 0;
    const struct linear linear = {
        .x = floats(s->stream, a->dim), .out = floats(s->projected + s->of_q - of_q, s->width), .rows = s->tokens,
        .dim = a->dim, .alike = a->alike, .eps = a->eps, .weight = {b->q, b->k, b->v}, .bias = {b->q_bias, b->k_bias, b->v_bias},
        .columns = {of_q, has_v ? s->of_kv : 2 * s->of_kv, has_v ? s->of_kv : 0},
        .norm_gain = b->norm_gain, .norm_bias = b->norm_bias};
    linear_of_team(&linear, s->room, me);
}

/* Keys and values of all tokens: projected (tokens, width) -> a layer of out (tokens, 2 * of_kv). */
static void keep_keys(const struct blocks *a, long layer, const struct scratch *s, const struct member *me) {
    const long both = 2 * s->of_kv;
    for (long r = begin_of(me, s->tokens); r < end_of(me, s->tokens); r++)
        memcpy(a->out + (layer * s->tokens + r) * both, s->projected + r * s->width + s->of_q, both * sizeof *a->out);
}

/* Attention of the last `seq` tokens of each row: projected (rows, suffix, width) -> mixed (rows, seq, of_q). */
static void mix(const struct blocks *a, long layer, long seq, const struct scratch *s, const struct member *me) {
    struct decode decode = a->attention;
    decode.seq = seq;
    decode.q = (char *)(s->projected + (decode.suffix - seq) * s->width);
    decode.k = (char *)(s->projected + s->of_q);
    decode.v = (char *)(s->projected + s->of_q + s->of_kv);
    decode.out = (char *)s->mixed;
    decode.q_row = decode.kv_row = decode.suffix * s->width;
    decode.q_token = decode.kv_token = s->width;
    decode.prefix_k += layer * a->prefix_layer;
    decode.prefix_v += layer * a->prefix_layer;
    decode_of_team(&decode, s->of_attention, me);
}

/* What attention gave onto the stream, and the feed-forward behind it: mixed (rows, of_q), stream (rows, dim) -> total
   and out (rows, dim). */
static void feed_forward(const struct blocks *a, const struct block *b, long rows, float *out, const struct scratch *s,
                         const struct member *me) {
    const int is_normed = b->out_gain.data != NULL; /* then the next linear adds the stream */
    const struct matrix merged = floats(is_normed ? s->merged : s->total, a->dim), hidden = floats(s->hidden, a->inner);
    const struct linear merge = {
        .x = floats(s->mixed, s->of_q), .out = merged, .rows = rows, .dim = s->of_q, .alike = a->alike, .eps = a->eps,
        .weight = {b->out}, .bias = {b->out_bias}, .columns = {a->dim}, .residual = is_normed ? NULL : s->stream};
    linear_of_team(&merge, s->room, me);
    const struct linear expand = {
        .x = merged, .out = hidden, .rows = rows, .dim = a->dim, .alike = a->alike, .eps = a->eps,
        .weight = {b->expand}, .bias = {b->expand_bias}, .columns = {a->inner}, .activation = a->activation,
        .stream = is_normed ? s->stream : NULL, .stream_gain = b->out_gain, .total = s->total,
        .norm_gain = b->ff_gain, .norm_bias = b->ff_bias};
    linear_of_team(&expand, s->room, me);
    const struct linear contract = {
        .x = hidden, .out = floats(out, a->dim), .rows = rows, .dim = a->inner, .alike = a->alike, .eps = a->eps,
        .weight = {b->contract}, .bias = {b->contract_bias}, .columns = {a->dim}, .norm_gain = b->inner_gain,
        .residual = s->total};
    linear_of_team(&contract, s->room, me);
}

/* The head, of rows divided by their maximum: stream (rows, dim), which is overwritten -> out (rows, columns). */
static void project_out(const struct blocks *a, const struct block *b, long rows, const struct scratch *s,
                        const struct member *me) {
    const long dim = a->dim;
    for (long r = begin_of(me, rows); r < end_of(me, rows); r++) {
        float *row = s->stream + r * dim, most = row[0];
        for (long k = 1; k < dim; k++) most = row[k] > most ? row[k] : most;
        for (long k = 0; k < dim; k++) row[k] /= most;
    }
    meet(me);
    const struct linear head = {
        .x = floats(s->stream, dim), .out = floats(a->out, a->columns), .rows = rows, .dim = dim, .alike = a->alike,
        .eps = a->eps, .weight = {b->q}, .bias = {b->q_bias}, .columns = {a->columns}, .norm_gain = b->norm_gain,
        .norm_bias = b->norm_bias};
    linear_of_team(&head, s->room, me);
}

/* All blocks, and the head, by all threads of a team, of the tokens in `stream`, which they overwrite. */
static void blocks_of_team(const struct blocks *a, const struct scratch *s, const struct member *me) {
    const long rows = a->attention.rows, suffix = a->attention.suffix, outputs = a->outputs, dim = a->dim;
    float *const stream = s->stream;
    for (long layer = 0; layer < a->depth; layer++) {
        const int last = layer == a->depth - 1;
        const long seq = last ? outputs : suffix;
        project(a, a->blocks + layer, seq > 0, s, me);
        if (!outputs) keep_keys(a, layer, s, me);
        if (!seq) break;
        for (long r = 0; r < rows && seq < suffix && !me->thread; r++) /* read when all have met behind attention */
            memmove(stream + r * seq * dim, stream + ((r + 1) * suffix - seq) * dim, seq * dim * sizeof *stream);
        mix(a, layer, seq, s, me);
        feed_forward(a, a->blocks + layer, seq == suffix ? s->tokens : rows * seq, last && !a->head ? a->out : stream, s, me);
    }
    if (outputs && a->head) project_out(a, a->blocks + a->depth, rows * outputs, s, me);
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
    memcpy(call.scratch.stream, a->x, call.scratch.tokens * a->dim * sizeof *a->x);
    in_team(blocks_by_member, &call, threads);
    free(call.scratch.room);
    return 0;
}
