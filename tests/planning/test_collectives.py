"""Bytes on the wire against modules whose traffic is known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.planning.collectives import by_kind, collectives
from stepdistill_jax.planning.hlo import Module

HLO = """
HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%noted_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[64,10]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="wi"}
}

%noted_condition (p: (s32[], f32[8])) -> pred[] {
}

%compared_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (f32[3,5]{1,0}, /*index=1*/f32[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
  %alone = f32[1000]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}

%compared_condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (a: f32[16]) -> f32[2] {
  %whole = f32[16]{0} all-reduce(%a), replica_groups=mesh['x'=1,'y'=8] {'y'}, to_apply=%add
}

%unknown_body (p: (s32[])) -> (s32[]) {
  %p = f32[5]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}

%unknown_condition (p: (s32[])) -> pred[] {
}

ENTRY %main (a: f32[8]) -> f32[] {
  %w1 = (s32[], f32[8]) while(%t), condition=%noted_condition, body=%noted_body, backend_config={"known_trip_count":{"n":"24"}}
  %w2 = (s32[], f32[8]) while(%t), condition=%compared_condition, body=%compared_body
  %w3 = (s32[]) while(%t), condition=%unknown_condition, body=%unknown_body
  %f = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%a), replica_groups={}, dimensions={0}
}
"""


def test_loops_groups_and_fused_scatters_are_counted_by_hand():
    operations, unknown = collectives(Module(HLO), 8)
    assert unknown == 1
    assert by_kind(operations) == {
        # a loop of 24 with groups of 4, and a started one over all 8 devices
        "all-gather": {
            "count": 25,
            "bytes": 24 * 64 * 10 * 2 + 32 * 4,
            "wire_bytes": 24 * 64 * 10 * 2 * 3 // 4 + 32 * 4 * 7 // 8,
        },
        # 16 numbers in pairs, 7 times; the one over a single device sends nothing
        "all-reduce": {"count": 7, "bytes": 7 * 64, "wire_bytes": 7 * 64},
        "collective-permute": {"count": 1, "bytes": 20, "wire_bytes": 20},
        # 16 numbers over 8 devices: a device keeps 2 and sends 7 parts of 2
        "reduce-scatter": {"count": 1, "bytes": 8, "wire_bytes": 56},
    }
    assert next(c for c in operations if c.count == 24).op_name == "wi"


@pytest.mark.parametrize("length", [1, 5])
def test_a_compiled_scan_over_cut_weights_gathers_each_of_them(length):
    mesh = make_mesh(Layout(fsdp=8), jax.devices()[:8])
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(x, weights):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, whole)
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    arrays = (
        jax.ShapeDtypeStruct((4, 64), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((length, 64, 64), jnp.float32, sharding=cut),
    )
    compiled = jax.jit(step, out_shardings=whole).lower(*arrays).compile()
    operations, unknown = collectives(Module(compiled.as_text()), 8)
    assert unknown == 0
    assert {c.kind for c in operations} == {"all-gather"}
    assert sum(c.bytes for c in operations) == length * 64 * 64 * 4
    assert sum(c.wire_bytes for c in operations) == length * 64 * 64 * 4 * 7 / 8
