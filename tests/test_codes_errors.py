"""Stored codes: what is refused, each in one message that names what is wrong."""

import dataclasses
import re

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from small_codes import (
    KilledError,
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder written in one go."""
    directory = tmp_path_factory.mktemp("whole")
    write(directory)
    return directory


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_refused_by_image(tmp_path, label):
    sources = small_sources()
    sources["train"].labels[9] = label
    with pytest.raises(ValueError, match=f"image9.png of split 'train' has label {label}"):
        write(tmp_path, sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encode": lambda x: encode(x) - 5000}, "codes from -.* vocab_size=1021"),
        ({"encode": lambda x: encode(x) + 1021}, "to .* vocab_size=1021"),
        ({"encode": lambda x: encode(x)[:, :5]}, r"shape \(4, 5\) for grid=\(2, 3\)"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of process_count 2"),
    ],
)
def test_what_does_not_fit_the_job_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **change)


def test_views_that_do_not_fit_the_job_are_refused(tmp_path):
    sources = small_sources()
    job = small_job(sources)
    views = {"train": one_view, "test": one_view}
    with pytest.raises(ValueError, match=r"image0.png are uint8 of shape \(1, 4, 6, 1\).*\(3, h"):
        write_codes(tmp_path, job, sources, views, encode, batch_size=4, progress=False)
    views = {"train": lambda x: three_views(x[: 2 + 2 * (x[0, 0, 0] % 2)]), "test": one_view}
    with pytest.raises(ValueError, match=r"different sizes.*data.image_size"):
        write_codes(tmp_path, job, sources, views, encode, batch_size=4, progress=False)
    with pytest.raises(ValueError, match=r"images=.*23.*but the sources .*22"):
        write(tmp_path, small_sources(train=22), job=job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {"name": "random", "seed": [1, 3]}}, r"source.seed=\[1, 2\].*=\[1, 3\]"),
        ({"source": {"name": "random"}}, r'source.seed=\[1, 2\].*source.seed="\(absent\)"'),
        ({"tokenizer": "f" * 16}, 'tokenizer="0123456789abcdef".*tokenizer="f'),
        ({"vocab_size": 2000}, "vocab_size=1021.*vocab_size=2000"),
        ({"grid": (3, 2)}, r"grid=\[2, 3\].*grid=\[3, 2\]"),
        ({"images_per_shard": 8}, "images_per_shard=7.*images_per_shard=8"),
        ({"views": {"train": ("plain", "a", "b"), "test": ("plain",)}}, "views.train=.*mirrored"),
    ],
)
def test_a_folder_of_another_job_is_refused_by_field(whole, change, message):
    before = files_of(whole)
    with pytest.raises(ValueError, match=message):
        write(whole, job=small_job(small_sources(), **change))
    assert files_of(whole) == before


def test_a_source_of_another_size_is_another_job(whole):
    with pytest.raises(ValueError, match=r"images.train=23.*images.train=24"):
        write(whole, small_sources(train=24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"train": 5}}, "same splits"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"images_per_shard": 0}, "images_per_shard: 0"),
        ({"grid": (0, 3)}, r"grid: \(0, 3\)"),
        ({"views": {"train": (), "test": ("plain",)}}, "views of split 'train': 0"),
        ({"images": {"train": 5, "test": 0}}, "images of split 'test': 0"),
        ({"format": 2}, "format: 2 .* not 1"),
    ],
)
def test_a_job_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small_job(small_sources()), **change)


def test_splits_with_different_classes_are_refused():
    sources = small_sources()
    sources["test"].class_names = ("cat", "dog")
    with pytest.raises(ValueError, match="different class names"):
        small_job(sources)


def test_a_folder_without_a_whole_manifest_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere', which is no folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"which has no manifest.json"):
        read_manifest(tmp_path)
    with pytest.raises(KilledError):
        write(tmp_path, encode=failing_at(8))
    again = "run the same lasad_jax.tokenize command again"
    with pytest.raises(FileNotFoundError, match=f"not finished.*{again}"):
        read_manifest(tmp_path)
    write(tmp_path)
    shard = tmp_path / "train-00003-of-00004.arrayrecord"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    sizes = f"{len(content) - 1} bytes where {len(content)}"
    with pytest.raises(ValueError, match=f"{re.escape(str(shard))}.*{sizes} were.*{again}"):
        read_manifest(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(shard))}.*is missing; {again}"):
        read_manifest(tmp_path)
    for broken, message in (("{", "no JSON file"), ("{}", "no manifest"), ("[]", "no manifest")):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(ValueError, match=message):
            read_manifest(tmp_path)


def test_a_file_that_was_not_written_whole_never_gets_its_name(tmp_path, monkeypatch):
    class FullDisk(ArrayRecordWriter):
        """Loses what it is given, and says nothing."""

        def write(self, record):
            pass

    monkeypatch.setattr("lasad_jax.data.codes.shard.ArrayRecordWriter", FullDisk)
    with pytest.raises(OSError, match="has 0 of 21 records after writing; is the disk full"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_the_share_of_unreadable_images_is_not_rounded_down_by_a_hair(tmp_path):
    sources = small_sources(train=100, broken=range(29))
    assert 0.29 * 100 < 29
    assert write(tmp_path, sources, max_unreadable=0.29).splits["train"].images == 71


def test_unreadable_images_beyond_the_share_stop_the_run(tmp_path):
    sources = small_sources(train=70, broken=[*range(1, 21), 30, 40])
    job = small_job(sources, images_per_shard=35)
    for share, allowed in ((0.29, 20), (0.3, 21)):
        with pytest.raises(ValueError) as caught:
            write(tmp_path, sources, job=job, max_unreadable=share)
        message = str(caught.value)
        found = 21 if share == 0.29 else 22
        assert f"{found} of the 70 images of split 'train'" in message
        assert f"allows {allowed}" in message
        assert message.count("cut short") == 20 and f"and {found - 20} more" in message
        assert not (tmp_path / "manifest.json").exists()
    # The share decides nothing of the content, so the same folder goes on with a larger one.
    assert write(tmp_path, sources, job=job, max_unreadable=22 / 70).splits["train"].images == 48


def test_no_image_may_be_unreadable_where_the_share_is_less_than_one_image(tmp_path):
    with pytest.raises(ValueError, match=r"1 of the 23 images .* allows 0; .*\n  image3.png: cut"):
        write(tmp_path, small_sources(broken=[3]))
    with pytest.raises(ValueError, match=r"max_unreadable is 1\.5"):
        write(tmp_path, max_unreadable=1.5)
