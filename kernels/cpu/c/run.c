/* Steps of a run: tokens, all blocks, and what the solver makes of them. */

#include "blocks.c"

enum { AS_IT_IS, RANGE, LENGTH }; /* of a clean estimate: limited to a radius, or scaled to it */

struct run {
    struct blocks blocks; /* of rows that hold as many samples as there are outputs; x and out are found here */
    const float *time, *null, *coefficients; /* of each step: a row's first tokens; predictions; six numbers */
    struct vector query;
    float *x, *x0; /* (samples, dim), in place */
    long clamp;
    double cond_scale, radius;
};
MIRRORED(run, 52);

/* Products and sums apart, as PyTorch rounds them. */
#ifdef __clang__
#define UNFUSED
#define UNFUSED_HERE _Pragma("clang fp contract(off)")
#else
#define UNFUSED __attribute__((optimize("fp-contract=off")))
#define UNFUSED_HERE
#endif

/* Guidance, prediction to clean estimate, its clamp and the solver's update of a sample: pred, noise (dim,). */
static UNFUSED void update(const struct run *a, const float *noise, long step, long sample, float *pred) {
    UNFUSED_HERE
    const long dim = a->blocks.dim;
    const float scale = a->cond_scale, radius = a->radius, *null = a->null + step * dim, *c = a->coefficients + step * 6;
    float *x = a->x + sample * dim, *x0 = a->x0 + sample * dim, square = 0;
    for (long k = 0; k < dim; k++) {
        const float clean = c[0] * x[k] + c[1] * (null[k] + (pred[k] - null[k]) * scale);
        pred[k] = a->clamp != RANGE ? clean : clean > radius ? radius : clean < -radius ? -radius : clean; /* NaN stays */
    }
    if (a->clamp == LENGTH) {
        for (long k = 0; k < dim; k++) square += pred[k] * pred[k];
        const float length = sqrtf(square), fit = radius / (length < 1e-12f ? 1e-12f : length);
        for (long k = 0; k < dim; k++) pred[k] *= fit;
    }
    for (long k = 0; k < dim; k++) {
        x[k] = c[2] * x[k] + c[3] * pred[k] + c[4] * x0[k] + (noise ? c[5] * noise[k] : 0);
        x0[k] = pred[k];
    }
}

/* The tokens of a row, (suffix, dim): of the time, its samples, and as many queries. */
static void make_tokens(const struct run *a, long step, long row, float *token) {
    const long dim = a->blocks.dim, samples = a->blocks.outputs, times = a->blocks.attention.suffix - 2 * samples;
    memcpy(token, a->time + step * times * dim, times * dim * sizeof *token);
    token += times * dim;
    memcpy(token, a->x + row * samples * dim, samples * dim * sizeof *token);
    token += samples * dim;
    for (long sample = 0; sample < samples; sample++, token += dim)
        for (long k = 0; k < dim; k++) token[k] = number(a->query, k);
}

struct steps_call {
    const struct run *run;
    struct scratch scratch;
    float *predictions; /* (samples, dim) */
    const float *const *noise; /* of each step: (samples, dim), or NULL */
    long first, count;
};

static void steps_by_member(const void *argument, const struct member *me) {
    const struct steps_call *call = argument;
    const struct run *a = call->run;
    struct blocks blocks = a->blocks;
    blocks.out = call->predictions;
    const long rows = blocks.attention.rows, suffix = blocks.attention.suffix, dim = blocks.dim;
    const long begin = begin_of(me, rows), end = end_of(me, rows);
    for (long i = 0; i < call->count; i++) {
        for (long row = begin; row < end; row++)
            make_tokens(a, call->first + i, row, call->scratch.stream + row * suffix * dim);
        meet(me);
        blocks_of_team(&blocks, &call->scratch, me);
        for (long sample = begin * blocks.outputs; sample < end * blocks.outputs; sample++) {
            const float *noise = call->noise[i] ? call->noise[i] + sample * dim : NULL;
            update(a, noise, call->first + i, sample, call->predictions + sample * dim);
        }
    }
}

/* Some steps of a run from the first on: tokens, all blocks, and what the solver makes of them. */
int run_steps(const struct run *a, const float *const *noise, long first, long count, long threads) {
    struct steps_call call = {.run = a, .noise = noise, .first = first, .count = count};
    if (!get_scratch(&a->blocks, threads, &call.scratch)) return 1;
    call.predictions = allocate(a->blocks.attention.rows * a->blocks.outputs * a->blocks.dim);
    const int failed = !call.predictions;
    if (!failed) in_team(steps_by_member, &call, threads);
    free(call.predictions);
    free(call.scratch.room);
    return failed;
}
