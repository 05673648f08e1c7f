"""Parameters in parts: sent once a step and kept, or sent again where memory is short."""

import collections
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from test_sharding import collectives
from tiny import one_device_mesh, tiny_config

from lasad_jax.models.exchange import exchanged
from lasad_jax.models.storage import stored_axis, with_parts
from lasad_jax.training import cross_entropy, sharding
from lasad_jax.training.state import abstract_state
from lasad_jax.training.step import jit_step, make_train_step

WIDTH, HIDDEN, VOCAB = 24, 40, 56
SIZES = {"width": WIDTH, "num_heads": 3, "ffn_width": HIDDEN, "vocab_size": VOCAB, "grid": (3, 5)}


@functools.cache
def compiled_step(remat):
    config = tiny_config(
        mesh={"data": 1, "fsdp": 8}, model=SIZES | {"num_layers": 3, "remat": remat, "unroll": 3}
    )
    mesh = sharding.make_mesh(config.mesh)
    batch = {"tokens": np.zeros((16, 15), np.int32), "labels": np.zeros(16, np.int32)}
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        batch = sharding.put_batch(batch, mesh)
        state = abstract_state(config, mesh)
        return jit_step(make_train_step(config), state).lower(state, batch).compile().as_text()


def gathers(text):
    """How often an array of each number of elements is put together."""
    arrays = itertools.chain.from_iterable(collectives(text, "all-gather"))
    return collections.Counter(map(math.prod, arrays))


@pytest.mark.parametrize(("remat", "again"), [("cheap", 0), ("lean", 3), ("block", 3)])
def test_a_layers_parameters_are_sent_once_or_again(remat, again, monkeypatch):
    # Logits of several parts, each of which reads the head.
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 2 * 2 * 15 * VOCAB // 6)
    found = gathers(compiled_step(remat))
    # down, and gate with up, of three layers.
    assert found[WIDTH * HIDDEN] == found[WIDTH * 2 * HIDDEN] == 3 + again
    assert found[WIDTH * VOCAB] == 2  # the head, and the embedding of tokens


def test_parts_are_pieces_of_memory():
    """What is put together is put one behind the other, but for classes, taps and too few heads."""
    found = re.findall(
        r"= \w+\[([\d,]+)\]\S* all-gather\(.*?dimensions=\{(\d+)\}", compiled_step("cheap")
    )
    along = collections.defaultdict(set)
    for shape, dimension in found:
        along[tuple(map(int, shape.split(",")))].add(int(dimension))
    assert along.pop((3, 8, WIDTH)) == {2}
    assert along.pop((11, WIDTH)) == {1}
    assert along.pop((13, WIDTH)) == {1}
    assert {(HIDDEN, WIDTH), (VOCAB, WIDTH), (WIDTH, VOCAB)} <= set(along)
    assert all(dimensions == {0} for dimensions in along.values()), along


@pytest.mark.parametrize(
    ("names", "shape", "devices", "parts", "axis", "on_tpu"),
    [
        (("layers", "embed", "mlp"), (4, 24, 40), (1, 1, 2), 4, 1, 1),
        (("layers", "mlp", "embed"), (4, 40, 24), (1, 2, 1), 4, 1, 2),
        (("layers", "mlp", "embed"), (4, 40, 24), (1, 4, 1), 4, 2, 2),  # 40 are not 16 parts
        (("heads", "head_dim", "embed"), (6, 16, 24), (1, 1, 1), 4, 2, 2),
        (("heads", "head_dim", "embed"), (6, 16, 25), (1, 1, 1), 4, None, None),
        (("heads", "head_dim"), (8, 16), (2, 1), 4, 0, None),
        (("heads",), (8,), (1,), 4, None, None),  # small
        (("taps", "embed"), (12, 24), (1, 1), 4, 1, 1),
        (("vocab", "embed"), (56, 24), (1, 1), 8, 0, 1),
        ((None, "embed"), (5, 24), (1, 1), 1, 1, 1),
    ],
)
def test_the_first_axis_that_can_is_stored_in_parts(names, shape, devices, parts, axis, on_tpu):
    """But on TPUs the width."""
    assert stored_axis(names, shape, devices, parts, "gpu") == axis
    assert stored_axis(names, shape, devices, parts, "tpu") == on_tpu


@pytest.mark.parametrize(
    ("axes", "parts", "joined"),
    [
        (None, None, None),
        (None, "fsdp", "fsdp"),
        ("tensor", "fsdp", ("tensor", "fsdp")),
        (("a", "b"), None, ("a", "b")),
    ],
)
def test_axes_for_computation_come_before_those_for_storage(axes, parts, joined):
    assert with_parts(axes, parts) == joined


def test_values_and_gradients_are_those_of_one_device():
    rng = np.random.default_rng()
    values = {"heads": rng.standard_normal((16, 3, 5)), "out": rng.standard_normal((5, 16))}
    axes = {"heads": ("embed", "heads", "head_dim"), "out": (None, "embed")}
    x = rng.standard_normal((8, 2, 16))

    def loss(params, x):
        kernels = {name: (kernel, axes[name]) for name, kernel in params.items()}
        x, y, kernels = exchanged(x, 2 * x, kernels)
        y = jnp.sin(y @ kernels["heads"][:, 1]) @ kernels["out"]
        return jnp.sum(y * x)

    expected = jax.value_and_grad(loss, (0, 1))(values, x)
    mesh = sharding.make_mesh(tiny_config(mesh={"data": 2, "fsdp": 4}).mesh)
    parts = {"heads": PartitionSpec("fsdp"), "out": PartitionSpec(None, "fsdp")}
    images = PartitionSpec(sharding.BATCH_AXES)
    put = lambda tree, specs: jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        ours = jax.jit(jax.value_and_grad(loss, (0, 1)))(put(values, parts), put(x, images))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected
    )
    for name, gradient in ours[1][0].items():
        assert gradient.sharding.spec == parts[name]


def test_who_waits_for_what():
    """Forward kernels for the tokens they are sent after, and the branch for kernels; backward
    those tokens for the sums of gradients, but not for those of a few numbers in another dtype."""
    shapes = {"heads": (16, 3, 8), "down": (40, 16), "taps": (13, 16)}
    axes = {"heads": ("embed", "heads", None), "down": ("mlp", "embed"), "taps": ("taps", "embed")}
    kernels = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in shapes.items()}
    kernels["taps"] = jnp.ones(shapes["taps"])
    x = jnp.ones((8, 5, 16), jnp.bfloat16)

    def loss(kernels, x):
        named = {name: (kernel, axes[name]) for name, kernel in kernels.items()}
        x, branch, kernels = exchanged(x, 2 * x, named)
        return sum(jnp.sum(y) for y in (x, branch, *kernels.values()))

    mesh = sharding.make_mesh(tiny_config(mesh={"data": 2, "fsdp": 4}).mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(kernels, x).as_text()
    lines = re.findall(r"optimization_barrier .* : (.*)", text)
    numbers = [[tuple(map(int, re.findall(r"\d+(?=x)", y))) for y in x.split(", ")] for x in lines]
    everything = sorted([x.shape, *shapes.values()])
    added = sorted([x.shape, shapes["heads"], shapes["down"]])
    assert list(map(sorted, numbers)) == [everything, everything, added]


def test_whole_parameters_are_left_alone():
    kernel, x = np.zeros((16, 3)), np.zeros((2, 5, 16))
    config = tiny_config()
    with jax.set_mesh(one_device_mesh(config)), nn.logical_axis_rules(sharding.RULES):
        left = exchanged(x, x, {"a": (kernel, ("embed", "mlp"))})
    assert left[0] is x
    assert left[1] is x
    assert left[2]["a"] is kernel
