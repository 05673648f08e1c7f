"""The real images that generated ones are compared with: of a run, or of any source."""

import dataclasses
import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lasad_jax.config import Config, DataConfig
from lasad_jax.data.codes import read_manifest
from lasad_jax.data.image_examples import ImageExamples
from lasad_jax.data.images import ImageSet, common_size, load_images
from lasad_jax.data.sources import SPLITS, ArraySource, ImageSource, open_source
from lasad_jax.data.tokens import TOKENIZER_FILE
from lasad_jax.evaluation.fit_classifier import TrainedClassifier, fit_or_load
from lasad_jax.interop.tokenizer_files import load_tokenizer

# Decoded for a data set's fingerprint, beside all names.
_LOOKED_AT = 64
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class RealImages:
    """A source of images as a generator saw them, looked for once.

    Attributes:
      data: source, size and fit; never "codes".
      channels: 1 or 3.
    """

    data: DataConfig
    channels: int

    @property
    def name(self) -> str:
        """The source as a report names it."""
        parts = (self.data.source, self.data.name, self.data.directory)
        return " ".join(part for part in parts if part)

    def shape(self, split: str) -> tuple[int, int, int]:
        """Rows, columns and channels of every image.

        Raises:
          ValueError, FileNotFoundError: a source that is missing or has no common size.
        """
        return (*common_size(self.data, self._open(split)), self.channels)

    def load(self, split: str) -> ImageSet:
        """All images and labels of a split, in memory."""
        return load_images(self.data, split, channels=self.channels, source=self._open(split))

    def stream(self, split: str) -> "SplitImages":
        """The images of a split as features are taken of them."""
        return self._stream(split)

    def fingerprint(self, split: str) -> str:
        """16 hex digits that tell apart what `stream` gives.

        Of every image that is in memory anyway; of files their names and some images.
        """
        source = self._open(split)
        digest = hashlib.sha256()
        shape = (*common_size(self.data, source), self.channels)
        how = {"shape": shape, "fit": self.data.fit, "background": self.data.background}
        digest.update(json.dumps(how).encode())
        if isinstance(source, ArraySource):
            digest.update(np.ascontiguousarray(source.images))
        else:
            digest.update(json.dumps([source.name(i) for i in range(len(source))]).encode())
            # One by one from their files: to read all for a few of them would take minutes.
            stream = self._stream(split, memory=0)
            for i in np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int):
                digest.update(np.ascontiguousarray(stream.read(int(i), int(i) + 1)))
        return digest.hexdigest()[:16]

    def classifier(self, path: Path, *, progress: bool = True) -> TrainedClassifier:
        """The classifier in a file, trained on the training images if it is not there yet.

        Raises:
          ValueError: a file of a classifier of other images, or images that are not for one.
        """
        images = (self.load(split) for split in SPLITS)
        return fit_or_load(path, *images, name=self.name, progress=progress)

    def _stream(self, split: str, **options) -> "SplitImages":
        options |= {"channels": self.channels, "source": self._open(split)}
        return SplitImages(ImageExamples(self.data, split, **options))

    def _open(self, split: str) -> ImageSource:
        if split not in self._opened:
            self._opened[split] = open_source(self.data, split, channels=self.channels)
        return self._opened[split]

    @functools.cached_property
    def _opened(self) -> dict[str, ImageSource]:
        return {}


class SplitImages:
    """A split as `lasad_jax.evaluation.extract.Images`, files decoded by a pool of threads."""

    def __init__(self, examples: ImageExamples):
        self._examples = examples
        self.shape = examples.batch(np.zeros(0, np.int64))["images"].shape[1:]

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, first: int, last: int) -> UInt8[np.ndarray, "n h w channels"]:
        """Images first to last - 1."""
        rows = np.arange(first, last)
        chunks = np.split(rows, range(_CHUNK, len(rows), _CHUNK))
        with ThreadPoolExecutor(min(self._examples.num_threads, os.cpu_count() or 1)) as pool:
            return np.concatenate([batch["images"] for batch in pool.map(self._batch, chunks)])

    def _batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._examples.batch(rows)


def of_run(config: Config, workdir: Path) -> RealImages:
    """The images that the generator in `workdir` was trained on; of a run on codes those that
    its codes were made from.

    Raises:
      FileNotFoundError: the codes or images are no longer where they were.
    """
    if config.data.source != "codes":
        return RealImages(config.data, channels=1)
    hint = "say where its images are with --source and --directory"
    try:
        stored = read_manifest(config.data.directory).job.source
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or {hint}") from error
    try:
        data = DataConfig(**stored | {"image_size": tuple(stored["image_size"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"source: the codes in {config.data.directory} do not say what images they were made "
            f"from ({error}); {hint}"
        ) from error
    if data.source in ("idx", "folder") and not Path(data.directory).is_dir():
        raise FileNotFoundError(
            f"directory: {data.directory}, which the codes in {config.data.directory} were made "
            f"from, is gone; {hint}"
        )
    tokenizer, _ = load_tokenizer(Path(workdir) / TOKENIZER_FILE)
    return RealImages(data, tokenizer.channels)
