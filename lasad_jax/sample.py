"""Draws images from a run: python -m lasad_jax.sample --workdir=DIR

Writes a labelled PNG grid and an .npz (arr_0: uint8 NHWC images, arr_1: labels; the ADM
convention). --classes=3,1,4 chooses classes, by number or name; --complete=FILE.npz --rows=14
keeps the first rows of tokens of the images in arr_0 and draws the rest.

Images are kept in OUT.parts, batch by batch, until all are there. Running the same command
again goes on where it was stopped.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from absl import flags
from flax import linen as nn

from lasad_jax.command import run
from lasad_jax.config import Config, load_config
from lasad_jax.data.tokens import Codec, load_class_names, load_run_codec
from lasad_jax.sampling.decode import balanced_labels, sample_batches
from lasad_jax.sampling.job import Job, digest, draw_parts, fingerprint
from lasad_jax.sampling.pictures import image_grid
from lasad_jax.training import sharding
from lasad_jax.training.checkpoints import restore_parameters

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUT = flags.DEFINE_string("out", None, "Path of the results without ending; in the run if unset.")
_NUM = flags.DEFINE_integer("num", 100, "Number of images, balanced over the classes.", 1)
_CLASSES = flags.DEFINE_list("classes", None, "Classes to draw, by number or name; all if unset.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the images.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the best by held-out loss if unset.")
_RAW = flags.DEFINE_bool("raw", False, "Use the parameters themselves, not their average.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Images drawn, and kept, at a time.", 1)
_COMPLETE = flags.DEFINE_string("complete", None, "An .npz of images (arr_0) to complete.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows of tokens of --complete to keep.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; as configured if unset.")
_SCHEDULE = flags.DEFINE_string("guidance_schedule", None, "constant, linear or power-cosine.")
_POWER = flags.DEFINE_float("guidance_power", None, "Exponent of power-cosine.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Temperature; 0 for the likeliest.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw among the k likeliest codes; 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw among codes of total probability p.")


def sample(workdir: Path) -> None:
    """Draws what the flags ask for and writes it."""
    config = load_config(workdir)
    overrides = {
        "guidance": _GUIDANCE.value,
        "guidance_schedule": _SCHEDULE.value,
        "guidance_power": _POWER.value,
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    sampling = dataclasses.replace(config.sampling, **overrides)
    codec, class_names = load_run_codec(config.data, workdir), load_class_names(workdir)
    labels, given = _labels(config, class_names), None
    if _COMPLETE.value:
        labels, given = _given(config, codec, Path(_COMPLETE.value), labels)

    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        params, step = restore_parameters(config, workdir, mesh, step=_STEP.value, raw=_RAW.value)
        identity = {
            "step": step,
            "parameters": f"{'raw' if _RAW.value else 'average'} {fingerprint(params)}",
            "seed": _SEED.value,
            "num": len(labels),
            "labels": digest(labels),
            "given": "none" if given is None else f"{given.shape[1]} codes {digest(given)}",
            "batch_size": _BATCH.value,
        } | dataclasses.asdict(sampling)
        out = Path(_OUT.value or workdir / "samples" / f"sample_{step:07d}_seed{_SEED.value}")
        job = Job(out, labels, _BATCH.value, identity)
        if job.is_finished():
            _say(f"these {len(labels)} images are there already: {job.png}, {job.npz}")
            return
        draw = functools.partial(
            sample_batches,
            config.model,
            params,
            labels,
            sampling=sampling,
            seed=_SEED.value,
            mesh=mesh,
            batch_size=_BATCH.value,
            given=given,
        )
        draw_parts(job, draw, lambda tokens: codec.decode(tokens, config.model.grid))
    if jax.process_index() == 0:
        shown = _shown(labels)
        job.finish(image_grid(job.read_images(shown), labels[shown], class_names=class_names))
    _say(f"{len(labels)} images of step {step}: {job.png}, {job.npz}")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line)


def _shown(labels: np.ndarray, most: int = 200) -> np.ndarray:
    """Indices of the images for the picture: the first of every class, as many as fit."""
    classes, counts = np.unique(labels, return_counts=True)
    each = min(counts.max(), max(1, most // len(classes)))
    return np.concatenate([np.flatnonzero(labels == c)[:each] for c in classes])[:most]


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
