"""Decays, tokens and comparisons shared by the operator's tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lasad_jax.ops import ManhattanDecay, NoDecay, RasterDecay, SequenceDecay, linear_attention

FAMILIES = (NoDecay, SequenceDecay, RasterDecay, ManhattanDecay)
# Family and whether gated; all take the gate the same way, ManhattanDecay takes none.
VARIANTS = [*((family, False) for family in FAMILIES), (RasterDecay, True)]
HEADS, KEY_DIM, VALUE_DIM = 4, 3, 5

forward = jax.jit(
    linear_attention, static_argnames=("grid", "num_prefix", "implementation", "return_state")
)


def make_decay(family, rates=None):
    """Rates from 1e-4 to 20 spread over the heads, paired differently for rows and columns."""
    rates = np.geomspace(1e-4, 20, HEADS, dtype=np.float32) if rates is None else rates
    return family(*(np.roll(rates, i) for i in range(len(dataclasses.fields(family)))))


def make_args(family, num_tokens, *, gated=False, batch=2, seed=0):
    """q, k, v, decay, log_gate in float32; a third of the gates are 0, a third -50."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((batch, num_tokens, HEADS, width), np.float32)
        for width in (KEY_DIM, KEY_DIM, VALUE_DIM)
    )
    gate = rng.exponential(0.3, q.shape[:3]) * rng.integers(0, 2, q.shape[:3])
    gate = np.where(rng.random(q.shape[:3]) < 1 / 3, 50, gate).astype(np.float32)
    return q, k, v, make_decay(family), -gate if gated else None


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def with_gradients(implementation, grid, num_prefix, transform=lambda operator: operator):
    """Maps the five arguments and a cotangent to the output and all gradients."""

    def run(args, cotangent):
        def operator(q, k, v, decay, log_gate):
            return linear_attention(
                q,
                k,
                v,
                decay,
                grid=grid,
                num_prefix=num_prefix,
                log_gate=log_gate,
                implementation=implementation,
            )

        out, pullback = jax.vjp(transform(operator), *args)
        names = ("q", "k", "v", "rates", "log_gate")
        return {"out": out, **dict(zip(names, pullback(cotangent), strict=True))}

    return run


def assert_close(got, want, tolerance):
    """norm(got - want) <= tolerance * norm(want), for each entry of two dicts or for two trees."""
    if not isinstance(want, dict):
        got, want = {"value": got}, {"value": want}
    assert got.keys() == want.keys()
    for name in want:
        a, b = (_as_vector(tree[name]) for tree in (got, want))
        difference, scale = np.linalg.norm(a - b), np.linalg.norm(b)
        assert difference <= tolerance * scale, f"{name}: {difference / scale:.2e} > {tolerance}"


def _as_vector(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate([*leaves, np.zeros(0)])
