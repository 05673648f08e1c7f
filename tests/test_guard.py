"""What watches over a run: the guard against spikes, goodput, the watchdog, traces."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import one_device_mesh, tiny_config

from lasad_jax.config import OptimizerConfig
from lasad_jax.training import generator_task, loop, sharding
from lasad_jax.training.checkpoints import Checkpoints
from lasad_jax.training.goodput import PARTS, Goodput, flop_utilization, peak_flops
from lasad_jax.training.guard import choose, judge, new_guard
from lasad_jax.training.metrics import read_metrics
from lasad_jax.training.peers import Peers
from lasad_jax.training.profile import Profile
from lasad_jax.training.state import abstract_state, init_state
from lasad_jax.training.step import make_train_step
from lasad_jax.training.summary import check_skips, summary
from lasad_jax.training.watchdog import Watchdog, report

# The guard


def guarded(norms, losses, factor):
    """In NumPy: which updates are taken, and the level after each."""
    level, seen, taken, levels = 0.0, 0, [], []
    for norm, loss in zip(norms, losses, strict=True):
        bound = factor * level if factor and seen >= 100 else np.inf
        finite = np.isfinite(norm) and np.isfinite(loss)
        taken.append(finite and norm <= bound)
        if finite:
            level += (min(norm, bound) - level) / min(seen + 1, 100)
            seen += 1
        levels.append(level)
    return taken, levels


@pytest.mark.parametrize("factor", [0.0, 5.0])
def test_the_guard_is_what_it_says(factor):
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 0.3, 300))
    losses = np.ones(300)
    norms[[3, 130, 200]] = [50, 40, 7]  # the first before the level is believed
    norms[[20, 150]] = np.nan, np.inf
    losses[160] = np.nan
    norms[220:] *= 8  # for good

    def body(guard, values):
        take, guard = judge(guard, values[0], values[1], factor)
        return guard, (take, guard.level, guard.skipped, guard.in_a_row)

    values = jnp.stack([jnp.asarray(losses), jnp.asarray(norms)], 1).astype(jnp.float32)
    last, (taken, levels, skipped, in_a_row) = jax.lax.scan(body, new_guard(), values)
    taken = np.asarray(taken)
    expected, expected_levels = guarded(norms, losses, factor)
    np.testing.assert_array_equal(taken, expected)
    np.testing.assert_allclose(levels, expected_levels, rtol=1e-4)
    np.testing.assert_array_equal(skipped, np.cumsum(~np.array(expected)))
    longest = max(map(len, re.findall("1+", "".join("01"[not t] for t in expected))))
    assert int(in_a_row.max()) == longest
    assert int(last.skipped) == (3 if factor == 0 else np.sum(~np.array(expected)))
    if factor:
        assert not taken[[130, 200, 150, 160, 20]].any()
        assert taken[3] and not taken[220:226].all() and taken[-30:].all()


def test_what_is_left_out_changes_nothing_but_counts():
    old = {"w": jnp.array([1.0, -0.0]), "count": jnp.array(3)}
    new = {"w": jnp.array([jnp.nan, 2.0]), "count": jnp.array(4)}
    for take, w in ((False, old["w"]), (True, new["w"])):
        kept = choose(jnp.array(take), new, old)
        np.testing.assert_array_equal(kept["w"], w)
        assert int(kept["count"]) == 4


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out():
    config = tiny_config(model={"num_layers": 1})
    mesh = one_device_mesh(config)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        batch = {"tokens": np.zeros((16, 64), np.int32), "labels": np.zeros(16, np.int32)}
        batch = sharding.put_batch(batch, mesh)
        step = jax.jit(make_train_step(config))
        state, _ = step(state, batch)
        head = state.params["head"]["kernel"]
        broken = {**state.params, "head": {"kernel": head.at[0, 0].set(jnp.inf)}}
        after, metrics = step(state.replace(params=broken), batch)
        assert not np.isfinite(metrics["loss"])
        assert (int(metrics["skipped_updates"]), int(after.step)) == (1, 2)
        jax.tree.map(np.testing.assert_array_equal, after.params, broken)
        jax.tree.map(np.testing.assert_array_equal, after.ema, state.ema)
        after, metrics = step(after.replace(params=state.params), batch)
        assert (int(metrics["skipped_updates"]), int(metrics["skipped_in_a_row"])) == (1, 0)
        assert np.any(after.params["head"]["kernel"] != head)


def values(loss=1.0, norm=1.0, skipped=0, in_a_row=0):
    return {
        name: np.float32(value)
        for name, value in {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": 0.1,
            "skipped_updates": skipped,
            "skipped_in_a_row": in_a_row,
            "grad_norm_level": 1.0,
        }.items()
    }


def test_updates_left_out_are_told_and_too_many_end_the_run(caplog):
    steps = [values(), values(np.nan, np.nan, 1, 1), values(3.0, skipped=1)]
    check_skips(steps, 8, max_skips=2)
    assert "step 7: update left out: loss nan, gradient norm nan where 1 is usual" in caplog.text
    row = summary(steps)
    assert (row["loss"], row["grad_norm"], row["skipped_updates"]) == (2.0, 1.0, 1.0)
    assert "loss" not in summary(steps[1:2])
    steps.append(values(2.0, 90.0, 2, 1))
    steps.append(values(2.0, 95.0, 3, 2))
    with pytest.raises(FloatingPointError, match=r"step 10: .*95\.0 .*2 updates in a row"):
        check_skips(steps, 10, max_skips=2)


@pytest.mark.parametrize("field", [{"max_skips": 0}, {"spike_factor": 0.5}, {"spike_factor": -1.0}])
def test_a_guard_that_makes_no_sense_is_refused(field):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(field))}: "):
        OptimizerConfig(**field)


def test_a_run_goes_on_after_one_bad_step_and_ends_after_many(tmp_path, monkeypatch):
    """A trace is written on the way."""
    config = tiny_config(model={"num_layers": 1}, optimizer={"max_skips": 3}, log_every=4)
    make = generator_task.make_train_step

    def make_poisoned(bad_steps):
        def make_step(config):
            step = make(config)

            def poisoned(state, batch):
                bad = jnp.isin(state.step, jnp.array(bad_steps))
                kernel = state.params["head"]["kernel"]
                broken = {**state.params, "head": {"kernel": jnp.where(bad, jnp.inf, kernel)}}
                new, metrics = step(state.replace(params=broken), batch)
                # A step that was left out leaves the parameters that it was given.
                kept = jax.tree.map(
                    lambda new, old: jnp.where(bad, old, new), new.params, state.params
                )
                return new.replace(params=kept), metrics

            return poisoned

        return make_step

    monkeypatch.setattr(generator_task, "make_train_step", make_poisoned([1, 5, 6, 7]))
    with pytest.raises(FloatingPointError, match=r"step 8: loss .*3 updates in a row"):
        loop.train(config, tmp_path, profile=Profile(2, 3))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["step"], row["skipped_updates"]) == (4, 1)
    assert np.isfinite(row["loss"])
    assert sum(row[f"goodput/{part}"] for part in PARTS) == pytest.approx(1, abs=1e-6)
    assert row["tokens_per_second"] == pytest.approx(64 * row["images_per_second"])
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [4]
    state = checkpoints.restore(4, abstract_state(config, one_device_mesh(config)))
    assert int(state.guard.skipped) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


# Goodput


class Output:
    """Of a step that the device ends at a time of the test's clock."""

    def __init__(self, clock, end):
        self._clock, self._end = clock, end

    def block_until_ready(self):
        while self._clock[0] < self._end:
            time.sleep(0.001)


def test_shares_of_the_wall_time():
    clock = [0.0]
    goodput = Goodput(lambda: clock[0])

    def passes(seconds):
        clock[0] += seconds
        time.sleep(0.05)  # for the thread that waits for steps
        return "batch"

    with goodput.spent("start"):
        assert goodput.part == "start"
        passes(10)
    assert goodput.wait_for(lambda: passes(4)) == "batch"  # nothing to do for the device
    with goodput.spent("compilation"):
        passes(6)
    assert goodput.part == "steps"
    goodput.dispatched(Output(clock, 23.0))
    goodput.wait_for(lambda: passes(2))  # the device is at its step: nothing is lost
    passes(8)
    goodput.wait_for(lambda: passes(5))  # it has ended before: all is lost
    with goodput.spent("saving"):
        passes(5)
    seconds = {"steps": 10, "start": 10, "compilation": 6, "data": 9, "saving": 5, "evaluation": 0}
    assert goodput.shares() == pytest.approx({part: x / 40 for part, x in seconds.items()})
    with goodput.spent("evaluation"):
        passes(30)
    passes(10)
    assert goodput.shares()["evaluation"] == pytest.approx(0.75)
    assert goodput.summary().startswith("80 s: steps 25.0%, start 12.5%, compilation 7.5%")
    goodput.close()


def test_flops_over_the_peak(monkeypatch):
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert (peak_flops("TPU v5 lite"), peak_flops("TPU v5p"), peak_flops("TPU v5")) == (
        *(197e12, 459e12, 459e12),
    )
    assert peak_flops("cpu") is None
    task = type("Task", (), {"flops_per_image": 1e12})
    assert flop_utilization(task, 100.0) is None
    monkeypatch.setattr("lasad_jax.training.goodput.peak_flops", lambda kind: 1e14)
    assert flop_utilization(task, 100.0) == pytest.approx(1 / jax.device_count())
    task.flops_per_image = None
    assert flop_utilization(task, 100.0) is None


# The watchdog


def test_the_watchdog_says_who_is_behind():
    heard = {0: ("7 steps 9", 99.0), 1: ("5 data 9", 99.5), 2: ("7 steps 3", 60.0)}
    assert report(heard, 100.0, 4, silence=10.0) == (
        "process 3 has not begun; process 1 is at step 5, data; process 0 is at step 7, steps; "
        "process 2 is at step 7, steps, silent for 40 s"
    )


def test_the_watchdog_speaks_after_a_while_without_progress():
    place, said = [3, "data"], []
    with Watchdog(Peers(), lambda: tuple(place), 0.2, said.append):
        for _ in range(6):  # progress all the time
            time.sleep(0.1)
            place[0] += 1
        assert not said
        place[0] = 9
        time.sleep(0.9)
    assert 1 <= len(said) <= 3  # after 0.2, 0.4 and 0.8 s
    assert re.fullmatch(r"no progress for 0 s: process 0 is at step 9, data", said[0])


@pytest.mark.parametrize("text", ["5", "5:", "7:5", "0:2", "a:b"])
def test_a_profile_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match="must be START:STOP"):
        Profile.parse(text)
