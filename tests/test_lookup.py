"""Rows of a table on a mesh: those of one device, and gradients rounded before they are sent."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import one_device_mesh, tiny_config

from lasad_jax.models.lookup import look_up
from lasad_jax.training import sharding

V, D, IMAGES, TOKENS = 48, 24, 16, 7
NAMES = ("vocab", "embed")


def value_and_gradient(dtype, table, ids, weights):
    """Rows, and the gradient of their sum under weights."""

    def loss(table):
        rows = look_up(table, ids, NAMES, dtype)
        return jnp.sum(rows.astype(jnp.float32) * weights), rows

    (_, rows), gradient = jax.value_and_grad(loss, has_aux=True)(table)
    return rows, gradient


def on_mesh(mesh, dtype, table, ids, weights):
    """The lowered program, and its arguments where they lie."""
    mesh = sharding.make_mesh(tiny_config(mesh=mesh).mesh)
    boxed = nn.Partitioned(table, NAMES)
    images = sharding.batch_sharding(mesh)
    arguments = (
        jax.device_put(table, sharding.tree_shardings(boxed, mesh)),
        *(jax.device_put(x, images) for x in (ids, weights)),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        run = jax.jit(functools.partial(value_and_gradient, dtype))
        return run.lower(*arguments), arguments


def random_arguments():
    rng = np.random.default_rng()
    # Some rows often, some never.
    ids = rng.integers(0, V // 2, (IMAGES, TOKENS)) * rng.integers(1, 3, (IMAGES, 1))
    table = rng.standard_normal((V, D), np.float32)
    return table, ids.astype(np.int32), rng.standard_normal((IMAGES, TOKENS, D), np.float32)


MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"slice": 2, "data": 2, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize("mesh", MESHES)
def test_in_float32_all_is_that_of_one_device(mesh):
    table, ids, weights = random_arguments()
    gradient = np.zeros((V, D))
    np.add.at(gradient, ids, weights.astype(np.float64))
    lowered, arguments = on_mesh(mesh, "float32", table, ids, weights)
    rows, ours = lowered.compile()(*arguments)
    np.testing.assert_array_equal(rows, table[ids])
    np.testing.assert_allclose(ours, gradient, rtol=1e-5, atol=1e-5)
    if mesh.get("tensor", 1) == 1:
        assert ours.sharding.is_equivalent_to(arguments[0].sharding, 2)


@pytest.mark.parametrize("mesh", MESHES[:4])
def test_in_bfloat16_each_device_adds_up_exactly_and_sends_what_is_rounded(mesh):
    table, ids, weights = random_arguments()
    weights = weights.astype(jnp.bfloat16).astype(np.float32)
    lowered, arguments = on_mesh(mesh, "bfloat16", table, ids, weights)
    rows, ours = lowered.compile()(*arguments)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, table.astype(jnp.bfloat16)[ids])

    total = np.zeros((V, D))
    sizes = np.zeros((V, D))
    for device in np.split(np.arange(IMAGES), 8):
        part = np.zeros((V, D))
        np.add.at(part, ids[device], weights[device].astype(np.float64))
        part = part.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
        total, sizes = total + part, sizes + np.abs(part)
    assert ours.dtype == jnp.float32
    # However these are added in bfloat16: a rounding for each of seven sums.
    assert np.all(np.abs(np.asarray(ours) - total) <= 7 * 2**-8 * sizes)
    sums = re.findall(
        r'"stablehlo.(?:all_reduce|reduce_scatter)".*?\) : \((.*?)\)', lowered.as_text(), re.S
    )
    assert sums
    assert all("bf16" in x for x in sums), sums


def test_one_device_adds_up_in_float32():
    table, ids, weights = random_arguments()
    mesh = one_device_mesh(tiny_config())
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        run = jax.jit(functools.partial(value_and_gradient, "bfloat16"))
        _, ours = run(table, ids, weights)
    weights = weights.astype(jnp.bfloat16).astype(np.float64)
    expected = np.zeros((V, D))
    np.add.at(expected, ids, weights)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
