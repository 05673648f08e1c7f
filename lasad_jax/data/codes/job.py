"""What a run of the tokenizer is to write: everything that decides the content of its files."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lasad_jax.data.sources.base import ImageSource
from lasad_jax.files import whole_file

JOB_FILE = "job.json"
FORMAT = 1
MAX_AUGMENTATIONS = 2**16  # a record numbers them in two bytes


class Shard(NamedTuple):
    """A file of a split and the images it is for, [first, last) of the source."""

    split: str
    index: int
    count: int
    first: int
    last: int

    @property
    def file(self) -> str:
        """Name of the file of records."""
        return f"{self.split}-{self.index:05}-of-{self.count:05}.arrayrecord"

    @property
    def report_file(self) -> str:
        """Name of the JSON file that says what the shard holds; it is there once all is."""
        return f"{self.split}-{self.index:05}-of-{self.count:05}.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """Images, their views and the tokenizer that makes codes of them.

    Attributes:
      source: description of the images, any JSON object.
      tokenizer: its fingerprint.
      grid: (R, C), rows and columns of codes; a record has N = R*C of them in raster order.
      vocab_size: codes run from 0 to vocab_size - 1.
      views: for each split the names of its A augmentations, in order.
      images: for each split the number of images of its source, readable or not.
      class_names: of labels 0, 1, ...
      images_per_shard: shard s of a split is for images [s * K, (s + 1) * K) of its source,
        so that the number of processes decides nothing.
      dtype: that the tokenizer computes in.
      format: of the files.

    Raises:
      ValueError: fields out of range or not of the same splits.
    """

    source: dict[str, Any]
    tokenizer: str
    grid: tuple[int, int]
    vocab_size: int
    views: dict[str, tuple[str, ...]]
    images: dict[str, int]
    class_names: tuple[str, ...]
    images_per_shard: int = 8192
    dtype: str = "float32"
    format: int = FORMAT

    def __post_init__(self):
        if self.format != FORMAT:
            raise ValueError(
                f"format: {self.format} of stored codes is not {FORMAT}, the one this version "
                "reads and writes; use the version that wrote them"
            )
        if self.views.keys() != self.images.keys() or not self.images:
            raise ValueError(
                f"views are of the splits {list(self.views)}, images of {list(self.images)}; "
                "name the same splits, at least one"
            )
        for name in ("vocab_size", "images_per_shard"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: {value} must be at least 1")
        if min(self.grid) < 1:
            raise ValueError(f"grid: {self.grid} must be positive")
        for split in self.images:
            if self.images[split] < 1:
                raise ValueError(f"images of split {split!r}: {self.images[split]}; give some")
            if not 1 <= len(self.views[split]) <= MAX_AUGMENTATIONS:
                raise ValueError(
                    f"views of split {split!r}: {len(self.views[split])} must be 1 to "
                    f"{MAX_AUGMENTATIONS}"
                )

    @classmethod
    def of_sources(cls, sources: Mapping[str, ImageSource], **fields) -> "Job":
        """The job for these sources, one for each split; `fields` are all that they do not tell.

        Raises:
          ValueError: sources whose class names differ.
        """
        names = {tuple(source.class_names) for source in sources.values()}
        if len(names) > 1:
            raise ValueError(
                f"the splits {list(sources)} have different class names; a label must mean the "
                "same in each"
            )
        images = {split: len(source) for split, source in sources.items()}
        return cls(images=images, class_names=next(iter(names), ()), **fields)

    @property
    def num_codes(self) -> int:
        """N, codes of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def record_dtype(self) -> np.dtype:
        """Layout of a record, packed and little-endian.

        "image": index in the source; "label": class; "augmentation": index into the split's
        views; "codes": (N,), two bytes each where the vocabulary allows, else four.
        """
        code = "<u2" if self.vocab_size <= 2**16 else "<u4"
        return np.dtype(
            [
                ("image", "<u8"),
                ("label", "<i4"),
                ("augmentation", "<u2"),
                ("codes", code, (self.num_codes,)),
            ]
        )

    def shards(self, split: str | None = None) -> list[Shard]:
        """The files of one split in order, or of all."""
        splits = self.images if split is None else (split,)
        size = self.images_per_shard
        return [
            Shard(split, start // size, -(-images // size), start, min(start + size, images))
            for split in splits
            for images in [self.images[split]]
            for start in range(0, images, size)
        ]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Job":
        """Undoes `to_json`."""
        tuples = {name: tuple(value[name]) for name in ("grid", "class_names")}
        views = {split: tuple(names) for split, names in value["views"].items()}
        return cls(**value | tuples | {"views": views})


def store_job(directory: Path, job: Job, process_index: int = 0) -> None:
    """Writes job.json, or checks that the one in the folder is of the same job.

    Raises:
      ValueError: the folder belongs to another job; names the first field that differs.
    """
    path = directory / JOB_FILE
    if not path.exists():
        # Processes may come here at once, each with its own temporary file; all write the
        # same, and whoever does not is refused below.
        write_json(path, job.to_json(), writer=process_index)
    difference = first_difference(read_json(path), job.to_json())
    if difference:
        field, theirs, ours = difference
        raise ValueError(
            f"{path} was written with {field}={theirs}, this run has {field}={ours}; write to "
            "an empty folder, or run with the same settings"
        )


def first_difference(left: Any, right: Any, name: str = "") -> tuple[str, str, str] | None:
    """The first field, by its dotted name, in which two JSON values differ, and both values."""
    if left == right:
        return None
    if isinstance(left, dict) and isinstance(right, dict):
        for key in right | left:
            inner = f"{name}.{key}" if name else key
            if difference := first_difference(
                left.get(key, "(absent)"), right.get(key, "(absent)"), inner
            ):
                return difference
    return name, _shortened(left), _shortened(right)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def write_json(path: Path, value: Any, writer: int | None = None) -> None:
    """Writes a JSON file that is seen whole or not at all; for `writer` see `whole_file`."""
    with whole_file(path, writer) as file:
        file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: a file that is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:  # bytes that are not UTF-8 too
        raise ValueError(f"{path} is no JSON file ({error}); remove it and run again") from error
