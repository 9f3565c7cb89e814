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
    double scale;
};
MIRRORED(decode, 29);

/* A head of a suffix token, rotated, then of length 1 with `cosine`, then times `scale`. */
static void prepare(const struct decode *a, const char *heads, long from, long token, float scale, float *to) {
    const long dim = a->dim_head;
    const float *cos = a->cos + token * a->rotated, *sin = a->sin + token * a->rotated;
    for (long d = 0; d < dim; d++) to[d] = at((struct vector){heads, a->kind}, from + d);
    for (long d = 0; d < a->rotated; d += 2) {
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
        prepare(a, a->q, row * a->q_row + s * a->q_token + head * dim, token[lane], a->scale, query);
        for (long d = 0; d < dim; d++) laid[d][lane] = query[d];
    }
    for (long j = 0; j < a->prefix; j++) {
        key[j] = a->prefix_k + prompt * a->prefix_prompt + j * a->prefix_token + kv_head * a->prefix_head;
        value[j] = a->prefix_v + prompt * a->prefix_prompt + j * a->prefix_token + kv_head * a->prefix_head;
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
        for (long d = 0; d < dim; d++) put((struct matrix){a->out, a->kind, a->heads * dim}, row * a->seq + s, head * dim + d, laid[d][lane]);
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
            prepare(a, a->k, from + j * a->kv_token, j, 1, keys[j]);
            for (long d = 0; d < dim; d++) values[j][d] = at((struct vector){a->v, a->kind}, from + j * a->kv_token + d);
        }
        known = i / parts;
        attend(a, row, kv_head, i % parts * LANES, keys[0], values[0]);
    }
    meet(me);
}

static void decode_by_member(const void *argument, const struct member *me) { decode_of_team(argument, me); }

void decode_attention(const struct decode *a, long threads) { in_team(decode_by_member, a, threads); }
