"""What a finished folder of codes holds, from the reports of its shards."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lasad_jax.data.codes.job import JOB_FILE, Job, Shard, read_json, write_json

MANIFEST_FILE = "manifest.json"
_RUN_AGAIN = "run the same lasad_jax.tokenize command again"


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that was left out.

    Attributes:
      image: index in the source.
      name, reason: of the image, and why it could not be decoded.
    """

    image: int
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What one shard holds; stored beside it.

    Attributes:
      images: that were readable.
      records: images times augmentations.
      bytes: size of the file.
      class_counts: images of each class.
      unreadable: images that were left out.
    """

    images: int
    records: int
    bytes: int
    class_counts: tuple[int, ...]
    unreadable: tuple[Unreadable, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ShardReport":
        """From what `dataclasses.asdict` gave."""
        lists = {
            "class_counts": tuple(value["class_counts"]),
            "unreadable": tuple(Unreadable(**entry) for entry in value["unreadable"]),
        }
        return cls(**value | lists)


@dataclasses.dataclass(frozen=True)
class StoredShard:
    """One file.

    Attributes:
      file: its name.
      images, records, bytes: how many it has.
    """

    file: str
    images: int
    records: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class SplitManifest:
    """What one split holds.

    Attributes:
      images: that were readable.
      augmentations: A, records of each image, adjacent in its shard.
      class_counts: images of each class.
      shards: its files in order.
      unreadable: images that were left out.
    """

    images: int
    augmentations: int
    class_counts: tuple[int, ...]
    shards: tuple[StoredShard, ...]
    unreadable: tuple[Unreadable, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished folder holds.

    Attributes:
      job: what was to be written.
      splits: what was, for each split.
    """

    job: Job
    splits: dict[str, SplitManifest]


def read_manifest(directory: str | Path) -> Manifest:
    """Reads the manifest of a finished folder and looks that every shard is there, whole.

    Raises:
      FileNotFoundError: no such folder, no codes in it, an unfinished job, or no such shard.
      ValueError: a shard of another size than was written, or a broken manifest.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"data.directory is {str(directory)!r}, which is no folder; name one written by "
            "lasad_jax.tokenize"
        )
    path = directory / MANIFEST_FILE
    if not path.is_file():
        if (directory / JOB_FILE).is_file():
            raise FileNotFoundError(
                f"data.directory is {str(directory)!r}, whose job is not finished (it has no "
                f"{MANIFEST_FILE}); {_RUN_AGAIN}"
            )
        raise FileNotFoundError(
            f"data.directory is {str(directory)!r}, which has no {MANIFEST_FILE}; name a folder "
            "written by lasad_jax.tokenize"
        )
    value = read_json(path)
    try:
        manifest = Manifest(
            Job.from_json(value["job"]),
            {split: _split_from_json(inner) for split, inner in value["splits"].items()},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no manifest of stored codes ({error!r}); remove it and {_RUN_AGAIN}"
        ) from error
    for split in manifest.splits.values():
        for shard in split.shards:
            _check_size(directory / shard.file, shard.bytes)
    return manifest


def write_manifest(directory: Path, job: Job, reports: dict[Shard, ShardReport]) -> None:
    """Writes the manifest, the last file of a job, from the reports of all shards."""
    splits = {}
    for split, views in job.views.items():
        of_split = {shard: reports[shard] for shard in job.shards(split)}
        splits[split] = SplitManifest(
            images=sum(report.images for report in of_split.values()),
            augmentations=len(views),
            class_counts=tuple(
                np.sum([report.class_counts for report in of_split.values()], axis=0).tolist()
            ),
            shards=tuple(
                StoredShard(shard.file, report.images, report.records, report.bytes)
                for shard, report in of_split.items()
            ),
            unreadable=tuple(bad for report in of_split.values() for bad in report.unreadable),
        )
    value = {
        "job": job.to_json(),
        # For readers in other languages; this one knows it from the job.
        "record_dtype": job.record_dtype.descr,
        "splits": {split: dataclasses.asdict(inner) for split, inner in splits.items()},
    }
    write_json(directory / MANIFEST_FILE, value)


def read_report(directory: Path, shard: Shard) -> ShardReport | None:
    """What the shard holds, or None where it is not there, whole."""
    try:
        report = ShardReport.from_json(read_json(directory / shard.report_file))
        _check_size(directory / shard.file, report.bytes)
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return report


def _split_from_json(value: dict[str, Any]) -> SplitManifest:
    return SplitManifest(
        images=value["images"],
        augmentations=value["augmentations"],
        class_counts=tuple(value["class_counts"]),
        shards=tuple(StoredShard(**entry) for entry in value["shards"]),
        unreadable=tuple(Unreadable(**entry) for entry in value["unreadable"]),
    )


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}, a shard of stored codes, is missing; {_RUN_AGAIN}")
    if (found := path.stat().st_size) != size:
        raise ValueError(
            f"{path}, a shard of stored codes, has {found} bytes where {size} were written; "
            f"{_RUN_AGAIN}"
        )
