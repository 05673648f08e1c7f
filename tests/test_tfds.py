"""Sets of tensorflow-datasets, prepared here without TensorFlow, and its mocked ones."""

import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from source_cases import both, examples, names, picture, values

from lasad_jax.config import DataConfig
from lasad_jax.data import UnreadableImage


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
