/* How many products and sums of fp32 the cores add up in registers, where nothing is read: the roof of linears. */

#include "../kernels/cpu/c/numbers.h"
#include <omp.h>
#include <time.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

/* FLOPs of a second on so many threads: the most of some tries, each of as many rounds. */
double peak(long threads, long tries, long rounds) {
    double most = 0;
    for (long i = 0; i < tries; i++) {
        float kept = 0;
        const double start = now();
#pragma omp parallel num_threads(threads) reduction(+ : kept)
        {
            vec sums[SUMS];
            const vec factor = (vec){0} + 0.999f, added = (vec){0} + 1e-3f;
            UNROLLED for (int n = 0; n < SUMS; n++) sums[n] = (vec){0} + (float)(n + 2); /* 1 would stay */
            for (long round = 0; round < rounds; round++) {
                UNROLLED for (int n = 0; n < SUMS; n++) sums[n] = sums[n] * factor + added;
            }
            for (int n = 0; n < SUMS; n++) kept += sum(sums[n]);
        }
        const double flops = 2.0 * threads * rounds * SUMS * LANES / (now() - start);
        if (kept == kept && flops > most) most = flops;
    }
    return most;
}
