"""Costs of single operations against bytes and FLOPs counted by hand on short texts."""

import pytest

from stepdistill_jax.models.kernel_costs import KernelCost, kernel_cost
from stepdistill_jax.planning.costs import Costs
from stepdistill_jax.planning.hlo import Array, Module
from stepdistill_jax.planning.roofline import bound
from stepdistill_jax.planning.runs import runs
from stepdistill_jax.runtime.chips import Chip

# a second is a thousand FLOPs, bytes, or element operations
CHIP = Chip(1000, 1, 1000, 1000, 1000, 1000, 1000, float32=500, exact=100)

SLICED = """
%fused (p0: f32[24,100], p1: s32[]) -> f32[100] {
  %p0 = f32[24,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  %flat = f32[100]{0} bitcast(%one)
  ROOT %twice = f32[100]{0} add(%flat, %flat)
}

ENTRY %main (kept: f32[24,100], i: s32[]) -> f32[100] {
  %kept = f32[24,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[100]{0} fusion(%kept, %i), kind=kLoop, calls=%fused
}
"""
CONVERTED = """
%fused (p0: f32[24,100]) -> bf16[2,100] {
  %p0 = f32[24,100]{1,0} parameter(0)
  %small = bf16[24,100]{1,0} convert(%p0)
  ROOT %two = bf16[2,100]{1,0} slice(%small), slice={[3:5], [0:100]}
}

ENTRY %main (kept: f32[24,100]) -> bf16[2,100] {
  %kept = f32[24,100]{1,0} parameter(0)
  ROOT %f = bf16[2,100]{1,0} fusion(%kept), kind=kLoop, calls=%fused
}
"""
IN_PLACE = """
%fused (p0: bf16[24,100], p1: bf16[100], p2: s32[]) -> bf16[24,100] {
  %p0 = bf16[24,100]{1,0} parameter(0)
  %p1 = bf16[100]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = bf16[1,100]{1,0} bitcast(%p1)
  ROOT %put = bf16[24,100]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

ENTRY %main (kept: bf16[24,100], x: bf16[100], i: s32[]) -> bf16[24,100] {
  %kept = bf16[24,100]{1,0} parameter(0)
  %x = bf16[100]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = bf16[24,100]{1,0} fusion(%kept, %x, %i), kind=kLoop, calls=%fused
}
"""
TILED = """
%fused (p0: bf16[100,200], p1: bf16[64]) -> bf16[100,200] {
  %p0 = bf16[100,200]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[64]{0:T(256)(128)(2,1)S(1)} parameter(1)
  ROOT %n = bf16[100,200]{1,0:T(8,128)(2,1)} negate(%p0)
}

ENTRY %main (x: bf16[100,200], near: bf16[64]) -> bf16[100,200] {
  %x = bf16[100,200]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[64]{0:T(256)(128)(2,1)S(1)} parameter(1)
  ROOT %f = bf16[100,200]{1,0:T(8,128)(2,1)} fusion(%x, %near), kind=kLoop, calls=%fused
}
"""
GEMM = """
ENTRY %main (a: bf16[4,30,50], b: bf16[4,50,20]) -> (bf16[4,30,20], s8[33554432]) {
  %a = bf16[4,30,50]{2,1,0} parameter(0)
  %b = bf16[4,50,20]{2,1,0} parameter(1)
  ROOT %c = (bf16[4,30,20]{2,1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]},"precision_config":{"operand_precision":["DEFAULT","DEFAULT"],"algorithm":"ALG_UNSET"}}}
}
"""
EXACT = """
ENTRY %main (a: f32[30,50], b: f32[50,20]) -> f32[30,20] {
  %a = f32[30,50]{1,0} parameter(0)
  %b = f32[50,20]{1,0} parameter(1)
  ROOT %c = f32[30,20]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
}
"""
# 5 products of [3, 7] x [7, 2] as the TPU compiler writes them: the batch is a spatial dimension whose
# window is as wide as the input and padded, so that 4 of 5 places miss
AS_CONVOLUTION = """
ENTRY %main (a: bf16[5,3,7], b: bf16[5,7,2]) -> bf16[5,3,2] {
  %a = bf16[5,3,7]{2,1,0} parameter(0)
  %b = bf16[5,7,2]{2,1,0} parameter(1)
  ROOT %c = bf16[5,3,2]{2,1,0} convolution(%a, %b), window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf
}
"""
# 5 places, 3 of them read for each result, of which the two ends lack one
PADDED = """
ENTRY %main (a: bf16[2,5,7], b: bf16[3,7,4]) -> bf16[2,5,4] {
  %a = bf16[2,5,7]{2,1,0} parameter(0)
  %b = bf16[3,7,4]{2,1,0} parameter(1)
  ROOT %c = bf16[2,5,4]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
SCATTERED = """
ENTRY %main (a: f32[16]) -> f32[2] {
  %a = f32[16]{0} parameter(0)
  ROOT %r = f32[2]{0} reduce-scatter(%a), replica_groups={}, dimensions={0}, to_apply=%add
}
"""
COPIED = """
ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %s = (f32[16]{0:S(1)}, f32[16]{0}, u32[]{:S(2)}) copy-start(%a)
  ROOT %d = f32[16]{0:S(1)} copy-done(%s)
}
"""
UNKNOWN = """
ENTRY %main (a: f32[16]) -> f32[8] {
  %a = f32[16]{0} parameter(0)
  ROOT %k = f32[8]{0} custom-call(%a), custom_call_target="NAME", metadata={op_name="jit(f)/layers/attention/my_kernel/pallas_call"}
}
"""


def root_cost(text, on_tpu=False):
    module = Module("HloModule jit_f\n" + text)
    return Costs(module, spaces_on_chip=on_tpu).of(module.entry, module.entry.root)


@pytest.mark.parametrize(
    ("text", "on_tpu", "size"),
    [
        pytest.param(SLICED, False, 4 * (100 + 100 + 1), id="of 24 rows one is read"),
        pytest.param(CONVERTED, False, 4 * 200 + 2 * 200, id="of 24 rows two are converted"),
        pytest.param(IN_PLACE, False, 2 * (100 + 100) + 4, id="of 24 rows one is written"),
        # 100 x 200 in tiles of 8 x 128; what lies in the chip's own memory costs nothing
        pytest.param(TILED, True, 2 * (2 * 104 * 256), id="tiles are filled"),
        pytest.param(TILED, False, 2 * (2 * 104 * 256) + 2 * 256, id="all spaces are memory"),
        pytest.param(GEMM, False, 2 * 4 * (30 * 50 + 50 * 20 + 30 * 20), id="no workspace"),
        pytest.param(UNKNOWN, False, 4 * (16 + 8), id="an unknown call reads and writes all"),
    ],
)
def test_bytes_by_hand(text, on_tpu, size):
    assert root_cost(text, on_tpu).bytes == size


@pytest.mark.parametrize(
    ("text", "products"),
    [
        (GEMM, {("bf16", "default"): 2 * 4 * 30 * 50 * 20}),
        (
            GEMM.replace("bf16", "f32").replace("DEFAULT", "HIGHEST"),
            {("f32", "highest"): 2 * 4 * 30 * 50 * 20},
        ),
        (EXACT, {("f32", "highest"): 2 * 30 * 50 * 20}),
        (AS_CONVOLUTION, {("bf16", "default"): 2 * 5 * 3 * 7 * 2}),
        (PADDED, {("bf16", "default"): 2 * 2 * 7 * 4 * (5 * 3 - 2)}),
        (SLICED, {}),
    ],
    ids=["cublas", "exact cublas", "dot", "convolution", "padding", "none"],
)
def test_flops_by_hand(text, products):
    assert root_cost(text).products == products


def test_a_product_takes_the_rate_of_its_precision():
    """30,000 multiplications and additions, at 100 a second; its bytes would take 12 s."""
    (product,) = bound(Module(EXACT), CHIP, on_tpu=False).operations
    assert product.seconds == 2 * 30 * 50 * 20 / 100


def test_an_asynchronous_copy_costs_the_side_in_main_memory():
    (copy,) = bound(Module(COPIED), CHIP, on_tpu=True).operations
    assert copy.cost.bytes == 4 * 16


def test_a_collective_is_no_operation_of_the_bound():
    assert bound(Module(SCATTERED), CHIP, on_tpu=False).operations == ()


def test_a_kernel_costs_what_its_formula_says(monkeypatch):
    """By the target of its call, or by the name that it has in the model."""
    monkeypatch.setattr("stepdistill_jax.models.kernel_costs._FORMULAS", {})
    assert not root_cost(UNKNOWN).known

    @kernel_cost("my_kernel")
    def cost(operands, results):
        (x,), (y,) = operands, results
        return KernelCost(flops=x.dims[0], bytes=y.bytes, integer=3, other=5)

    found = root_cost(UNKNOWN)
    assert (found.flops, found.bytes, found.integer, found.other) == (16, 32, 3, 5)
    assert found.known
    kernel_cost("NAME")(lambda operands, results: KernelCost(bytes=1))
    assert root_cost(UNKNOWN).bytes == 1


LOOPS = """
%double (p0: f32[10]) -> f32[10] {
  %p0 = f32[10]{0} parameter(0)
  ROOT %twice = f32[10]{0} add(%p0, %p0)
}

%condition (p: (s32[], f32[10])) -> pred[] {
  %p = (s32[], f32[10]{0}) parameter(0)
  %n = s32[] constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[10]{0} get-tuple-element(%p), index=1
  %f = f32[10]{0} fusion(%x), kind=kLoop, calls=%double
  ROOT %t = (s32[], f32[10]{0}) tuple(%i, %f)
}

%until (p: (s32[], f32[10])) -> pred[] {
  %p = (s32[], f32[10]{0}) parameter(0)
  ROOT %less = pred[] custom-call(%p), custom_call_target="unfinished"
}

%small (p: f32[10]) -> f32[10] {
  ROOT %p = f32[10]{0} parameter(0)
}

%large (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  ROOT %f = f32[10]{0} fusion(%p), kind=kLoop, calls=%double
}

ENTRY %main (t: (s32[], f32[10]), x: f32[10], which: s32[]) -> f32[10] {
  %t = (s32[], f32[10]{0}) parameter(0)
  %x = f32[10]{0} parameter(1)
  %which = s32[] parameter(2)
  %known = (s32[], f32[10]{0}) while(%t), condition=%condition, body=%body
  %tokens = (s32[], f32[10]{0}) while(%t), condition=%until, body=%body
  %fewer = (s32[], f32[10]{0}) while(%t), condition=%until, body=%body
  ROOT %c = f32[10]{0} conditional(%which, %x, %x), branch_computations={%small, %large}
}
"""


@pytest.mark.parametrize(
    ("tokens", "runs"),
    # 3 of the known loop, each unknown one once, and the larger branch; or 5 of the first unknown one
    [(None, 3 + 1 + 1 + 1), (5, 3 + 5 + 0 + 1)],
)
def test_loops_and_branches_are_counted(tokens, runs):
    found = bound(Module(LOOPS), CHIP, on_tpu=False, unknown_trips=tokens)
    assert sum(o.times for o in found.operations) == runs
    # 10 numbers read and 10 written; 10 additions take less
    assert found.seconds == pytest.approx(runs * 80 / 1000)


@pytest.mark.parametrize(("start", "step", "count"), [(0, 1, 7), (0, 2, 4), (3, 2, 2), (9, 1, 0)])
def test_a_counter_goes_from_its_start_in_steps_to_the_limit(start, step, count):
    """As the TPU compiler writes the products that it cuts into pieces, with an unsigned counter."""
    module = Module(f"""
%until (p: (f32[10], u32[])) -> pred[] {{
  %limit = u32[]{{:T(128)}} constant(7)
  %p = (f32[10]{{0}}, u32[]) parameter(0)
  %i = u32[]{{:T(128)}} get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%body (p: (f32[10], u32[])) -> (f32[10], u32[]) {{
  %p = (f32[10]{{0}}, u32[]) parameter(0)
  %x = f32[10]{{0}} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %by = u32[] constant({step})
  %next = u32[] add(%i, %by)
  %y = f32[10]{{0}} negate(%x)
  ROOT %t = (f32[10]{{0}}, u32[]) tuple(%y, %next)
}}

ENTRY %main (x: f32[10]) -> (f32[10], u32[]) {{
  %x = f32[10]{{0}} parameter(0)
  %first = u32[] constant({start})
  %t = (f32[10]{{0}}, u32[]) tuple(%x, %first)
  ROOT %w = (f32[10]{{0}}, u32[]) while(%t), condition=%until, body=%body
}}
""")
    times = [run.times for run in runs(module) if run.instruction.opcode == "negate"]
    assert times == ([count] if count else [])


def test_an_array_in_a_tuple_keeps_its_type_and_tiles():
    module = Module(COPIED)
    start = module.entry.by_name["s"]
    assert start.arrays == (
        Array("f32", (16,), "{0:S(1)}"), Array("f32", (16,), "{0}"), Array("u32", (), "{:S(2)}")
    )  # fmt: skip
    assert [array.space for array in start.arrays] == [1, 0, 2]
