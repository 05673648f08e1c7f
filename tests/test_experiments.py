"""The comparison of mixers: its arms, its queue, and what is said of finished runs."""

import collections
import json
import math
import os
import subprocess
import sys

import pytest
from tiny import tiny_config

from lasad_jax.benchmarks.mixer_names import model_fields
from lasad_jax.experiments.arms import (
    ARMS,
    DEFAULT,
    SOFTMAX,
    SOFTMAX_CONV,
    TASKS,
    trials,
)
from lasad_jax.experiments.jobs import Job, of_task, work_off
from lasad_jax.experiments.results import at_best_rate, decode_state, mean_and_error, read_results
from lasad_jax.experiments.tables import rate_rows, table_rows
from lasad_jax.models.config import ModelConfig
from lasad_jax.training.checkpoints import store_config


def model_of(arm):
    return ModelConfig(**model_fields(arm))


def test_arms_are_models_that_there_are_and_differ():
    models = [model_of(arm) for arm in ARMS]
    assert len(set(map(str, models))) == len(ARMS) == len(set(ARMS))
    resolved = lambda model: (model.mixer, model.decay, model.selective, model.rope)
    assert resolved(model_of(DEFAULT)) == resolved(ModelConfig())
    assert model_of(DEFAULT).has_local_conv and not model_of(SOFTMAX).has_local_conv
    assert model_of("raster+gate+conv+rope+dk16").query_dim == 16


@pytest.mark.parametrize("arm", ["rasta+gate", "raster+gat", "raster+dk", "softmax+dkx", ""])
def test_other_arms_are_refused(arm):
    with pytest.raises(ValueError, match="arms: "):
        trials(["han"], [arm], [0])


def test_tasks_are_refused_or_have_a_config():
    with pytest.raises(ValueError, match="tasks: 'imagenet' is not one of"):
        trials(["imagenet"], [DEFAULT], [0])
    chosen = trials(TASKS, [DEFAULT, SOFTMAX], [3, 4])
    assert len({trial.name for trial in chosen}) == 2 * 2 * len(TASKS)
    assert [trial.seed for trial in chosen] == [3] * 2 * len(TASKS) + [4] * 2 * len(TASKS)
    assert all(os.path.exists(trial.flags()[0].removeprefix("--config=")) for trial in chosen)


def test_flags_are_of_all_tasks_or_of_one():
    given = ["--config.steps=7", "han:--config.data.directory=/a:b", "fashion:--x=1"]
    assert of_task("han", given) == ["--config.steps=7", "--config.data.directory=/a:b"]
    assert of_task("clipart", given) == ["--config.steps=7"]


def job(folder, name, code):
    return Job([sys.executable, "-c", code], folder / f"{name}.log", folder / name)


def test_the_queue_ends_what_runs_and_goes_on(tmp_path):
    """Jobs that save on SIGTERM, one that fails, and one lane after the other."""
    waits = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
        "print('ready', flush=True); time.sleep(60)"
    )
    jobs = [job(tmp_path, "good", "pass"), job(tmp_path, "bad", "raise OSError('no room')")]
    jobs += [job(tmp_path, name, waits) for name in ("long", "never")]
    ready = lambda: (tmp_path / "long.log").exists() and "ready" in jobs[2].log.read_text()
    assert work_off([collections.deque(jobs)], ready) == 1
    done = lambda: {each.done.name for each in jobs if each.done.exists()}
    assert done() == {"good"}
    assert not jobs[3].log.exists()
    # Again, with two lanes; what is done is not done again.
    again = [Job([sys.executable, "-c", "print('second')"], x.log, x.done) for x in jobs]
    shared = collections.deque(again)
    assert work_off([shared, shared], lambda: False) == 0
    assert done() == {"good", "bad", "long", "never"}
    assert ["second" in x.log.read_text() for x in jobs] == [False, True, True, True]


def write_run(out, task, arm, seed, held_out, losses, rate=1e-3, **measured):
    folder = out / task / arm / f"seed{seed}"
    folder.mkdir(parents=True)
    fields = {name: getattr(model_of(arm), name) for name in model_fields(arm)}
    store_config(tiny_config(model=fields, optimizer={"learning_rate": rate}), folder)
    rows = [{"step": step, "loss": bits * math.log(2)} for step, bits in losses.items()]
    rows += [{"step": step, "held_out_bits_per_token": bits} for step, bits in held_out.items()]
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: row["step"])]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if measured:
        (folder / "measured_classifier.json").write_text(json.dumps({"metrics": measured}))
    (folder / "trained").touch()


def straight(first, last):
    return {step: first + (last - first) * (step - 10) / 990 for step in range(10, 1001, 10)}


@pytest.fixture
def results(tmp_path):
    held_out = lambda a, b: {500: a, 1000: b}
    write_run(tmp_path, "han", DEFAULT, 0, held_out(2.0, 1.0), straight(3, 1), fid_classifier=0.5)
    write_run(tmp_path, "han", DEFAULT, 1, held_out(2.0, 1.2), straight(3, 1))
    write_run(tmp_path, "han", SOFTMAX, 0, held_out(2.5, 1.5), straight(4, 1.9))
    write_run(tmp_path, "clipart", DEFAULT, 0, held_out(1.0, 1.3), straight(3, 1))
    (tmp_path / "han/none/seed0").mkdir(parents=True)  # not finished
    return read_results(tmp_path)


def test_the_table_has_means_errors_and_equal_losses(results):
    rows = table_rows([result for result in results if result.task == "han"])
    assert [row["arm"] for row in rows] == [DEFAULT, SOFTMAX]
    best, softmax = rows
    assert best["bits"] == pytest.approx((1.1, 0.1))
    assert softmax["bits"][0] == 1.5 and math.isnan(softmax["bits"][1])
    assert best["fid_classifier"][0] == 0.5
    # Of the last tenth of the steps.
    assert softmax["train_bits"][0] == pytest.approx(1.9 + 2.1 * 45 / 990, rel=1e-6)
    # LASAD's training bits, means over five points, come there at step 528; it is told every ten.
    first = next(r for r in results if (r.task, r.arm, r.seed) == ("han", DEFAULT, 0))
    lag = 20
    step = 10 + 990 * (3 - softmax["train_bits"][0]) / 2 + lag
    expected = 2 - (math.ceil(step / 10) * 10 - 500) / 500
    assert first.held_out_at(softmax["train_bits"][0]) == pytest.approx(expected)
    assert first.held_out_at(0.5) is None


def test_learning_rates_are_compared_where_there_are_several(results, tmp_path):
    other = tmp_path / "other"
    for seed, bits in ((0, 0.9), (1, 0.8)):
        write_run(other, "han", DEFAULT, seed, {1000: bits}, straight(3, 1), rate=4e-3)
    write_run(other, "han", SOFTMAX, 0, {1000: 1.6}, straight(3, 1), rate=4e-3)
    write_run(other, "han", SOFTMAX_CONV, 0, {1000: 1.4}, straight(3, 1), rate=4e-3)
    others = read_results(other)
    of_han = [result for result in results if result.task == "han"]
    rows = rate_rows(of_han, others)
    found = [(row["arm"], row["rate"], row["seeds"], row["bits"][0]) for row in rows]
    assert found == [
        (DEFAULT, 1e-3, 2, 1.1), (DEFAULT, 4e-3, 2, pytest.approx(0.85)),
        (SOFTMAX_CONV, 4e-3, 1, 1.4), (SOFTMAX, 1e-3, 1, 1.5), (SOFTMAX, 4e-3, 1, 1.6),
    ]  # fmt: skip
    assert rate_rows(results, []) == []
    every = at_best_rate([*results, *others])
    best = sorted((r.task, r.arm, r.seed, r.learning_rate) for r in every)
    assert best == [
        ("clipart", DEFAULT, 0, 1e-3), ("han", DEFAULT, 0, 4e-3), ("han", DEFAULT, 1, 4e-3),
        ("han", SOFTMAX_CONV, 0, 4e-3), ("han", SOFTMAX, 0, 1e-3),
    ]  # fmt: skip


def test_where_images_repeat_the_best_step_counts(results):
    (clipart,) = (result for result in results if result.task == "clipart")
    assert clipart.bits == 1.0


def test_the_report_prints_tables_and_draws(results, tmp_path):
    other = tmp_path / "other"
    write_run(other, "han", DEFAULT, 0, {500: 2.0, 1000: 0.9}, straight(3, 1), rate=4e-3)
    folders = f"--out={tmp_path},{other}"
    command = [sys.executable, "-m", "lasad_jax.experiments.report", folders]
    done = subprocess.run(
        [*command, f"--pictures={tmp_path}"],
        capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert "| `raster+gate+conv+rope` | 2         | 1.1000 ± 0.1000 |" in done.stdout
    assert "Open Clip Art" in done.stdout
    assert "| `raster+gate+conv+rope` | 0.004         | 1         | 0.9000        |" in done.stdout
    for name in ("curves", "states", "scaling"):
        assert (tmp_path / f"quality_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_states_are_those_of_the_decoder():
    """Counted by hand: memory, recent keys, values and weights, the convolution's rows."""
    lasad, softmax = model_of(DEFAULT), model_of(SOFTMAX)
    heads, keys, values = lasad.num_heads, lasad.query_dim, lasad.value_dim
    by_hand = heads * (keys * values + 16 * (keys + values + 1)) + lasad.width * (2 * 16 + 2)
    assert decode_state(lasad, 256) == by_hand
    assert decode_state(softmax, 1024) == 2 * 1025 * softmax.width


def test_means_have_errors_of_two_values_or_more():
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_and_error([1.0])[1])
