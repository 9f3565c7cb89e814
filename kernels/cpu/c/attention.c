/* Attention of a few tokens behind a cached prefix. */

#include "numbers.h"
#include "team.h"

struct decode {
    const char *q, *k, *v; /* (rows, seq, heads, dim_head), (rows, suffix, kv_heads, dim_head) twice; heads side by side */
    char *out; /* (rows, seq, heads * dim_head) */
    long kind, q_row, q_token, kv_row, kv_token; /* of these numbers, and strides */
    const float *prefix_k, *prefix_v; /* (prompts, prefix, kv_heads, dim_head) */
    long prefix_prompt, prefix_token, prefix_head; /* strides of both */
    const float *bias, *mask, *cos, *sin; /* (suffix, heads, prefix + suffix), (prompts, prefix), (suffix, rotated) twice */
    long rows, seq, suffix, heads, kv_heads, dim_head, prompts, prefix, rotated, cosine;
    const long *starts; /* (rows + 1), where the tokens of each row begin, which all are queries; NULL: `suffix` each */
    const long *prompt; /* (rows), whose prefix each row has; NULL: the rows of a prompt lie together */
    double scale;
};
MIRRORED(decode, 31);

/* The attention of a row alone. */
static struct decode row_of(const struct decode *a, long row) {
    struct decode one = *a;
    const long prompt = a->prompt ? a->prompt[row] : row / (a->rows / a->prompts), bytes = BYTES[a->kind];
    const long first = a->starts ? a->starts[row] : 0;
    if (a->starts) one.seq = one.suffix = a->starts[row + 1] - first;
    one.q += (a->starts ? first * a->q_token : row * a->q_row) * bytes;
    one.k += (a->starts ? first * a->kv_token : row * a->kv_row) * bytes;
    one.v += (a->starts ? first * a->kv_token : row * a->kv_row) * bytes;
    one.out += (a->starts ? first : row * a->seq) * a->heads * a->dim_head * bytes;
    one.prefix_k += prompt * a->prefix_prompt;
    one.prefix_v += prompt * a->prefix_prompt;
    if (a->mask) one.mask += prompt * a->prefix;
    return one;
}

/* A head of a suffix token from element `first` on, rotated, then of length 1 with `cosine`, then times `scale`:
   (dim_head,). */
static void prepare(const struct decode *a, const char *tokens, long first, long token, float scale, float *head) {
    const long dim = a->dim_head;
    const float *cos = a->cos + token * a->rotated, *sin = a->sin + token * a->rotated;
    for (long d = 0; d < dim; d++) head[d] = number((struct vector){tokens, a->kind}, first + d);
    for (long d = 0; d < a->rotated; d += 2) {
        const float x = head[d], y = head[d + 1];
        head[d] = x * cos[d] + y * sin[d];
        head[d + 1] = y * cos[d + 1] + x * sin[d + 1];
    }
    if (a->cosine) {
        vec squares = {0};
        float square = 0;
        long d = 0;
        for (; d + LANES <= dim; d += LANES) squares += *(vec *)(head + d) * *(vec *)(head + d);
        for (; d < dim; d++) square += head[d] * head[d];
        scale /= fmaxf(sqrtf(square + sum(squares)), 1e-12f);
    }
    for (long d = 0; d < dim; d++) head[d] *= scale;
}

/* Up to LANES queries of a row that share their keys, a lane for each: of a kv_head, by tokens, then by heads. */
struct queries {
    long kv_head, count, token[LANES], head[LANES]; /* tokens count from the first query */
};

static struct queries queries_of(const struct decode *a, long kv_head, long first) {
    const long group = a->heads / a->kv_heads; /* heads that share a kv_head */
    struct queries q = {.kv_head = kv_head, .count = least(group * a->seq - first, LANES)};
    for (long lane = 0; lane < q.count; lane++) {
        q.token[lane] = (first + lane) / group;
        q.head[lane] = kv_head * group + (first + lane) % group;
    }
    return q;
}

/* Prepared queries (dim_head, lanes), and their logits (keys, lanes) before the products: the bias, or causal. */
INLINE void lay_queries(const struct decode *a, const struct queries *q, vec *query, vec *logits) {
    const long dim = a->dim_head, keys = a->prefix + a->suffix;
    float head[dim];
    memset(query, 0, dim * sizeof *query);
    memset(logits, 0, (keys + 3) * sizeof *logits);
    for (long lane = 0; lane < q->count; lane++) {
        const long token = a->suffix - a->seq + q->token[lane];
        const long first = q->token[lane] * a->q_token + q->head[lane] * dim;
        prepare(a, a->q, first, token, a->scale, head);
        for (long d = 0; d < dim; d++) query[d][lane] = head[d];
        const float *bias = a->bias + (token * a->heads + q->head[lane]) * keys;
        if (a->bias) for (long j = 0; j < keys; j++) logits[j][lane] = bias[j];
        else for (long j = a->prefix + token + 1; j < keys; j++) logits[j][lane] = -INFINITY;
    }
}

/* Logits (keys, lanes) to the weights of a softmax, in place; returns what their sum is to be divided by. */
INLINE vec softmax(const float *mask, long prefix, long keys, vec *logits) {
    vec most = {0}, total = {0};
    for (long j = 0; j < keys; j++) {
        if (mask && j < prefix) logits[j] += mask[j];
        most = j ? choose(logits[j] > most, logits[j], most) : logits[0];
    }
    for (long j = 0; j < keys; j++) total += logits[j] = exponential(logits[j] - most);
    return total;
}

/* How many keys some query sees, up to the last of them: behind it the logits of all are -infinity. */
INLINE long keys_seen(const struct queries *q, long keys, const vec *logits) {
    for (; keys > 1; keys--)
        for (long lane = 0; lane < q->count; lane++)
            if (logits[keys - 1][lane] != -INFINITY) return keys;
    return keys;
}

enum { ON_STACK = 16 << 10 /* bytes: a program may give its threads little more */ };

/* Memory of a thread: keys and values of the suffix, (suffix, dim_head); where all keys and values lie; queries, in their
   place what attention gives, (dim_head, lanes); logits (keys, lanes). */
struct attention_room {
    float *keys, *values;
    const float **key, **value;
    vec *query, *weight;
};

static long bytes_of_attention(const struct decode *a) {
    const long keys = a->prefix + a->suffix + 3, numbers = 2 * a->suffix * a->dim_head;
    return ((a->dim_head + keys) * sizeof(vec) + 2 * keys * sizeof(float *) + numbers * sizeof(float) + 63) / 64 * 64;
}

/* Of all threads, which must be allocated: 0 where stacks have room. */
static long bytes_of_attentions(const struct decode *a, long threads) {
    const long bytes = bytes_of_attention(a);
    return bytes > ON_STACK ? threads * bytes : 0;
}

static struct attention_room attention_room(const struct decode *a, char *room) {
    const long keys = a->prefix + a->suffix + 3;
    struct attention_room r = {.query = (vec *)room};
    r.weight = r.query + a->dim_head;
    r.key = (const float **)(r.weight + keys);
    r.value = r.key + keys;
    r.keys = (float *)(r.value + keys);
    r.values = r.keys + a->suffix * a->dim_head;
    return r;
}

/* Attention of queries of a row alone; those of the suffix among their keys and values are prepared. Its loops are slower
   in the function that calls it. */
static __attribute__((noinline)) void attend(const struct decode *a, const struct queries *q, struct attention_room room) {
    const long dim = a->dim_head, prefix = a->prefix;
    const float **key = room.key, **value = room.value;
    vec *query = room.query, *weight = room.weight;

    lay_queries(a, q, query, weight);
    const long keys = keys_seen(q, prefix + a->suffix, weight);
    for (long j = 0; j < prefix; j++) {
        const long place = j * a->prefix_token + q->kv_head * a->prefix_head;
        key[j] = a->prefix_k + place, value[j] = a->prefix_v + place;
    }
    for (long j = prefix; j < keys; j++)
        key[j] = room.keys + (j - prefix) * dim, value[j] = room.values + (j - prefix) * dim;
    key[keys] = key[keys + 1] = key[keys + 2] = key[0]; /* four at a time */
    for (long j = 0; j < keys; j += 4) { /* logits: (keys, lanes) */
        vec sums[4] = {{0}};
        for (long d = 0; d < dim; d++) UNROLLED for (int i = 0; i < 4; i++) sums[i] += key[j + i][d] * query[d];
        UNROLLED for (int i = 0; i < 4; i++) weight[j + i] += sums[i];
    }
    const vec total = 1 / softmax(a->mask, prefix, keys, weight);
    for (long d = 0; d < dim; d += 8) { /* values, mixed: (dim_head, lanes), in place of the queries */
        vec sums[8] = {{0}};
        const long here = least(dim - d, 8);
        if (here == 8)
            for (long j = 0; j < keys; j++) UNROLLED for (int i = 0; i < 8; i++) sums[i] += value[j][d + i] * weight[j];
        else
            for (long j = 0; j < keys; j++) for (long i = 0; i < here; i++) sums[i] += value[j][d + i] * weight[j];
        for (long i = 0; i < here; i++) query[d + i] = sums[i] * total;
    }
    const struct matrix out = {a->out, a->kind, a->heads * dim};
    for (long lane = 0; lane < q->count; lane++)
        for (long d = 0; d < dim; d++)
            store(out, q->token[lane], q->head[lane] * dim + d, query[d][lane]);
}

/* Attention of suffix tokens over a prefix and themselves, by all threads of a team; room: of `bytes_of_attentions`. */
static void decode_of_team(const struct decode *a, char *room, const struct member *me) {
    const long most = a->starts ? a->suffix : a->seq, group = a->heads / a->kv_heads, dim = a->dim_head;
    const long parts = (group * most + LANES - 1) / LANES, all = a->rows * a->kv_heads * parts;
    const long bytes = bytes_of_attention(a);
    char own[bytes > ON_STACK ? 64 : bytes] __attribute__((aligned(64)));
    const struct attention_room mine = attention_room(a, bytes > ON_STACK ? room + me->thread * bytes : own);
    struct decode one = {0};
    for (long i = begin_of(me, all), known = -1; i < end_of(me, all); i++) {
        const long kv_head = i / parts % a->kv_heads, first = i % parts * LANES;
        if (known != i / parts) {
            known = i / parts;
            one = row_of(a, known / a->kv_heads);
            for (long j = 0; j < one.suffix; j++) {
                const long place = j * a->kv_token + kv_head * dim;
                prepare(a, one.k, place, j, 1, mine.keys + j * dim);
                for (long d = 0; d < dim; d++) mine.values[j * dim + d] = number((struct vector){one.v, a->kind}, place + d);
            }
        }
        if (first >= group * one.seq) continue; /* of a row with fewer tokens */
        const struct queries queries = queries_of(&one, kv_head, first);
        attend(&one, &queries, mine);
    }
    meet(me);
}

struct decode_call {
    const struct decode *decode;
    char *room;
};

static void decode_by_member(const void *argument, const struct member *me) {
    const struct decode_call *call = argument;
    decode_of_team(call->decode, call->room, me);
}

static void *allocate_bytes(long bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* This and what else returns a number: 0, or 1 where there is no memory. */
int decode_attention(const struct decode *a, long threads) {
    const long bytes = bytes_of_attentions(a, threads);
    const struct decode_call call = {.decode = a, .room = bytes ? allocate_bytes(bytes) : NULL};
    if (bytes && !call.room) return 1;
    in_team(decode_by_member, &call, threads);
    free(call.room);
    return 0;
}
