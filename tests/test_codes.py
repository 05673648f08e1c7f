"""Stored codes: what is in the files, after kills and by several processes too."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from small_codes import (
    SHAPE,
    ArraySource,
    KilledError,
    code_of,
    encode,
    failing_at,
    files_of,
    one_view,
    small_job,
    small_sources,
    three_views,
    write,
)

from lasad_jax.data.codes import read_manifest, write_codes
from lasad_jax.data.codes.ahead import map_ahead


def never(pixels):
    raise AssertionError("nothing was left to encode")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder written in one go."""
    directory = tmp_path_factory.mktemp("whole")
    write(directory)
    return directory


def records_of(directory, file: str, num_codes: int = 6, code: str = "<u2") -> np.ndarray:
    """The records of a file, with a layout of the test's own."""
    layout = [("image", "<u8"), ("label", "<i4"), ("augmentation", "<u2")]
    dtype = np.dtype([*layout, ("codes", code, num_codes)])
    return np.frombuffer(b"".join(ArrayRecordReader(str(directory / file), "").read_all()), dtype)


def test_each_shard_holds_its_own_images_views_side_by_side(tmp_path):
    sources = small_sources(broken=[8, 22])
    manifest = write(tmp_path, sources, max_unreadable=0.1)
    source = sources["train"]
    for shard in range(4):
        records = records_of(tmp_path, f"train-{shard:05}-of-00004.arrayrecord")
        images = [i for i in range(7 * shard, min(7 * shard + 7, 23)) if i not in source.broken]
        expected = [
            (i, source.labels[i], a, code_of(view))
            for i in images
            for a, view in enumerate(three_views(source.images[i]))
        ]
        assert len(records) == len(expected)
        for record, (image, label, augmentation, codes) in zip(records, expected, strict=True):
            assert record["image"] == image and record["label"] == label
            assert record["augmentation"] == augmentation
            assert record["codes"].tolist() == codes
    assert len(records_of(tmp_path, "test-00000-of-00001.arrayrecord")) == 5

    split = manifest.splits["train"]
    readable = np.delete(source.labels, [8, 22])
    assert split.images == 21 and split.augmentations == 3
    assert split.class_counts == tuple(np.bincount(readable, minlength=3))
    assert [shard.records for shard in split.shards] == [21, 18, 21, 3]
    assert [(bad.image, bad.name, bad.reason) for bad in split.unreadable] == [
        (8, "image8.png", "cut short"),
        (22, "image22.png", "cut short"),
    ]


def test_the_manifest_reads_back_as_it_was_written(whole):
    manifest = read_manifest(whole)
    assert manifest.job == small_job(small_sources())
    assert set(manifest.splits) == {"train", "test"}
    value = json.loads((whole / "manifest.json").read_text())
    dtype = [tuple(field) for field in value["record_dtype"]]
    assert [name for name, *_ in dtype] == ["image", "label", "augmentation", "codes"]
    assert manifest.job.record_dtype.itemsize == 8 + 4 + 2 + 6 * 2


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_died_anywhere_goes_on_to_the_same_files(tmp_path, whole, seed):
    rng = np.random.default_rng(seed)
    deaths = 0
    while True:
        count = int(rng.integers(1, 4))
        try:
            for process in reversed(range(count)):
                dying = failing_at(int(rng.integers(0, 9)))
                write(tmp_path, encode=dying, process_index=process, process_count=count)
            break
        except KilledError:
            deaths += 1
            # What a kill leaves where an exception still cleans up.
            for name in ("train-00002-of-00004.arrayrecord.tmp", "job.json.0.tmp"):
                (tmp_path / name).write_bytes(b"half")
            assert deaths < 100
    assert deaths
    assert files_of(tmp_path) == files_of(whole)


def test_three_processes_write_the_same_files_as_one(tmp_path, whole):
    for process in (2, 1, 0):
        manifest = write(tmp_path, process_index=process, process_count=3)
        assert (manifest is None) == (process != 0)
        assert (tmp_path / "manifest.json").exists() == (process == 0)
    assert files_of(tmp_path) == files_of(whole)


def test_the_first_process_waits_for_the_others(tmp_path, whole, capsys):
    late = threading.Timer(
        0.5, write, args=(tmp_path,), kwargs={"process_index": 1, "process_count": 2}
    )
    late.start()
    write(tmp_path, process_index=0, process_count=2)
    late.join()
    assert "waiting for 2 shards of other processes" in capsys.readouterr().out
    assert files_of(tmp_path) == files_of(whole)


def test_another_process_s_temporary_file_is_left_alone(tmp_path):
    theirs = tmp_path / "train-00001-of-00004.arrayrecord.tmp"
    theirs.write_bytes(b"being written")
    with pytest.raises(KilledError):
        write(tmp_path, encode=failing_at(0), process_index=0, process_count=2)
    assert theirs.read_bytes() == b"being written"


def test_a_finished_folder_is_left_as_it_is(tmp_path, capsys):
    write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write(tmp_path, encode=never) == read_manifest(tmp_path)
    assert "all codes are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("file", ["train-00001-of-00004.arrayrecord", "test-00000-of-00001.json"])
def test_a_lost_or_damaged_file_is_written_again(tmp_path, whole, file):
    write(tmp_path)
    (tmp_path / file).unlink()
    write(tmp_path)
    assert files_of(tmp_path) == files_of(whole)
    (tmp_path / file).write_bytes((whole / file).read_bytes()[:-5])
    write(tmp_path)
    assert files_of(tmp_path) == files_of(whole)


def test_the_tokenizer_sees_one_shape_and_two_batches_ahead(tmp_path):
    events = []

    class Pending:
        def __init__(self, codes):
            self.codes = codes

        def __array__(self, dtype=None, copy=None):
            events.append("waited")
            return np.array(self.codes, dtype)

    def lazy(pixels):
        events.append(pixels.shape)
        return Pending(encode(pixels))

    write(tmp_path, encode=lazy)
    assert set(events) == {"waited", (4, *SHAPE)}
    # A full shard has 21 augmentations, 6 batches.
    assert events[:4] == [(4, *SHAPE)] * 3 + ["waited"]


def test_work_ahead_is_bounded_and_ordered():
    begun, most, done = 0, 0, 0
    lock = threading.Lock()

    def square(x):
        nonlocal begun
        with lock:
            begun += 1
        return x * x

    with ThreadPoolExecutor(3) as pool:
        for i, value in enumerate(map_ahead(pool, square, ((x,) for x in range(50)), depth=5)):
            most = max(most, begun - done)
            done += 1
            assert value == i * i
    assert done == 50 and most <= 5


def test_a_shard_without_readable_images_is_written_empty(tmp_path):
    manifest = write(tmp_path, small_sources(broken=range(7, 14)), max_unreadable=0.4)
    assert [shard.images for shard in manifest.splits["train"].shards] == [7, 0, 7, 2]
    assert len(records_of(tmp_path, "train-00001-of-00004.arrayrecord")) == 0


@pytest.mark.parametrize(("vocab_size", "code"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_codes_take_two_bytes_up_to_65536_of_them(tmp_path, vocab_size, code):
    sources = {"train": ArraySource(3)}
    job = small_job(sources, vocab_size=vocab_size, views={"train": ("plain",)})
    largest = lambda pixels: encode(pixels) * 0 + vocab_size - 1
    write_codes(tmp_path, job, sources, {"train": one_view}, largest, batch_size=4, progress=False)
    records = records_of(tmp_path, "train-00000-of-00001.arrayrecord", code=code)
    np.testing.assert_array_equal(records["codes"], vocab_size - 1)
    assert len(records) == 3
