"""What `python -m lasad_jax.evaluate` does, for options that are values."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lasad_jax.config import DataConfig, load_config
from lasad_jax.evaluation import real_images
from lasad_jax.evaluation.evaluator import Evaluator, Samples
from lasad_jax.evaluation.in_training import FOLDER
from lasad_jax.evaluation.measure import MOST_KEPT
from lasad_jax.evaluation.protocol import PROTOCOLS
from lasad_jax.evaluation.real_images import RealImages
from lasad_jax.evaluation.reconstructed_images import reconstruct
from lasad_jax.evaluation.report import Report
from lasad_jax.evaluation.sweep import Sweep, markdown
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.sampling.job import Job
from lasad_jax.sampling.run import GeneratorRun
from lasad_jax.training.tokenizer_task import load_any_tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """An evaluation to make.

    Attributes:
      workdir: a generator's run: its images are drawn, or were for `samples`.
      samples: an .npz of images, in place of drawing.
      tokenizer: a tokenizer's run or file, whose reconstructions are measured.
      num, seed, step, raw, batch_size: of images that are drawn.
      sampling: fields of `SamplingConfig` in place of the run's.
      sweep: guidance scales, a row for each.
      keep_samples: do not remove images that were drawn.
      out: path of the results without ending.
      cache: folder of what is computed once.
      data: fields of `DataConfig` that name real images; the run's if there is no "source".
      split, reference, reference_split, inception, classifier, protocol, metrics, most_kept,
        force: see `Evaluator`.
    """

    workdir: Path | None = None
    samples: Path | None = None
    tokenizer: Path | None = None
    num: int = 50_000
    seed: int = 0
    step: int | None = None
    raw: bool = False
    batch_size: int = 128
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sweep: tuple[float, ...] = ()
    keep_samples: bool = True
    out: Path | None = None
    cache: Path | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    split: str | None = None
    reference: Path | None = None
    reference_split: str | None = None
    inception: Path | None = None
    classifier: Path | None = None
    protocol: str | None = None
    metrics: tuple[str, ...] | None = None
    most_kept: int = MOST_KEPT
    force: bool = False

    @property
    def folder(self) -> Path:
        """Of what is computed once and, by default, of results."""
        if self.cache is not None:
            return self.cache
        beside = next(path for path in (self.workdir, self.tokenizer, self.samples) if path)
        return (beside if beside.is_dir() else beside.parent) / FOLDER


def carry_out(request: Request) -> None:
    """Makes an evaluation, writes its files and prints its report; all processes together.

    Raises:
      FileNotFoundError, ValueError: naming the option and a remedy.
    """
    if request.tokenizer is not None:
        _measure_tokenizer(request)
    elif request.samples is not None:
        _measure_file(request)
    elif request.workdir is not None:
        _measure_run(request)
    else:
        raise ValueError(
            "workdir: give --workdir=RUN to draw from, --samples=FILE.npz, or --tokenizer=RUN"
        )


def _measure_file(request: Request) -> None:
    samples = Samples.of_file(request.samples)
    evaluator = _evaluator(
        request,
        samples.images.shape,
        count=len(samples.images),
        count_field="samples",
        labelled=samples.labels is not None,
        protocol=request.protocol or samples.comment.get("protocol", "generation"),
    )
    out = request.out or request.folder / request.samples.stem
    _finish(evaluator, evaluator.measure(samples), out)


def _measure_tokenizer(request: Request) -> None:
    config, params, data = load_any_tokenizer(request.tokenizer)
    real = RealImages(dataclasses.replace(data, **request.data), config.channels)
    split = request.split or PROTOCOLS["reconstruction"]
    samples = reconstruct(TokenizerCodec(config, params), real, split)
    evaluator = _evaluator(
        request,
        samples.images.shape,
        real=lambda: real,
        count=len(samples.images),
        count_field="tokenizer",
        labelled=False,
        protocol=request.protocol or "reconstruction",
    )
    out = request.out or request.folder / f"reconstructions_{split}"
    _finish(evaluator, evaluator.measure(samples), out)


def _measure_run(request: Request) -> None:
    generator = GeneratorRun.open(request.workdir, step=request.step, raw=request.raw)
    evaluator = _evaluator(
        request,
        generator.image_shape,
        count=request.num,
        count_field="num",
        labelled=True,
        protocol=request.protocol or "generation",
    )
    sampling = dataclasses.replace(generator.config.sampling, **request.sampling)
    # In turns, so that any stretch of the images has all classes.
    labels = np.arange(request.num, dtype=np.int32) % generator.config.model.num_classes
    out = request.out or request.folder / f"step_{generator.step:07d}_seed{request.seed}"

    def job(guidance: float) -> Job:
        place = out
        if request.sweep or request.out is None:
            # Without a dot, behind which an ending would be.
            place = out.with_name(f"{out.name}_guidance{guidance:g}".replace(".", "p"))
        return generator.job(
            place,
            labels,
            sampling=dataclasses.replace(sampling, guidance=guidance),
            seed=request.seed,
            batch_size=request.batch_size,
        )

    def measured(job: Job) -> Report:
        generator.draw(job)
        report = evaluator.measure(Samples.of_file(job.npz))
        if jax.process_index() == 0 and not request.keep_samples:
            job.npz.unlink()
        return report

    if request.sweep:
        identity = {**job(1.0).identity, **evaluator.identity} | {"guidance": "of each row"}
        sweep = Sweep(out.with_name(f"{out.name}_sweep_{evaluator.extractor.kind}"), identity)
        _carry_out_sweep(sweep, request.sweep, lambda guidance: measured(job(guidance)))
    else:
        only = job(sampling.guidance)
        _finish(evaluator, measured(only), only.out)


def _carry_out_sweep(
    sweep: Sweep, scales: tuple[float, ...], measured: Callable[[float], Report]
) -> None:
    there = sweep.reports()
    for scale in scales:
        if scale in there:
            _say(f"guidance {scale:g} is there already")
            continue
        report = measured(scale)
        if jax.process_index() == 0:
            sweep.add(scale, report)
        _say(f"guidance {scale:g}\n{report.table()}\n")
    if jax.process_index() == 0:
        sweep.write()
        print(f"{markdown(sweep.rows())}in {sweep.out}.md, .csv, .jsonl and .png")


def _evaluator(request: Request, shape: tuple[int, int, int], **known: Any) -> Evaluator:
    known = {"real": lambda: _real_images(request, shape)} | known
    same = ("split", "reference", "reference_split", "inception", "classifier", "metrics")
    return Evaluator(
        shape,
        cache=request.folder,
        **{name: getattr(request, name) for name in (*same, "most_kept", "force")},
        **known,
    )


def _real_images(request: Request, shape: tuple[int, int, int]) -> RealImages:
    """The source that is named, or the run's."""
    if "source" in request.data:
        # Files may have any size; the images of other sources have one of their own.
        sized = request.data["source"] in ("folder", "tfds")
        size = {"image_size": tuple(shape[:2])} if sized else {}
        return RealImages(DataConfig(**size | dict(request.data)), channels=shape[-1])
    if request.data:
        raise ValueError(f"source: {min(request.data)} is of a source; name it with --source")
    if request.workdir is None:
        raise ValueError(
            "source: there is nothing to compare with; name the real images with --source and "
            "--directory, or the run that drew the samples with --workdir, or give "
            "--reference=FILE.npz and --inception=FILE"
        )
    return real_images.of_run(load_config(request.workdir), request.workdir)


def _finish(evaluator: Evaluator, report: Report, out: Path) -> None:
    if jax.process_index() == 0:
        report.write(out.with_name(f"{out.name}_{evaluator.extractor.kind}"))
    _say(report.table())


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
