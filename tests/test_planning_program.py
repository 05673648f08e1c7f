"""What is read from compiled programs: products, traffic, collectives; against known counts."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lasad_jax.planning import costs
from lasad_jax.planning.collectives import collective, count_collectives
from lasad_jax.planning.hlo import Program

TURNS, ROWS, COLUMNS = 3, 8, 24


def compiled(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile()


def program(function, *shapes):
    return Program(compiled(function, *shapes).as_text())


def test_products_count_as_often_as_their_loops_turn():
    def nested(x, w, v):
        def outer(x, _):
            x, _ = lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)
            return x, None

        return lax.scan(outer, x, None, length=TURNS)[0] @ v

    found = program(nested, (ROWS, 16), (16, 16), (16, COLUMNS))
    once = 2 * ROWS * 16 * 16
    assert costs.product_flops(found) == TURNS * 5 * once + 2 * ROWS * 16 * COLUMNS


@pytest.mark.parametrize(
    ("lhs", "rhs", "options"),
    [
        ((2, 9, 7, 4), (3, 3, 4, 6), {"window_strides": (1, 1), "padding": "SAME"}),
        ((2, 9, 7, 4), (3, 2, 4, 6), {"window_strides": (2, 1), "padding": [(2, 1), (0, 3)]}),
        (
            (1, 5, 6, 3),
            (4, 3, 3, 2),
            {
                "window_strides": (1, 1),
                "padding": [(11, 11), (2, 0)],
                "lhs_dilation": (2, 1),
                "rhs_dilation": (1, 2),
            },
        ),
    ],
)
def test_convolutions_count_only_what_lies_in_the_input(lhs, rhs, options):
    """As XLA's own analysis counts them."""
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)
    made = compiled(convolve, lhs, rhs)
    assert costs.product_flops(Program(made.as_text())) == made.cost_analysis()["flops"]


def test_traffic_of_a_pass_and_of_slices():
    size = 4 * ROWS * COLUMNS
    assert costs.memory_traffic(program(lambda x: x + 1, (ROWS, COLUMNS))) == 2 * size
    fused = program(lambda x, y: (x + y) * jnp.sin(y), *[(ROWS, COLUMNS)] * 2)
    assert costs.memory_traffic(fused) == 3 * size

    # A loop over a stack reads and writes a part at each turn, never the whole of it.
    def over_layers(carry, stack):
        step = lambda carry, x: (carry + x, jnp.sin(x) * carry)
        return lax.scan(step, carry, stack)

    moved = lambda turns: costs.memory_traffic(
        program(over_layers, (ROWS, COLUMNS), (turns, ROWS, COLUMNS))
    )
    more = moved(400) - moved(200)
    assert 200 * 4 * size <= more <= 200 * 10 * size


MESH = {"data": 2, "fsdp": 4}


@functools.cache
def collectives():
    """By kind: (group, times, payload), of a program whose collectives are known."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)

    def part(x):
        def turn(x, _):
            return jnp.sin(lax.psum(x, "data")), None

        x, _ = lax.scan(turn, x, None, length=TURNS)
        whole = lax.all_gather(x, "fsdp", tiled=True)
        summed = lax.psum_scatter(jnp.cos(whole), ("data", "fsdp"), tiled=True)
        swapped = lax.all_to_all(jnp.exp(x), "fsdp", 1, 1, tiled=True)
        moved = lax.ppermute(x * 3, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return summed, swapped, moved

    split = P("fsdp")
    function = jax.shard_map(
        part, mesh=mesh, in_specs=split, out_specs=(P(("data", "fsdp")), split, split),
        check_vma=False,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((4 * ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, split))
    return count_collectives(Program(jax.jit(function).lower(x).compile().as_text()))


def test_collectives_of_a_known_program():
    own = 4 * ROWS * COLUMNS
    want = {
        "all-reduce": (2, TURNS, TURNS * own, TURNS * own),
        "all-gather": (4, 1, own, 3 * own),
        "reduce-scatter": (8, 1, 4 * own, 4 * own * 7 / 8),
        "all-to-all": (4, 1, own, own * 3 / 4),
        "collective-permute": (2, 1, own, own),
    }
    found = {x.kind: (x.group, x.times, x.payload, x.sent) for x in collectives()}
    assert found == want
    sent = [x.sent for x in collectives()]
    assert sent == sorted(sent, reverse=True)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=2,'fsdp'=4,'tensor'=3] {'data','tensor'}", 6),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("mesh['a'=8,'b'=3] {'a':(2)4,'b'}", 12),
    ],
)
def test_groups_are_read_however_they_are_written(groups, size):
    text = f"""HloModule step
%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %c = f32[] add(%a, %b)
}}

ENTRY %main (x: bf16[5,{{}}7]) -> bf16[5,7] {{
  %x = bf16[5,7]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  ROOT %y = bf16[5,7]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}"""
    (found,) = count_collectives(Program(text))
    assert found == collective("all-reduce", size, 1, 70)
    assert found.sent == pytest.approx(2 * 70 * (size - 1) / size)


def test_products_within_kernels_count_and_other_kernels_do_not():
    call = 'custom-call(%x, %w), custom_call_target="mosaic_gpu_v2"'
    text = f"""HloModule step
ENTRY %main (x: bf16[24,16], w: bf16[16,40]) -> bf16[24,20] {{
  %x = bf16[24,16]{{1,0}} parameter(0)
  %w = bf16[16,40]{{1,0}} parameter(1)
  %a = (bf16[24,40]{{1,0}}, bf16[24,20]{{1,0}}) {call}, metadata={{op_name="ffn/swiglu_forward/k"}}
  %b = (bf16[24,40]{{1,0}}, bf16[24,20]{{1,0}}) {call}, metadata={{op_name="ffn/other/k"}}
  ROOT %h = bf16[24,20]{{1,0}} get-tuple-element(%a), index=1
}}"""
    assert costs.product_flops(Program(text)) == 2 * 24 * 16 * 40


def test_a_loop_without_a_known_count_is_read_from_its_condition():
    """As TPU's compiler leaves it; what lies in a memory of the core's own is no traffic."""
    text = """HloModule step
%cond (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,16]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %y = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %y)
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], /*index=1*/f32[8,16]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,16]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}"""
    found = Program(text)
    assert costs.product_flops(found) == 12 * 2 * 8 * 16 * 16
    # Twelve products, and the comparison's index, bound and outcome.
    assert costs.memory_traffic(found) == 12 * (2 * 4 * 8 * 16 + 4 + 4 + 1)
    assert costs.custom_calls(found) == {"AllocateBuffer"}


@pytest.mark.parametrize(("first", "limit", "step"), [(0, 16, 2), (3, 17, 5), (1, 4, 1)])
def test_loops_turn_as_their_index_says(first, limit, step):
    """The way TPU's compiler writes the loop of a product whose pieces are passed around."""
    text = f"""HloModule test

%cond (p: (s32[4], u32[])) -> pred[] {{
  %p = (s32[4]{{0}}, u32[]{{:T(128)}}) parameter(0)
  %n = u32[] constant({limit})
  %i = u32[]{{:T(128)}} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%body (p: (s32[4], u32[])) -> (s32[4], u32[]) {{
  %p = (s32[4]{{0}}, u32[]{{:T(128)}}) parameter(0)
  %x = s32[4]{{0}} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %copied = u32[] copy(%i)
  %by = u32[] constant({step})
  %next = u32[] add(%copied, %by)
  ROOT %t = (s32[4]{{0}}, u32[]) tuple(%x, %next)
}}

ENTRY %main (x: s32[4]) -> (s32[4], u32[]) {{
  %x = s32[4]{{0}} parameter(0)
  %first = u32[] constant({first})
  %start = u32[] copy(%first)
  %t = (s32[4]{{0}}, u32[]) tuple(%x, %start)
  ROOT %loop = (s32[4]{{0}}, u32[]) while(%t), condition=%cond, body=%body
}}"""
    times = {run.instruction.name: run.times for run in Program(text).runs()}
    assert times["next"] == len(range(first, limit, step))


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("module @jit_step {}")


def test_every_product_of_a_gradient_is_found():
    """A perceptron's: each product forward and twice backward, but the first for the input."""
    sizes = (16, 40, 24, 8)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(pair, np.float32) for pair in itertools.pairwise(sizes)]

    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    x = np.ones((ROWS, sizes[0]), np.float32)
    text = jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text()
    forward = [2 * ROWS * math.prod(w.shape) for w in weights]
    assert costs.product_flops(Program(text)) == 3 * sum(forward) - forward[0]
