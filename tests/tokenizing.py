"""The tokenize command on a few random colour images, with a tokenizer that is not trained."""

from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from processes import command
from tiny_tokenizer import tiny_tokenizer_config

from lasad_jax.data.codes import read_manifest
from lasad_jax.interop.tokenizer_files import fingerprint, save_tokenizer
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.models.tokenizer import init_tokenizer

CLASSES = ("cats", "dogs", "eels")
SIZE = (8, 12)
GRID = (4, 6)
VOCAB_SIZE = 16


def write_tokenizer(path: Path, seed: int = 9) -> TokenizerCodec:
    """A tokenizer's file, and the same at work; the default seed's uses all codes."""
    config = tiny_tokenizer_config(model={"channels": 3}).model
    params = init_tokenizer(config, jax.random.key(seed))
    save_tokenizer(path, config, params)
    codec = TokenizerCodec(config, params, devices=jax.devices()[:1])
    assert codec.fingerprint == fingerprint(config, params)
    return codec


def write_images(folder: Path, count: int, sizes=(SIZE,), seed: int = 0) -> None:
    """Pictures cats/0000.png, dogs/0001.png, eels/0002.png, ..., of each size in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / CLASSES[i % 3] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_picture(rng, sizes[i % len(sizes)])).save(path)


def random_picture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noisy blocks of random colours, which use more codes than noise alone."""
    blocks = rng.integers(0, 256, (-(-size[0] // 4), -(-size[1] // 4), 3), np.uint8)
    picture = blocks.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]].astype(np.int64)
    return np.clip(picture + rng.integers(-20, 21, picture.shape), 0, 255).astype(np.uint8)


def tokenize(*flags, fails: bool = False) -> str:
    return command("tokenize", *flags, fails=fails)


def read_records(out: Path, split: str) -> np.ndarray:
    """All records of a split in the order of its files."""
    job = read_manifest(out).job
    content = []
    for path in sorted(out.glob(f"{split}-*.arrayrecord")):
        reader = ArrayRecordReader(str(path))
        content += reader.read_all()
        reader.close()
    return np.frombuffer(b"".join(content), job.record_dtype)
