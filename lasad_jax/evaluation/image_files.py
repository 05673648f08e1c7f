"""Images in .npz files as features are taken of them, a few in memory at a time."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lasad_jax.interop.adm_files import open_images

_CHUNK = 64


class FileImages:
    """The images arr_0 of a file; `lasad_jax.evaluation.extract.Images`.

    The file is read forwards. Asking for images before the last ones begins anew.

    Attributes:
      shape: rows, columns and channels of each.
      labels: classes, or None.

    Raises:
      FileNotFoundError, ValueError: as `open_images`.
    """

    def __init__(self, field: str, path: Path):
        self._stored = open_images(path, field=field)
        self.shape, self.labels = self._stored.shape[1:], self._stored.labels
        self._first, self._chunk, self._rest = 0, None, iter(())

    def __len__(self) -> int:
        return self._stored.shape[0]

    def read(self, first: int, last: int) -> UInt8[np.ndarray, "n h w channels"]:
        """Images first to last - 1.

        Raises:
          ValueError: a damaged file.
        """
        if self._chunk is None or first < self._first:
            self._first, self._rest = first, self._stored.batches(_CHUNK, first)
            self._chunk = next(self._rest)
        images = np.empty((last - first, *self.shape), np.uint8)
        filled = 0
        while True:
            here = self._chunk[first + filled - self._first :][: len(images) - filled]
            images[filled : filled + len(here)] = here
            filled += len(here)
            if filled == len(images):
                return images
            self._first += len(self._chunk)
            self._chunk = next(self._rest)


def npz_fingerprint(field: str, path: Path) -> tuple[str, set[str]]:
    """16 hex digits that tell apart the contents of .npz files, and the names of their arrays.

    From the checksums that the file has of its arrays: no array is read.

    Raises:
      FileNotFoundError, ValueError: no file, or no .npz; names `field`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{field}={path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((m.filename, m.file_size, m.CRC) for m in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{field}={path} is no whole .npz file; copy or write it once more"
        ) from error
    fingerprint = hashlib.sha256(repr(members).encode()).hexdigest()[:16]
    return fingerprint, {name.removesuffix(".npy") for name, _, _ in members}
