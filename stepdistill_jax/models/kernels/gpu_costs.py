"""The costs of the attention kernels for NVIDIA GPUs.

Tiles that a causal mask hides are not counted. Tiles that a kernel skips because of segments are counted. Outside
matmuls, a fused multiplication and addition counts as one operation.
"""

import math
from collections.abc import Sequence

from stepdistill_jax.models.dropout import DRAWS
from stepdistill_jax.models.kernel_costs import KernelCost, Shaped, kernel_cost
from stepdistill_jax.models.kernels.gpu_tiles import FEW_KEYS, KEYS, Call

# operations for a random word: 9 for its hash, 1 for its place, 1 to extract its first draw
_WORD = 11
# program -> (number of matmuls for a tile, operations on each element of a tile, further operations on each
# element that dropout needs for its scale and selection). The second number is the sum of 4 operations (bias,
# mask, and two for the exponential) and the operations that the comments list.
_PROGRAMS = {
    "forward": (2, 7, 1),  # maximum, sum, rounding
    "queries_gradient": (3, 7, 2),  # minus, times, rounding
    "keys_gradient": (4, 8, 3),  # minus, times, 2 roundings
    "bias_gradient": (2, 6, 2),  # minus, times and sum
}


def name_of(program: str, causal: bool) -> str:
    """Returns a kernel's name, under which its cost is registered."""
    return f"gpu_attention_{program}" + "_causal" * causal


def _cost(program: str, causal: bool, operands: Sequence[Shaped], results: Sequence[Shaped]):
    q, k = operands[:2]
    rows, q_len, heads, head_dim = q.dims
    dropout = any(operand.dtype == "u32" for operand in operands)
    bias = operands[3].dtype == "f32"
    keys = FEW_KEYS if q.dtype == "f32" else KEYS
    call = Call(causal, DRAWS, q_len, k.dims[1], keys, interpret=False)
    places = rows * heads * call.tiles * call.queries * keys
    products, always, of_dropout = _PROGRAMS[program]
    # a program with two halves computes a word once for both, and extracts the second draw
    of_word = (_WORD + 1) / call.halves
    return KernelCost(
        # a float32 matmul is computed as three TF32 matmuls
        flops=(3 if q.dtype == "f32" else 1) * 2 * head_dim * products * places,
        # each array is read once: programs that run at the same time share a head, and its arrays fit the L2
        # cache
        bytes=math.fsum(array.bytes for array in (*operands, *results)),
        # compares segments, places under a causal mask, and draws
        integer=places * (1 + 2 * causal + dropout * (of_word + 1)),
        other=places * (always - (not bias) + dropout * of_dropout),
    )


def _register(program: str, causal: bool) -> None:
    kernel_cost(name_of(program, causal))(
        lambda operands, results: _cost(program, causal, operands, results)
    )


for _program in _PROGRAMS:
    for _causal in (False, True):
        _register(_program, _causal)
