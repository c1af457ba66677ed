"""What a call of each attention kernel for NVIDIA GPUs costs, by the sizes of its arrays.

Whole tiles count, so lengths are rounded up, and of a causal mask the tiles that it leaves. Tiles that
are skipped since their segments do not meet count, too: a plan does not know the segments. A
multiplication and the addition after it are one operation, as they are one instruction.
"""

import math
from collections.abc import Sequence

from stepdistill_jax.models.dropout import DRAWS
from stepdistill_jax.models.kernel_costs import KernelCost, Shaped, kernel_cost
from stepdistill_jax.models.kernels.gpu_tiles import FEW_KEYS, KEYS, Call

# of a random word: 9 of its hash, 1 for its place, 1 to take its first draw out of it
_WORD = 11
# program -> its products of a tile, and operations on each place of it: always, by dropout's scale and
# choice. Always are: bias, mask, 2 of the exponential, and
_PROGRAMS = {
    "forward": (2, 7, 1),  # maximum, sum, rounding
    "queries_gradient": (3, 7, 2),  # minus, times, rounding
    "keys_gradient": (4, 8, 3),  # minus, times, 2 roundings
    "bias_gradient": (2, 6, 2),  # minus, times and sum
}


def name_of(program: str, causal: bool) -> str:
    """Returns the name of a kernel, by which its cost is found."""
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
    of_word = (_WORD + 1) / call.halves
    return KernelCost(
        # three products stand for one of float32
        flops=(3 if q.dtype == "f32" else 1) * 2 * head_dim * products * places,
        # what runs at the same time shares a head, whose arrays the second cache holds
        bytes=math.fsum(array.bytes for array in (*operands, *results)),
        # segments are compared, of a causal mask places too, and draws
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
