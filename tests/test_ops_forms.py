"""Every form of the operator against the float64 quadratic form, and that against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from ops_cases import (
    FAMILIES,
    HEADS,
    VARIANTS,
    assert_close,
    cast,
    forward,
    make_args,
    make_decay,
    with_gradients,
)

from lasad_jax.ops import (
    ManhattanDecay,
    NoDecay,
    RasterDecay,
    SequenceDecay,
    decay_matrix,
    linear_attention,
)

FORMS = ("quadratic", "chunked", "scan")


# The formula


def log_weight(decay, t, s, columns):
    """log D(t, s) of grid tokens s <= t, from the definition."""
    (row_t, column_t), (row_s, column_s) = divmod(t, columns), divmod(s, columns)
    match decay:
        case NoDecay():
            return 0.0
        case SequenceDecay(rate):
            return -rate * (t - s)
        case RasterDecay(alpha, beta):
            begins_row = [u % columns == 0 for u in range(s + 1, t + 1)]
            return -sum((alpha if begins else beta) for begins in begins_row)
        case ManhattanDecay(alpha, beta):
            return -alpha * (row_t - row_s) - beta * abs(column_t - column_s)


def oracle(q, k, v, decay, log_gate, *, grid, num_prefix):
    """Output and weights (B, H, N, N), a pair of tokens at a time in NumPy."""
    batch, num_tokens, heads, _ = q.shape
    out, weights = np.zeros_like(v), np.zeros((batch, heads, num_tokens, num_tokens))
    for t in range(num_tokens):
        for s in range(t + 1):
            log_d = np.zeros((batch, heads))
            if s >= num_prefix:
                log_d += log_weight(decay, t - num_prefix, s - num_prefix, grid[1])
                log_d += 0 if log_gate is None else log_gate[:, s + 1 : t + 1].sum(axis=1)
            weights[:, :, t, s] = np.exp(log_d)
            score = np.exp(log_d) * np.sum(q[:, t] * k[:, s], axis=-1)
            out[:, t] += score[..., None] * v[:, s]
    return out, weights


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 4)])
@pytest.mark.parametrize(("family", "gated"), [*VARIANTS, (NoDecay, True), (SequenceDecay, True)])
def test_quadratic_and_decay_matrix_are_the_formula(family, gated, grid, num_prefix):
    where = {"grid": grid, "num_prefix": num_prefix}
    args = make_args(family, num_prefix + grid[0] * grid[1], gated=gated)
    q, k, v, decay, log_gate = jax.tree.map(np.float64, args)
    out, weights = oracle(q, k, v, decay, log_gate, **where)
    with jax.enable_x64(True):
        got = forward(q, k, v, decay, log_gate=log_gate, implementation="quadratic", **where)
        assert got.dtype == np.float64
        assert_close(got, out, 1e-13)
        if not gated:
            matrix = decay_matrix(decay, **where)
            heads = 1 if family is NoDecay else HEADS
            assert matrix.shape == (heads, *weights.shape[2:])
            assert_close(matrix, weights[0, :heads], 1e-13)


@pytest.mark.parametrize(("family", "gated"), VARIANTS)
def test_gradients_of_quadratic_are_finite_differences(family, gated):
    with jax.enable_x64(True):
        q, k, v, decay, log_gate = cast(make_args(family, 9, gated=gated), jnp.float64)
        decay = jax.tree.map(lambda rate: 0.1 + rate / 20, decay)
        f = lambda q, k, v, decay, log_gate: forward(
            q, k, v, decay, grid=(3, 3), log_gate=log_gate, implementation="quadratic"
        )
        check_grads(f, (q, k, v, decay, log_gate), order=1, modes=("rev",), rtol=1e-6)


# The forms


def covering_cases():
    """Every grid with every decay; prefixes, part rows, gates and `scan` spread over them."""
    grids = [(1, 1), (1, 7), (7, 1), (5, 7), (16, 16), (24, 24), (12, 20)]
    linear, both = ("chunked",), ("chunked", "scan")
    for i, grid in enumerate(grids):
        for j, family in enumerate(FAMILIES):
            num_prefix, missing = (0, 1, 3)[(i + j) % 3], grid[1] // 2 * ((i + j) % 2)
            forms = both if (i + j) % 4 == 3 or grid == (5, 7) else linear
            yield family, False, grid, num_prefix, missing, forms
    yield NoDecay, True, (5, 7), 1, 0, linear
    yield SequenceDecay, True, (16, 16), 0, 5, both
    yield RasterDecay, True, (1, 1), 3, 0, linear
    yield RasterDecay, True, (7, 1), 0, 0, both
    yield RasterDecay, True, (24, 24), 1, 7, linear
    yield RasterDecay, True, (12, 20), 3, 0, both


@pytest.mark.parametrize(
    ("family", "gated", "grid", "num_prefix", "missing", "forms"), list(covering_cases())
)
def test_forms_agree_with_the_float64_quadratic_form(
    family, gated, grid, num_prefix, missing, forms
):
    args = make_args(family, num_prefix + grid[0] * grid[1] - missing, gated=gated)
    cotangent = np.random.default_rng(1).standard_normal(args[2].shape, np.float32)

    def run(form, dtype):
        return jax.jit(with_gradients(form, grid, num_prefix))(*cast((args, cotangent), dtype))

    with jax.enable_x64(True):
        want = run("quadratic", jnp.float64)
        for form in forms:
            assert_close(run(form, jnp.float64), want, 1e-10)
    for form in ("quadratic", *forms):
        assert_close(run(form, jnp.float32), want, 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "gated"), VARIANTS)
def test_bfloat16_stays_within_a_hundredth(family, gated, form):
    grid = (16, 16)
    args = cast(make_args(family, 257, gated=gated), jnp.bfloat16)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(args[2].shape), jnp.bfloat16)
    got = jax.jit(with_gradients(form, grid, 1))(args, cotangent)
    assert got["out"].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        args, cotangent = cast((args, cotangent), jnp.float64)
        want = jax.jit(with_gradients("quadratic", grid, 1))(args, cotangent)
    assert_close(got, want, 1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_of_wide_heads(form):
    """Sizes for which XLA takes other products on a CPU, some of which it lacks in bf16."""
    rng = np.random.default_rng(2)
    tokens = [rng.standard_normal((2, 65, 2, 64), np.float32) for _ in range(3)]
    args = (*tokens, make_decay(RasterDecay, np.array([0.3, 0.05], np.float32)))
    where = {"grid": (8, 8), "num_prefix": 1}
    got = forward(*cast(args, jnp.bfloat16), **where, implementation=form)
    assert_close(got, forward(*args, **where, implementation="quadratic"), 1e-2)


def test_states_between_blocks_cost_no_accuracy():
    """The 2D decay over five blocks in bf16, held to what a kernel reaches on one."""
    grid, names = (40, 8), ("out", "q", "k", "v")
    args = cast(make_args(ManhattanDecay, 321, gated=False), jnp.bfloat16)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(args[2].shape), jnp.bfloat16)
    got = jax.jit(with_gradients("chunked", grid, 1))(args, cotangent)
    with jax.enable_x64(True):
        args, cotangent = cast((args, cotangent), jnp.float64)
        want = jax.jit(with_gradients("quadratic", grid, 1))(args, cotangent)
    assert_close(*({name: x[name] for name in names} for x in (got, want)), 3e-3)


# Properties

SHAPES = st.sampled_from([((3, 4), 1), ((1, 5), 0), ((4, 2), 3)])
SEEDS = st.integers(0, 2**16)
FEW = settings(max_examples=10, deadline=None)


def random_rates(seed, low=1e-3, high=5.0):
    uniform = np.random.default_rng(seed).uniform(np.log(low), np.log(high), HEADS)
    return np.exp(uniform).astype(np.float32)


def apply(decay, form, grid, num_prefix, seed=0, tokens=None):
    q, k, v, *_ = tokens or make_args(NoDecay, num_prefix + grid[0] * grid[1], seed=seed)
    return forward(q, k, v, decay, grid=grid, num_prefix=num_prefix, implementation=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@FEW
@given(shape=SHAPES, seed=SEEDS, data=st.data())
def test_no_token_sees_a_later_one(family, form, shape, seed, data):
    (grid, num_prefix), decay = shape, make_decay(family, random_rates(seed))
    num_tokens = num_prefix + grid[0] * grid[1]
    cut = data.draw(st.integers(1, num_tokens - 1))
    tokens = make_args(family, num_tokens, seed=seed)[:3]
    others = make_args(family, num_tokens, seed=seed + 1)[:3]
    mixed = [
        np.concatenate([a[:, :cut], b[:, cut:]], axis=1)
        for a, b in zip(tokens, others, strict=True)
    ]
    before, after = (apply(decay, form, grid, num_prefix, tokens=x) for x in (tokens, mixed))
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.all(np.any(before[:, cut:] != after[:, cut:], axis=-1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES[1:])
@FEW
@given(shape=SHAPES, seed=SEEDS)
def test_vanishing_rates_are_no_decay(family, form, shape, seed):
    decay = make_decay(family, random_rates(seed, 1e-9, 1e-8))
    assert_close(apply(decay, form, *shape, seed), apply(NoDecay(), form, *shape, seed), 1e-6)


@pytest.mark.parametrize("form", FORMS)
@FEW
@given(shape=SHAPES, seed=SEEDS)
def test_raster_with_equal_rates_is_sequence(form, shape, seed):
    rates = random_rates(seed)
    raster = apply(RasterDecay(rates, rates), form, *shape, seed)
    assert_close(raster, apply(SequenceDecay(rates), form, *shape, seed), 1e-6)


@pytest.mark.parametrize("form", FORMS)
@FEW
@given(num_prefix=st.sampled_from([0, 2]), seed=SEEDS)
def test_manhattan_on_one_row_is_sequence(form, num_prefix, seed):
    shape, rates = ((1, 6), num_prefix), random_rates(seed)
    manhattan = apply(ManhattanDecay(random_rates(seed + 1), rates), form, *shape, seed)
    assert_close(manhattan, apply(SequenceDecay(rates), form, *shape, seed), 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@FEW
@given(shape=SHAPES, seed=SEEDS, scale=st.floats(-4, 4, width=16))
def test_output_is_linear_in_values(family, form, shape, seed, scale):
    (grid, num_prefix), decay = shape, make_decay(family, random_rates(seed))
    q, k, v, *_ = make_args(family, num_prefix + grid[0] * grid[1], seed=seed)
    other = np.roll(v, 1, axis=-1)
    of = lambda values: apply(decay, form, grid, num_prefix, tokens=(q, k, values))
    assert_close(of(v + scale * other), of(v) + scale * of(other), 1e-5)


# Transformations


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "gated"), VARIANTS)
def test_vmap_jit_and_remat_change_nothing(family, gated, form):
    """Two batches at once under vmap, with the rates shared."""
    f = with_gradients(form, (3, 4), 1)
    remat = with_gradients(form, (3, 4), 1, transform=jax.checkpoint)
    with jax.enable_x64(True):
        pairs = [cast(make_args(family, 13, gated=gated, seed=i), jnp.float64) for i in (0, 1)]
        cotangent = np.random.default_rng(1).standard_normal(pairs[0][2].shape)
        plain = [jax.jit(f)(args, cotangent) for args in pairs]

        *tokens, _, log_gate = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
        axes = ((0, 0, 0, None, 0), None)
        args = (*tokens, pairs[0][3], log_gate)
        mapped = jax.jit(jax.vmap(f, in_axes=axes))(args, cotangent)
        for i, want in enumerate(plain):
            assert_close(jax.tree.map(lambda x, i=i: x[i], mapped), want, 1e-12)
        assert_close(jax.jit(remat)(pairs[0], cotangent), plain[0], 1e-12)

        *tokens, decay, log_gate = pairs[0]
        eager = linear_attention(
            *tokens, decay, log_gate=log_gate, grid=(3, 4), implementation=form
        )
        assert_close(eager, plain[0]["out"], 1e-12)
