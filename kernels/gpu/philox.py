"""Random numbers inside kernels: the same numbers as `reference.philox_uniform`, in any order of programs."""

import triton
import triton.language as tl


@triton.jit
def uniform(seed, c0, c1):
    """Uniform in [0, 1) of int32 counters c0 and c1 (a block each, or c1 a scalar) and an int64 seed."""
    zero = c0 * 0
    word, _, _, _ = tl.philox(seed, c0, c1 + zero, zero, zero)
    return tl.uint_to_uniform_float(word)
