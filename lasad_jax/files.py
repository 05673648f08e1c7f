"""Files and folders that are there whole or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


def temporary(path: Path, writer: int | None = None) -> Path:
    """Where a file is while it is being written, see `whole_file`."""
    # In the same folder, since a rename is atomic only within one file system.
    return path.with_name(f"{path.name}.tmp" if writer is None else f"{path.name}.{writer}.tmp")


@contextlib.contextmanager
def whole_file(path: str | Path, writer: int | None = None) -> Iterator[Path]:
    """A path to write to, in the same folder, that becomes `path` when the block ends well.

    The folder is made if missing. The name is the same each time: what a killed process
    leaves, the next one takes over. So a path has one writer at a time, or writers of
    different numbers; the last one's file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = temporary(path, writer)
    try:
        yield file
        file.replace(path)
    finally:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill, beside `path`, that becomes `path` when the block ends well.

    As `whole_file`, with one writer at a time.

    Args:
      path: where nothing is, or an empty folder.
      replace: something may be there, and is removed once the new folder has its place.

    Raises:
      OSError: if something is there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, old = temporary(path), path.with_name(f"{path.name}.old")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if replace and path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        folder.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
