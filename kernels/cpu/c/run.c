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
MIRRORED(run, 51);

/* Products and sums apart, as PyTorch rounds them. */
#ifdef __clang__
#define UNFUSED
#define UNFUSED_HERE _Pragma("clang fp contract(off)")
#else
#define UNFUSED __attribute__((optimize("fp-contract=off")))
#define UNFUSED_HERE
#endif

/* Guidance, prediction to clean estimate, its clamp and the solver's update of a sample. */
static UNFUSED void update(const struct run *a, const float *noise, long index, long sample, float *pred) {
    UNFUSED_HERE
    const long dim = a->blocks.dim, first = sample * dim;
    const float scale = a->cond_scale, radius = a->radius, *null = a->null + index * dim, *of = a->coefficients + index * 6;
    float *x = a->x + first, *x0 = a->x0 + first, square = 0;
    for (long k = 0; k < dim; k++) {
        const float clean = of[0] * x[k] + of[1] * (null[k] + (pred[k] - null[k]) * scale);
        pred[k] = a->clamp != RANGE ? clean : clean > radius ? radius : clean < -radius ? -radius : clean; /* NaN stays */
    }
    if (a->clamp == LENGTH) {
        for (long k = 0; k < dim; k++) square += pred[k] * pred[k];
        const float length = sqrtf(square), fit = radius / (length < 1e-12f ? 1e-12f : length);
        for (long k = 0; k < dim; k++) pred[k] *= fit;
    }
    for (long k = 0; k < dim; k++) {
        x[k] = of[2] * x[k] + of[3] * pred[k] + of[4] * x0[k] + (noise ? of[5] * noise[first + k] : 0);
        x0[k] = pred[k];
    }
}

struct steps_call {
    const struct run *run;
    struct scratch scratch;
    float *predictions; /* (samples, dim) */
    const float *const *noise; /* of each step: (samples, dim), or NULL */
    long first, count;
};

/* The tokens of a row: of the time, its samples, and as many queries. */
static void make_tokens(const struct run *a, long index, long row, float *to) {
    const long dim = a->blocks.dim, samples = a->blocks.outputs, times = a->blocks.attention.suffix - 2 * samples;
    memcpy(to, a->time + index * times * dim, times * dim * sizeof *to);
    memcpy(to += times * dim, a->x + row * samples * dim, samples * dim * sizeof *to);
    to += samples * dim;
    for (long sample = 0; sample < samples; sample++, to += dim)
        for (long k = 0; k < dim; k++) to[k] = at(a->query, k);
}

static void steps_by_member(const void *argument, const struct member *me) {
    const struct steps_call *call = argument;
    const struct run *a = call->run;
    const long rows = a->blocks.attention.rows, suffix = a->blocks.attention.suffix, dim = a->blocks.dim;
    const long begin = rows * me->thread / me->threads, end = rows * (me->thread + 1) / me->threads; /* of its own */
    struct blocks blocks = a->blocks;
    blocks.out = call->predictions;
    for (long i = 0; i < call->count; i++) {
        for (long row = begin; row < end; row++)
            make_tokens(a, call->first + i, row, call->scratch.stream + row * suffix * dim);
        meet(me);
        blocks_of_team(&blocks, &call->scratch, me);
        for (long sample = begin * blocks.outputs; sample < end * blocks.outputs; sample++)
            update(a, call->noise[i], call->first + i, sample, call->predictions + sample * dim);
    }
}

/* Some steps of a run from the first on: tokens, all blocks, and what the solver makes of them. */
int run_steps(const struct run *a, const float *const *noise, long first, long count, long threads) {
    struct steps_call call = {.run = a, .noise = noise, .first = first, .count = count};
    const long numbers = a->blocks.attention.rows * a->blocks.outputs * a->blocks.dim;
    if (!get_scratch(&a->blocks, threads, &call.scratch)) return 1;
    const int failed = !(call.predictions = aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64));
    if (!failed) in_team(steps_by_member, &call, threads);
    free(call.predictions);
    free(call.scratch.linears);
    return failed;
}
