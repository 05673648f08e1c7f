"""The benchmarks of whole generators: counts, floors, tables and files, on tiny shapes."""

import dataclasses
import functools
import json
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from lasad_jax.benchmarks import (
    agreement,
    decoding,
    generators,
    limits,
    llamagen,
    plain,
    sample_rows,
    sampling,
    tables,
    traces,
    train_rows,
    training,
)
from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.models import SIZES, count_parameters, counts, decoder

NANO = {"num_layers": 1, "width": 32, "num_heads": 2}
FEW = ["--vocab=64", "--repeats=2", "--copy_megabytes=1"]
TRAINING = [*FEW, "--cases=tiny:2x2x3", "--scaling=tiny:4x1x5"]
SAMPLING = [*FEW, "--cases=tiny:2x2x3,tiny:1x3x5", "--along=tiny:1x3x5"]
lower_step = functools.cache(train_rows.lower_step)
trained = functools.cache(agreement._trained)


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """The smallest size is smaller still; what tests trace and train alike is so once."""
    monkeypatch.setitem(SIZES, "tiny", NANO)
    monkeypatch.setattr(train_rows, "lower_step", lower_step)
    monkeypatch.setattr(agreement, "_trained", trained)


@pytest.fixture
def parse():
    """Parses a command's flags for the length of a test."""
    with flagsaver.flagsaver():
        yield lambda *arguments: flags.FLAGS(["command", *arguments])
    flags.FLAGS.unparse_flags()


@pytest.fixture
def run_main(parse, capsys):
    """Runs a command with these flags and returns what it prints."""

    def run(command, *arguments):
        parse(*arguments)
        command.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def traced(monkeypatch):
    """Calls are made once each, and their traces tell of one kernel of a second in ten calls."""

    def trace_calls(function, input_sets):
        jax.block_until_ready([function(*inputs) for inputs in input_sets])
        return [traces.Kernels(["gemm"], np.array([(0, 1e9)]))], 10

    monkeypatch.setattr(traces, "trace_calls", trace_calls)


def step_of(config, *make_step):
    return train_rows.lower_step(config, *make_step).compile()


def test_training_table_and_files(run_main, tmp_path, monkeypatch, traced):
    monkeypatch.setitem(llamagen.TRAINING, ("tiny", 6, 2), llamagen.Figure(1000.0, 5e9))
    printed = run_main(training, *TRAINING, "--kernels", f"--out={tmp_path}")
    found = json.loads((tmp_path / "training.json").read_text())
    assert [(row["case"], row["mixer"]) for row in found["rows"]] == [
        ("tiny:2x2x3", "softmax"),
        ("tiny:2x2x3", "lasad"),
    ]
    assert [row["tokens"] for row in found["scaling"]] == [5, 5]
    baseline = found["rows"][0]
    assert "over_softmax" not in baseline
    for row in found["rows"]:
        assert len(row["runs"]) == 2
        assert row["seconds"] == pytest.approx(np.median(row["runs"]))
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["seconds_per_token"] == pytest.approx(row["seconds"] / 12)
        speed = row["product_flops"] / row["seconds"]
        assert row["product_flops"] == 6 * 12 * row["product_parameters"]
        assert row["of_product"] == pytest.approx(speed / found["product_flops_per_second"])
        assert row["over_llamagen"] == pytest.approx(row["images_per_second"] / 1000)
        # Parameters and AdamW's two moments in float32, replaced in place; then gradients.
        assert 12 * row["parameters"] < row["memory_bytes"] < 40 * row["parameters"]
        if row is not baseline:
            faster = row["images_per_second"] / baseline["images_per_second"]
            assert row["over_softmax"] == pytest.approx(faster)
    lines = [line for line in printed.splitlines() if line.startswith("| tiny")]
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[1].split("|")[1:-1]]
    shown = dict(zip((c.name for c in training.COLUMNS), cells, strict=True))
    row = found["rows"][1]
    assert shown["ms"] == tables.milliseconds(row["seconds"])
    assert (shown["LlamaGen"], shown["its GB"]) == ("1000", "5")
    assert shown["GB allocated"] == "-"  # a CPU does not say
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.size[0] > 500
    assert [(row["case"], row["mixer"]) for row in found["kernels"]] == [
        (row["case"], row["mixer"]) for row in found["rows"]
    ]
    assert all(row["kernels"][0]["seconds"] == 0.1 for row in found["kernels"])


def test_average_of_parameters_takes_memory(parse):
    parse(*TRAINING)
    without, with_it = (
        train_rows.run_config(GeneratorCase.parse("tiny:2x2x3"), "lasad", ema=ema)
        for ema in (False, True)
    )
    more = limits.compiled_bytes(step_of(with_it)) - limits.compiled_bytes(step_of(without))
    assert more >= 4 * count_parameters(without.model)


def test_a_step_that_fails_is_a_row_with_its_reason(run_main, monkeypatch):
    trainer, lower_step = train_rows.Trainer, train_rows.lower_step

    def too_large(config, *arguments):
        if config.model.mixer == "softmax" and config.model.num_tokens == 6:
            raise RuntimeError("RESOURCE_EXHAUSTED: too large\nand more")
        return trainer(config, *arguments)

    def untraceable(config):
        if config.model.mixer == "softmax" and config.model.num_tokens == 5:
            raise RuntimeError("RESOURCE_EXHAUSTED: too large")
        return lower_step(config)

    monkeypatch.setattr(train_rows, "Trainer", too_large)
    monkeypatch.setattr(train_rows, "lower_step", untraceable)
    printed = run_main(training, *TRAINING)
    assert printed.count("RuntimeError: RESOURCE_EXHAUSTED: too large |") == 2
    assert "and more" not in printed
    done = [line for line in printed.splitlines() if "| lasad" in line]
    assert len(done) == 2
    assert not any("Error" in line for line in done)


def test_plain_path_and_loader_are_printed(run_main, tmp_path):
    extra = ("--scaling=", "--mixers=lasad", "--loader", "--plain_steps=4", f"--out={tmp_path}")
    printed = run_main(training, *TRAINING, *extra)
    found = json.loads((tmp_path / "training.json").read_text())
    (curves,) = found["curves"]
    assert curves["losses"].keys() == {"plain", "step", "plain, chunked operator"}
    assert all(len(losses) == 4 for losses in curves["losses"].values())
    # The head begins at zero: every code is as likely as any other.
    assert curves["losses"]["plain"][0] == pytest.approx(math.log(64), rel=1e-4)
    difference = curves["largest_difference"]["step"]
    assert difference < 1e-2
    assert f"step: {difference:.2e}" in printed
    (loop,) = found["loader"]
    assert 0 < loop["share"] < 1
    assert f"{tables.percent(loop['share'])} of the time waits" in printed
    with Image.open(tmp_path / "training_curves_lasad.png") as picture:
        assert picture.size[1] > 500


def test_plain_step_is_the_step(parse):
    parse(*TRAINING)
    config = train_rows.run_config(GeneratorCase.parse("tiny:3x2x3"), "softmax", dtype="float32")
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2)
    config = dataclasses.replace(config, optimizer=optimizer)
    losses = {}
    for is_plain in (False, True):
        make = lambda config, is_plain=is_plain: plain.make_step(config, plain=is_plain)
        trainer = train_rows.Trainer(config, step_of(config, make))
        losses[is_plain] = [float(trainer(trainer.batch(0))["loss"]) for _ in range(5)]
    np.testing.assert_allclose(losses[False], losses[True], rtol=1e-5)
    assert losses[True][-1] < losses[True][0] - 0.02  # it learns: the state does go on
    assert plain.largest_differences({"a": [1.0, 2.0], "b": [1.5, 1.75]}) == {"b": 0.5}


def test_loop_that_waits_for_batches_says_so(parse, monkeypatch):
    parse(*TRAINING)
    real = train_rows.train_batches

    def slow(*args, **kwargs):
        for batch in real(*args, **kwargs):
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(train_rows, "train_batches", slow)
    case = GeneratorCase.parse("tiny:2x2x3")
    config = train_rows.run_config(case, "softmax")
    trainer = train_rows.Trainer(config, step_of(config))
    row = train_rows.loader_row(trainer, case, steps=4, images=5, wait_every=2)
    assert row["seconds"] > 0.2
    assert row["share"] > 0.5
    assert row["seconds_on_device"] < row["seconds"]


def test_sampling_table_and_files(run_main, tmp_path, monkeypatch, traced):
    monkeypatch.setitem(llamagen.SAMPLING, ("tiny", 6, 2), llamagen.Figure(1000.0, 5e9))
    monkeypatch.setattr(sampling, "_LENGTHS", 2)
    printed = run_main(sampling, *SAMPLING, "--kernels", f"--out={tmp_path}")
    found = json.loads((tmp_path / "sampling.json").read_text())
    assert [row["case"] for row in found["rows"]] == ["tiny:2x2x3"] * 2 + ["tiny:1x3x5"] * 2
    speed = max(found["copy_bytes_per_second"].values())
    for row, (batch, tokens) in zip(found["rows"], [(2, 6)] * 2 + [(1, 15)] * 2, strict=True):
        config = GeneratorCase.parse(row["case"]).model(row["mixer"], vocab_size=64)
        assert row["floor_bytes"] == counts.read_per_token(config, 2 * batch)
        floor = sum(row["floor_bytes"].values()) / speed
        assert row["floor_seconds"] == pytest.approx(floor)
        assert row["seconds_per_token"] == pytest.approx(row["seconds"] / tokens)
        assert row["images_per_second"] == pytest.approx(batch / row["seconds"])
        assert row["over_floor"] == pytest.approx(row["seconds"] / tokens / floor)
        weights = jax.eval_shape(lambda config=config: sample_rows._make_weights(config))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
        assert row["memory_bytes"] > max(held, 3 * row["parameters"])
    assert ["over_llamagen" in row for row in found["rows"]] == [True, True, False, False]
    assert ["over_softmax" in row for row in found["rows"]] == [False, True, False, True]
    for row in found["along"]:
        assert row["positions"] == list(range(15))
        assert len(row["seconds_per_token"]) == 15
    assert [row["tokens"] for row in found["memory"]] == [2, 15] * 2
    assert found["memory"][0]["memory_bytes"] < found["memory"][1]["memory_bytes"]
    assert printed.count("\n| softmax") == printed.count("\n| lasad") == 1
    with Image.open(tmp_path / "sampling.png") as picture:
        assert picture.size[0] > 500
    # Of a token, not of an image.
    times = [row["kernels"][0]["seconds"] for row in found["kernels"]]
    assert times == pytest.approx([0.1 / 6] * 2 + [0.1 / 15] * 2)


def test_time_along_the_sequence_is_that_of_each_place(parse, monkeypatch):
    parse(*SAMPLING)

    def begin(config, weights, labels):
        return jnp.zeros((len(labels), 4)), {"index": jnp.zeros((), jnp.int32)}

    def step(config, weights, tokens, cache):
        sleep = lambda index: (time.sleep(0.05 if index >= 6 else 0.0), index + 1)[1]
        index = jax.pure_callback(sleep, cache["index"], cache["index"])
        return jnp.zeros((len(tokens), 4)) + index, {"index": index}

    monkeypatch.setattr(decoding, "begin", begin)
    monkeypatch.setattr(decoding, "step", step)
    case = GeneratorCase.parse("tiny:1x2x5")
    segment = sample_rows.lower_along(case, "lasad", 3).compile()
    row = sample_rows.along_row(case, "lasad", segment, length=3, repeats=3)
    assert row["positions"] == [0, 3, 6]  # the tenth token fills no segment
    first, second, third = row["seconds_per_token"]
    assert max(first, second) < 0.05 <= third


def test_drawing_that_fails_is_a_row_with_its_reason(run_main, monkeypatch):
    def refuse(*args):
        raise ValueError("not on this device")

    monkeypatch.setattr(decoding, "draw_images", refuse)
    monkeypatch.setattr(decoding, "begin", refuse)
    printed = run_main(sampling, *SAMPLING)
    assert printed.count("ValueError: not on this device") == 4 + 2 + 8


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        (training, "cases", "B:16x16"),
        (training, "scaling", "tiny:0x4x4"),
        (training, "cases", "huge:1x4x4"),
        (training, "mixers", "lasad,hyena"),
        (sampling, "cases", "tiny"),
        (sampling, "along", "tiny:1x4"),
        (sampling, "mixers", "hyena"),
        (sampling, "mixers", "raster+swish"),
    ],
)
def test_wrong_flags_are_refused(run_main, command, flag, value):
    wrong = {"lasad,hyena": "hyena", "huge:1x4x4": "huge"}.get(value, value)
    given = TRAINING if command is training else SAMPLING
    with pytest.raises(ValueError, match=f"^{flag}: .*'{re.escape(wrong)}'"):
        run_main(command, *given, f"--{flag}={value}")


def test_loader_needs_a_case(run_main):
    with pytest.raises(ValueError, match=r"^cases: none given"):
        run_main(training, *TRAINING, "--cases=", "--loader")


def test_cases_are_written_as_they_are_read(parse):
    parse(*FEW)
    case = GeneratorCase.parse("XL:64x16x24")
    assert str(case) == "XL:64x16x24"
    assert case.peer_key == ("XL", 384, 64)
    assert case.shrunk(1, 4).grid == (4, 6)
    config = case.model("manhattan+rope+dk16")
    assert (config.mixer, config.decay, config.rope) == ("lasad", "manhattan", True)
    assert (config.selective, config.local_conv, config.key_dim) == (False, "off", 16)
    config = case.model("softmax")
    assert (config.width, config.grid, config.vocab_size) == (1280, (16, 24), 64)


def test_random_codes_differ_by_seed_and_fit(parse):
    parse(*FEW)
    config = GeneratorCase.parse("tiny:64x5x7").model("lasad")
    batch, again, other = (generators.random_batch(config, 64, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(batch["tokens"], again["tokens"])
    assert not np.array_equal(batch["tokens"], other["tokens"])
    assert batch["tokens"].shape == (64, 35)
    assert (batch["tokens"].min(), batch["tokens"].max() <= 63) == (0, True)
    np.testing.assert_array_equal(batch["tokens"][:, 1::2], batch["tokens"][:, :-1:2])
    assert np.mean(batch["tokens"] < 32) > 0.7  # (1/2)^(1/4) of them


@pytest.mark.parametrize("warmer", [False, True])
def test_agreement_tells_other_codes_from_other_seeds(run_main, tmp_path, monkeypatch, warmer):
    if warmer:
        decode = decoder.decode
        warm = lambda features, cache: (features / 2, cache)
        monkeypatch.setattr(decoder, "decode", lambda *args, **how: warm(*decode(*args, **how)))
    cases = ["--cases=tiny:8x2x4", "--mixers=lasad", "--along=", "--agreement=2000"]
    run_main(sampling, *FEW, *cases, f"--out={tmp_path}")
    (row,) = json.loads((tmp_path / "sampling.json").read_text())["agreement"]
    assert row["draws"] == 2000
    noise = max(row["plain"], row["fast"])
    assert 0 < noise < 0.25
    assert (row["between"] > 1.4 * noise) == warmer
    assert 1e-4 < row["plain_error"] < 0.1
    assert (row["fast_error"] > 1.4 * row["plain_error"]) == warmer
