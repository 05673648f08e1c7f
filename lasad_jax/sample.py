"""Draws images from a run: python -m lasad_jax.sample --workdir=DIR

Writes a labelled PNG grid and an .npz (arr_0: uint8 NHWC images, arr_1: labels; the ADM
convention). --classes=3,1,4 chooses classes, by number or name; --complete=FILE.npz --rows=14
keeps the first rows of tokens of the images in arr_0 and draws the rest.

Images are kept in OUT.parts, batch by batch, until all are there. Running the same command
again goes on where it was stopped.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import flags

from lasad_jax.command import run
from lasad_jax.config import Config, load_config
from lasad_jax.data.tokens import Codec, load_class_names, load_run_codec
from lasad_jax.sampling.decode import balanced_labels
from lasad_jax.sampling.flags import BATCH, RAW, SEED, STEP, sampling_fields
from lasad_jax.sampling.run import GeneratorRun

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUT = flags.DEFINE_string("out", None, "Path of the results without ending; in the run if unset.")
_NUM = flags.DEFINE_integer("num", 100, "Number of images, balanced over the classes.", 1)
_CLASSES = flags.DEFINE_list("classes", None, "Classes to draw, by number or name; all if unset.")
_COMPLETE = flags.DEFINE_string("complete", None, "An .npz of images (arr_0) to complete.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows of tokens of --complete to keep.")


def sample(workdir: Path) -> None:
    """Draws what the flags ask for and writes it."""
    config, class_names = load_config(workdir), load_class_names(workdir)
    sampling = dataclasses.replace(config.sampling, **sampling_fields())
    labels, given = _labels(config, class_names), None
    if _COMPLETE.value:
        codec = load_run_codec(config.data, workdir)
        labels, given = _given(config, codec, Path(_COMPLETE.value), labels)
    generator = GeneratorRun.open(workdir, step=STEP.value, raw=RAW.value)
    out = Path(_OUT.value or workdir / "samples" / f"sample_{generator.step:07d}_seed{SEED.value}")
    job = generator.job(
        out, labels, sampling=sampling, seed=SEED.value, batch_size=BATCH.value, given=given
    )
    if job.is_finished():
        _say(f"these {len(labels)} images are there already: {job.png}, {job.npz}")
        return
    generator.draw(job, given)
    _say(f"{len(labels)} images of step {generator.step}: {job.png}, {job.npz}")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line)


def _labels(config: Config, class_names: tuple[str, ...] | None) -> np.ndarray:
    num_classes = config.model.num_classes
    if _CLASSES.value is None:
        return balanced_labels(_NUM.value, num_classes)
    numbers = {name: number for number, name in enumerate(class_names or ())}
    numbers |= {str(number): number for number in range(num_classes)}
    if unknown := [name for name in _CLASSES.value if name not in numbers]:
        raise ValueError(
            f"classes: {unknown[0]!r} is no class; there are 0 to {num_classes - 1}"
            + (f", named {', '.join(class_names)}" if class_names else "")
        )
    chosen = np.array([numbers[name] for name in _CLASSES.value], np.int32)
    return chosen[balanced_labels(_NUM.value, len(chosen))]


def _given(
    config: Config, codec: Codec, path: Path, default_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"complete: {path} does not exist")
    with np.load(path) as file:
        if "arr_0" not in file:
            raise ValueError(
                f"complete: {path} has no array arr_0, only {', '.join(file) or 'none'}; save "
                "uint8 images (N, H, W, channels) under it"
            )
        images = file["arr_0"]
        labels = file.get("arr_1")
    if _CLASSES.value is not None or labels is None:
        labels = default_labels
    rows, (num_rows, num_columns) = _ROWS.value, config.model.grid
    if rows is None or not 0 <= rows <= num_rows:
        raise ValueError(f"rows: {rows} must be 0 to {num_rows}, the rows of --complete to keep")
    num = min(len(images), len(labels), _NUM.value)
    tokens = codec.encode(images[:num])
    if tokens.shape[1] != config.model.num_tokens:
        raise ValueError(f"complete: images of {images.shape[1:3]} do not fit {config.model.grid}")
    return labels[:num], tokens[:, : rows * num_columns]


if __name__ == "__main__":
    run(lambda: sample(Path(_WORKDIR.value)))
