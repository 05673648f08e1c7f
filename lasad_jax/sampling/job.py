"""Drawing any number of images: in parts that are kept as they come, joined at the end.

A part is one batch of images, in an .npz of its own until all are there. Every part, and the
file they are joined to, holds in its zip comment what the images depend on. So a job that was
stopped at any moment goes on where it was, and no file is taken for another job's.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Int, Integer, PyTree, UInt8
from PIL import Image
from tqdm import tqdm

from lasad_jax.sampling.pictures import read_comment, write_npz, write_png

# Takes the image numbers of each batch; gives them back with the codes of the images.
DrawBatches = Callable[
    [Sequence[Int[np.ndarray, " b"]]],
    Iterator[tuple[Int[np.ndarray, " b"], Int[np.ndarray, "b N"]]],
]
Decode = Callable[[Int[np.ndarray, "b N"]], UInt8[np.ndarray, "b h w C"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Images to draw, and where they go.

    Attributes:
      out: path of the results without ending: out.npz, out.png, and the folder out.parts of
        what is not yet joined.
      labels: class of each image.
      batch_size: images of a part.
      identity: everything that the images depend on, under the names that a user knows it
        by; strings, numbers, booleans.
    """

    out: Path
    labels: Integer[np.ndarray, " num"]
    batch_size: int
    identity: Mapping[str, Any]

    @property
    def npz(self) -> Path:
        """The file of all images."""
        return self.out.with_suffix(".npz")

    @property
    def png(self) -> Path:
        """The picture of some."""
        return self.out.with_suffix(".png")

    @property
    def folder(self) -> Path:
        """Where parts are."""
        return self.out.with_suffix(".parts")

    def parts(self) -> list[Int[np.ndarray, " b"]]:
        """The image numbers of each part."""
        numbers = np.arange(len(self.labels))
        return np.split(numbers, numbers[self.batch_size :: self.batch_size])

    def part_file(self, part: int) -> Path:
        """Where a part is once it is drawn."""
        return self.folder / f"part-{part:05}.npz"

    def is_finished(self) -> bool:
        """Whether the results are there, and are this job's; all processes ask together."""
        found = self.png.exists() and _identity(self.npz) == self._stored_identity()
        return bool(_as_first_process(np.asarray(found)))

    def check_folder(self) -> None:
        """Refuses the folder of another job that is not finished.

        Raises:
          ValueError: naming everything that differs.
        """
        ours, finished = self._stored_identity(), _identity(self.npz)
        for path in sorted(self.folder.glob("part-*.npz")):
            # What a finished job could not remove before it was killed is nobody's.
            if (theirs := _identity(path)) in (None, ours, finished):
                continue
            differing = [
                f"{name}: {theirs.get(name, '(absent)')} there, {ours.get(name, '(absent)')} now"
                for name in ours | theirs
                if theirs.get(name) != ours.get(name)
            ]
            raise ValueError(
                f"out: {self.folder} holds a part of other images, whose job is not finished; "
                "go on with its settings, give another --out, or remove the folder: "
                + "; ".join(differing)
            )

    def is_missing(self) -> Bool[np.ndarray, " parts"]:
        """Which parts are not there, whole and undamaged."""
        return np.array([not self._is_whole(part) for part in range(len(self.parts()))])

    def write_part(
        self, numbers: Int[np.ndarray, " b"], images: UInt8[np.ndarray, "b h w C"]
    ) -> None:
        """Keeps the images of a part; its file appears whole or not at all."""
        path = self.part_file(int(numbers[0]) // self.batch_size)
        write_npz(path, [images], self.labels[numbers], comment=self._comment())

    def read_part(self, part: int) -> UInt8[np.ndarray, "b h w C"]:
        """The images of a part.

        Raises:
          ValueError: a missing or damaged file.
        """
        path = self.part_file(part)
        try:
            with np.load(path) as file:  # compares checksums too
                return file["arr_0"]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); run the same command again, which draws its "
                "images again"
            ) from error

    def read_images(self, numbers: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w C"]:
        """Some images, by number, of parts that are all there."""
        images = {}
        for part in np.unique(numbers // self.batch_size).tolist():
            of_part = self.read_part(part)
            here = numbers[numbers // self.batch_size == part]
            images |= {number: of_part[number - part * self.batch_size] for number in here}
        return np.stack([images[number] for number in numbers])

    def finish(self, picture: Image.Image) -> None:
        """Writes the results of parts that are all there, and removes the parts.

        Holds the images of one part at a time.
        """
        # The .npz last: once it is there, all is.
        write_png(self.png, picture)
        images = (self.read_part(part) for part in range(len(self.parts())))
        write_npz(self.npz, images, self.labels, comment=self._comment())
        for path in self.folder.glob("part-*.npz*"):
            path.unlink()
        with contextlib.suppress(OSError):  # a folder that holds something else stays
            self.folder.rmdir()

    def _is_whole(self, part: int) -> bool:
        if _identity(self.part_file(part)) != self._stored_identity():
            return False
        try:
            self.read_part(part)
        except ValueError:
            return False
        return True

    def _comment(self) -> str:
        return json.dumps(dict(self.identity))

    def _stored_identity(self) -> dict[str, Any]:
        return json.loads(self._comment())


def draw_parts(job: Job, draw: DrawBatches, decode: Decode, *, progress: bool = True) -> None:
    """Draws and keeps every part that is missing.

    All processes call it together. Each decodes its share of a batch; the first one alone
    reads and writes files.

    Args:
      job: whose parts.
      draw: of codes, such as `lasad_jax.sampling.decode.sample_batches`; asked for missing
        parts only, each a batch.
      decode: codes to images, on one process's devices.
      progress: show a bar over images.

    Raises:
      ValueError: parts of another job.
    """
    job.check_folder()
    is_first, parts = jax.process_index() == 0, job.parts()
    missing = _as_first_process(job.is_missing() if is_first else np.zeros(len(parts), bool))
    todo = [numbers for numbers, lacks in zip(parts, missing, strict=True) if lacks]
    with tqdm(
        total=len(job.labels),
        initial=len(job.labels) - sum(map(len, todo)),
        unit="image",
        dynamic_ncols=True,
        disable=not (progress and is_first),
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        for numbers, tokens in draw(todo):
            images = _decode_together(decode, tokens)
            if is_first:
                job.write_part(numbers, images)
            bar.update(len(numbers))


def fingerprint(params: PyTree) -> str:
    """16 hex digits that tell apart parameters, wherever they lie."""

    @jax.jit
    def sums(leaves):
        # Of their bits, modulo 2^32: exact in any order.
        return [
            jnp.sum(jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)) for x in leaves
        ]

    return digest(np.array(sums(jax.tree.leaves(params)), np.uint32))


def digest(array: np.ndarray) -> str:
    """16 hex digits that tell apart arrays."""
    header = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _decode_together(
    decode: Decode, tokens: Int[np.ndarray, "b N"]
) -> UInt8[np.ndarray, "b h w C"]:
    """The images of codes that every process has, from a share of them in each."""
    if (processes := jax.process_count()) == 1:
        return decode(tokens)
    share = -(-len(tokens) // processes)
    mine = np.arange(share) + share * jax.process_index()
    images = decode(tokens[np.minimum(mine, len(tokens) - 1)])
    return multihost_utils.process_allgather(images, tiled=True)[: len(tokens)]


def _as_first_process(answer: Bool[np.ndarray, "*S"]) -> Bool[np.ndarray, "*S"]:
    # Others may see files late, and all must do the same.
    return np.asarray(multihost_utils.broadcast_one_to_all(answer)).astype(bool)


def _identity(path: Path) -> dict[str, Any] | None:
    """What the images of a file depend on, or None where it does not say."""
    try:
        value = json.loads(read_comment(path))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
