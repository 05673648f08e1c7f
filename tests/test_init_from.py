"""Runs that begin with the parameters of another: what is loaded, said, and refused."""

import contextlib
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import initial_parameters, one_device_mesh, tiny_config
from tiny_tokenizer import tiny_tokenizer_config

from lasad_jax.config import config_to_json
from lasad_jax.training import loop
from lasad_jax.training.checkpoints import Checkpoints, store_config
from lasad_jax.training.generator_task import GeneratorTask
from lasad_jax.training.init_from import open_source
from lasad_jax.training.sharding import make_mesh
from lasad_jax.training.state import abstract_state, init_state

STEP = 7


def random_state(config, seed):
    """Random parameters and, where there is one, another average."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype),
        abstract_state(config, one_device_mesh(config)),
    )


def write_source(folder, **overrides):
    """A run with one checkpoint; returns its state."""
    config = tiny_config(**overrides)
    state = random_state(config, 3)
    store_config(config, folder)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(state, STEP, None)
    return state


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run on four by six codes of 12 kinds in 3 classes, and its state."""
    folder = tmp_path_factory.mktemp("source")
    shape = {"vocab_size": 12, "num_classes": 3, "grid": (4, 6), "ffn_width": 24}
    return folder, write_source(folder, model=shape)


def begin(config, mesh=None):
    """The state that a run on digits begins with."""
    task = GeneratorTask(config, mesh or one_device_mesh(config))
    return jax.device_get(task.init_state())


def assert_parameters(state, config, given, loaded):
    """`loaded` are those of `given`, the others what the seed gives, the average the same."""
    params, ema = flatten_dict(state.params, sep="/"), flatten_dict(state.ema, sep="/")
    fresh = flatten_dict(initial_parameters(config.model, config.seed), sep="/")
    given = flatten_dict(given, sep="/")
    assert params.keys() == fresh.keys()
    for name, value in params.items():
        expected = given[name] if name in loaded else fresh[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)
        np.testing.assert_array_equal(ema[name], expected, err_msg=name)


def assert_unused_optimizer(state, config):
    plain = init_state(config, one_device_mesh(config))
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, plain.opt_state)
    assert state.step == 0


# What is loaded

LAYERS = 2
WIDTH = 16
# Of a LASAD run, in order of name; a feed-forward of 24.
BLOCKS = {
    "blocks/conv/kernel": (LAYERS, 13, WIDTH),
    "blocks/ffn/down/kernel": (LAYERS, 24, WIDTH),
    "blocks/ffn/gate/kernel": (LAYERS, WIDTH, 24),
    "blocks/ffn/up/kernel": (LAYERS, WIDTH, 24),
    "blocks/ffn_norm/scale": (LAYERS, WIDTH),
    "blocks/mixer/column_rate": (LAYERS, 2),
    "blocks/mixer/decay_gate/bias": (LAYERS, 2),
    "blocks/mixer/decay_gate/kernel": (LAYERS, WIDTH, 2),
    "blocks/mixer/k/kernel": (LAYERS, WIDTH, 2, 8),
    "blocks/mixer/norm/scale": (LAYERS, 2, 8),
    "blocks/mixer/out/kernel": (LAYERS, 2, 8, WIDTH),
    "blocks/mixer/out_gate/kernel": (LAYERS, WIDTH, 2, 8),
    "blocks/mixer/q/kernel": (LAYERS, WIDTH, 2, 8),
    "blocks/mixer/row_rate": (LAYERS, 2),
    "blocks/mixer/v/kernel": (LAYERS, WIDTH, 2, 8),
    "blocks/mixer_norm/scale": (LAYERS, WIDTH),
}
SHARED_BY_MIXERS = ("q", "k", "v", "out")


def test_other_classes_codes_and_grid_begin_afresh_and_the_rest_is_loaded(source, capsys):
    folder, given = source
    config = tiny_config(init_from=str(folder), model={"ffn_width": 24})
    state = begin(config)
    loaded = {**BLOCKS, "final_norm/scale": (WIDTH,)}
    assert_parameters(state, config, given.ema, loaded)
    assert_unused_optimizer(state, config)
    lines = [f"  loaded      {name} {shape}" for name, shape in BLOCKS.items()]
    assert capsys.readouterr().out.splitlines() == [
        f"init_from: 17 of 20 parameters from step 7 of {folder}",
        *lines,
        "  not loaded  class_embedding/embedding (11, 16): there it is (4, 16)",
        "  loaded      final_norm/scale (16,)",
        "  not loaded  head/kernel (16, 8): there it is (16, 12)",
        "  not loaded  token_embedding/embedding (8, 16): there it is (12, 16)",
    ]


@pytest.mark.parametrize("mixers", [("softmax", "lasad"), ("lasad", "softmax")])
def test_mixers_give_each_other_what_both_have(tmp_path, mixers, capsys):
    there, here = mixers
    given = write_source(tmp_path, model={"mixer": there, "ffn_width": 24})
    config = tiny_config(init_from=str(tmp_path), model={"mixer": here, "ffn_width": 24})
    state = begin(config)
    own = {
        name
        for name in BLOCKS
        if name.startswith("blocks/mixer/") and name.split("/")[2] not in SHARED_BY_MIXERS
    } | {"blocks/conv/kernel"}
    assert len(own) == 7
    shared = (BLOCKS.keys() - own) | {
        f"{name}/{leaf}"
        for name, leaf in (
            ("class_embedding", "embedding"),
            ("token_embedding", "embedding"),
            ("final_norm", "scale"),
            ("head", "kernel"),
        )
    }
    assert_parameters(state, config, given.ema, shared)
    said = capsys.readouterr().out
    for name in own:
        line = f"  not used    {name} {BLOCKS[name]}"
        if here == "lasad":
            line = f"  not loaded  {name} {BLOCKS[name]}: there is none there"
        assert line in said.splitlines()
    assert said.count("  loaded  ") == len(shared)
    assert said.count("\n") == 1 + len(shared) + len(own)


def test_parameters_without_an_average_and_of_another_dtype_are_loaded(tmp_path):
    half = {"param_dtype": "float16"}
    given = write_source(tmp_path, model=half, optimizer={"ema_decay": 0.0})
    assert given.ema is None
    config = tiny_config(init_from=str(tmp_path))
    state = begin(config)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    names = flatten_dict(given.params, sep="/")
    assert_parameters(state, config, given.params, names)


def test_a_mesh_changes_nothing(source):
    folder, given = source
    config = tiny_config(
        init_from=str(folder), model={"ffn_width": 24}, mesh={"data": 2, "fsdp": 2, "tensor": 2}
    )
    mesh = make_mesh(config.mesh)
    task = GeneratorTask(config, mesh)
    state = task.init_state()
    for ours, plan in zip(
        jax.tree.leaves(state), jax.tree.leaves(task.abstract_state()), strict=True
    ):
        assert ours.sharding.is_equivalent_to(plan.sharding, ours.ndim)
    loaded = {**BLOCKS, "final_norm/scale": (WIDTH,)}
    assert_parameters(jax.device_get(state), config, given.ema, loaded)


def test_the_best_checkpoint_is_taken(tmp_path):
    config = tiny_config()
    states = [random_state(config, seed) for seed in range(3)]
    store_config(config, tmp_path)
    with contextlib.closing(Checkpoints(tmp_path, keep_last=3)) as checkpoints:
        for step, (state, loss) in enumerate(zip(states, (2.0, 1.0, 3.0), strict=True)):
            checkpoints.save(state, step, loss)
    source = open_source(tiny_config(init_from=str(tmp_path)))
    assert source.step == 1
    loaded = source.load(one_device_mesh(config))
    expected = flatten_dict(states[1].ema, sep="/")
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name], value)


# When


def test_a_run_begins_there_once_and_goes_on_from_its_own_checkpoints(tmp_path, capsys):
    write_source(tmp_path / "a")
    fields = {"save_every": 2, "init_from": str(tmp_path / "a")}
    # As if it had been stopped before its first checkpoint.
    store_config(tiny_config(steps=2, **fields), tmp_path / "b")
    for steps in (2, 4):
        loop.train(tiny_config(steps=steps, **fields), tmp_path / "b")
        assert ("init_from: 20 of 20" in capsys.readouterr().out) == (steps == 2)
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
    assert Checkpoints(tmp_path / "b", read_only=True).steps() == [2, 4]

    # The same four steps at once, from the same parameters.
    write_source(tmp_path / "a")
    loop.train(tiny_config(steps=4, **fields), tmp_path / "c")
    states = [
        Checkpoints(tmp_path / run, read_only=True).restore(
            4, abstract_state(tiny_config(), one_device_mesh(tiny_config()))
        )
        for run in ("b", "c")
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)


# Refusals


@pytest.fixture(scope="module")
def places(tmp_path_factory, source):
    """Folders of what is no run to begin with."""
    top = tmp_path_factory.mktemp("places")
    (top / "empty").mkdir()
    (top / "tokenizer").mkdir()
    (top / "tokenizer" / "config.json").write_text(config_to_json(tiny_tokenizer_config()))
    store_config(tiny_config(), top / "new")
    store_config(tiny_config(), top / "killed")
    (top / "killed" / "checkpoints").mkdir()
    store_config(tiny_config(), top / "broken")
    (top / "broken" / "config.json").write_text("{")
    (top / "source").symlink_to(source[0])
    return top


@pytest.mark.parametrize(
    ("place", "model", "message"),
    [
        ("none", {}, r"none' is no generator's run .*config\.json is missing.*name a run"),
        ("empty", {}, r"empty' is no generator's run .*config\.json is missing.*name a run"),
        ("tokenizer", {}, r"tokenizer' is no generator's run .*holds a tokenizer's run"),
        ("broken", {}, r"broken' is no generator's run "),
        ("new", {}, r"the run in '.*new' has no checkpoint yet; train it"),
        ("killed", {}, r"the run in '.*killed' has no checkpoint yet; train it"),
        (
            "source",
            {"width": 24, "num_layers": 3},
            r"no parameter of the run in .*is 16, here it is 24",
        ),
    ],
)
def test_what_cannot_be_begun_with_is_refused_before_anything_is_written(
    places, tmp_path, place, model, message
):
    config = tiny_config(init_from=str(places / place), model=model)
    with pytest.raises(ValueError, match=rf"config\.init_from: .*{message}"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
