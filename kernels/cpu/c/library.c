/* The library: one unit of translation, so that what one file has of another is inlined, and all share their teams. */

#include "run.c" /* which includes what it calls, and that what it calls */
#include "sums.c"
