"""Parameters in parts: sent once a step and kept, or sent again where memory is short."""

import collections
import itertools
import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from test_sharding import collectives
from tiny import one_device_mesh, tiny_config

from lasad_jax.models.gathered import gathered, moment
from lasad_jax.training import cross_entropy, sharding
from lasad_jax.training.state import abstract_state
from lasad_jax.training.step import jit_step, make_train_step

WIDTH, HIDDEN, VOCAB = 24, 40, 56
SIZES = {"width": WIDTH, "num_heads": 3, "ffn_width": HIDDEN, "vocab_size": VOCAB, "grid": (3, 5)}


def compiled_step(remat):
    config = tiny_config(
        mesh={"data": 1, "fsdp": 8}, model=SIZES | {"num_layers": 3, "remat": remat, "unroll": 3}
    )
    mesh = sharding.make_mesh(config.mesh)
    batch = {"tokens": np.zeros((16, 15), np.int32), "labels": np.zeros(16, np.int32)}
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        batch = sharding.put_batch(batch, mesh)
        step = jit_step(make_train_step(config))
        return step.lower(abstract_state(config, mesh), batch).compile().as_text()


def gathers(text):
    """How often an array of each number of elements is put together."""
    arrays = itertools.chain.from_iterable(collectives(text, "all-gather"))
    return collections.Counter(map(math.prod, arrays))


@pytest.mark.parametrize(("remat", "again"), [("cheap", 0), ("lean", 3), ("block", 9)])
def test_a_layers_parameters_are_sent_once_or_again(remat, again, monkeypatch):
    # Logits of several parts, each of which reads the head.
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 2 * 2 * 15 * VOCAB // 6)
    found = gathers(compiled_step(remat))
    # gate, up and down of three layers. Backward, "lean" has gate and up, joined, but not down.
    assert found[WIDTH * HIDDEN] == 9 + again
    assert found[WIDTH * VOCAB] == 2  # the head, and the embedding of tokens


def test_values_and_gradients_are_those_of_one_device():
    rng = np.random.default_rng()
    values = {"kernel": rng.standard_normal((16, 3, 5)), "scale": rng.standard_normal(16)}
    axes = {"kernel": ("embed", "heads", "head_dim"), "scale": ("embed",)}
    x = rng.standard_normal((8, 2, 16))

    def loss(params, x):
        x, after = moment(x)
        y, before = moment(2 * x)
        params = gathered(params, axes, after, before)
        return jax.numpy.sum(jax.numpy.sin((y * params["scale"]) @ params["kernel"][:, 1]))

    expected = jax.value_and_grad(loss, (0, 1))(values, x)
    mesh = sharding.make_mesh(tiny_config(mesh={"data": 2, "fsdp": 4}).mesh)
    parts = {"kernel": PartitionSpec("fsdp"), "scale": PartitionSpec("fsdp")}
    images = PartitionSpec(sharding.BATCH_AXES)
    put = lambda tree, specs: jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        ours = jax.jit(jax.value_and_grad(loss, (0, 1)))(put(values, parts), put(x, images))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected
    )
    (gradient, _) = ours[1]
    assert gradient["kernel"].sharding.spec[0] == "fsdp"


def test_whole_parameters_are_left_alone():
    kernel = np.zeros((16, 3))
    config = tiny_config()
    with jax.set_mesh(one_device_mesh(config)), nn.logical_axis_rules(sharding.RULES):
        assert gathered({"a": kernel}, {"a": ("embed", "mlp")}, 0.0, 0.0)["a"] is kernel
