"""Runs that are gone on with, finished, or started again with something else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import one_device_mesh, tiny_config, train_steps

from lasad_jax.training import generator_task, loop
from lasad_jax.training.checkpoints import Checkpoints
from lasad_jax.training.metrics import read_metrics
from lasad_jax.training.state import abstract_state


def restore(config, workdir, step):
    checkpoints = Checkpoints(workdir, read_only=True)
    return checkpoints.restore(step, abstract_state(config, one_device_mesh(config)))


def assert_bitwise_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def losses(workdir):
    """Everything but what is timed."""
    rows = read_metrics(workdir / "metrics.jsonl")
    timed = lambda name: "per_second" in name or name.startswith("goodput/")
    return [{k: v for k, v in row.items() if not timed(k)} for row in rows]


@pytest.fixture
def run(tmp_path):
    """A finished run of four steps."""
    config = tiny_config(steps=4, save_every=2)
    loop.train(config, tmp_path)
    return config, tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_checkpoints_are_the_states_of_their_steps(run):
    # The step after a save is given the saved buffers to overwrite.
    config, workdir = run
    mesh = loop.sharding.make_mesh(config.mesh)
    assert Checkpoints(workdir, read_only=True).steps() == [2, 4]
    states = []
    train_steps(config, mesh, 4, lambda state: states.append(jax.device_get(state)))
    for step in (2, 4):
        assert_bitwise_equal(restore(config, workdir, step), states[step])


def test_a_finished_run_stays_as_it_is_and_more_steps_go_on(run, monkeypatch):
    config, workdir = run
    before = contents(workdir / "checkpoints")
    rows = losses(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(generator_task, "make_train_step", lambda _: pytest.fail)
        loop.train(config, workdir)
    assert contents(workdir / "checkpoints") == before
    assert losses(workdir) == rows

    longer = tiny_config(steps=6, save_every=2)
    loop.train(longer, workdir)
    state, expected = train_steps(longer, loop.sharding.make_mesh(longer.mesh), 6)
    assert_bitwise_equal(restore(longer, workdir, 6), state)
    assert [row["loss"] for row in losses(workdir)] == expected


def test_a_run_goes_on_with_another_dtype_of_the_first_moment(run):
    _, workdir = run
    half = tiny_config(steps=6, save_every=2, optimizer={"mu_dtype": "bfloat16"})
    loop.train(half, workdir)
    state = restore(half, workdir, 6)
    dtypes = lambda tree: {leaf.dtype for leaf in jax.tree.leaves(tree)}
    moments = state.opt_state[1][0]
    assert dtypes(moments.mu) == {jnp.dtype(jnp.bfloat16)}
    assert dtypes(moments.nu) == dtypes(state.params) == {jnp.dtype(jnp.float32)}


def test_another_architecture_is_refused_field_by_field(run):
    _, workdir = run
    before = contents(workdir)
    other = tiny_config(
        steps=6,
        model={"num_layers": 3, "width": 32, "mixer": "softmax", "dropout": 0.3},
        optimizer={"ema_decay": 0.0},
    )
    with pytest.raises(ValueError, match="holds a run of another architecture") as error:
        loop.train(other, workdir)
    message = str(error.value)
    for part in (
        "model.num_layers: 2 there, 3 now",
        "model.width: 16 there, 32 now",
        "model.mixer: 'lasad' there, 'softmax' now",
        "optimizer.ema_decay: 0.9 there, 0.0 now",
    ):
        assert part in message
    assert message.count(" there, ") == 4
    assert contents(workdir) == before


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch):
    # A held-out loss that rises: the head starts at zero and grows.
    def make_rising(_):
        return lambda params, batch: (jnp.abs(params["head"]["kernel"]).sum(), jnp.ones(()))

    monkeypatch.setattr(generator_task, "make_eval_step", make_rising)
    config = tiny_config(steps=11, eval_every=4, save_every=2, keep_last=2)
    loop.train(config, tmp_path)
    measured = [
        row["held_out_nats_per_token"]
        for row in read_metrics(tmp_path / "metrics.jsonl")
        if "held_out_nats_per_token" in row
    ]
    assert len(measured) == 3
    assert measured == sorted(set(measured))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [4, 10, 11]
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (4, 11)

    loop.train(tiny_config(steps=15, eval_every=4, save_every=2, keep_last=2), tmp_path)
    assert Checkpoints(tmp_path, read_only=True).steps() == [4, 14, 15]
