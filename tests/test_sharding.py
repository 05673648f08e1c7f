"""The same training on any mesh and any number of processes: eight simulated devices."""

import json
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from tiny import ROOT, environment, one_device_mesh, tiny_config, train_steps

from lasad_jax.config import MeshConfig
from lasad_jax.training import loop, sharding
from lasad_jax.training.metrics import read_metrics
from lasad_jax.training.state import abstract_state
from lasad_jax.training.step import make_train_step

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
MIXERS = {"lasad": {}, "softmax": {"mixer": "softmax"}}
STEPS = 5


def on_mesh(sizes, **overrides):
    config = tiny_config(mesh=dict(zip(sharding.AXES, sizes, strict=True)), **overrides)
    return config, sharding.make_mesh(config.mesh)


@pytest.fixture(scope="module")
def on_one_device():
    """Parameters and losses by mixer."""
    results = {}

    def get(mixer):
        if mixer not in results:
            config = tiny_config(model=MIXERS[mixer])
            state, losses = train_steps(config, one_device_mesh(config), STEPS)
            results[mixer] = jax.device_get(state.params), losses
        return results[mixer]

    return get


def bytes_on_first_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mixer", "sizes"), [*(("lasad", sizes) for sizes in MESHES), ("softmax", (2, 2, 2))]
)
def test_every_mesh_trains_to_the_same_parameters(mixer, sizes, on_one_device):
    expected, expected_losses = on_one_device(mixer)
    config, mesh = on_mesh(sizes, model=MIXERS[mixer])
    state, losses = train_steps(config, mesh, STEPS)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert losses[-1] < losses[0]

    def assert_close(path, ours, theirs):
        error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
        assert error < 1e-5, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(assert_close, state.params, expected)

    # After the steps as before them, everything lies where the rules say.
    planned = abstract_state(config, mesh)
    for ours, plan in zip(jax.tree.leaves(state), jax.tree.leaves(planned), strict=True):
        assert ours.sharding.is_equivalent_to(plan.sharding, ours.ndim), (ours.shape, ours.sharding)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    share = bytes_on_first_device(state.params) / whole
    if sizes == (1, 8, 1):
        # All but the few rates and biases, which have no axis to split.
        assert share < 1 / 8 + 0.02
    elif sizes == (8, 1, 1):
        assert share == 1
    else:
        assert share < 0.6


def test_the_train_step_carries_sharding_constraints():
    config, mesh = on_mesh((2, 2, 2))
    batch = {
        "tokens": np.zeros((config.batch_size, 64), np.int32),
        "labels": np.zeros(config.batch_size, np.int32),
    }
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        step = jax.jit(make_train_step(config))
        text = step.lower(abstract_state(config, mesh), sharding.put_batch(batch, mesh)).as_text()
    constraints = set(re.findall(r"sdy\.sharding_constraint [^:]*: ?tensor<[^>]*>", text))
    assert any('{"data", "fsdp"}' in line and "16x64x16x" in line for line in constraints)
    assert any('"tensor"' in line and "16x64x8x" in line for line in constraints)


# What is refused


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh(MeshConfig(-1, 2, 2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }


@pytest.mark.parametrize(
    ("sizes", "shown"), [((3, 1, 1), "(3, 1, 1)"), ((-1, 3, 1), "(2, 3, 1)"), ((4, 4, 1), "(4, 4,")]
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

PROCESS = """
import json, sys
from pathlib import Path

import jax

address, process, workdir, overrides = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(process))
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)

from tiny import tiny_config
from lasad_jax.training.loop import train

train(tiny_config(**json.loads(overrides)), Path(workdir))
"""


def test_two_processes_train_as_one(tmp_path):
    overrides = {
        "steps": 3,
        "save_every": 2,
        "eval_every": 2,
        "sample_every": 3,
        "mesh": {"data": 2, "fsdp": 4},
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    two, one = tmp_path / "two" / "run", tmp_path / "one" / "run"
    arguments = (str(two), json.dumps(overrides))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(process), *arguments],
            cwd=ROOT,
            env=environment(4) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)

    loop.train(tiny_config(**overrides), one)
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
