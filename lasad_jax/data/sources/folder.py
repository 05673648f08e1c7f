"""Image files in folders, a class per folder or listed with their labels in a CSV file."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from lasad_jax.config.sections import DataConfig
from lasad_jax.data.decode import decode_image
from lasad_jax.data.sources.base import Example
from lasad_jax.data.sources.label_file import read_label_file
from lasad_jax.data.sources.listing import HELD_OUT, Listing, hold_out

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files, decoded when they are asked for.

    Attributes:
      directory: that the listed paths are relative to.
      listing: the files.
      channels, background: as for `decode_image`.
    """

    directory: Path
    listing: Listing
    channels: int
    background: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.listing.class_names

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, index: int) -> Example:
        name = self.name(index)
        image = decode_image(
            self.directory / name, channels=self.channels, background=self.background, name=name
        )
        return Example(image, self.listing.labels[index])

    def name(self, index: int) -> str:
        return self.listing.paths[index]


def open_folder(data: DataConfig, split: str, *, channels: int) -> FolderSource:
    """The image files of `data.directory`, or those that `data.labels` lists in it.

    Without a list, each sub-folder that holds images, however deep, is a class, in the order
    of their names; images beside no sub-folder are one class, named after the directory.
    Sub-folders train and test (or validation, or val) are the splits and hold the classes;
    otherwise `hold_out` chooses. Links to files are followed, links to folders only where
    they are a split or a class, and names that begin with a dot are passed over.

    Raises:
      FileNotFoundError: no such directory, list or listed file.
      ValueError: no images, a single one, images beside sub-folders, classes that only
        "test" has, or a list that does not hold together.
    """
    if not data.directory:
        raise FileNotFoundError('data.directory is empty, but data.source="folder" reads files')
    directory = Path(data.directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"data.directory is {data.directory!r}, which is no folder")
    listing = read_label_file(Path(data.labels), directory) if data.labels else _scan(directory)
    if listing.splits is None:
        listing = hold_out(listing, directory)
    return FolderSource(directory, listing.part(split), channels, data.background)


def _scan(directory: Path) -> Listing:
    folders = _split_folders(directory)
    files = [
        (os.path.join(folder, name, path), name, split)
        for split, folder in folders.items()
        for name in _class_folders(directory / folder)
        for path in sorted(_image_files(directory / folder / name))
    ]
    if not files:
        raise ValueError(
            f"data.directory is {str(directory)!r}, which holds no images; known are "
            f"{', '.join(SUFFIXES)}"
        )
    paths, names, splits = zip(*files, strict=True)
    classes = sorted({name for name, split in zip(names, splits, strict=True) if split != "test"})
    if unknown := sorted(set(names) - set(classes)):
        raise ValueError(
            f"data.directory is {str(directory)!r}, where {folders['test']} has the class "
            f"{unknown[0]!r} but train has not; both need the same sub-folders"
        )
    index = {name: i for i, name in enumerate(classes)}
    return Listing(
        paths,
        tuple(index[name] for name in names),
        (directory.resolve().name,) if classes == [""] else tuple(classes),
        splits if "test" in folders else None,
    )


def _split_folders(directory: Path) -> dict[str, str]:
    """The folder of each split, or {"": ""} if the directory is not divided into splits."""
    held_out = [name for name in HELD_OUT if (directory / name).is_dir()]
    if not (directory / "train").is_dir() or not held_out:
        return {"": ""}
    train = _class_folders(directory / "train")
    for name in held_out:
        # ImageNet's folder test has images but no classes: validation holds out there.
        classes = _class_folders(directory / name)
        if train and classes and (train == [""]) == (classes == [""]):
            return {"train": "train", "test": name}
    raise ValueError(
        f"data.directory is {str(directory)!r}, whose folders train and {' or '.join(held_out)} "
        "must both hold images, and both in sub-folders, one a class, or neither"
    )


def _class_folders(folder: Path) -> list[str]:
    """Sorted names of the sub-folders that hold images; [""] for images without any."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    names = [path.name for path in paths if path.is_dir() and any(_image_files(path))]
    images = [path.name for path in paths if _is_image(path.name) and not path.is_dir()]
    if names and images:
        raise ValueError(
            f"data.directory: {str(folder)!r} holds both images, such as {images[0]!r}, and "
            f"sub-folders of images, such as {names[0]!r}; move the images into sub-folders, "
            "one a class"
        )
    return names or [""] * bool(images)


def _image_files(top: Path) -> Iterator[str]:
    """Paths relative to `top`, in no order."""
    for at, folders, files in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if _is_image(name):
                yield os.path.relpath(os.path.join(at, name), top)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
