"""Files of ADM's evaluator: statistics of features, and images, in one .npz format.

An .npz holds any of mu and sigma (of FID's features), mu_s and sigma_s (of sFID's), arr_0
(images) and arr_1 (their classes). ADM's evaluator needs arr_0 in both of its files, and takes
statistics, where a file has them, in place of its own of these images. pytorch-fid's files
hold mu and sigma only.
"""

import dataclasses
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from lasad_jax.evaluation.moments import Moments
from lasad_jax.files import whole_file
from lasad_jax.interop.npz_members import (
    array_names,
    new_member,
    open_npz,
    read_array,
    read_bytes,
    read_header,
)

_ASYMMETRY = 1e-4  # of the largest entry: what sums in float32 leave
_FIRST = 64  # images looked at for their range
_SKIP = 2**24  # bytes read at a time where images are passed over


class Statistics(NamedTuple):
    """Moments of features of images.

    Attributes:
      pooled: of the features of FID; count 0 where the file does not tell.
      spatial: of those of sFID; None where a file has none.
    """

    pooled: Moments
    spatial: Moments | None


def read_statistics(path: str | Path, *, field: str = "reference") -> Statistics:
    """Reads the statistics of a file, and none of its images.

    Args:
      path: of an .npz with mu, sigma and perhaps mu_s, sigma_s, and count if it is from
        `write_statistics`.
      field: that names the file, for messages.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no whole .npz, or statistics that are missing, of wrong shapes or dtypes, not
        finite, or with a sigma that is not symmetric.
    """
    with open_npz(path, field) as archive:
        names = array_names(archive)
        found = {"mu", "sigma", "mu_s", "sigma_s"} & set(names)
        if found not in ({"mu", "sigma"}, {"mu", "sigma", "mu_s", "sigma_s"}):
            remedy = "; its images arr_0 can be evaluated in their place" * ("arr_0" in names)
            raise ValueError(
                "statistics are mu and sigma, or these and mu_s and sigma_s, but of them the "
                f"file has {sorted(found) or 'none'} among {names}{remedy}"
            )
        count = read_array(archive, "count") if "count" in names else np.int64(0)
        if count.shape != () or not np.issubdtype(count.dtype, np.integer) or count < 0:
            raise ValueError(f"count must be a whole number of images, got {count!r}")
        pair = lambda mu, sigma: _checked(
            Moments(int(count), read_array(archive, mu), read_array(archive, sigma)), mu, sigma
        )
        return Statistics(pair("mu", "sigma"), pair("mu_s", "sigma_s") if "mu_s" in found else None)


def write_statistics(
    path: str | Path, statistics: Statistics, *, images: "StoredImages | None" = None
) -> None:
    """Writes statistics, float64; the file appears whole or not at all.

    Args:
      path: of the file, .npz by custom.
      statistics: to write. Their count is written as "count" if known; ADM's evaluator does
        not look at it.
      images: to write as arr_0 too: ADM's evaluator needs some, and computes precision and
        recall from them.

    Raises:
      ValueError: moments of wrong shapes, not finite or not symmetric, or of two counts.
    """
    pooled, spatial = statistics
    arrays = dict(zip(("mu", "sigma"), _checked(pooled)[1:], strict=True))
    if spatial is not None:
        if spatial.count != pooled.count:
            raise ValueError(
                f"pooled and spatial statistics are of {pooled.count} and {spatial.count} "
                "images; take both from the same ones"
            )
        spatial = _checked(spatial, "mu_s", "sigma_s")
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if pooled.count:
        arrays["count"] = np.array(pooled.count, np.int64)
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with new_member(archive, name) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        if images is not None:
            with new_member(archive, "arr_0") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in images.batches(_FIRST):
                    file.write(batch.data)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImages:
    """The images of a file, which stay in it until they are asked for.

    Attributes:
      path: of the file.
      field: that names the file, for messages.
      shape: (N, h, w, channels).
      labels: the images' classes arr_1, or None if the file has none.
    """

    path: Path
    field: str
    shape: tuple[int, int, int, int]
    labels: Integer[np.ndarray, " N"] | None

    def batches(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[UInt8[np.ndarray, "_ h w channels"]]:
        """Images start to stop - 1 in order, `size` at a time, the last batch perhaps fewer.

        The file is read forwards only, and no more than a batch of it is kept.

        Raises:
          ValueError: a range outside the file, or a damaged file: where the damage is met, or
            with the last image, where the checksum is compared.
        """
        stop = self.shape[0] if stop is None else stop
        if not (0 <= start <= stop <= self.shape[0] and size > 0):
            raise ValueError(
                f"{self.field}={self.path} holds images 0 to {self.shape[0] - 1}; {start} to "
                f"{stop - 1} in batches of {size} cannot be read"
            )
        return self._batches(size, start, stop)

    def _batches(self, size: int, start: int, stop: int) -> Iterator[np.ndarray]:
        one = math.prod(self.shape[1:])
        with open_npz(self.path, self.field) as archive, archive.open("arr_0.npy") as file:
            read_header(file)
            for first in range(0, start * one, _SKIP):
                read_bytes(file, min(_SKIP, start * one - first))
            for first in range(start, stop, size):
                count = min(size, stop - first)
                data = read_bytes(file, count * one)
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])


def open_images(path: str | Path, *, field: str = "samples") -> StoredImages:
    """Looks at the images of a file: their header, the first few, and all labels.

    Args:
      path: of an .npz with arr_0, uint8 (N, h, w, channels), and perhaps arr_1, integers (N,).
      field: that names the file, for messages.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no whole .npz, no images, or images or labels of a wrong dtype, shape or range.
    """
    path = Path(path)
    with open_npz(path, field) as archive:
        names = array_names(archive)
        if "arr_0" not in names:
            raise ValueError(f"images are expected as arr_0, but the file has only {names}")
        with archive.open("arr_0.npy") as file:
            shape, fortran_order, dtype = read_header(file)
            _check_form(shape, fortran_order, dtype)
            first = read_bytes(file, min(_FIRST, shape[0]) * math.prod(shape[1:]) * dtype.itemsize)
        _check_values(np.frombuffer(first, dtype))
        labels = read_array(archive, "arr_1") if "arr_1" in names else None
        if labels is not None and (
            labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer)
        ):
            raise ValueError(
                f"labels arr_1 must be integers ({shape[0]},), one an image, got {labels.dtype} "
                f"of shape {labels.shape}"
            )
    return StoredImages(path, field, shape, labels)


def read_images(
    path: str | Path, *, field: str = "samples"
) -> tuple[UInt8[np.ndarray, "N h w channels"], Integer[np.ndarray, " N"] | None]:
    """All images of a file at once, and their labels or None; for many, see `open_images`.

    Raises:
      FileNotFoundError, ValueError: as `open_images` and `StoredImages.batches`.
    """
    stored = open_images(path, field=field)
    (images,) = stored.batches(stored.shape[0])
    return images, stored.labels


def _check_form(shape: tuple[int, ...], fortran_order: bool, dtype: np.dtype) -> None:
    form = "images arr_0 must be (images, height, width, channels)"
    if len(shape) != 4 or math.prod(shape) == 0:
        raise ValueError(f"{form}, none of them 0, got {shape}")
    if shape[3] not in (1, 3):
        remedy = "; move the channels to the end" if shape[1] in (1, 3) else ""
        raise ValueError(f"{form} with 1 or 3 channels, got {shape}{remedy}")
    if dtype.hasobject:
        raise ValueError(f"images arr_0 must be uint8, got {dtype}; make them one array")
    if fortran_order:
        raise ValueError("images arr_0 are in Fortran order; write np.ascontiguousarray of them")


def _check_values(images: np.ndarray) -> None:
    if images.dtype == np.uint8:
        # Zeros alone may be black images; with ones beside them, they were a range of 0 to 1.
        if images.max() == 1:
            raise ValueError(
                "the first images arr_0 hold only 0 and 1, where 0 to 255 are expected; multiply "
                "by 255 before the cast to uint8"
            )
        return
    remedy = "write uint8"
    if np.issubdtype(images.dtype, np.floating):
        if images.min() >= 0 and images.max() <= 1:
            remedy = "they seem to be in [0, 1]: write np.round(x * 255) as uint8"
        elif images.min() >= -1 and images.max() <= 1:
            remedy = "they seem to be in [-1, 1]: write np.round((x + 1) * 127.5) as uint8"
    raise ValueError(f"images arr_0 must be uint8, 0 to 255, got {images.dtype}; {remedy}")


def _checked(moments: Moments, mu: str = "mu", sigma: str = "sigma") -> Moments:
    """As float64, the covariance symmetric to the last digit."""
    mean, covariance = moments.mean, moments.covariance
    for name, array in (mu, mean), (sigma, covariance):
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name} must be of floats, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite; compute it anew")
    if mean.ndim != 1 or len(mean) == 0 or covariance.shape != 2 * mean.shape:
        raise ValueError(
            f"{mu} must be (D,) and {sigma} (D, D), got shapes {mean.shape} and {covariance.shape}"
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > _ASYMMETRY * np.abs(covariance).max():
        raise ValueError(
            f"{sigma} must be symmetric, but differs by up to {asymmetry:.3g} from its "
            "transpose; compute it anew"
        )
    return Moments(moments.count, mean, (covariance + covariance.T) / 2)
