"""Checkpoints that are cut, of before or of something else; disks that are full or read-only."""

import json
import shutil
import subprocess

import jax
import numpy as np
import pytest
from tiny import one_device_mesh, tiny_config

from lasad_jax.training import loop
from lasad_jax.training.checkpoints import Checkpoints, find_step
from lasad_jax.training.state import abstract_state

MODEL = {"num_layers": 1}


def config(**changes):
    return tiny_config(model=MODEL, save_every=2, eval_every=4, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, with checkpoints of 2 and 4."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.train(config(steps=4), workdir)
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def restore(workdir, step):
    asked = config()
    checkpoints = Checkpoints(workdir, read_only=True)
    return checkpoints.restore(step, abstract_state(asked, one_device_mesh(asked)))


def data_file(workdir, step):
    """The largest of a checkpoint."""
    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_missing_file_is_named(run):
    (gone := data_file(run, 4)).unlink()
    with pytest.raises(ValueError, match=rf"checkpoints/4: damaged: .*{gone.name} is missing"):
        restore(run, 4)


def test_a_run_goes_on_from_the_newest_good_checkpoint(finished, run, caplog):
    cut(data_file(run, 4))
    with pytest.raises(ValueError, match=r"checkpoints/4: damaged: .* take another step, of \[2\]"):
        restore(run, 4)
    assert Checkpoints(run, read_only=True).latest_step() == 2
    assert find_step(run) == 2  # the best by held-out loss was 4

    good = contents(run / "checkpoints" / "2")
    loop.train(config(steps=4), run)
    assert "the checkpoint of step 4 is damaged" in caplog.text
    assert "goes on from step 2" in caplog.text
    assert contents(run / "checkpoints" / "2") == good
    assert (run / "damaged_checkpoints" / "4").is_dir()
    jax.tree.map(np.testing.assert_array_equal, restore(run, 4), restore(finished, 4))


def test_a_run_of_which_nothing_is_left_is_refused(run):
    for step in (2, 4):
        cut(data_file(run, step))
    before = contents(run)
    with pytest.raises(ValueError, match=r"every checkpoint .* is damaged, the newest, 4, because"):
        loop.train(config(steps=6), run)
    assert contents(run) == before


def test_a_damage_that_sizes_do_not_tell_is_named_and_nothing_is_touched(run):
    path = run / "checkpoints" / "4" / "default" / "_METADATA"
    path.write_text("x" * path.stat().st_size)
    before = contents(run / "checkpoints")
    with pytest.raises(ValueError, match=r"checkpoints/4: cannot be read \(JSONDecodeError"):
        loop.train(config(steps=6), run)
    assert contents(run / "checkpoints") == before


def test_a_state_of_another_architecture_is_named_array_by_array(run):
    other = tiny_config(model=MODEL | {"ffn_width": 48}, steps=6)
    # As where a config.json was written by hand: otherwise that is compared first.
    stored = json.loads((run / "config.json").read_text())
    stored["model"]["ffn_width"] = 48
    (run / "config.json").write_text(json.dumps(stored))
    before = contents(run / "checkpoints")
    with pytest.raises(ValueError, match=r"checkpoints/4: a state of another architecture: ") as e:
        loop.train(other, run)
    assert "ema/blocks/ffn/down/kernel: (1, " in str(e.value)
    assert str(e.value).count(" there, ") == 5 and "more" in str(e.value)
    assert contents(run / "checkpoints") == before


def test_a_checkpoint_from_before_there_was_a_guard_is_gone_on_with(run, monkeypatch):
    state = restore(run, 4)
    shutil.rmtree(run / "checkpoints")
    old = Checkpoints(run)
    old.save(state.replace(guard=None), 4, None)
    old.close()
    (run / "checkpoints" / "4" / "sizes.json").unlink()  # nor were there sizes
    new = restore(run, 4)
    assert (int(new.guard.seen), int(new.step)) == (0, 4)
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    loop.train(config(steps=6), run)
    assert int(restore(run, 6).guard.seen) == 2


# A disk of its own


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB, and what mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*words):
        return subprocess.run(["mount", *words, str(folder)], capture_output=True, check=False)

    try:
        mounted = mount("-t", "tmpfs", "-o", "size=8m", "tmpfs")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    yield folder, lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_or_read_only_disk_is_named_and_leaves_what_was_good(disk, finished):
    folder, remount = disk
    run = shutil.copytree(finished, folder / "run")
    good = contents(run / "checkpoints")

    assert remount("ro").returncode == 0
    with pytest.raises(OSError, match=rf"Read-only file system: '{run}"):
        loop.train(config(steps=6, keep_last=1), run)
    assert remount("rw").returncode == 0
    assert contents(run / "checkpoints") == good

    room = shutil.disk_usage(folder).free - 200_000  # for numbers, not for a state
    (folder / "other").write_bytes(b"x" * room)
    with pytest.raises(OSError, match=rf"cannot be written to {run}/checkpoints .*and the same"):
        loop.train(config(steps=6, keep_last=1), run)
    assert {name: x for name, x in contents(run / "checkpoints").items() if name in good} == good
    assert Checkpoints(run, read_only=True).steps() == [2, 4]

    (folder / "other").unlink()
    loop.train(config(steps=6, keep_last=1), run)
    assert Checkpoints(run, read_only=True).latest_step() == 6
