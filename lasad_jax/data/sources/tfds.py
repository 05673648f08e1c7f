"""Classification sets of tensorflow-datasets, read without TensorFlow."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lasad_jax.config.sections import DataConfig
from lasad_jax.data.decode import convert_image, decode_image
from lasad_jax.data.sources.base import Example

_TRAIN_PERCENT = 95  # where a set has no split to hold out


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Records of a prepared set, decoded when they are asked for.

    Attributes:
      records: dicts with "image", encoded or an array, and "label".
      class_names: of the labels' values.
      split: the set's split that the records are of.
      start: index of the first one in it.
      channels, background: as for `decode_image`.
    """

    records: Sequence[dict[str, Any]]
    class_names: tuple[str, ...]
    split: str
    start: int
    channels: int
    background: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        image, label = record["image"], int(record["label"])
        if not 0 <= label < len(self.class_names):
            raise ValueError(
                f"{self.name(index)} has label {label}, outside 0 to "
                f"{len(self.class_names) - 1}, the range of the set's classes; prepare it again"
            )
        how = {"channels": self.channels, "background": self.background}
        if isinstance(image, bytes):
            return Example(decode_image(image, name=self.name(index), **how), label)
        return Example(convert_image(image, **how), label)

    def name(self, index: int) -> str:
        return f"{self.split}[{self.start + index}]"


def open_tfds(data: DataConfig, split: str, *, channels: int) -> TfdsSource:
    """The set `data.name`, prepared in `data.directory` ("" for the default place).

    "test" is the set's split test, if its labels are public, else validation, else the last
    5 % of train, which "train" then ends before.

    Raises:
      FileNotFoundError: a set not prepared there in a format with random access.
      ValueError: no name, an unknown one, a set without images and classes, or too small.
    """
    if not data.name:
        raise ValueError('data.name is empty, but data.source="tfds" needs one, such as "cifar10"')
    # Imported here: it is slow, and only this source needs it.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(data.name, data_dir=data.directory or None)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"data.name is {data.name!r}, which tensorflow-datasets does not know and "
            f"data.directory={data.directory!r} does not hold"
        ) from error
    features = builder.info.features
    names = getattr(features["label"], "names", None) if "label" in features else None
    if "image" not in features or names is None:
        raise ValueError(
            f"data.name is {data.name!r}, whose features are {', '.join(features)}; an image "
            "classification set is needed, with image and label"
        )
    part, start, stop = _part(builder, split)
    chosen = part if stop is None else f"{part}[{start}:{stop}]"
    return TfdsSource(
        _records(builder, chosen), tuple(names), part, start, channels, data.background
    )


def _part(builder: Any, split: str) -> tuple[str, int, int | None]:
    """The set's split that plays the part of `split`, and the range of it (stop None: all)."""
    sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
    if not sizes:  # not prepared, which reading it will say
        return split, 0, None
    if not sizes.get("train"):
        raise ValueError(
            f"data.name is {builder.name!r}, whose splits are {', '.join(sizes)}; train is needed"
        )
    for name in ("test", "validation"):
        if sizes.get(name) and int(_records(builder, name)[0]["label"]) >= 0:
            return (name if split == "test" else "train"), 0, None
    size = sizes["train"]
    if size < 2:
        raise ValueError(
            f"data.name is {builder.name!r}, which holds a single image, so that none can be "
            "held out"
        )
    cut = min(size - 1, max(1, size * _TRAIN_PERCENT // 100))
    return ("train", 0, cut) if split == "train" else ("train", cut, size)


def _records(builder: Any, split: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        records = builder.as_data_source(split=split)
    except (KeyError, NotImplementedError) as error:
        raise FileNotFoundError(
            f"data.name is {builder.name!r}, which is not prepared with random access in "
            f'{str(builder.data_path)!r}; run tfds.builder("{builder.name}", data_dir=..., '
            'file_format="array_record").download_and_prepare() in Python, or '
            f"tfds build {builder.name} --file_format=array_record --data_dir=..."
        ) from error
    # Set on the records and not asked of the builder, whose stand-in for tests would then
    # encode its images, with TensorFlow.
    records.decoders = {"image": tfds.decode.SkipDecoding()}
    return records
