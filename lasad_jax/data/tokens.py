"""From a configuration to tokens and back to images: quantised pixels, or stored codes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Integer, PyTree, UInt8

from lasad_jax.config import DataConfig
from lasad_jax.data.codes import CodeExamples, read_manifest
from lasad_jax.data.images import load_images
from lasad_jax.data.loader import Examples, TokenExamples
from lasad_jax.data.pixel_tokens import PixelCodec
from lasad_jax.data.sources import SPLITS
from lasad_jax.files import whole_file
from lasad_jax.interop.tokenizer_files import fingerprint, load_tokenizer
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.models.tokenizer_config import TokenizerConfig

# In a folder of codes, and copied from there into the run of a generator trained on them.
TOKENIZER_FILE = "tokenizer.safetensors"
_CLASSES_FILE = "classes.json"


class Codec(Protocol):
    """The way from images to tokens and back."""

    def encode(self, images: UInt8[np.ndarray, "N h w C"]) -> Integer[np.ndarray, "N L"]:
        """The tokens of images, in raster order."""

    def decode(
        self, tokens: Integer[np.ndarray, "N L"], grid: tuple[int, int]
    ) -> UInt8[np.ndarray, "N h w C"]:
        """The images of tokens on a grid (R, C)."""


class TokenData(NamedTuple):
    """Everything that a generator is trained on.

    Attributes:
      training, held_out: tokens and labels of the images.
      grid: rows and columns of an image's tokens.
      vocab_size: number of tokens V.
      class_names: one for each class.
      tokenizer: its file and fingerprint, for stored codes.
      load_codec: reads what decodes the tokens; it may be large.
    """

    training: Examples
    held_out: Examples
    grid: tuple[int, int]
    vocab_size: int
    class_names: tuple[str, ...]
    tokenizer: tuple[Path, str] | None
    load_codec: Callable[[], Codec]


def load_tokens(data: DataConfig) -> TokenData:
    """Opens the data of a generator's configuration.

    Raises:
      ValueError, FileNotFoundError: data that is missing, damaged or of another tokenizer.
    """
    if data.source == "codes":
        return _load_codes(data)
    codec = PixelCodec(data.levels)
    training, held_out = (load_images(data, split) for split in SPLITS)
    return TokenData(
        TokenExamples(codec.encode(training.images), training.labels),
        TokenExamples(codec.encode(held_out.images), held_out.labels),
        grid=training.images.shape[1:3],
        vocab_size=data.levels,
        class_names=training.class_names,
        tokenizer=None,
        load_codec=lambda: codec,
    )


def _load_codes(data: DataConfig) -> TokenData:
    folder = Path(data.directory)
    job = read_manifest(folder).job
    if data.tokenizer not in ("", job.tokenizer):
        raise ValueError(
            f"data.directory: the codes in {folder} were made by tokenizer {job.tokenizer}, "
            f"not by data.tokenizer={data.tokenizer!r}; name other codes or clear the field"
        )
    tokenizer = (folder / TOKENIZER_FILE, job.tokenizer)
    return TokenData(
        CodeExamples(folder, "train"),
        CodeExamples(folder, "test"),
        grid=job.grid,
        vocab_size=job.vocab_size,
        class_names=job.class_names,
        tokenizer=tokenizer,
        load_codec=lambda: TokenizerCodec(*_load_checked(*tokenizer)),
    )


def check_run_tokens(tokens: TokenData, workdir: Path) -> None:
    """Refuses to go on with a run whose tokens another tokenizer has made, and to begin one
    with another tokenizer's file beside the codes.

    Raises:
      ValueError: naming both fingerprints.
      FileNotFoundError: codes without their tokenizer's file.
    """
    if tokens.tokenizer is None:
        return
    file, ours = tokens.tokenizer
    copy = Path(workdir) / TOKENIZER_FILE
    if not copy.exists():
        _load_checked(file, ours)
        return
    if (theirs := fingerprint(*load_tokenizer(copy))) != ours:
        raise ValueError(
            f"data.directory: its codes were made by tokenizer {ours}, but the run in {workdir} "
            f"was trained on those of {theirs}; give the codes of that one or another workdir"
        )


def store_run_tokens(tokens: TokenData, workdir: Path) -> None:
    """Puts beside a run's config.json what turns its tokens into labelled pictures."""
    workdir = Path(workdir)
    store_class_names(tokens.class_names, workdir)
    if tokens.tokenizer is not None and not (workdir / TOKENIZER_FILE).exists():
        with whole_file(workdir / TOKENIZER_FILE) as file:
            shutil.copyfile(tokens.tokenizer[0], file)


def load_run_codec(data: DataConfig, workdir: Path) -> Codec:
    """What decodes the tokens of the run in `workdir`."""
    if data.source == "codes":
        return TokenizerCodec(*load_tokenizer(Path(workdir) / TOKENIZER_FILE))
    return PixelCodec(data.levels)


def store_class_names(class_names: tuple[str, ...], workdir: Path) -> None:
    """Writes the names of a run's classes."""
    with whole_file(Path(workdir) / _CLASSES_FILE) as file:
        file.write_text(json.dumps(class_names) + "\n")


def load_class_names(workdir: Path) -> tuple[str, ...] | None:
    """The names of a run's classes; None if it has stored none."""
    path = Path(workdir) / _CLASSES_FILE
    return tuple(json.loads(path.read_text())) if path.exists() else None


def _load_checked(file: Path, expected: str) -> tuple[TokenizerConfig, PyTree]:
    config, params = load_tokenizer(file)
    if (found := fingerprint(config, params)) != expected:
        raise ValueError(
            f"data.directory: {file} has fingerprint {found}, but the codes beside it were made "
            f"by {expected}; put back the file they were made with"
        )
    return config, params
