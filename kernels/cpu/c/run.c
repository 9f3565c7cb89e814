/* Steps of a run: tokens, all blocks, and what the solver makes of them. */

#include "blocks.c"

enum { AS_IT_IS, RANGE, LENGTH }; /* of a clean estimate: limited to a radius, or scaled to it */

/* A step of one sample: where its state lies, and what the solver does there. */
struct row {
    const float *time, *null, *coefficients, *noise; /* (times, dim); (dim,), prediction of guidance; six; (dim,) or NULL */
    float *x, *x0; /* (dim,), in place */
    long clamp;
    double cond_scale, radius;
};
MIRRORED(row, 9);

/* All steps of samples that begin together. */
struct run {
    struct blocks blocks; /* of rows that hold as many samples as there are outputs; x and out are found here */
    const float *time, *null, *coefficients; /* of each step: a row's first tokens; predictions; six numbers */
    struct vector query;
    float *x, *x0; /* (samples, dim), in place */
    const double *cond_scale; /* (samples,) */
    long clamp;
    double radius;
};
MIRRORED(run, 54);

/* Products and sums apart, as PyTorch rounds them. */
#ifdef __clang__
#define UNFUSED
#define UNFUSED_HERE _Pragma("clang fp contract(off)")
#else
#define UNFUSED __attribute__((optimize("fp-contract=off")))
#define UNFUSED_HERE
#endif

/* Guidance, prediction to clean estimate, its clamp and the solver's update of a sample: pred (dim,). */
static UNFUSED void update(const struct row *a, long dim, float *pred) {
    UNFUSED_HERE
    const float scale = a->cond_scale, radius = a->radius, *null = a->null, *c = a->coefficients, *noise = a->noise;
    float *x = a->x, *x0 = a->x0, square = 0;
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

/* The tokens of a row, (suffix, dim): of the time, its samples (samples, dim), and as many queries. */
static void make_tokens(const struct blocks *a, struct vector query, const float *time, const float *x, float *token) {
    const long dim = a->dim, samples = a->outputs, times = a->attention.suffix - 2 * samples;
    memcpy(token, time, times * dim * sizeof *token);
    token += times * dim;
    memcpy(token, x, samples * dim * sizeof *token);
    token += samples * dim;
    for (long sample = 0; sample < samples; sample++, token += dim)
        for (long k = 0; k < dim; k++) token[k] = number(query, k);
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
    const long rows = blocks.attention.rows, suffix = blocks.attention.suffix, dim = blocks.dim, each = blocks.outputs;
    const long begin = begin_of(me, rows), end = end_of(me, rows), times = suffix - 2 * each;
    for (long i = 0; i < call->count; i++) {
        const long step = call->first + i;
        for (long row = begin; row < end; row++)
            make_tokens(&blocks, a->query, a->time + step * times * dim, a->x + row * each * dim,
                        call->scratch.stream + row * suffix * dim);
        meet(me);
        blocks_of_team(&blocks, &call->scratch, me);
        for (long sample = begin * each; sample < end * each; sample++) {
            const struct row row = {
                .null = a->null + step * dim, .coefficients = a->coefficients + step * 6,
                .noise = call->noise[i] ? call->noise[i] + sample * dim : NULL, .x = a->x + sample * dim,
                .x0 = a->x0 + sample * dim, .clamp = a->clamp, .cond_scale = a->cond_scale[sample], .radius = a->radius};
            update(&row, dim, call->predictions + sample * dim);
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

struct rows_call {
    const struct blocks *blocks;
    const struct row *rows;
    struct vector query;
    struct scratch scratch;
    float *predictions; /* (rows, dim) */
};

static void rows_by_member(const void *argument, const struct member *me) {
    const struct rows_call *call = argument;
    struct blocks blocks = *call->blocks;
    blocks.out = call->predictions;
    const long suffix = blocks.attention.suffix, dim = blocks.dim;
    const long begin = begin_of(me, blocks.attention.rows), end = end_of(me, blocks.attention.rows);
    for (long r = begin; r < end; r++)
        make_tokens(&blocks, call->query, call->rows[r].time, call->rows[r].x, call->scratch.stream + r * suffix * dim);
    meet(me);
    blocks_of_team(&blocks, &call->scratch, me);
    for (long r = begin; r < end; r++) update(call->rows + r, dim, call->predictions + r * dim);
}

/* A step of rows of one sample, each at a step of its own, behind the prefix that `blocks->attention.prompt` says. */
int run_rows(const struct blocks *a, const struct row *rows, const struct vector *query, long threads) {
    struct rows_call call = {.blocks = a, .rows = rows, .query = *query};
    if (!get_scratch(a, threads, &call.scratch)) return 1;
    call.predictions = allocate(a->attention.rows * a->dim);
    const int failed = !call.predictions;
    if (!failed) in_team(rows_by_member, &call, threads);
    free(call.predictions);
    free(call.scratch.room);
    return failed;
}
