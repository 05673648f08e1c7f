"""Measures a run, or a file of samples, against real images: FID and its relatives.

    python -m lasad_jax.evaluate --workdir=runs/fashion --num=10000
    python -m lasad_jax.evaluate --workdir=runs/fashion --sweep=1,1.5,2,3 --num=10000
    python -m lasad_jax.evaluate --samples=FILE.npz --inception=WEIGHTS.pth \\
        --reference=VIRTUAL_imagenet256_labeled.npz

With --workdir the images are drawn, class-balanced, and going on where they were stopped;
--samples=FILE.npz takes them from there (uint8 NHWC under arr_0, classes under arr_1). They are
compared with the images that the run was trained on, with those of --source and --directory, or
with --reference=FILE.npz (statistics and images as in ADM's files). Features are Inception's
with --inception=FILE, otherwise those of a small classifier that is trained on the real images
once. Writes OUT_KIND.json and OUT_KIND.txt, and for --sweep a table and a picture.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from lasad_jax.command import rows_and_columns, run
from lasad_jax.config import DataConfig, load_config
from lasad_jax.config.sections import FITS, IMAGE_SOURCES
from lasad_jax.data.sources import SPLITS
from lasad_jax.evaluation import real_images
from lasad_jax.evaluation.evaluator import Evaluator, Samples
from lasad_jax.evaluation.in_training import FOLDER
from lasad_jax.evaluation.measure import METRICS, MOST_KEPT
from lasad_jax.evaluation.protocol import PROTOCOLS
from lasad_jax.evaluation.real_images import RealImages
from lasad_jax.evaluation.report import Report
from lasad_jax.evaluation.sweep import Sweep, markdown
from lasad_jax.sampling.flags import BATCH, RAW, SEED, STEP, are_set, with_flags
from lasad_jax.sampling.job import Job
from lasad_jax.sampling.run import GeneratorRun

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a generator's run.")
_SAMPLES = flags.DEFINE_string("samples", None, "An .npz of images to measure; drawn if unset.")
_NUM = flags.DEFINE_integer("num", 50_000, "Images to draw, balanced over the classes.", 1)
_SWEEP = flags.DEFINE_list("sweep", None, "Guidance scales, a row of the table for each.")
_KEEP = flags.DEFINE_bool("keep_samples", True, "Keep the images that are drawn.")
_OUT = flags.DEFINE_string("out", None, "Path of the results without ending.")
_INCEPTION = flags.DEFINE_string("inception", None, "Inception's weights, to take its features.")
_CLASSIFIER = flags.DEFINE_string(
    "classifier", None, "File of the data's classifier, made if missing; in --cache if unset."
)
_CACHE = flags.DEFINE_string(
    "cache", None, "Folder of what is computed once; evaluation/ in the run or by the samples."
)
_REFERENCE = flags.DEFINE_string("reference", None, "An .npz to compare with, such as ADM's.")
_REFERENCE_SPLIT = flags.DEFINE_enum(
    "reference_split", None, SPLITS, "What --reference is of, where its name does not tell."
)
_SOURCE = flags.DEFINE_enum("source", None, IMAGE_SOURCES, "The real images; the run's if unset.")
_DIRECTORY = flags.DEFINE_string("directory", None, "The source's folder.")
_NAME = flags.DEFINE_string("name", None, "Data set of tfds.")
_LABELS = flags.DEFINE_string("labels", None, "CSV of folder.")
_SIZE = flags.DEFINE_list("image_size", None, "Rows and columns; those of the samples if unset.")
_FIT = flags.DEFINE_enum("fit", None, FITS, "How real images are brought to that size.")
_SPLIT = flags.DEFINE_enum(
    "split", None, SPLITS, "Part of the source to compare with; what the protocol says if unset."
)
_PROTOCOL = flags.DEFINE_enum(
    "protocol", None, tuple(PROTOCOLS), "What the samples are; generation if they do not say."
)
_METRICS = flags.DEFINE_list("metrics", None, f"Some of {','.join(METRICS)}; all if unset.")
_MOST_KEPT = flags.DEFINE_integer(
    "kept_images", MOST_KEPT, "Images of each side that precision, recall and KID see.", 2
)
_FORCE = flags.DEFINE_bool("force", False, "Measure even what means little; reports say so.")


def evaluate() -> None:
    """Measures what the flags ask for, and writes and prints it."""
    if _SAMPLES.value is not None:
        _evaluate_file(Path(_SAMPLES.value))
    elif _WORKDIR.value is not None:
        _evaluate_run(Path(_WORKDIR.value))
    else:
        raise ValueError("workdir: give --workdir=RUN to draw from, or --samples=FILE.npz")


def _evaluate_file(path: Path) -> None:
    drawing = are_set() + [flag.name for flag in (_NUM, _SWEEP) if flag.present]
    if drawing:
        raise ValueError(f"{drawing[0]}: nothing is drawn with --samples; leave out one of them")
    samples = Samples.of_file(path)
    evaluator = _evaluator(
        samples.images.shape,
        len(samples.images),
        "samples",
        samples.labels is not None,
        samples.comment,
    )
    _finish(evaluator, evaluator.measure(samples), _out(path.stem))


def _evaluate_run(workdir: Path) -> None:
    scales = _scales()
    generator = GeneratorRun.open(workdir, step=STEP.value, raw=RAW.value)
    evaluator = _evaluator(generator.image_shape, _NUM.value, "num", True, {})
    sampling = with_flags(generator.config.sampling)
    # In turns, so that any stretch of the images has all classes.
    labels = np.arange(_NUM.value, dtype=np.int32) % generator.config.model.num_classes
    out = _out(f"step_{generator.step:07d}_seed{SEED.value}")

    def job(guidance: float) -> Job:
        place = out
        if scales or _OUT.value is None:
            # Without a dot, behind which an ending would be.
            place = out.with_name(f"{out.name}_guidance{guidance:g}".replace(".", "p"))
        settings = dataclasses.replace(sampling, guidance=guidance)
        return generator.job(
            place, labels, sampling=settings, seed=SEED.value, batch_size=BATCH.value
        )

    def measured(job: Job) -> Report:
        generator.draw(job)
        report = evaluator.measure(Samples.of_file(job.npz))
        if jax.process_index() == 0 and not _KEEP.value:
            job.npz.unlink()
        return report

    if not scales:
        only = job(sampling.guidance)
        _finish(evaluator, measured(only), only.out)
        return
    identity = {**job(1.0).identity, **evaluator.identity} | {"guidance": "of each row"}
    sweep = Sweep(out.with_name(f"{out.name}_sweep_{evaluator.extractor.kind}"), identity)
    there = sweep.reports()
    for scale in scales:
        if scale in there:
            _say(f"guidance {scale:g} is there already")
            continue
        report = measured(job(scale))
        if jax.process_index() == 0:
            sweep.add(scale, report)
            print(f"guidance {scale:g}\n{report.table()}\n", flush=True)
    if jax.process_index() == 0:
        sweep.write()
        print(f"{markdown(sweep.rows())}in {sweep.out}.md, .csv, .jsonl and .png")


def _evaluator(
    shape: tuple[int, int, int],
    count: int,
    count_field: str,
    labelled: bool,
    comment: Mapping[str, Any],
) -> Evaluator:
    return Evaluator(
        shape,
        count=count,
        count_field=count_field,
        labelled=labelled,
        cache=_cache(),
        protocol=_PROTOCOL.value or comment.get("protocol", "generation"),
        real=lambda: _real_images(shape),
        split=_SPLIT.value,
        reference=_REFERENCE.value and Path(_REFERENCE.value),
        reference_split=_REFERENCE_SPLIT.value,
        inception=_INCEPTION.value and Path(_INCEPTION.value),
        classifier=_CLASSIFIER.value and Path(_CLASSIFIER.value),
        metrics=_METRICS.value,
        most_kept=_MOST_KEPT.value,
        force=_FORCE.value,
    )


def _real_images(shape: tuple[int, int, int]) -> RealImages:
    """The source that the flags name, or the run's."""
    values = {
        "directory": _DIRECTORY.value,
        "name": _NAME.value,
        "labels": _LABELS.value,
        "image_size": _SIZE.value and rows_and_columns("image_size", _SIZE.value),
        "fit": _FIT.value,
    }
    told = {name: value for name, value in values.items() if value is not None}
    if _SOURCE.value is not None:
        # Files may have any size; those of the other sources have one of their own.
        if _SOURCE.value in ("folder", "tfds"):
            told = {"image_size": tuple(shape[:2])} | told
        return RealImages(DataConfig(source=_SOURCE.value, **told), channels=shape[-1])
    if told:
        raise ValueError(f"source: {next(iter(told))} is of a source; name it with --source")
    if _WORKDIR.value is None:
        raise ValueError(
            "source: there is nothing to compare with; name the real images with --source and "
            "--directory, or the run that drew the samples with --workdir, or give "
            "--reference=FILE.npz and --inception=FILE"
        )
    return real_images.of_run(load_config(_WORKDIR.value), Path(_WORKDIR.value))


def _cache() -> Path:
    beside = _WORKDIR.value or Path(_SAMPLES.value).parent
    return Path(_CACHE.value or Path(beside) / FOLDER)


def _out(name: str) -> Path:
    return Path(_OUT.value or _cache() / name)


def _scales() -> list[float]:
    try:
        scales = [float(word) for word in _SWEEP.value or ()]
    except ValueError:
        scales = [-1.0]
    if any(not scale >= 0 for scale in scales):
        raise ValueError(f"sweep: {','.join(_SWEEP.value)!r} must be scales such as 1,1.5,2")
    return scales


def _finish(evaluator: Evaluator, report: Report, out: Path) -> None:
    if jax.process_index() == 0:
        report.write(out.with_name(f"{out.name}_{evaluator.extractor.kind}"))
        print(report.table())


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line)


if __name__ == "__main__":
    run(evaluate)
