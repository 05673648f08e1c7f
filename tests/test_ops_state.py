"""What one call hands to the next: sequences in pieces and token by token equal one call."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_cases import (
    FAMILIES,
    HEADS,
    KEY_DIM,
    VALUE_DIM,
    VARIANTS,
    assert_close,
    cast,
    forward,
    make_args,
)

from lasad_jax.ops import ManhattanDecay, RasterDecay, init_state, linear_attention, step

GRID, PREFIX = (3, 3), 2
NUM_TOKENS = PREFIX + GRID[0] * GRID[1]
FORMS = ("chunked", "scan")
WITH_PLACES = [(RasterDecay, True), (ManhattanDecay, False)]
TOLERANCE = 1e-12

jitted_step = jax.jit(step, static_argnames="grid")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def empty_state(family, grid=GRID, num_prefix=PREFIX, batch=2, dtype=jnp.float64):
    sizes = {"batch": batch, "num_heads": HEADS, "key_dim": KEY_DIM, "value_dim": VALUE_DIM}
    return init_state(family, **sizes, grid=grid, num_prefix=num_prefix, dtype=dtype)


def in_one_call(args, form, grid=GRID, num_prefix=PREFIX, apply=forward):
    return in_pieces(args, (), form, None, grid, num_prefix, apply)


def in_pieces(args, cuts, form, state, grid=GRID, num_prefix=PREFIX, apply=forward):
    """Output and final state of one call for each stretch between cuts."""
    *tokens, decay, log_gate = args
    outs, bounds = [], (0, *cuts, tokens[0].shape[1])
    for start, end in itertools.pairwise(bounds):
        out, state = apply(
            *(x[:, start:end] for x in tokens),
            decay,
            log_gate=None if log_gate is None else log_gate[:, start:end],
            grid=grid,
            num_prefix=num_prefix,
            implementation=form,
            initial_state=state,
            return_state=True,
        )
        outs.append(out)
    return {"out": jnp.concatenate(outs, axis=1), **vars(state)}


def by_steps(args, state, start=0):
    *tokens, decay, log_gate = args
    outs = []
    for t in range(start, tokens[0].shape[1]):
        gate = None if log_gate is None else log_gate[:, t]
        out, state = jitted_step(state, *(x[:, t] for x in tokens), decay, grid=GRID, log_gate=gate)
        outs.append(out)
    return {"out": jnp.stack(outs, axis=1), **vars(state)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "gated"), VARIANTS)
def test_any_split_equals_one_call(family, gated, form):
    """In the prefix, at a row end, mid-row; every point where the positions matter most.

    Calls that get a state are compiled for any position, once for each length.
    """
    args = cast(make_args(family, NUM_TOKENS, gated=gated), jnp.float64)
    whole = in_one_call(args, form)
    assert_close(whole["out"], in_quadratic_form(args), TOLERANCE)
    cuts_of = [(), (1,), (5,), (6,), (10,), (1, 6), (5, 10)]
    if form == "chunked" and (family, gated) in WITH_PLACES:
        cuts_of += [(t,) for t in range(2, NUM_TOKENS - 1)] + [(2, 4), (7, 9)]
    for cuts in cuts_of:
        assert_close(in_pieces(args, cuts, form, empty_state(family)), whole, TOLERANCE)


def in_quadratic_form(args):
    *tokens, decay, log_gate = args
    where = {"grid": GRID, "num_prefix": PREFIX}
    return forward(*tokens, decay, log_gate=log_gate, implementation="quadratic", **where)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_split_without_a_state_to_start_from(family, form):
    """The first call's position is then a constant; cuts in the prefix, at its end, mid-row."""
    args = cast(make_args(family, NUM_TOKENS), jnp.float64)
    whole = in_one_call(args, form)
    for cut in (1, PREFIX, 7):
        assert_close(in_pieces(args, (cut,), form, None), whole, TOLERANCE)


@pytest.mark.parametrize(("family", "gated"), VARIANTS)
def test_split_of_many_chunks(family, gated):
    grid, num_prefix = (12, 20), 3
    args = cast(make_args(family, 243, gated=gated, batch=1), jnp.float64)
    whole = in_one_call(args, "chunked", grid, num_prefix)
    pieces = in_pieces(args, (2, 150), "chunked", None, grid, num_prefix)
    assert_close(pieces, whole, TOLERANCE)


@pytest.mark.parametrize(("family", "gated"), VARIANTS)
def test_steps_equal_one_call_and_continue_it(family, gated):
    args = cast(make_args(family, NUM_TOKENS, gated=gated), jnp.float64)
    whole = in_one_call(args, "chunked")
    assert_close(by_steps(args, empty_state(family)), whole, TOLERANCE)
    *tokens, decay, log_gate = args
    for start in (1, 5):
        head = [x[:, :start] for x in tokens]
        gate = None if log_gate is None else log_gate[:, :start]
        _, state = forward(
            *head, decay, log_gate=gate, grid=GRID, num_prefix=PREFIX, return_state=True
        )
        rest = whole | {"out": whole["out"][:, start:]}
        assert_close(by_steps(args, state, start), rest, TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_continues_steps(family):
    args = cast(make_args(family, NUM_TOKENS), jnp.float64)
    whole = in_one_call(args, "chunked")
    head = jax.tree.map(lambda x: x[:, :7], args[:3])
    state = by_steps((*head, *args[3:]), empty_state(family))
    state.pop("out")
    rest = jax.tree.map(lambda x: x[:, 7:], args[:3])
    got = in_pieces((*rest, *args[3:]), (), "chunked", type(empty_state(family))(**state))
    assert_close(got, whole | {"out": whole["out"][:, 7:]}, TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_inside_a_compiled_loop(family):
    *tokens, decay, _ = cast(make_args(family, NUM_TOKENS), jnp.float64)

    def one(state, token):
        out, state = step(state, *token, decay, grid=GRID)
        return state, out

    time_first = [jnp.moveaxis(x, 1, 0) for x in tokens]
    state, out = jax.jit(lambda s, x: jax.lax.scan(one, s, x))(empty_state(family), time_first)
    got = {"out": jnp.moveaxis(out, 0, 1), **vars(state)}
    assert_close(got, in_one_call((*tokens, decay, None), "chunked"), TOLERANCE)


@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize(("family", "gated"), WITH_PLACES)
def test_gradients_through_a_split(family, gated, cut):
    args = cast(make_args(family, NUM_TOKENS, gated=gated), jnp.float64)
    weight = np.random.default_rng(1).standard_normal(args[2].shape)

    def loss(args, cuts):
        result = in_pieces(args, cuts, "chunked", None, apply=linear_attention)
        return jnp.sum(weight * result["out"]) + jnp.sum(jnp.sin(result["memory"]))

    split, whole = (
        dict(enumerate(jax.jit(jax.grad(loss), static_argnums=1)(args, cuts)))
        for cuts in ((cut,), ())
    )
    assert_close(split, whole, TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_tokens_keep_a_float32_memory(family):
    args = cast(make_args(family, NUM_TOKENS), jnp.bfloat16)
    state = empty_state(family, dtype=jnp.bfloat16)
    for result in (in_one_call(args, "chunked"), in_one_call(args, "scan"), by_steps(args, state)):
        assert result["out"].dtype == result["prefix_k"].dtype == jnp.bfloat16
        assert result["memory"].dtype == state.memory.dtype == jnp.float32
        assert result["index"] == NUM_TOKENS
        assert_close(result["out"], in_quadratic_form(cast(args, jnp.float64)), 1e-2)
