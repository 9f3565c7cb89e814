/* Numbers that a file held: sums that show damage, and whether all are finite, in one reading of memory. */

#include <stdint.h>
#include <string.h>

enum { ROW = 64 /* integers of 64 bits */ };

/* The sum of each row, and whether anything in them is NaN or infinite: a number whose exponent is all ones.
 * `exponents` has the bits of the exponents of the numbers in 64 bits, `lowest` the lowest of each: added to a full
 * exponent it carries into the sign, which the mask has cleared. Both are 0 for numbers that are all finite. */
long sum_rows(const char *data, long rows, uint64_t exponents, uint64_t lowest, uint64_t *sums) {
    uint64_t seen = 0;
    for (long row = 0; row < rows; row++, data += ROW * sizeof(uint64_t)) {
        uint64_t sum = 0;
        for (long i = 0; i < ROW; i++) {
            uint64_t word;
            memcpy(&word, data + i * sizeof word, sizeof word);
            sum += word;
            seen |= (word & exponents) + lowest;
        }
        sums[row] = sum;
    }
    return (seen & (exponents + lowest)) != 0; /* which is the signs */
}
