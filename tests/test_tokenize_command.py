"""The tokenize command as a user types it: killed, spread over processes, and refused."""

import random
import re
import time

import numpy as np
import pytest
from PIL import Image
from processes import call, run_two, start
from small_codes import files_of
from tiny import tiny_config
from tokenizing import (
    CLASSES,
    GRID,
    SIZE,
    random_picture,
    read_records,
    tokenize,
    write_images,
    write_tokenizer,
)

from lasad_jax.config import config_to_json
from lasad_jax.data.codes import read_manifest

TRAIN, TEST = 600, 12
DOUBLE = (2 * SIZE[0], 2 * SIZE[1])


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenize")


@pytest.fixture(scope="module")
def codec(top):
    """Of the tokenizer in tokenizer.safetensors."""
    return write_tokenizer(top / "tokenizer.safetensors")


@pytest.fixture(scope="module")
def flags(top, codec):
    """Of a job that takes about two seconds; --out is missing."""
    write_images(top / "images" / "train", TRAIN, (SIZE, DOUBLE))
    write_images(top / "images" / "test", TEST, (DOUBLE, SIZE), seed=1)
    return (
        f"--tokenizer={top / 'tokenizer.safetensors'}",
        f"--directory={top / 'images'}",
        "--image_size=8,12",
        "--images_per_shard=8",
        "--batch_size=4",
    )


@pytest.fixture(scope="module")
def whole(top, flags):
    """A run that nothing disturbed, and what it said."""
    return top / "whole", tokenize(*flags, f"--out={top / 'whole'}")


def pixels_of(folder):
    """Images of a split in the order of their records, and their labels."""
    paths = sorted(folder.rglob("*.png"))
    pixels = [np.asarray(Image.open(path), np.int64) for path in paths]
    return pixels, np.array([CLASSES.index(path.parent.name) for path in paths])


def shrunk(pixels):
    """To SIZE: means of two columns, then of two rows, each rounded as Pillow does."""
    if pixels.shape[:2] == DOUBLE:
        pixels = (pixels[:, ::2] + pixels[:, 1::2] + 1) // 2
        pixels = (pixels[::2] + pixels[1::2] + 1) // 2
    return pixels.astype(np.uint8)


def assert_same_codes(codes, expected):
    """But for near ties, which the compiler's other settings here may decide otherwise."""
    assert codes.shape == expected.shape
    assert np.mean(codes != expected) < 1e-3


# What is written


def test_codes_are_those_of_each_view_of_each_image(top, codec, whole):
    out, said = whole
    assert f"train: {TRAIN} images x 2 views, 0 unreadable" in said
    assert f"test: {TEST} images x 1 views, 0 unreadable" in said
    for split, num_views in (("train", 2), ("test", 1)):
        pixels, labels = pixels_of(top / "images" / split)
        plain = np.stack([shrunk(image) for image in pixels])
        views = np.stack([plain, plain[:, :, ::-1]], axis=1)[:, :num_views]
        expected = codec.encode(views.reshape(-1, *plain.shape[1:]))
        assert len(np.unique(expected)) > 12

        records = read_records(out, split)
        assert_same_codes(records["codes"], expected)
        np.testing.assert_array_equal(records["label"], np.repeat(labels, num_views))
        np.testing.assert_array_equal(
            records["image"], np.repeat(np.arange(len(pixels)), num_views)
        )
        np.testing.assert_array_equal(
            records["augmentation"], np.tile(np.arange(num_views), len(pixels))
        )


def test_the_manifest_says_what_was_made_of_what(top, codec, whole):
    out, _ = whole
    manifest = read_manifest(out)
    assert manifest.job.tokenizer == codec.fingerprint
    assert manifest.job.grid == GRID
    assert manifest.job.class_names == CLASSES
    assert manifest.job.views == {"train": ("center", "mirrored center"), "test": ("center",)}
    assert manifest.job.source["directory"] == str(top / "images")
    assert manifest.splits["train"].class_counts == (TRAIN // 3,) * 3
    file = (top / "tokenizer.safetensors").read_bytes()
    assert (out / "tokenizer.safetensors").read_bytes() == file


# Kills and processes


def kill_at_work(flags, out, delay):
    """Kills the command a little after it has begun to write; it must still be at work."""
    before = set(out.iterdir()) if out.exists() else set()
    process = start("tokenize", *flags, f"--out={out}")
    deadline = time.monotonic() + 120
    while not any(".arrayrecord" in p.name for p in set(ls(out)) - before):
        assert process.is_alive(), "the command ended before it wrote"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    assert process.is_alive(), "the command ended before it could be killed"
    process.kill()
    process.join()
    assert not (out / "manifest.json").exists()


def ls(folder):
    return list(folder.iterdir()) if folder.exists() else []


def test_a_job_killed_five_times_leaves_the_files_of_one_that_was_not(top, flags, whole):
    out, rng = top / "killed", random.Random(0)
    left = []
    for _ in range(5):
        kill_at_work(flags, out, rng.uniform(0, 0.15))
        left += [path.name for path in ls(out) if path.name.endswith(".tmp")]
    assert left, "no kill came while a file was being written"
    # As if one more had come while the tokenizer was copied, which takes too short to hit.
    (out / "tokenizer.safetensors.tmp").write_bytes(b"begun")
    tokenize(*flags, f"--out={out}")

    assert files_of(out) == files_of(whole[0])
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    for split, images, views in (("train", TRAIN, 2), ("test", TEST, 1)):
        records = read_records(out, split)
        seen = sorted(zip(records["image"].tolist(), records["augmentation"].tolist(), strict=True))
        assert seen == [(image, view) for image in range(images) for view in range(views)]


def test_two_processes_write_the_files_of_one(top, flags, whole):
    out = top / "two"
    said = run_two(call("tokenize", *flags, f"--out={out}", "--distributed"))
    # Each had its half: the bars count a process's own images.
    for (_, errors), own in zip(said, (308, 304), strict=True):
        assert f"{own}/{own}" in errors
    assert files_of(out) == files_of(whole[0])


def test_a_finished_job_run_again_says_so_and_changes_nothing(flags, whole):
    out, _ = whole
    before = files_of(out)
    said = tokenize(*flags, f"--out={out}")
    assert "all codes are there already" in said
    assert f"train: {TRAIN} images x 2 views" in said
    assert files_of(out) == before


# Unreadable images, and ten crops of the others

LARGER = (12, 18)


@pytest.fixture(scope="module")
def damaged(top, codec):
    """Flags of a job of 30 images of which one is cut short, and its name."""
    write_images(top / "damaged" / "train", 29, (LARGER,), seed=2)
    write_images(top / "damaged" / "test", 3, seed=3)
    path = top / "damaged" / "train" / "dogs" / "0005.jpg"
    Image.fromarray(random_picture(np.random.default_rng(4), LARGER)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    return (
        f"--tokenizer={top / 'tokenizer.safetensors'}",
        f"--directory={top / 'damaged'}",
        "--image_size=8,12",
        "--crops=ten",
        "--ratios=1.5,1",
        f"--out={top / 'ten'}",
    ), "train/dogs/0005.jpg"


def test_an_unreadable_image_is_named_or_left_out_where_that_is_allowed(top, codec, damaged):
    flags, name = damaged
    said = tokenize(*flags, fails=True)
    assert "1 of the 30 images of split 'train' cannot be read" in said
    assert f"  {name}: " in said
    assert not (top / "ten" / "manifest.json").exists()

    assert "train: 29 images x 20 views, 1 unreadable" in tokenize(*flags, "--max_unreadable=0.1")
    manifest = read_manifest(top / "ten")
    paths = sorted((top / "damaged" / "train").rglob("*.*"))
    bad = [path.name for path in paths].index("0005.jpg")
    [entry] = manifest.splits["train"].unreadable
    assert (entry.image, entry.name) == (bad, name)
    assert entry.reason

    records = read_records(top / "ten", "train")
    good = [i for i in range(30) if i != bad]
    np.testing.assert_array_equal(records["image"], np.repeat(good, 20))
    # At ratio 1.5 the images are as they are; their own corners and the centre, then mirrored.
    views = []
    for i in good:
        pixels = np.asarray(Image.open(paths[i]))
        for side in (pixels, pixels[:, ::-1]):
            for y, x in ((0, 0), (0, 6), (4, 0), (4, 6), (2, 3)):
                views.append(side[y : y + 8, x : x + 12])
    first = records["augmentation"] < 10
    assert_same_codes(records["codes"][first], codec.encode(np.stack(views)))
    # At ratio 1 all five crops are the centre.
    rest = records["codes"][~first].reshape(29, 2, 5, -1)
    np.testing.assert_array_equal(rest, rest[:, :, :1].repeat(5, axis=2))


# Refusals


@pytest.fixture(scope="module")
def places(top, codec):
    """A folder of what is not what a flag asks for, and two tokenizers' fingerprints."""
    (top / "empty").mkdir()
    (top / "generator").mkdir()
    (top / "generator" / "config.json").write_text(config_to_json(tiny_config()))
    (top / "notes.txt").write_text("no folder")
    other = write_tokenizer(top / "other.safetensors", seed=1)
    return {"top": top, "theirs": codec.fingerprint, "ours": other.fingerprint}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--tokenizer={top}/none.safetensors", "tokenizer: there is no file .*none.safetensors"),
        ("--tokenizer={top}/generator", "generator holds a generator's run, not a tokenizer's"),
        ("--directory={top}/none", "data.directory is '.*none', which is no folder"),
        ("--directory={top}/empty", "data.directory is '.*empty', which holds no images"),
        ("--image_size=9,12", r"data.image_size: \(9, 12\) must be positive multiples of 2"),
        ("--image_size=0", r"data.image_size: \(0, 0\) leaves .* set rows and columns"),
        ("--image_size=abc", "image_size: 'abc' must be rows,columns"),
        ("--crops=ten --ratios=x", r"ratios: \['x'\] must be numbers"),
        ("--crops=ten --ratios=0.5", r"ratios is \(0.5,\).* each >= 1"),
        ("--crops=ten --ratios=inf", r"ratios is \(inf,\).* each >= 1"),
        ("--crops=nine", "crops=nine: value should be one of"),
        ("--out={top}/notes.txt", "FileExistsError: .*notes.txt"),
        ("--tokenizer={top}/other.safetensors", 'with tokenizer="{theirs}", .* tokenizer="{ours}"'),
        ("--images_per_shard=9", "with images_per_shard=8, this run has images_per_shard=9"),
        ("--fit=pad", 'with source.fit="crop", this run has source.fit="pad"'),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(places, flags, whole, changes, message):
    out, _ = whole
    before = files_of(out)
    changes = changes.format(**places).split()
    said = tokenize(*flags, f"--out={out}", *changes, fails=True)
    assert re.search(message.format(**places), said), said
    assert files_of(out) == before
