"""Image sources on files written here: folders, lists of labels, tensorflow-datasets."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lasad_jax.config import DataConfig
from lasad_jax.data import UnreadableImage, load_images, open_source
from lasad_jax.data.sources.listing import Listing, hold_out


def picture(value: int, size: tuple[int, int] = (5, 4)) -> Image.Image:
    """A plain colour that tells which image it is; size is (rows, columns)."""
    return Image.new("RGB", size[::-1], (value, 255 - value, 7))


def write(path, value: int = 0, size: tuple[int, int] = (5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(value, size).save(path)


def folder(directory, **fields) -> DataConfig:
    return DataConfig(source="folder", directory=str(directory), **fields)


def both(data: DataConfig, channels: int = 3):
    return open_source(data, "train", channels=channels), open_source(
        data, "test", channels=channels
    )


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def examples(source) -> list:
    return [source[i] for i in range(len(source))]


def values(source) -> list[int]:
    return [example.image[0, 0, 0] for example in examples(source)]


# Folders


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


# Lists of labels


def listed(tmp_path, text: str) -> DataConfig:
    for value, name in enumerate(("a", "b", "c", "d")):
        write(tmp_path / "images" / f"{name}.png", value)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    return folder(tmp_path / "images", labels=str(tmp_path / "list.csv"))


def test_a_list_gives_numbers_or_names(tmp_path):
    text = "\ufefflabel, path\n2,c.png\n0,a.png\n1,./b.png\n"
    train, test = both(listed(tmp_path, text))
    assert train.class_names == ("0", "1", "2") and len(train) + len(test) == 3
    found = {
        source.name(i): source[i].label for source in (train, test) for i in range(len(source))
    }
    assert found == {"a.png": 0, "b.png": 1, "c.png": 2}
    text = 'path,label,note\na.png,"salt, pepper",x\nb.png,10th,y\n\nc.png,10th,z\n'
    train, test = both(listed(tmp_path, text))
    assert train.class_names == ("10th", "salt, pepper")
    found = {
        source.name(i): source[i].label for source in (train, test) for i in range(len(source))
    }
    assert found == {"a.png": 1, "b.png": 0, "c.png": 0}


def test_a_list_gives_the_splits(tmp_path):
    text = "path,label,split\na.png,x,train\nb.png,y,{}\nc.png,x,Train\nd.png,y,val\n"
    train, test = both(listed(tmp_path, text.format("test")))
    assert (names(train), names(test)) == (["a.png", "c.png"], ["b.png"])
    assert [example.label for example in examples(test)] == [1]
    assert names(both(listed(tmp_path, text.format("validation")))[1]) == ["b.png"]
    assert names(both(listed(tmp_path, text.format("val")))[1]) == ["b.png", "d.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,0\nb.png,-1\n", "line 3: label -1 is outside 0 to 1"),
        ("path,label\na.png,0\nb.png,1\nc.png,10\n", "line 4: label 10 is outside 0 to 2.*gaps"),
        ("path,label\na.png,0\nb.png,cat\n", "line 3: label 'cat' is no whole number, unlike '0'"),
        ("path,label\na.png,cat\nb.png,1\n", "line 3: label '1' is a whole number, unlike"),
        ("path,label\na.png,0\nb.png,\n", "line 3: label is empty"),
        ("path,label\na.png,0\nb.png\n", "line 3: 1 values for 2 columns"),
        ("path,label\na.png,0\n./a.png,0\n", r"line 3: path './a\.png' is on line 2 already"),
        ("path,class\na.png,0\n", "columns path, class but no column label"),
        ("file,class\na.png,0\n", "no column path and no label"),
        ("", "no column path"),
        ("path,label\n", "lists no images"),
        ("path,label,split\na.png,0,train\nb.png,0,dev\n", "line 3: split 'dev' is not one of"),
        ("path,label,split\na.png,0,train\nb.png,0,train\n", "no line with test"),
        ("path,label,split\na.png,0,test\nb.png,0,val\n", "no line with train"),
        ("path,label\na.png,0\n", "a single image is used"),
    ],
)
def test_lists_that_do_not_hold_together_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        both(listed(tmp_path, text))
    assert "data.labels" in str(caught.value) or "data.directory" in str(caught.value)


def test_missing_files_of_a_list_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"line 3: path 'x\.png' is not in.*2 of 3 paths"):
        both(listed(tmp_path, "path,label\na.png,0\nx.png,0\ny.png,0\n"))
    with pytest.raises(FileNotFoundError, match=r"data\.labels: .*gone\.csv is no file"):
        both(folder(tmp_path, labels=str(tmp_path / "gone.csv")))
    data = listed(tmp_path, "path,label\n")
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xff\xfe,0\n")
    with pytest.raises(ValueError, match="is not CSV in UTF-8"):
        both(data)


# tensorflow-datasets


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """A set prepared as its users prepare theirs, from `content`: {split: [(file, label)]}."""

    VERSION = tfds.core.Version("1.0.0")
    content: dict = {}  # noqa: RUF012

    def _info(self):
        label = tfds.features.ClassLabel(names=["circle", "square"])
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {name: self._generate_examples(files) for name, files in self.content.items()}

    def _generate_examples(self, files):
        for i, (file, label) in enumerate(files):
            yield i, {"image": io.BytesIO(file), "label": label}


def prepare(directory, content, file_format="array_record") -> DataConfig:
    TinyShapes.content = content
    builder = TinyShapes(data_dir=directory, file_format=file_format)
    builder.download_and_prepare()
    return DataConfig(source="tfds", name="tiny_shapes", directory=str(directory))


def files(count: int, start: int = 0) -> list[tuple[bytes, int]]:
    encoded = []
    for value in range(start, start + count):
        buffer = io.BytesIO()
        picture(value, (value % 7 + 1, 4)).save(buffer, "PNG")
        encoded.append((buffer.getvalue(), value % 2))
    return encoded


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_a_prepared_set_is_read(tmp_path, held_out):
    train, test = both(prepare(tmp_path, {"train": files(9), held_out: files(3, 100)}))
    assert train.class_names == test.class_names == ("circle", "square")
    assert sorted(values(train)) == [*range(9)] and sorted(values(test)) == [100, 101, 102]
    for image, label in examples(train):
        value = image[0, 0, 0]
        assert label == value % 2 and image.shape == (value % 7 + 1, 4, 3)
    assert names(test)[1] == f"{held_out}[1]"


def test_a_set_without_a_labelled_test_split_uses_validation(tmp_path):
    unlabelled = [(file, -1) for file, _ in files(3, 50)]
    content = {"train": files(5), "test": unlabelled, "validation": files(2, 100)}
    _, test = both(prepare(tmp_path, content))
    assert sorted(values(test)) == [100, 101]


@pytest.mark.parametrize(("count", "held_out"), [(40, 2), (7, 1), (2, 1)])
def test_the_last_of_train_are_held_out_of_a_set_without_splits(tmp_path, count, held_out):
    train, test = both(prepare(tmp_path, {"train": files(count)}))
    assert (len(train), len(test)) == (count - held_out, held_out)
    assert sorted(values(train) + values(test)) == [*range(count)]
    assert names(train)[0] == "train[0]" and names(test)[-1] == f"train[{count - 1}]"


def test_a_broken_image_of_a_set_is_named_and_labels_are_checked(tmp_path):
    broken = files(1)[0][0][:45]
    data = prepare(tmp_path, {"train": [(broken, 0)] * 3 + [(files(1)[0][0], -1)] * 2})
    train, test = both(data)
    failures = []
    for source in (train, test):
        for i in range(len(source)):
            with pytest.raises(ValueError, match=r"train\[\d\]") as caught:
                source[i]
            failures.append(type(caught.value))
    assert failures.count(UnreadableImage) == 3 and failures.count(ValueError) == 2


def test_sets_that_are_missing_are_explained(tmp_path):
    config = lambda name: DataConfig(source="tfds", name=name, directory=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.name is empty"):
        both(config(""))
    with pytest.raises(ValueError, match=r"data\.name is 'no_such_set', which .* does not know"):
        both(config("no_such_set"))
    with pytest.raises(
        FileNotFoundError, match=r"'mnist', which is not prepared.*tfds build mnist"
    ):
        both(config("mnist"))
    with pytest.raises(ValueError, match=r"'wider_face', whose features are .* set is needed"):
        both(config("wider_face"))
    with pytest.raises(ValueError, match="holds a single image"):
        both(prepare(tmp_path / "one", {"train": files(1)}))
    with pytest.raises(ValueError, match="whose splits are test; train is needed"):
        both(prepare(tmp_path / "two", {"test": files(2)}))


@pytest.mark.parametrize(("name", "classes"), [("imagenet2012", 1000), ("mnist", 10)])
@pytest.mark.parametrize("channels", [1, 3])
def test_mocked_sets_are_read(name, classes, channels):
    with tfds.testing.mock_data(num_examples=4):
        for source in both(DataConfig(source="tfds", name=name), channels):
            assert len(source) == 4 and len(source.class_names) == classes
            for i in range(4):
                image, label = source[i]
                assert image.ndim == 3 and image.shape[-1] == channels and image.dtype == np.uint8
                assert 0 <= label < classes


def test_only_the_source_that_needs_it_imports_tensorflow_datasets():
    code = (
        "import sys\nfrom lasad_jax.config import DataConfig\n"
        "from lasad_jax.data import load_images\n"
        "load_images(DataConfig(), 'test'); assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Whole sources in memory


def test_a_folder_is_loaded_at_its_size(tmp_path):
    for value in range(30):
        write(tmp_path / f"class{value % 2}" / f"{value}.png", value, (8 + value, 20))
    data = folder(tmp_path, image_size=(6, 7))
    train, test = (
        load_images(data, split, channels=3, progress=True) for split in ("train", "test")
    )
    assert len(train.labels) + len(test.labels) == 30 and train.num_classes == 2
    for images in (train, test):
        assert images.images.shape[1:] == (6, 7, 3) and images.images.dtype == np.uint8
        assert images.labels.dtype == np.int32 and images.class_names == ("class0", "class1")
        np.testing.assert_array_equal(images.images[:, 0, 0, 0] % 2, images.labels)
    assert load_images(data, "test", size=(3, 3)).images.shape[1:] == (3, 3, 1)
    with pytest.raises(
        ValueError, match=r"data\.image_size is \(0, 0\), but class\d/.* is \d+ x 20"
    ):
        load_images(folder(tmp_path), "train")


def test_unreadable_images_are_left_out_up_to_a_share(tmp_path, monkeypatch):
    for value in range(50):
        write(tmp_path / "train" / f"{value:02d}.png", value)
    write(tmp_path / "test" / "1.png")
    (tmp_path / "train" / "07.png").write_bytes(b"broken")
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    got = load_images(folder(tmp_path), "train", channels=3, max_unreadable=0.02)
    assert got.images[:, 0, 0, 0].tolist() == [value for value in range(50) if value != 7]
    assert len(got.labels) == 49 and len(warnings) == 1
    assert "1 of 50 images are unreadable" in warnings[0]
    assert "train/07.png: not an image" in warnings[0]
    for value in range(20, 45):
        (tmp_path / "train" / f"{value}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"26 of 50 images are unreadable, more") as caught:
        load_images(folder(tmp_path), "train", max_unreadable=0.5)
    assert str(caught.value).count("not an image") == 20 and "and 6 more" in str(caught.value)
    assert "train/07.png" in str(caught.value) and len(warnings) == 1
    (tmp_path / "test" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no readable images in split 'test'"):
        load_images(folder(tmp_path), "test", max_unreadable=1)


def test_one_unreadable_image_of_few_is_too_many_by_default(tmp_path):
    for value in range(50):
        write(tmp_path / f"{value:02d}.png", value)
    (tmp_path / "07.png").write_bytes(b"")
    (tmp_path / "08.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unreadable, more than the share of 0\.001"):
        load_images(folder(tmp_path), "train")
