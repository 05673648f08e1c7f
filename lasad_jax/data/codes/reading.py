"""Stored codes as examples: any rows of any epochs, read from their shards."""

from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int64, Integer

from lasad_jax.data.codes.manifest import read_manifest
from lasad_jax.data.loader import Batch

# Nothing is read beyond what was asked for, and on the caller's own thread.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class CodeExamples:
    """The images of one split of a folder that `write_codes` finished.

    An example is an image; its augmentation is drawn anew for each epoch, see
    `draw_augmentations`. Shards are opened when first read, in each process by itself: an
    object that was pickled carries no open files.

    Attributes:
      manifest: of the folder.
      split: name of the split.
    """

    def __init__(self, directory: str | Path, split: str):
        """Raises what `read_manifest` does, and a ValueError for a split that has no images."""
        self.manifest = read_manifest(directory)
        self.split = split
        splits = self.manifest.splits
        if split not in splits or not splits[split].images:
            full = [name for name, inner in splits.items() if inner.images]
            raise ValueError(
                f"data.directory is {str(directory)!r}, which has no images of split {split!r}, "
                f"only of {full}; run lasad_jax.tokenize with that split into an empty folder"
            )
        self._paths = [str(Path(directory) / shard.file) for shard in splits[split].shards]
        self._ends = np.cumsum([shard.images for shard in splits[split].shards])
        self._dtype = self.manifest.job.record_dtype
        self._readers: dict[int, ArrayRecordReader] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_augmentations(self) -> int:
        """A, records of each image."""
        return self.manifest.splits[self.split].augmentations

    def batch(
        self,
        rows: Integer[np.ndarray, " b"],
        epochs: Integer[np.ndarray, " b"] | None = None,
        seed: int = 0,
    ) -> Batch:
        """See `lasad_jax.data.loader.Examples`; without epochs, each image's first augmentation."""
        rows = np.asarray(rows, np.int64)
        if epochs is None:
            augmentations = np.zeros(len(rows), np.int64)
        else:
            augmentations = draw_augmentations(rows, epochs, seed, self.num_augmentations)
        shards = np.searchsorted(self._ends, rows, side="right")
        starts = np.append(0, self._ends[:-1])
        places = (rows - starts[shards]) * self.num_augmentations + augmentations
        # Record by record: `read` of a list of indices starts threads, which costs several times
        # as much for the few records that a batch has in one shard.
        content = [
            self._reader(shard).read(place, place + 1)[0]
            for shard, place in zip(shards.tolist(), places.tolist(), strict=True)
        ]
        records = np.frombuffer(b"".join(content), self._dtype)
        return {
            "tokens": records["codes"].astype(np.int32),
            "labels": records["label"].astype(np.int32),
        }

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            self._readers[shard] = ArrayRecordReader(self._paths[shard], _READER_OPTIONS)
        return self._readers[shard]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_readers": {}}


def draw_augmentations(
    rows: Integer[np.ndarray, " b"],
    epochs: Integer[np.ndarray, " b"],
    seed: int,
    num_augmentations: int,
) -> Int64[np.ndarray, " b"]:
    """An augmentation for each row in each epoch, from 0 to num_augmentations - 1.

    A pure function of (seed, epoch, row): seed, epoch and row go one after another through
    the finaliser of SplitMix64 (Steele, Lea, Flood 2014), and the upper 32 bits of the hash
    h give floor(h * num_augmentations / 2^32). Uniform but for a bias below
    num_augmentations / 2^32.

    Args:
      seed: from 0 to 2^64 - 1.
    """
    hashed = _mix(np.array([seed], np.uint64))
    hashed = _mix(hashed ^ np.asarray(epochs).astype(np.uint64))
    hashed = _mix(hashed ^ np.asarray(rows).astype(np.uint64))
    scaled = (hashed >> np.uint64(32)) * np.uint64(num_augmentations)
    return (scaled >> np.uint64(32)).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step: a bijection of 64-bit words in which every bit depends on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
