"""Operations of a compiled step, named as XLA names them, and the part of the model that each is of."""

import pytest

from stepdistill_jax.planning import parts
from stepdistill_jax.planning.costs import Costs
from stepdistill_jax.planning.hlo import Module

LAYER = "jit(train_step)/jvp(EncoderDecoder.states)/decoder/while/body/closed_call/layers"
BACK = "jit(train_step)/transpose(jvp(EncoderDecoder.states))/EncoderDecoder.encode/encoder/while/body/closed_call/checkpoint"
PRODUCT = "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
SUM = "add(%a, %b)"
KERNEL = 'custom-call(%a, %b), custom_call_target="tpu_custom_call"'


@pytest.mark.parametrize(
    ("what", "name", "part"),
    [
        (PRODUCT, f"{LAYER}/self_attention/bqhd,bkhd->bhqk/dot_general", parts.ATTENTION_PRODUCTS),
        (PRODUCT, f"{LAYER}/self_attention.keys_values/key/dot_general", parts.PROJECTIONS),
        (PRODUCT, f"{LAYER}_3/self_attention.queries_keys_values/query_key_value/dot_general", parts.PROJECTIONS),
        (PRODUCT, f"{BACK}/layers/attention/out/transpose", parts.PROJECTIONS),
        (PRODUCT, f"{BACK}/layers/mlp/wi_0/dot_general", parts.MLP),
        (PRODUCT, "jit(train_step)/jvp()/while/body/closed_call/dot_general", parts.OUTPUT),
        (PRODUCT, "jit(decode)/while/body/EncoderDecoder.decode_step/EncoderDecoder._logits/logits_dense/dot_general", parts.OUTPUT),
        (SUM, f"{BACK}/rematted_computation/layers/attention/reduce_max", parts.ATTENTION_ELEMENTWISE),
        (KERNEL, f"{BACK}/layers/attention/my_kernel/pallas_call", parts.ATTENTION_KERNEL),
        (SUM, f"{LAYER}/pre_self_attention_layer_norm/mul", parts.NORMS),
        (SUM, f"{LAYER}/mlp/Dropout_0/jit(_where)/select_n", parts.MLP),
        (SUM, f"{LAYER}/Dropout_0/jit(_where)/select_n", parts.RESIDUAL),
        (SUM, "jit(train_step)/jvp(EncoderDecoder.states)/EncoderDecoder._embed/jit(_take)/gather", parts.EMBEDDING),
        (SUM, "jit(train_step)/jvp(EncoderDecoder.states)/decoder/while/body/dynamic_update_slice", parts.KEPT),
        (SUM, "jit(train_step)/jvp(EncoderDecoder.states)/EncoderDecoder.encode/encoder/broadcast_in_dim", parts.KEPT),
        (SUM, "jit(train_step)/mul", parts.OPTIMIZER),
    ],
)  # fmt: skip
def test_the_name_says_the_part(what, name, part):
    module = Module(f"""
ENTRY %main (a: f32[4,4], b: f32[4,4]) -> f32[4,4] {{
  %a = f32[4,4]{{1,0}} parameter(0)
  %b = f32[4,4]{{1,0}} parameter(1)
  ROOT %c = f32[4,4]{{1,0}} {what}, metadata={{op_name="{name}"}}
}}
""")
    root = module.entry.root
    cost = Costs(module, spaces_on_chip=False).of(module.entry, root)
    assert parts.part_of(module, root, cost) == part


@pytest.mark.parametrize(
    ("dtype", "inside", "part"),
    [
        ("f32", f"{BACK}/layers/attention/mul", parts.ATTENTION_ELEMENTWISE),
        ("u32", f"{LAYER}/mlp/Dropout_0/xor", parts.RANDOM_BITS),
    ],
)
def test_a_fusion_without_a_name_is_what_most_of_it_is(dtype, inside, part):
    module = Module(f"""
%fused (a: {dtype}[4,4]) -> {dtype}[4,4] {{
  %a = {dtype}[4,4]{{1,0}} parameter(0)
  %b = {dtype}[4,4]{{1,0}} add(%a, %a), metadata={{op_name="{inside}"}}
  ROOT %c = {dtype}[4,4]{{1,0}} add(%b, %b), metadata={{op_name="{inside}"}}
}}

ENTRY %main (a: {dtype}[4,4]) -> {dtype}[4,4] {{
  %a = {dtype}[4,4]{{1,0}} parameter(0)
  ROOT %f = {dtype}[4,4]{{1,0}} fusion(%a), kind=kLoop, calls=%fused, metadata={{op_name="{BACK}/add_any"}}
}}
""")
    root = module.entry.root
    cost = Costs(module, spaces_on_chip=False).of(module.entry, root)
    assert parts.part_of(module, root, cost) == part
