"""Draws images from a run: python -m lasad_jax.sample --workdir=DIR

--folder=DIR draws from what lasad_jax.export wrote, --demo from the small model that comes with
the library.

Writes a labelled PNG grid and an .npz (arr_0: uint8 NHWC images, arr_1: labels; the ADM
convention). --classes=3,1,4 chooses classes, by number or name; --complete=FILE.npz --rows=14
keeps the first rows of tokens of the images in arr_0 and draws the rest.

Images are kept in OUT.parts, batch by batch, until all are there. Running the same command
again goes on where it was stopped.
"""

import dataclasses
from importlib import resources
from pathlib import Path

import jax
import numpy as np
from absl import flags

from lasad_jax.command import run
from lasad_jax.config import Config
from lasad_jax.data.tokens import Codec
from lasad_jax.evaluation.image_files import FileImages
from lasad_jax.sampling.decode import balanced_labels
from lasad_jax.sampling.flags import BATCH, RAW, SEED, STEP, sampling_fields
from lasad_jax.sampling.run import GeneratorRun

_ABOUT = 100  # images, unless --num says how many
_DEMO_BATCH = 31  # a third: on a CPU about as fast, and shows how far it is

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_FOLDER = flags.DEFINE_string("folder", None, "In place of a run, what lasad_jax.export wrote.")
_DEMO = flags.DEFINE_bool("demo", False, "In place of a run, the library's own small model.")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Path of the results without ending; if unset in the run, or named as the exported folder.",
)
_NUM = flags.DEFINE_integer(
    "num", None, f"Number of images, balanced over the classes; about {_ABOUT} if unset.", 1
)
_CLASSES = flags.DEFINE_list("classes", None, "Classes to draw, by number or name; all if unset.")
_COMPLETE = flags.DEFINE_string("complete", None, "An .npz of images (arr_0) to complete.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows of tokens of --complete to keep.")


def sample() -> None:
    """Draws what the flags ask for and writes it."""
    generator, out = _open()
    config = generator.config
    sampling = dataclasses.replace(config.sampling, **sampling_fields())
    labels, given = _labels(config, generator.class_names), None
    if _COMPLETE.value:
        labels, given = _given(config, generator.codec, Path(_COMPLETE.value), labels)
    job = generator.job(
        Path(_OUT.value or out),
        labels,
        sampling=sampling,
        seed=SEED.value,
        batch_size=_DEMO_BATCH if _DEMO.value and not BATCH.present else BATCH.value,
        given=given,
    )
    if job.is_finished():
        _say(f"these {len(labels)} images are there already: {job.png}, {job.npz}")
        return
    generator.draw(job, given)
    origin = f"step {generator.step}" if _WORKDIR.value else out.name
    _say(f"{len(labels)} images of {origin}: {job.png}, {job.npz}")


def _open() -> tuple[GeneratorRun, Path]:
    """What to draw from, and where the results go unless --out says it."""
    sources = [flag for flag in (_WORKDIR, _FOLDER, _DEMO) if flag.value]
    if len(sources) != 1:
        given = " and ".join(f"--{flag.name}" for flag in sources) or "nothing"
        raise ValueError(
            f"workdir: {given} given to draw from; name one of --workdir=RUN, --folder=EXPORTED "
            "and --demo"
        )
    if _WORKDIR.value:
        workdir = Path(_WORKDIR.value)
        generator = GeneratorRun.open(workdir, step=STEP.value, raw=RAW.value)
        name = f"sample_{generator.step:07d}_seed{SEED.value}"
        return generator, workdir / "samples" / name
    if STEP.present or RAW.present:
        raise ValueError("step, raw: an exported folder has one set of parameters; leave them out")
    folder = resources.files("lasad_jax") / "demo" if _DEMO.value else Path(_FOLDER.value)
    return GeneratorRun.open_export(folder), Path(folder.resolve().name)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line)


def _labels(config: Config, class_names: tuple[str, ...] | None) -> np.ndarray:
    num_classes = config.model.num_classes
    if _CLASSES.value is None:
        return balanced_labels(_num(num_classes), num_classes)
    numbers = {name: number for number, name in enumerate(class_names or ())}
    numbers |= {str(number): number for number in range(num_classes)}
    if unknown := [name for name in _CLASSES.value if name not in numbers]:
        raise ValueError(
            f"classes: {unknown[0]!r} is no class; there are 0 to {num_classes - 1}"
            + (f", named {', '.join(class_names)}" if class_names else "")
        )
    chosen = np.array([numbers[name] for name in _CLASSES.value], np.int32)
    return chosen[balanced_labels(_num(len(chosen)), len(chosen))]


def _num(num_classes: int) -> int:
    """--num or, if unset, as many of each class as make about 100."""
    return _NUM.value or _ABOUT // num_classes * num_classes or _ABOUT


def _given(
    config: Config, codec: Codec, path: Path, default_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    images = FileImages("complete", path)
    labels = images.labels
    if _CLASSES.value is not None or labels is None:
        labels = default_labels
    rows, (num_rows, num_columns) = _ROWS.value, config.model.grid
    if rows is None or not 0 <= rows <= num_rows:
        raise ValueError(f"rows: {rows} must be 0 to {num_rows}, the rows of --complete to keep")
    num = min(len(images), len(labels), _NUM.value or _ABOUT)
    tokens = codec.encode(images.read(0, num))
    if tokens.shape[1] != config.model.num_tokens:
        raise ValueError(f"complete: images of {images.shape[:2]} do not fit {config.model.grid}")
    return labels[:num], tokens[:, : rows * num_columns]


if __name__ == "__main__":
    run(sample)
