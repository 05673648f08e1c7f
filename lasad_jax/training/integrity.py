"""Whether a checkpoint's files are those that were written.

Beside what Orbax writes, each checkpoint holds a list of its files and their sizes, stored
before the checkpoint gets its name. A cut or missing file is known by it before anything is
read: in Orbax's own files a cut one brings up an error from deep inside, on one process while
others wait. Flipped bits are left to the storage.
"""

import json
from collections.abc import Callable
from pathlib import Path

from absl import logging

_SIZES_FILE = "sizes.json"
# What Orbax writes later, and does not need.
_OTHER_FILES = ("commit_success.txt",)


def store_sizes(folder: Path) -> None:
    """Lists the files of the state and of the held-out loss in `folder`, all of them written."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for part in ("default", "metrics")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file() and path.name not in _OTHER_FILES
    }
    (folder / _SIZES_FILE).write_text(json.dumps(sizes))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None for nothing, or where no list is stored."""
    try:
        sizes = json.loads((folder / _SIZES_FILE).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{_SIZES_FILE} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (there := path.stat().st_size) != size:
            return f"{name} has {there} bytes of {size}"
    return None


def set_aside_damaged(workdir: Path, *, rename: bool, meet: Callable[[], None]) -> None:
    """Moves damaged checkpoints newer than the newest good one to damaged_checkpoints/.

    Nothing is deleted. A run can then go on from the newest good one and save these steps again.

    Args:
      workdir: the run.
      rename: whether this process is the one to move them.
      meet: waits for all processes; called before and after.

    Raises:
      ValueError: there are checkpoints, and all of them are damaged.
    """
    folders = sorted(
        (path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()),
        key=lambda path: int(path.name),
    )
    wrong = {}
    while folders and (reason := damage(folders[-1])):
        wrong[folders.pop()] = reason
    if wrong and not folders:
        newest, reason = next(iter(wrong.items()))
        raise ValueError(
            f"workdir: every checkpoint of {workdir} is damaged, the newest, {newest.name}, "
            f"because {reason}; put back its files, or give another directory to begin anew"
        )
    meet()
    for path, reason in wrong.items() if rename else ():
        place = workdir / "damaged_checkpoints" / path.name
        while place.exists():
            place = place.with_name(f"{place.name}_again")
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
        logging.warning(
            "the checkpoint of step %s is damaged (%s); it is now %s, and the run goes on from "
            "step %s",
            *(path.name, reason, place, folders[-1].name),
        )
    meet()
