"""Jobs of many images: stopped anywhere, damaged, mistaken for another, on several processes."""

import json
import time
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image
from processes import call, command, run_two, start
from tiny import tiny_config

from lasad_jax.config import MeshConfig
from lasad_jax.sampling import job as job_module
from lasad_jax.sampling.job import Job, digest, draw_parts, fingerprint
from lasad_jax.sampling.pictures import read_comment
from lasad_jax.training import loop
from lasad_jax.training.sharding import batch_sharding, make_mesh

NUM, BATCH, GRID = 11, 4, (3, 5)  # parts of 4, 4 and 3
PICTURE = Image.new("RGB", (4, 4))


class Draw:
    """Codes that depend on their image's number; notes what it was asked for, and may stop."""

    def __init__(self, stop_after: int | None = None):
        self.drawn, self.stop_after = [], stop_after

    def __call__(self, batches):
        for batch, numbers in enumerate(batches):
            if batch == self.stop_after:
                raise KeyboardInterrupt
            self.drawn += numbers.tolist()
            yield numbers, np.stack([codes(number) for number in numbers])


def codes(number):
    return np.random.default_rng(number).integers(0, 256, GRID[0] * GRID[1])


def decode(tokens):
    return tokens.reshape(-1, *GRID, 1).astype(np.uint8)


def make_job(folder, num=NUM, batch_size=BATCH, **identity):
    identity = {"seed": 0, "guidance": 1.5, "labels": "abc"} | identity
    return Job(folder / "out", np.arange(num) % 3, batch_size, identity)


def run(job, draw=None):
    draw = draw or Draw()
    draw_parts(job, draw, decode, progress=False)
    job.finish(PICTURE)
    return draw.drawn


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def whole(tmp_path):
    """The files of a job that was not stopped."""
    folder = tmp_path / "whole"
    assert run(make_job(folder)) == list(range(NUM))
    return contents(folder)


def stopped(folder, parts):
    with pytest.raises(KeyboardInterrupt):
        run(make_job(folder), Draw(stop_after=parts))
    assert len(list(folder.glob("out.parts/*"))) == parts
    assert not list(folder.glob("out.npz"))


def test_a_job_leaves_its_images_and_labels_alone(tmp_path):
    job = make_job(tmp_path)
    assert not job.is_finished()
    run(job)
    assert sorted(contents(tmp_path)) == ["out.npz", "out.png"]
    assert not job.folder.exists()
    assert job.is_finished()
    with np.load(job.npz) as file:
        expected = decode(np.stack([codes(number) for number in range(NUM)]))
        np.testing.assert_array_equal(file["arr_0"], expected)
        np.testing.assert_array_equal(file["arr_1"], job.labels)


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_stopped_job_goes_on_where_it_was(tmp_path, whole, parts):
    stopped(tmp_path / "run", parts)
    drawn = run(make_job(tmp_path / "run"))
    assert drawn == list(range(parts * BATCH, NUM))
    assert contents(tmp_path / "run") == whole


@pytest.mark.parametrize("function", ["write_png", "write_npz"])
def test_a_job_stopped_while_its_parts_are_joined(tmp_path, whole, function, monkeypatch):
    job = make_job(tmp_path / "run")
    draw_parts(job, Draw(), decode, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job_module, function, lambda *args, **kwargs: raise_(KeyboardInterrupt()))
        job.finish(PICTURE)
    assert not job.is_finished()
    assert run(job) == []
    assert contents(tmp_path / "run") == whole


def raise_(error):
    raise error


def test_what_a_finished_job_could_not_remove_is_in_nobodys_way(tmp_path, whole):
    folder = tmp_path / "run"
    job = make_job(folder)
    draw_parts(job, Draw(), decode, progress=False)
    left = contents(job.folder)
    job.finish(PICTURE)
    job.folder.mkdir()
    (job.folder / "part-00001.npz").write_bytes(left["part-00001.npz"])
    (job.folder / "part-00002.npz.tmp").write_bytes(b"begun")
    assert job.is_finished()

    other = make_job(folder, seed=1)
    assert not other.is_finished()
    assert run(other) == list(range(NUM))
    assert sorted(contents(folder)) == ["out.npz", "out.png"]
    assert json.loads(read_comment(other.npz))["seed"] == 1


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    """One bit of the images."""
    place = data.index(decode(codes(5)[None]).tobytes())
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def forget(data):
    """As another program's file: without what the images depend on."""
    return data[: data.index(b'{"seed"') - 2] + b"\0\0"


@pytest.mark.parametrize("damage", [cut, flip, forget, lambda data: b"", lambda data: bytes(99)])
def test_damaged_parts_are_drawn_again(tmp_path, whole, damage):
    stopped(tmp_path / "run", 2)
    path = tmp_path / "run" / "out.parts" / "part-00001.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert run(make_job(tmp_path / "run")) == list(range(BATCH, NUM))
    assert contents(tmp_path / "run") == whole


def test_damage_that_comes_later_is_told(tmp_path, whole):
    job = make_job(tmp_path / "run")
    draw_parts(job, Draw(), decode, progress=False)
    path = job.part_file(1)
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(ValueError, match=r"part-00001\.npz cannot be read .*CRC.* run the same"):
        job.finish(PICTURE)
    assert not job.npz.exists()
    assert run(job) == list(range(BATCH, 2 * BATCH))
    assert contents(tmp_path / "run") == whole


def test_another_job_is_refused_and_told_what_differs(tmp_path, whole):
    stopped(tmp_path / "run", 1)
    before = contents(tmp_path / "run")
    draw = Draw()
    with pytest.raises(ValueError, match="job is not finished; go on with its settings") as error:
        run(make_job(tmp_path / "run", seed=1, guidance=2.0, num_codes=3), draw)
    message = str(error.value)
    for part in ("seed: 0 there, 1 now", "guidance: 1.5 there, 2.0 now", "num_codes: (absent) t"):
        assert part in message
    assert message.count(" there, ") == 3
    assert draw.drawn == []
    assert contents(tmp_path / "run") == before
    run(make_job(tmp_path / "run"))
    assert contents(tmp_path / "run") == whole


def test_images_are_found_by_number(tmp_path):
    job = make_job(tmp_path)
    draw_parts(job, Draw(), decode, progress=False)
    numbers = np.array([10, 0, 4, 3, 9])
    expected = decode(np.stack([codes(number) for number in numbers]))
    np.testing.assert_array_equal(job.read_images(numbers), expected)


def test_no_more_than_a_few_parts_are_in_memory(tmp_path):
    part = 500_000  # bytes
    job = make_job(tmp_path, num=80, batch_size=2)
    large = lambda tokens: np.full((len(tokens), 500, part // 1000, 1), tokens[0, 0], np.uint8)
    tracemalloc.start()
    draw_parts(job, Draw(), large, progress=False)
    job.finish(PICTURE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert job.npz.stat().st_size > 40 * part
    assert peak < 4 * part


def test_fingerprints_tell_parameters_apart_wherever_they_lie():
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((8, 3)), "b": {"c": rng.standard_normal(5)}}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    ours = fingerprint(params)
    split = jax.device_put(params["a"], batch_sharding(make_mesh(MeshConfig())))
    assert fingerprint(params | {"a": split}) == ours
    params["a"][7, 2] = np.nextafter(params["a"][7, 2], np.float32(9))
    assert fingerprint(params) != ours


def test_digests_tell_arrays_apart():
    array = np.arange(6, dtype=np.int32)
    others = (array[::-1], array.reshape(2, 3), array.astype(np.int64), array[:5])
    assert digest(array.copy()) == digest(array)
    assert len({digest(x) for x in (array, *others)}) == 5


# The command


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("job") / "run"
    loop.train(tiny_config(steps=1, model={"num_layers": 1}), workdir)
    return workdir


def flags_of(workdir, out):
    return f"--workdir={workdir}", f"--out={workdir / out}"


def sample(workdir, out, *flags, devices=1, fails=False):
    return command("sample", *flags_of(workdir, out), *flags, devices=devices, fails=fails)


def results(workdir, out):
    return [(workdir / f"{out}.{ending}").read_bytes() for ending in ("npz", "png")]


def kill_at_work(workdir, out, *flags):
    """Kills the command once it has kept a new part; gives the times of all that it has."""
    folder = workdir / f"{out}.parts"
    parts = lambda: {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.npz")}
    before = parts()
    process = start("sample", *flags_of(workdir, out), *flags)
    deadline = time.monotonic() + 120
    while len(parts()) == len(before):
        assert process.is_alive(), "the command ended before it wrote"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.is_alive(), "the command ended before it could be killed"
    process.kill()
    process.join()
    assert not (workdir / f"{out}.npz").exists()
    return before, parts()


def test_a_job_killed_twice_ends_like_one_that_was_not(workdir):
    flags = ("--num=150", "--batch_size=3", "--top_k=5")
    sample(workdir, "whole", *flags)
    _, first = kill_at_work(workdir, "killed", *flags)
    before, second = kill_at_work(workdir, "killed", *flags)
    assert before == first
    assert first.items() < second.items()

    refusal = sample(workdir, "killed", *flags, "--seed=3", fails=True)
    assert "ValueError: out: " in refusal and "seed: 0 there, 3 now" in refusal

    said = sample(workdir, "killed", *flags)
    assert "150 images of step 1" in said
    assert "150/150" in said and "image/s" in said
    assert results(workdir, "killed") == results(workdir, "whole")
    assert not (workdir / "killed.parts").exists()
    assert "are there already" in sample(workdir, "killed", *flags)


def test_any_devices_and_processes_draw_the_same(workdir):
    flags = ("--num=20", "--batch_size=8")
    sample(workdir, "one", *flags, devices=1)
    sample(workdir, "eight", *flags, devices=8)
    assert results(workdir, "eight") == results(workdir, "one")

    # Two processes go on with a job whose first part, seen by its images, is there.
    with np.load(workdir / "one.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    images[:8] = 7
    job = Job(workdir / "two", labels, 8, json.loads(read_comment(workdir / "one.npz")))
    job.write_part(np.arange(8), images[:8])
    said = run_two(call("sample", *flags_of(workdir, "two"), *flags, "--distributed"), devices=4)
    assert [out.count("20 images of step 1") for out, _ in said] == [1, 0]
    with np.load(workdir / "two.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], labels)
    assert job.is_finished() and not job.folder.exists()
