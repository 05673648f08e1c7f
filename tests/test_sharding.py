"""The same training on any mesh and any number of processes: eight simulated devices."""

import collections
import dataclasses
import functools
import json
import math
import re
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from processes import run_two
from tiny import one_device_mesh, tiny_config, train_steps

from lasad_jax.config import MeshConfig
from lasad_jax.training import loop, sharding
from lasad_jax.training.metrics import read_metrics
from lasad_jax.training.state import abstract_state
from lasad_jax.training.step import jit_step, make_train_step

# data, fsdp, tensor, and slices where there are several.
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
# Less to compile.
PLAIN = {"selective": False, "local_conv": "off", "rope": False, "dropout": 0.0, "remat": "none"}
MIXERS = {
    "raster": {"decay": "raster"},
    "none": {"decay": "none"} | PLAIN,
    "sequence": {"decay": "sequence"} | PLAIN,
    "manhattan": {"decay": "manhattan"} | PLAIN,
    "softmax": {"mixer": "softmax"} | PLAIN,
}
STEPS, BATCH, LAYERS = 20, 16, 3


def on_mesh(sizes, **overrides):
    names = (field.name for field in dataclasses.fields(MeshConfig))
    config = tiny_config(mesh=dict(zip(names, sizes, strict=False)), **overrides)
    return config, sharding.make_mesh(config.mesh)


def small_model(mixer):
    sizes = {"num_layers": LAYERS, "width": 32, "num_heads": 4, "ffn_width": 64, "vocab_size": 16}
    return sizes | {"grid": (3, 5)} | MIXERS[mixer]


OPTIMIZER = {"warmup_steps": 10}


def first_state(planned):
    """Random parameters, the same on any mesh, where a plan of the state has them lie."""
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), planned)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, x.dtype), state.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, planned)
    return jax.device_put(state.replace(params=params, ema=params), shardings)


def run(config, mesh):
    """The state before and after `STEPS`, losses, and the train step as lowered and as compiled."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 16, (STEPS, BATCH, 15), np.int32)
    labels = rng.integers(0, 10, (STEPS, BATCH), np.int32)
    batches = [{"tokens": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        planned, batches = (
            abstract_state(config, mesh),
            [sharding.put_batch(b, mesh) for b in batches],
        )
        lowered = jit_step(make_train_step(config), planned).lower(planned, batches[0])
        step, state, losses = lowered.compile(), first_state(planned), []
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
    return planned, state, jax.device_get(losses), lowered.as_text(), step.as_text()


@pytest.fixture(scope="module")
def on_one_device():
    """Parameters, their average and losses by mixer."""

    @functools.cache
    def get(mixer):
        config = tiny_config(model=small_model(mixer), optimizer=OPTIMIZER)
        _, state, losses, *_ = run(config, one_device_mesh(config))
        return jax.device_get((state.params, state.ema)), losses

    return get


# What a mesh does to a model shows on one with everything in it (raster). The decays differ in
# the operator alone, which knows of images and heads: for each, a mesh that splits both will do.
@pytest.mark.parametrize(
    ("mixer", "sizes"),
    [
        *(("raster", sizes) for sizes in MESHES),
        ("none", (1, 2, 4)),
        ("manhattan", (1, 2, 4)),
        ("softmax", (2, 2, 2)),
        ("sequence", (1, 2, 2, 2)),
    ],
    ids=str,
)
def test_every_mesh_trains_to_the_same_parameters(mixer, sizes, on_one_device):
    expected, expected_losses = on_one_device(mixer)
    config, mesh = on_mesh(sizes, model=small_model(mixer), optimizer=OPTIMIZER)
    planned, state, losses, lowered, compiled = run(config, mesh)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)

    def assert_close(path, ours, theirs):
        error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
        assert error < 1e-5, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(assert_close, (state.params, state.ema), expected)

    # After the steps as before them, everything lies where the rules say.
    for ours, plan in zip(jax.tree.leaves(state), jax.tree.leaves(planned), strict=True):
        assert ours.sharding.is_equivalent_to(plan.sharding, ours.ndim), (ours.shape, ours.sharding)
    # All but rates and biases, and by the tensor axis also norms and classes, is split evenly.
    parts = sizes[1] * sizes[2]
    for tree in (state.params, state.opt_state, state.ema):
        share = bytes_on_fullest_device(tree) / sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        assert 1 / parts <= share <= 1 / parts + (0.02 if parts > 1 else 0)

    check_constraints(lowered)
    check_collectives(compiled, state.params)


def bytes_on_fullest_device(tree):
    totals = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] += shard.data.nbytes
    return max(totals.values())


def check_constraints(lowered):
    """Images, and by the tensor axis the columns of logits, are held to where they belong."""
    for axes, shape in (("{}, {}", "16x15x32"), ('{}, {"tensor"}', "16x15x16")):
        images = '{"slice", "data", "fsdp"}'
        assert re.search(
            rf"sharding_constraint [^<]*<@mesh, \[{images}, {axes}\]> : tensor<{shape}xf32>",
            lowered,
        )


def check_collectives(compiled, params):
    """Nothing is sent for all layers at once but vectors, and no device gets all images."""
    blocks = jax.tree.leaves(params["blocks"])
    one_layer = sum(leaf.nbytes for leaf in blocks) / LAYERS
    found = list(collectives(compiled))
    assert len(found) > 1
    for arrays in found:
        # Parameters of one layer; with them, for their sum, its decay's weights and padding.
        assert sum(map(math.prod, arrays)) * 4 < 1.2 * one_layer, arrays
        assert all(math.prod(shape) <= LAYERS * 32 for shape in arrays if LAYERS in shape), arrays
        assert not any(shape[:2] in ((BATCH, 14), (BATCH, 15)) for shape in arrays), arrays


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(compiled, kinds=KINDS):
    """Shapes of the outputs of every operation of a program in which devices communicate."""
    for outputs in re.findall(rf"= (\S+|\([^)]*\)) (?:{kinds})(?:-start)?\(", compiled):
        shapes = re.findall(r"\w\[([\d,]*)\]", outputs)
        yield [tuple(map(int, filter(None, shape.split(",")))) for shape in shapes]


# Slices


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "a GPU"


@dataclasses.dataclass(frozen=True)
class SliceDevice(Device):
    slice_index: int = 0


def numbers(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices)


def test_devices_of_a_host_stay_together():
    hosts = [Device(id=i, process_index=i // 4) for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    mesh = sharding.make_mesh(MeshConfig(slice=-1, fsdp=2, tensor=2), hosts)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    np.testing.assert_array_equal(numbers(mesh).ravel(), range(8))
    # Without an axis for them, hosts follow one another all the same.
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), hosts)
    np.testing.assert_array_equal(numbers(mesh)[0], [[[0], [1], [2], [3]], [[4], [5], [6], [7]]])


def test_a_slice_may_have_many_processes():
    devices = [SliceDevice(id=i, process_index=i, slice_index=i % 2) for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(slice=-1, tensor=4), devices)
    np.testing.assert_array_equal(numbers(mesh)[:, 0, 0], [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_slice_of_the_mesh_may_not_reach_over_several_of_a_tpu():
    devices = [
        SliceDevice(id=i, process_index=i // 4, platform="tpu", slice_index=i // 2)
        for i in range(8)
    ]
    with pytest.raises(ValueError, match=r"mesh\.slice: 2 must be a multiple of 4, the slices"):
        sharding.make_mesh(MeshConfig(slice=2), devices)


@dataclasses.dataclass(frozen=True)
class TPU(Device):
    platform: str = "tpu"
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id % 2, self.id // 2, 0)


def test_tpus_that_know_of_no_slices_are_one():
    devices = [TPU(id=i, process_index=i // 4) for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(slice=-1, fsdp=8), devices)
    assert dict(mesh.shape) == {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1}


# What is refused


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh(MeshConfig(-1, 2, 2)).shape) == {
        "slice": 1,
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [((3, 1, 1), "(3, 1, 1, 1)"), ((-1, 3, 1), "(2, 3, 1, 1)"), ((1, 2, 2, 3), "(1, 2, 2, 3)")],
)
def test_sizes_that_do_not_multiply_are_refused(sizes, shown):
    message = rf"mesh: .*{re.escape(shown)}.* does not multiply to the 8 devices"
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(("batch_size", "accumulate", "parts"), [(18, 1, 4), (16, 3, 12)])
def test_a_batch_that_cannot_be_split_is_refused(batch_size, accumulate, parts):
    _, mesh = on_mesh((2, 2, 2))
    sharding.check_batch_size(parts, accumulate, mesh)
    message = rf"config\.batch_size: {batch_size} must be a multiple of {parts} "
    with pytest.raises(ValueError, match=message):
        sharding.check_batch_size(batch_size, accumulate, mesh)


# Two processes

TWO = """
import json, os, sys
from pathlib import Path

import jax
import numpy as np

jax.distributed.initialize(num_processes=2, process_id=int(os.environ["JAX_PROCESS_ID"]))
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)

sys.path.insert(0, "tests")
from test_sharding import taking_turns
from tiny import tiny_config, train_steps
from lasad_jax.training import loop, sharding

workdir, run, steps = sys.argv[1], *map(json.loads, sys.argv[2:])

said = {"rows": [], "losses": []}
for axes in ({"data": 2, "fsdp": 4}, {"data": 1, "tensor": 2, "fsdp": 4}):
    mesh = taking_turns(axes)
    rows = sharding.local_rows(16, mesh)
    batch = sharding.put_batch({"rows": rows}, mesh)["rows"]
    assert batch.shape == (16,)
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(16)[shard.index])
    said["rows"].append(rows.tolist())

loop.train(tiny_config(**run), Path(workdir))
_, said["losses"] = train_steps(tiny_config(**steps), mesh, 3)
print("said", json.dumps(said))
"""


def taking_turns(axes):
    """A mesh where neighbours are of two processes, as a TPU's network may have it."""
    mesh = sharding.make_mesh(MeshConfig(**axes))
    devices = mesh.devices.reshape(2, 4).T.reshape(mesh.devices.shape)
    return jax.sharding.Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def test_two_processes_train_as_one(tmp_path):
    """A run on slices; rows of the batch here and there, or shared by processes."""
    run = {"steps": 3, "save_every": 2, "eval_every": 2, "sample_every": 3}
    axes = {"data": 1, "fsdp": 2, "tensor": 2}
    steps = {"model": MIXERS["none"]}
    two, one = tmp_path / "two" / "run", tmp_path / "one" / "run"
    flags = (str(two), json.dumps(run | {"mesh": axes | {"slice": -1}}), json.dumps(steps))
    by_process = [
        json.loads(re.search(r"^said (.*)$", stdout, re.MULTILINE)[1])
        for stdout, _ in run_two([sys.executable, "-c", TWO, *flags], devices=4)
    ]
    assert [said["rows"] for said in by_process] == [
        [[0, 1, 4, 5, 8, 9, 12, 13], list(range(16))],
        [[2, 3, 6, 7, 10, 11, 14, 15], list(range(16))],
    ]
    _, expected = train_steps(tiny_config(**steps), one_device_mesh(tiny_config()), 3)
    for said in by_process:
        np.testing.assert_allclose(said["losses"], expected, rtol=1e-5)

    loop.train(tiny_config(**run, mesh=axes | {"slice": 2}), one)
    theirs, ours = (read_metrics(path / "metrics.jsonl") for path in (one, two))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3]
    assert [row["step"] for row in ours if "held_out_nats_per_token" in row] == [2, 3]
    for left, right in zip(ours, theirs, strict=True):
        assert left.keys() == right.keys()
        timed = {name for name in left if "per_second" in name or name.startswith("goodput/")}
        for name in left.keys() - timed:
            np.testing.assert_allclose(left[name], right[name], rtol=1e-5, err_msg=name)
    names = lambda path: sorted(file.name.split(".tfevents")[0] for file in path.iterdir())
    assert names(two) == names(one)
    for folder in ("samples", "checkpoints"):
        assert names(two / folder) == names(one / folder) != []
