"""The arrays of an .npz file, one at a time, or some bytes of one at a time."""

import contextlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def open_npz(path: str | Path, field: str) -> Iterator[zipfile.ZipFile]:
    """Opens the zip file that an .npz is. Errors inside the block are told to be the file's.

    Args:
      path: of the file.
      field: that names it, for messages.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no zip file, or not a whole one; one raised inside, such as for an array that
        is no array of numbers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{field}={path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        # RuntimeError: a turned bit says that the file is encrypted or compressed otherwise.
        raise ValueError(
            f"{field}={path} is no whole .npz file ({error}); copy or write it once more"
        ) from error
    except ValueError as error:
        raise ValueError(f"{field}={path}: {error}") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Of all arrays of the file, sorted."""
    suffix = ".npy"
    return sorted(n.removesuffix(suffix) for n in archive.namelist() if n.endswith(suffix))


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array; the others are not touched.

    Raises:
      ValueError, EOFError, zipfile.BadZipFile: a damaged array, or one of Python objects.
    """
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_header(file: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of an array's member, read to its data.

    Raises:
      ValueError: no array, or one in a format that NumPy does not use for arrays of numbers.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"an array has a header of version {version}; write it with np.savez")


def read_bytes(file: io.BufferedIOBase, number: int) -> bytes:
    """The next bytes.

    Raises:
      EOFError: fewer are left.
    """
    data = file.read(number)
    if len(data) < number:
        raise EOFError("an array ends too early")
    return data


def new_member(archive: zipfile.ZipFile, name: str) -> io.BufferedIOBase:
    """A file to write an array to, of any length.

    It has a date of its own, where a bare name would take the time of day: the same numbers
    make the same bytes.
    """
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
