"""Sizes that the kernels use, and that the memory planner calculates with.

Imports nothing, so that the planner runs without PyTorch. ``cpu.native`` passes those that C++ needs to the compiler.
"""

# --- AdamW ---
MOMENT_BLOCK = 256  # elements of an 8-bit moment that share a scale; bitsandbytes' choice for optimizers
SMALLEST_8BIT = 4096  # elements below which moments stay in float32, as in bitsandbytes: norms need it and are small
DRAW_TILE = 2**17  # elements whose random bits are hashed; other tiles reuse them with some bits flipped
PARTIAL_SUM = 2**16  # elements of a partial sum of squares on a CPU

# --- NF4 with double quantisation, as in bitsandbytes ---
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256  # weights that share a scale, and scales that share one

# --- linear cross-entropy ---
LOGITS_BUDGET = 64 * 2**20  # bytes of a chunk's logits
# Bytes of wide logits at a time on a CPU, few enough for a second-level cache: in one piece of 64 MiB the softmax took
# as long as the matrix products around it.
SOFTMAX_BUDGET = 2**20
# A row of 2,051 logits is 4,102 bytes: not a multiple of 16, so vector loads would be misaligned. On CUDA a chunk's
# copy of the weight has a multiple of this many columns.
HEAD_COLUMNS = 64

# --- attention ---
FOLDED_SCORES = 2**21  # at once on a CPU: 4 MiB in bf16, which the caches of a few cores hold
QUERY_ROWS = 64, 256  # fewest and most in a block of a long segment, on a CPU
GROUP_SCORES = 2**24  # of a group at once, in a handful of float32 matrices of 64 MiB each, without a fused kernel
