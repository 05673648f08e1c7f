"""Runs that are killed or told to end, at any moment, and gone on with.

LASAD_JAX_KILLS=20 python -m pytest tests/test_recovery.py -k killed -s    prints a report of 20.
"""

import os
import random
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest
from forked import Commands, wait_until
from tiny import environment, one_device_mesh, tiny_config

from lasad_jax.training.checkpoints import Checkpoints, unfinished_step
from lasad_jax.training.integrity import damage
from lasad_jax.training.metrics import read_metrics
from lasad_jax.training.preemption import EXIT_STATUS
from lasad_jax.training.state import abstract_state

KILLS = int(os.environ.get("LASAD_JAX_KILLS", "2"))
STEPS = 20 + 4 * KILLS
SAVE_EVERY = 4
FLAGS = (
    f"--config.steps={STEPS}",
    f"--config.save_every={SAVE_EVERY}",
    "--config.eval_every=8",
    "--config.sample_every=8",
    "--config.num_samples=2",
    "--config.model.num_layers=1",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",  # a sharded state must come back as well
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    with Commands(environment(2) | quick, tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(commands.start(f"--workdir={workdir}", *FLAGS))
    return workdir


def finish(run):
    assert run.wait() == 0, run.said()


def state(workdir, step=STEPS):
    config = tiny_config(model={"num_layers": 1})
    return jax.device_get(
        Checkpoints(workdir, read_only=True).restore(
            step, abstract_state(config, one_device_mesh(config))
        )
    )


def rows(workdir):
    """Everything but what is timed, all rows of a step as one."""
    found = {}
    for row in read_metrics(workdir / "metrics.jsonl"):
        timed = lambda name: "per_second" in name or name.startswith("goodput/")
        found.setdefault(row["step"], {}).update({k: v for k, v in row.items() if not timed(k)})
    return found


def assert_same_run(one, other):
    left, right = state(one), state(other)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert rows(one) == rows(other)
    assert sorted(rows(one)) == list(range(1, STEPS + 1))
    pictures = [sorted((run / "samples").iterdir()) for run in (one, other)]
    for left, right in zip(*pictures, strict=True):
        assert (left.name, left.read_bytes()) == (right.name, right.read_bytes())
    best = [Checkpoints(run, read_only=True).best_step() for run in (one, other)]
    assert best[0] == best[1]


def told(workdir):
    return max((row["step"] for row in read_metrics(workdir / "metrics.jsonl")), default=0)


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(commands, whole, tmp_path):
    rng = random.Random(0)
    moments = sorted(rng.sample(range(2, STEPS - 10), KILLS))
    newest = 0
    for number, moment in enumerate(moments):
        strict = number % 2 == 1
        flag = f"--config.async_save={not strict}"
        run = commands.start(f"--workdir={tmp_path}", *FLAGS, flag)
        beginning = number % 4 == 3
        if beginning:
            time.sleep(rng.uniform(0, 3))
        else:  # a little after a step, at least one further each time
            moment = max(moment, told(tmp_path) + 1)
            wait_until(lambda run=run, moment=moment: run.ended() or told(tmp_path) >= moment)
            time.sleep(rng.uniform(0, 0.05))
        assert not run.ended(), f"the run ended before it could be killed\n{run.said()}"
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        reached = told(tmp_path)
        saved = Checkpoints(tmp_path, read_only=True).steps()
        assert not any(map(damage, (tmp_path / "checkpoints" / str(step) for step in saved)))
        before, newest = newest, max(saved, default=0)
        # Nothing beyond the last checkpoint asked for or, while it was being written, the one
        # before; each waits for the one before it. What the metrics tell of a run that was
        # killed before it took a step, the one before it reached.
        asked = (reached - 1) // SAVE_EVERY * SAVE_EVERY
        assert newest >= (asked if strict and not beginning else max(0, asked - SAVE_EVERY))
        assert newest >= before
        how = "waited for" if strict else "in the background"
        how += ", killed in its beginning" if beginning else ""
        print(f"kill {number + 1}: step {reached} reached, {newest} on disk, {how}", flush=True)
    finish(commands.start(f"--workdir={tmp_path}", *FLAGS))
    assert_same_run(tmp_path, whole)
    print(f"{KILLS} kills: the same state, bit for bit")


def test_a_run_told_to_end_saves_wherever_it_is(commands, whole, tmp_path):
    def end(stall, calls, expected):
        run = commands.start(f"--workdir={tmp_path}", *FLAGS, stall=(stall, calls))
        wait_until(lambda: run.ended() or "stalled" in run.said())
        begun = time.monotonic()
        run.signal(signal.SIGTERM)
        assert run.wait() == EXIT_STATUS, run.said()
        assert time.monotonic() - begun < 20
        assert f"preempted at step {expected}: the same command goes on" in run.said()
        assert Checkpoints(tmp_path, read_only=True).latest_step() == (expected or None)

    end("compile", 0, 0)
    end("evaluate", 0, 8)
    assert unfinished_step(tmp_path) == 8
    # What was broken off is made up for: the first evaluation is that of step 8.
    end("picture", 1, 16)
    end("save", 0, 20)
    assert unfinished_step(tmp_path) is None
    finish(commands.start(f"--workdir={tmp_path}", *FLAGS))
    assert_same_run(tmp_path, whole)


def test_two_processes_told_to_end_save_one_step_that_one_goes_on_from(commands, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = [
        commands.start(
            f"--workdir={tmp_path}",
            "--distributed",
            *FLAGS,
            "--config.watchdog=2",
            joined={
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(2)
    ]
    wait_until(lambda: told(tmp_path) >= 2 or any(run.ended() for run in runs))
    runs[1].signal(signal.SIGSTOP)
    behind = re.compile(r"no progress for \d+ s: .*process 1 is at step \d+, \w+, silent for \d")
    wait_until(lambda: behind.search(runs[0].said()) or any(run.ended() for run in runs))
    runs[1].signal(signal.SIGCONT)
    runs[1].signal(signal.SIGTERM)  # the other hears of it from this one
    assert [run.wait() for run in runs] == [EXIT_STATUS] * 2, [run.said() for run in runs]
    step = Checkpoints(tmp_path, read_only=True).latest_step()
    assert 2 <= step < STEPS
    assert all(f"preempted at step {step}:" in run.said() for run in runs)
    # Four devices that shared the parameters, then two that each have all of them.
    finish(commands.start(f"--workdir={tmp_path}", *FLAGS[:-2], "--config.mesh.data=2"))
    one, other = rows(tmp_path), rows(whole)
    assert sorted(one) == list(range(1, STEPS + 1))
    for step, row in one.items():
        assert row["loss"] == pytest.approx(other[step]["loss"], rel=1e-4), step
