"""Image files in folders written here, and the split made where there is none."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from source_cases import both, examples, folder, names, values, write

from lasad_jax.data import UnreadableImage
from lasad_jax.data.sources.listing import Listing, hold_out


def test_each_sub_folder_is_a_class_however_deep(tmp_path):
    paths = ["b/1.png", "b/deep/er/2.PNG", "a/3.bmp", "a/4.webp", "c d/5.tif", "c d/6.gif"]
    for value, path in enumerate(paths):
        write(tmp_path / path, value * 10, (value + 1, 3))
    for other in ("a/notes.txt", "empty/readme.md", ".hidden/7.png", "a/._8.png", "b/.x/9.png"):
        write(tmp_path / "x.png")
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / other)
    train, test = both(folder(tmp_path))
    assert train.class_names == test.class_names == ("a", "b", "c d")
    assert sorted(names(train) + names(test)) == sorted(paths)
    for source in (train, test):
        assert names(source) == sorted(names(source)) and len(source)
        for i in range(len(source)):
            image, label = source[i]
            assert source.class_names[label] == source.name(i).split("/")[0]
            value = paths.index(source.name(i))
            assert image.shape == (value + 1, 3, 3) and image.dtype == np.uint8
            assert abs(int(image[0, 0, 0]) - value * 10) <= 2  # WebP loses a little


def test_one_class_is_enough_with_or_without_a_sub_folder(tmp_path):
    for value in range(3):
        write(tmp_path / "flat" / f"{value}.png", value)
        write(tmp_path / "nested" / "only" / f"{value}.png", value)
    for name, classes in (("flat", ("flat",)), ("nested", ("only",))):
        train, test = both(folder(tmp_path / name))
        assert (len(train), len(test)) == (2, 1)
        assert train.class_names == test.class_names == classes
        assert {example.label for source in (train, test) for example in examples(source)} == {0}


def test_grey_is_asked_for_by_channels(tmp_path):
    for value in range(2):
        write(tmp_path / f"{value}.png", 100)
    train, _ = both(folder(tmp_path), channels=1)
    assert train[0].image.shape == (5, 4, 1)
    assert (train[0].image == round(0.299 * 100 + 0.587 * 155 + 0.114 * 7)).all()
    Image.new("LA", (3, 2), (0, 0)).save(tmp_path / "0.png")
    Image.new("LA", (3, 2), (0, 0)).save(tmp_path / "1.png")
    for background in (0, 99):
        assert (both(folder(tmp_path, background=background))[0][0].image == background).all()


def test_one_file_in_twenty_is_held_out_and_always_the_same(tmp_path):
    for i in range(300):
        (tmp_path / f"class{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"class{i % 3}" / f"{i}.png").touch()
    train, test = both(folder(tmp_path))
    assert len(train) + len(test) == 300 and 5 <= len(test) <= 30
    assert not set(names(train)) & set(names(test))
    # A new file moves no other, and neither does another place of the directory.
    (tmp_path / "class0" / "new.png").touch()
    tmp_path.rename(tmp_path.with_name("moved"))
    again = both(folder(tmp_path.with_name("moved")))
    assert set(names(train)) <= set(names(again[0])) and set(names(test)) <= set(names(again[1]))


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text("abc", min_size=1), min_size=2, max_size=60))
def test_neither_split_is_ever_empty(tmp_path_factory, stems):
    paths = tuple(sorted(stems))
    listing = Listing(paths, (0,) * len(paths), ("x",), None)
    splits = hold_out(listing, tmp_path_factory.getbasetemp()).splits
    assert set(splits) == {"train", "test"}


def test_links_are_followed_and_never_put_an_image_on_both_sides(tmp_path):
    for i in range(60):
        write(tmp_path / "data" / "a" / f"{i}.png", i)
        (tmp_path / "data" / "b").mkdir(exist_ok=True)
        os.symlink(f"../a/{i}.png", tmp_path / "data" / "b" / f"other{i}.png")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "0.png", 200)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "c")  # a class that is a link
    os.symlink("../../elsewhere/0.png", tmp_path / "data" / "a" / "z.png")
    train, test = both(folder(tmp_path / "data"))
    assert train.class_names == ("a", "b", "c") and len(train) + len(test) == 122
    assert not set(values(train)) & set(values(test))
    assert sorted(values(train) + values(test)) == sorted([*range(60), *range(60), 200, 200])


@pytest.mark.parametrize("held_out", ["test", "validation", "val"])
@pytest.mark.parametrize("classes", [("a", "b"), ("",)])
def test_sub_folders_train_and_test_are_the_splits(tmp_path, held_out, classes):
    for value, name in enumerate(classes):
        write(tmp_path / "train" / name / "1.png", value)
    write(tmp_path / held_out / classes[-1] / "1.png", 77)
    train, test = both(folder(tmp_path))
    assert values(train) == [*range(len(classes))] and values(test) == [77]
    assert [example.label for example in examples(test)] == [len(classes) - 1]
    assert train.class_names == test.class_names == (classes if classes[0] else (tmp_path.name,))


def test_a_test_folder_without_classes_leaves_validation_to_hold_out(tmp_path):
    for value, path in enumerate(("train/a/1.png", "test/1.png", "val/a/1.png")):
        write(tmp_path / path, value)
    train, test = both(folder(tmp_path))
    assert (names(train), names(test)) == (["train/a/1.png"], ["val/a/1.png"])
    (tmp_path / "val/a/1.png").unlink()
    with pytest.raises(ValueError, match="train and test or val must both hold images"):
        both(folder(tmp_path))


def test_classes_of_test_alone_are_refused(tmp_path):
    for path in ("train/a/1.png", "test/a/1.png", "test/b/1.png"):
        write(tmp_path / path)
    with pytest.raises(ValueError, match="test has the class 'b' but train has not"):
        both(folder(tmp_path))


def test_folders_without_enough_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.directory is empty"):
        both(folder(""))
    with pytest.raises(FileNotFoundError, match=r"data\.directory is '.*nowhere', which is no"):
        both(folder(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"data\.directory.*holds no images; known are \.png"):
        both(folder(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").touch()
    with pytest.raises(ValueError, match="holds no images"):
        both(folder(tmp_path))
    write(tmp_path / "a" / "1.png")
    os.symlink("1.png", tmp_path / "a" / "2.png")
    with pytest.raises(ValueError, match="a single image is used, so that none can be held out"):
        both(folder(tmp_path))
    write(tmp_path / "3.png")
    with pytest.raises(ValueError, match=r"both images, such as '3\.png', and sub-folders.*'a'"):
        both(folder(tmp_path))


def test_an_unreadable_file_is_named(tmp_path):
    for value in range(3):
        path = tmp_path / "a" / f"{value}.jpg"
        write(path, value, (64, 64))
        path.write_bytes(path.read_bytes()[:-20])
    train, _ = both(folder(tmp_path))
    with pytest.raises(UnreadableImage, match=r"a/\d\.jpg: .*truncated") as caught:
        train[1]
    assert caught.value.name == train.name(1)
