"""Images that tell which they are, and the two splits of a source, for several tests."""

from pathlib import Path

from PIL import Image

from lasad_jax.config import DataConfig
from lasad_jax.data import open_source


def picture(value: int, size: tuple[int, int] = (5, 4)) -> Image.Image:
    """A plain colour that tells which image it is; size is (rows, columns)."""
    return Image.new("RGB", size[::-1], (value, 255 - value, 7))


def write(path: Path, value: int = 0, size: tuple[int, int] = (5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(value, size).save(path)


def folder(directory, **fields) -> DataConfig:
    return DataConfig(source="folder", directory=str(directory), **fields)


def both(data: DataConfig, channels: int = 3):
    return open_source(data, "train", channels=channels), open_source(
        data, "test", channels=channels
    )


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def examples(source) -> list:
    return [source[i] for i in range(len(source))]


def values(source) -> list[int]:
    return [example.image[0, 0, 0] for example in examples(source)]
