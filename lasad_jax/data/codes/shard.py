"""One shard: its images decoded, put in batches, encoded and written."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Integer, UInt8

from lasad_jax.data.codes.job import Job, Shard, write_json
from lasad_jax.data.codes.manifest import ShardReport, Unreadable
from lasad_jax.data.sources.base import ImageSource, UnreadableImage
from lasad_jax.files import whole_file

Views = Callable[[UInt8[np.ndarray, "H W channels"]], UInt8[np.ndarray, "A h w channels"]]
Encode = Callable[[UInt8[np.ndarray, "batch h w channels"]], Integer[jax.Array, "batch N"]]

# Records are read one at a time in any order, so each is a group of its own. Codes hardly
# compress, and unpacking them would cost a third of the reading rate.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# Batches that the device has at once: one to work on while the next one is on its way.
_IN_FLIGHT = 2


class Loaded(NamedTuple):
    """An image ready to be encoded.

    Attributes:
      image: index in the source.
      label: class.
      views: its A augmentations.
    """

    image: int
    label: int
    views: UInt8[np.ndarray, "A h w channels"]


def load(
    job: Job, source: ImageSource, views: Views, split: str, index: int
) -> Loaded | Unreadable:
    """Decodes and augments one image.

    Raises:
      ValueError: a label out of range, or views that are not bytes or not those of the job.
    """
    try:
        image, label = source[index]
    except UnreadableImage as error:
        return Unreadable(index, error.name, error.reason)
    if not 0 <= label < len(job.class_names):
        raise ValueError(
            f"{source.name(index)} of split {split!r} has label {label}, but the "
            f"{len(job.class_names)} classes have labels 0 to {len(job.class_names) - 1}; "
            "correct the label"
        )
    pixels = views(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(job.views[split]):
        raise ValueError(
            f"views of {source.name(index)} are {pixels.dtype} of shape {pixels.shape}; they "
            f"must be uint8 of shape ({len(job.views[split])}, h, w, channels), as split "
            f"{split!r} names {len(job.views[split])} views"
        )
    return Loaded(index, int(label), pixels)


def write_shard(
    directory: Path,
    job: Job,
    shard: Shard,
    images: Iterable[Loaded | Unreadable],
    encode: Encode,
    batch_size: int,
    accept: Callable[[tuple[Unreadable, ...]], None],
) -> None:
    """Encodes the images of a shard and writes it and its report, both whole or not at all.

    Args:
      accept: is shown the images that were left out, and raises where they are too many.

    Raises:
      ValueError: codes of another shape or range than the job says, images of different sizes.
      OSError: a file that could not be written.
    """
    path = directory / shard.file
    labels, unreadable = [], []

    def rows() -> Iterator[tuple[int, int, int, np.ndarray]]:
        for image in images:
            if isinstance(image, Unreadable):
                unreadable.append(image)
                continue
            labels.append(image.label)
            for augmentation, pixels in enumerate(image.views):
                yield image.image, image.label, augmentation, pixels

    num_records = 0
    with (
        whole_file(path) as file,
        contextlib.closing(ArrayRecordWriter(str(file), _WRITER_OPTIONS)) as writer,
    ):
        for records in _encoded(job, rows(), encode, batch_size):
            content, size = records.tobytes(), job.record_dtype.itemsize
            for start in range(0, len(content), size):
                writer.write(content[start : start + size])
            num_records += len(records)
        writer.close()
        accept(tuple(unreadable))
        _check_written(file, num_records)
        report = ShardReport(
            images=len(labels),
            records=num_records,
            bytes=file.stat().st_size,
            class_counts=tuple(np.bincount(labels, minlength=len(job.class_names)).tolist()),
            unreadable=tuple(unreadable),
        )
    # Last: a shard without its report counts as missing.
    write_json(directory / shard.report_file, dataclasses.asdict(report))


def _encoded(
    job: Job, rows: Iterator[tuple[int, int, int, np.ndarray]], encode: Encode, batch_size: int
) -> Iterator[np.ndarray]:
    """Records of one batch after another; the device works while the host prepares the next."""
    in_flight = collections.deque()
    while batch := list(itertools.islice(rows, batch_size)):
        images, labels, augmentations, views = zip(*batch, strict=True)
        if len(shapes := {view.shape for view in views}) > 1:
            raise ValueError(
                f"images {min(images)} to {max(images)} of the source have views of different "
                f"sizes, {sorted(shapes)}; set data.image_size"
            )
        # New memory each time: an asynchronous `encode` may still be reading the last one's.
        pixels = np.zeros((batch_size, *views[0].shape), np.uint8)
        np.stack(views, out=pixels[: len(views)])
        records = np.zeros(len(batch), job.record_dtype)
        records["image"], records["label"] = images, labels
        records["augmentation"] = augmentations
        in_flight.append((records, encode(pixels)))
        if len(in_flight) > _IN_FLIGHT:
            yield _filled(job, batch_size, *in_flight.popleft())
    while in_flight:
        yield _filled(job, batch_size, *in_flight.popleft())


def _filled(job: Job, batch_size: int, records: np.ndarray, codes: jax.Array) -> np.ndarray:
    """The records with their codes, once these are there."""
    codes = np.asarray(codes)
    if codes.shape != (batch_size, job.num_codes):
        raise ValueError(
            f"the tokenizer gives codes of shape {codes.shape} for grid={job.grid}, which takes "
            f"({batch_size}, {job.num_codes}); give the grid that fits the images"
        )
    codes = codes[: len(records)]
    if not 0 <= codes.min() <= codes.max() < job.vocab_size:
        raise ValueError(
            f"the tokenizer gives codes from {codes.min()} to {codes.max()} for "
            f"vocab_size={job.vocab_size}; give its codebook's size"
        )
    records["codes"] = codes
    return records


def _check_written(path: Path, num_records: int) -> None:
    """The writer itself says nothing of a full disk."""
    found = None
    with contextlib.suppress(RuntimeError, OSError, ValueError):
        reader = ArrayRecordReader(str(path))
        found = reader.num_records() if reader.ok() else None
        reader.close()
    if found != num_records:
        raise OSError(
            f"{path} has {found} of {num_records} records after writing; is the disk full? Free "
            "some and run the same command again"
        )
