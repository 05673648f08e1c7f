"""Which image files there are, of which class and split; and the split where none is given."""

import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

# What the held-out split may be called; of several the first that holds something is used.
HELD_OUT = ("test", "validation", "val")
_TEST_SHARE = 20  # one in


class Listing(NamedTuple):
    """Image files.

    Attributes:
      paths: relative to the directory that was listed.
      labels: index of each one's class.
      class_names: of the indices.
      splits: "train", "test" or "" (unused) for each; None if nothing says.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    splits: tuple[str, ...] | None

    def part(self, split: str) -> "Listing":
        """Only the files of a split."""
        chosen = [i for i, each in enumerate(self.splits) if each == split]
        return Listing(
            tuple(self.paths[i] for i in chosen),
            tuple(self.labels[i] for i in chosen),
            self.class_names,
            (split,) * len(chosen),
        )


def hold_out(listing: Listing, directory: Path) -> Listing:
    """Makes about one file in 20 "test": those whose path has a hash below that share.

    The path is the one that links lead to, so that an image which links put into two classes
    is on one side only. At least the smallest hash is "test", and at least one is not.

    Raises:
      ValueError: a single image.
    """
    keys = real_paths(directory, listing.paths)
    hashes = {
        key: int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8]) for key in set(keys)
    }
    if len(hashes) == 1:
        raise ValueError(
            f"data.directory is {str(directory)!r}, of which a single image is used, so that "
            "none can be held out; add images, or sub-folders train and test"
        )
    test = {key for key, value in hashes.items() if value < 2**64 // _TEST_SHARE}
    if not test or len(test) == len(hashes):
        test = {min(hashes, key=hashes.__getitem__)}
    return listing._replace(splits=tuple("test" if key in test else "train" for key in keys))


def real_paths(directory: Path, paths: tuple[str, ...]) -> list[str]:
    """Where the links of each path lead, relative to the directory, "/" between its parts."""
    root = os.path.realpath(directory)
    real_folder = functools.cache(os.path.realpath)

    def real(path: str) -> str:
        path = os.path.join(root, path)
        if os.path.islink(path):
            return os.path.realpath(path)
        return os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))

    return [Path(os.path.relpath(real(path), root)).as_posix() for path in paths]
