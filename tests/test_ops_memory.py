"""Training memory of the default path: compiled, not run."""

import jax
import jax.numpy as jnp
import pytest
from ops_cases import VARIANTS, make_decay, with_gradients

GIBIBYTE = 2**30


def temporary_bytes(family, gated, grid, heads=16, width=64):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    num_tokens = grid[0] * grid[1]
    x = of(1, num_tokens, heads, width)
    rates = jax.tree.map(lambda _: of(heads), make_decay(family))
    args = (x, x, x, rates, of(1, num_tokens, heads) if gated else None)
    compiled = jax.jit(with_gradients("auto", grid, num_prefix=0)).lower(args, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("family", "gated"), VARIANTS)
def test_forward_and_backward_memory_is_linear_and_small(family, gated):
    half, full = (temporary_bytes(family, gated, (rows, 64)) for rows in (32, 64))
    print(f"{family.__name__} gated={gated}: {half / 2**20:.0f}, {full / 2**20:.0f} MiB")
    assert 0 < full < GIBIBYTE
    assert full <= 2.2 * half
