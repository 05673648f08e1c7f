"""All images through a tokenizer into shards; a kill at any moment costs at most one shard."""

import contextlib
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from lasad_jax.data.codes.ahead import map_ahead
from lasad_jax.data.codes.job import JOB_FILE, Job, Shard, store_job
from lasad_jax.data.codes.manifest import (
    MANIFEST_FILE,
    Manifest,
    ShardReport,
    Unreadable,
    read_manifest,
    read_report,
    write_manifest,
)
from lasad_jax.data.codes.shard import Encode, Views, load, write_shard
from lasad_jax.data.sources.base import ImageSource
from lasad_jax.files import temporary

Item = TypeVar("Item")

_LISTED = 20
_SECONDS_BETWEEN_LOOKS = 1.0


def write_codes(
    directory: str | Path,
    job: Job,
    sources: Mapping[str, ImageSource],
    views: Mapping[str, Views],
    encode: Encode,
    *,
    batch_size: int,
    max_unreadable: float = 0.001,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    progress: bool = True,
) -> Manifest | None:
    """Writes the codes of all images, or of those that are still missing.

    Process p of n writes every n-th shard from the p-th; process 0 then waits for the others'
    and writes the manifest. A shard gets its name when it is whole. So after a kill at any
    moment the same call, on any number of processes, goes on with the shards that are missing,
    and all files come out the same to the byte, provided that `encode` gives the same codes
    for the same batch: no batch holds images of two shards.

    Args:
      directory: the same for all processes; made if absent.
      job: what is to be written; best made by `Job.of_sources`.
      sources, views: of each split; `views` gives the augmentations that job.views names. Both
        are called on threads.
      encode: takes batches of one size and may return before it is done.
      batch_size: augmentations per batch; the last one of a shard is filled up with zeros.
      max_unreadable: share of a split's images that may be unreadable: at most
        floor(max_unreadable * images), so none of fewer than 1000 by default. They are left
        out and listed in the manifest. Looked at after each shard, to list more than one.
      process_index, process_count: which shards are this process's. Each index must be running
        once only.
      num_threads: that decode; by default one for each core, up to 32.
      progress: show a bar over this process's images.

    Returns:
      The manifest in process 0, None in the others.

    Raises:
      ValueError: the folder of another job, sizes that do not fit together, a label or code
        out of range, or too many unreadable images.
    """
    _check(job, sources, batch_size, max_unreadable, process_index, process_count)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    store_job(directory, job, process_index)
    shards = job.shards()
    mine = shards[process_index::process_count]
    for shard in mine:
        for file in (shard.file, shard.report_file):
            temporary(directory / file).unlink(missing_ok=True)

    missing = _missing(directory, shards)
    if not missing and (directory / MANIFEST_FILE).is_file():
        print(f"{directory}: all codes are there already")
        return None if process_index else read_manifest(directory)

    todo = [shard for shard in mine if shard in missing]
    num_threads = num_threads or min(32, os.cpu_count() or 1)
    load_one = lambda split, i: load(job, sources[split], views[split], split, i)
    images = ((shard.split, i) for shard in todo for i in range(shard.first, shard.last))
    size = lambda shards: sum(shard.last - shard.first for shard in shards)
    with (
        ThreadPoolExecutor(num_threads) as pool,
        contextlib.closing(map_ahead(pool, load_one, images, depth=4 * num_threads)) as loaded,
        tqdm(
            total=size(mine),
            initial=size(mine) - size(todo),
            unit="image",
            dynamic_ncols=True,
            disable=not progress,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        ) as bar,
    ):
        for shard in todo:
            of_shard = _counted(itertools.islice(loaded, size([shard])), bar)
            accept = functools.partial(_accept, directory, job, shard.split, max_unreadable)
            write_shard(directory, job, shard, of_shard, encode, batch_size, accept)
    if process_index:
        return None

    reports = _wait_for_all(directory, shards)
    for split in job.images:
        _accept(directory, job, split, max_unreadable)
    write_manifest(directory, job, reports)
    # Left by processes that were killed while starting; none is starting any more.
    for stale in directory.glob(f"{JOB_FILE}.*.tmp"):
        stale.unlink(missing_ok=True)
    return read_manifest(directory)


def _check(
    job: Job,
    sources: Mapping[str, ImageSource],
    batch_size: int,
    max_unreadable: float,
    process_index: int,
    process_count: int,
) -> None:
    if (found := {split: len(source) for split, source in sources.items()}) != job.images:
        raise ValueError(f"the job has images={job.images}, but the sources {found}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= max_unreadable <= 1:
        raise ValueError(f"max_unreadable is {max_unreadable}; a share is 0 to 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index} of process_count {process_count}")


def _missing(directory: Path, shards: Iterable[Shard]) -> list[Shard]:
    return [shard for shard in shards if read_report(directory, shard) is None]


def _counted(items: Iterable[Item], bar: tqdm) -> Iterator[Item]:
    for item in items:
        yield item
        bar.update()


def _accept(
    directory: Path,
    job: Job,
    split: str,
    max_unreadable: float,
    new: tuple[Unreadable, ...] = (),
) -> None:
    """Refuses too many unreadable images of a split: those of finished shards, and new ones."""
    reports = (read_report(directory, shard) for shard in job.shards(split))
    bad = [entry for report in reports if report for entry in report.unreadable]
    bad.extend(new)
    # The small number: 0.29 * 100 is a little below 29.
    allowed = math.floor(max_unreadable * job.images[split] + 1e-9)
    if len(bad) > allowed:
        lines = [f"  {entry.name}: {entry.reason}" for entry in bad[:_LISTED]]
        if len(bad) > _LISTED:
            lines.append(f"  and {len(bad) - _LISTED} more")
        raise ValueError(
            f"{len(bad)} of the {job.images[split]} images of split {split!r} cannot be read, "
            f"where max_unreadable={max_unreadable} allows {allowed}; repair them and begin with "
            "an empty folder, or raise max_unreadable and run again:\n" + "\n".join(lines)
        )


def _wait_for_all(directory: Path, shards: list[Shard]) -> dict[Shard, ShardReport]:
    """The reports of all shards, once the other processes have written theirs."""
    waiting_for = 0
    while missing := _missing(directory, shards):
        if len(missing) != waiting_for:
            waiting_for = len(missing)
            print(f"{directory}: waiting for {waiting_for} shards of other processes", flush=True)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return {shard: read_report(directory, shard) for shard in shards}
