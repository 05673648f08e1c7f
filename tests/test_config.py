"""Configuration: what is refused, by name, and what comes back unchanged."""

import dataclasses
import importlib.util
import json
import re

import pytest
from processes import command
from tiny import ROOT, tiny_config

from lasad_jax.config import (
    Config,
    MeshConfig,
    OptimizerConfig,
    SamplingConfig,
    TokenizerRunConfig,
    build_config,
    config_to_json,
    default_config,
    load_config,
)
from lasad_jax.models import ModelConfig

# Keys and types


def test_defaults_come_back():
    assert build_config(default_config()) == build_config({}) == Config()


def test_a_config_dict_refuses_unknown_keys_and_wrong_types():
    config = default_config()
    with pytest.raises(AttributeError, match="hedas"):
        config.model.hedas = 3
    with pytest.raises(KeyError, match="hedas"):
        config.model.update(hedas=3)
    with pytest.raises(TypeError, match="num_heads"):
        config.model.num_heads = "x"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stpes": 3}, r"config\.stpes: unknown key; config has .*'steps'"),
        ({"model": {"hedas": 3}}, r"config\.model\.hedas: unknown key; .*'num_heads'"),
        ({"model": {"num_heads": "x"}}, r"config\.model\.num_heads: expected int, got 'x'"),
        ({"model": {"num_heads": 2.0}}, r"config\.model\.num_heads: expected int, got 2\.0"),
        ({"model": {"num_heads": True}}, r"config\.model\.num_heads: expected int, got True"),
        ({"model": {"rope": 1}}, r"config\.model\.rope: expected bool, got 1"),
        ({"model": {"grid": 8}}, r"config\.model\.grid: expected tuple, got 8"),
        (
            {"model": {"grid": (8, "x")}},
            r"config\.model\.grid: expected \(int, int\), got \(8, 'x'\)",
        ),
        ({"model": 3}, r"config\.model: expected a section, got 3"),
        ({"data": {"source": None}}, r"config\.data\.source: expected str, got None"),
    ],
)
def test_building_refuses_unknown_keys_and_wrong_types(values, message):
    with pytest.raises(ValueError, match=message):
        build_config(values)


def test_whole_numbers_do_for_floats_and_lists_for_tuples():
    config = build_config({"optimizer": {"clip_norm": 2}, "model": {"grid": [8, 4]}})
    assert type(config.optimizer.clip_norm) is float
    assert config.model.grid == (8, 4)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.model.num_heads=x", "config.model.num_heads"),
        ("--config.model.hedas=3", "hedas"),
        ("--config.modle.width=3", "modle"),
        ("--config.model.num_heads=3", "model.num_heads: 3 does not divide model.width=16"),
        ("--config.model.grid=(8,'x')", "model.grid"),
    ],
)
def test_the_command_line_names_the_field(tmp_path, flag, named):
    said = command("train", "--config=tests/tiny.py", f"--workdir={tmp_path}/run", flag, fails=True)
    assert named in said
    assert not (tmp_path / "run").exists()


# Checks

NAN = float("nan")
REFUSED = [
    (ModelConfig, {"mixer": "conv"}, r"model\.mixer: 'conv' is not one of .*'lasad'"),
    (ModelConfig, {"decay": "x"}, r"model\.decay: 'x' is not one of .*'raster'"),
    (ModelConfig, {"remat": "x"}, r"model\.remat: 'x' is not one of .*'block'"),
    (ModelConfig, {"dtype": "int8"}, r"model\.dtype: 'int8' is not one of .*'bfloat16'"),
    (ModelConfig, {"param_dtype": "x"}, r"model\.param_dtype: 'x' is not one of .*'float32'"),
    (ModelConfig, {"implementation": "x"}, r"model\.implementation: 'x' is not one of .*'auto'"),
    *(
        (ModelConfig, {name: 0}, rf"model\.{name}: 0 must be at least 1")
        for name in ("vocab_size", "num_classes", "num_layers", "width", "num_heads")
    ),
    (ModelConfig, {"key_dim": -4}, r"model\.key_dim: -4 must be positive, or 0"),
    (ModelConfig, {"ffn_width": -1}, r"model\.ffn_width: -1 must be positive, or 0"),
    (ModelConfig, {"dropout": 1.0}, r"model\.dropout: 1\.0 must be in \[0, 1\)"),
    (ModelConfig, {"class_dropout": -0.1}, r"model\.class_dropout: -0\.1 must be in \[0, 1\)"),
    (ModelConfig, {"grid": (8,)}, r"model\.grid: \(8,\) must be two positive sizes"),
    (ModelConfig, {"grid": (8, 0)}, r"model\.grid: \(8, 0\) must be two positive sizes"),
    (ModelConfig, {"num_heads": 7}, r"model\.num_heads: 7 does not divide model\.width=768"),
    (ModelConfig, {"key_dim": 6}, r"model\.rope: .*multiple of 4, not 6; set model\.key_dim"),
    (ModelConfig, {"decay": "manhattan"}, r"model\.selective: .*model\.decay='manhattan'"),
    (
        ModelConfig,
        {"mixer": "softmax", "key_dim": 32},
        r"model\.key_dim: 32 must be 0 or 64 with model\.mixer='softmax'",
    ),
    (OptimizerConfig, {"schedule": "x"}, r"optimizer\.schedule: 'x' is not one of .*'cosine'"),
    (OptimizerConfig, {"mu_dtype": "float16"}, r"optimizer\.mu_dtype: 'float16' is not one of"),
    *(
        (OptimizerConfig, {name: -1}, rf"optimizer\.{name}: -1 must be at least 0")
        for name in ("learning_rate", "warmup_steps", "weight_decay")
    ),
    (OptimizerConfig, {"learning_rate": NAN}, r"optimizer\.learning_rate: nan must be at least 0"),
    (OptimizerConfig, {"accumulate": 0}, r"optimizer\.accumulate: 0 must be at least 1"),
    (OptimizerConfig, {"clip_norm": 0.0}, r"optimizer\.clip_norm: 0\.0 must be positive"),
    (OptimizerConfig, {"clip_norm": NAN}, r"optimizer\.clip_norm: nan must be positive"),
    *(
        (OptimizerConfig, {name: 1.0}, rf"optimizer\.{name}: 1\.0 must be in \[0, 1\)")
        for name in ("b1", "b2", "ema_decay")
    ),
    (
        MeshConfig,
        {"fsdp": -1},
        r"mesh: .*\(-1, -1, 1, 1\) must be positive, or -1 for slice and at",
    ),
    (MeshConfig, {"tensor": 0}, r"mesh: .*\(-1, 1, 0, 1\) must be positive"),
    (MeshConfig, {"data": -2}, r"mesh: .*\(-2, 1, 1, 1\) must be positive"),
    (MeshConfig, {"slice": 0}, r"mesh: .*\(-1, 1, 1, 0\) must be positive"),
    (
        SamplingConfig,
        {"guidance_schedule": "x"},
        r"sampling\.guidance_schedule: 'x' is not one of .*'linear'",
    ),
    *(
        (SamplingConfig, {name: -1}, rf"sampling\.{name}: -1 must be at least 0")
        for name in ("guidance", "temperature", "top_k")
    ),
    (SamplingConfig, {"guidance_power": 0.0}, r"sampling\.guidance_power: 0\.0 must be positive"),
    (SamplingConfig, {"top_p": 0.0}, r"sampling\.top_p: 0\.0 must be in \(0, 1\]"),
    (SamplingConfig, {"top_p": 1.5}, r"sampling\.top_p: 1\.5 must be in \(0, 1\]"),
    *(
        (Config, {name: 0}, rf"config\.{name}: 0 must be at least 1")
        for name in ("steps", "batch_size", "log_every", "save_every", "keep_last", "num_samples")
    ),
    *(
        (Config, {name: -1}, rf"config\.{name}: -1 must be at least 0")
        for name in ("seed", "eval_every", "sample_every")
    ),
    (
        Config,
        {"optimizer": OptimizerConfig(accumulate=3)},
        r"optimizer\.accumulate: 3 does not divide batch_size=256",
    ),
    (
        Config,
        {"optimizer": OptimizerConfig(schedule="cosine", warmup_steps=1000)},
        r"optimizer\.warmup_steps: 1000 must be below steps=1000",
    ),
]


@pytest.mark.parametrize(
    ("cls", "fields", "message"), REFUSED, ids=[f"{c.__name__}-{f}" for c, f, _ in REFUSED]
)
def test_values_that_cannot_work_are_refused(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


def test_manhattan_goes_without_a_gate_and_with_softmax():
    assert ModelConfig(decay="manhattan", selective=False).decay == "manhattan"
    assert ModelConfig(decay="manhattan", mixer="softmax").mixer == "softmax"


# Files


def test_a_stored_configuration_is_the_same(tmp_path):
    config = tiny_config(seed=3, model={"grid": (4, 2)}, sampling={"top_p": 0.5})
    (tmp_path / "config.json").write_text(config_to_json(config))
    assert load_config(tmp_path) == config
    assert json.loads(config_to_json(config)) == {
        "kind": "generator",
        **json.loads(json.dumps(dataclasses.asdict(config))),
    }


def test_a_run_of_another_kind_is_refused(tmp_path):
    config = build_config({"optimizer": {"clip_norm": 2}}, TokenizerRunConfig)
    assert config.optimizer.weight_decay == 0  # a tokenizer's default, not the section's
    (tmp_path / "config.json").write_text(config_to_json(config))
    assert load_config(tmp_path, TokenizerRunConfig) == config
    with pytest.raises(ValueError, match="holds a tokenizer's run, not a generator's"):
        load_config(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    message = rf"workdir: no run in {re.escape(str(tmp_path))} \(config\.json is missing\)"
    with pytest.raises(FileNotFoundError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_builds(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config()
    except TypeError:
        config = module.get_config("B")
    assert config.is_locked
    if "losses" in config:
        config.model.width = 33
        with pytest.raises(ValueError, match=r"model\.width: 33 must be a multiple of 32"):
            build_config(config, TokenizerRunConfig)
        return
    assert build_config(config) != Config()
    with pytest.raises(ValueError, match=r"model\.selective"):
        build_config(config.to_dict() | {"model": _manhattan(config)})


def _manhattan(config):
    return config.model.to_dict() | {"mixer": "lasad", "decay": "manhattan", "selective": True}
