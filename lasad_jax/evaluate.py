"""Measures a run, or a file of samples, against real images: FID and its relatives.

    python -m lasad_jax.evaluate --workdir=runs/fashion --num=10000
    python -m lasad_jax.evaluate --workdir=runs/fashion --sweep=1,1.5,2,3 --num=10000
    python -m lasad_jax.evaluate --tokenizer=runs/clipart_tokenizer
    python -m lasad_jax.evaluate --samples=FILE.npz --inception=WEIGHTS.pth \\
        --reference=VIRTUAL_imagenet256_labeled.npz

With --workdir the images are drawn, class-balanced, and going on where they were stopped;
--samples=FILE.npz takes them from there (uint8 NHWC under arr_0, classes under arr_1). They are
compared with the images that the run was trained on, with those of --source and --directory, or
with --reference=FILE.npz (statistics and images as in ADM's files). --tokenizer measures what a
tokenizer makes of the held-out images, against these. Features are Inception's with
--inception=FILE, otherwise those of a small classifier that is trained on the real images once.
Writes OUT_KIND.json and OUT_KIND.txt, and for --sweep a table and a picture.
"""

from pathlib import Path

from absl import flags

from lasad_jax.command import run
from lasad_jax.data.flags import data_fields
from lasad_jax.data.sources import SPLITS
from lasad_jax.evaluation.measure import METRICS, MOST_KEPT
from lasad_jax.evaluation.protocol import PROTOCOLS
from lasad_jax.evaluation.requests import Request, carry_out
from lasad_jax.sampling.flags import BATCH, RAW, SEED, STEP, are_set, sampling_fields

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a generator's run.")
_SAMPLES = flags.DEFINE_string("samples", None, "An .npz of images to measure; drawn if unset.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A tokenizer's run or file: measure what it makes of real images."
)
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
    """Measures what the flags ask for."""
    drawing = are_set() + [flag.name for flag in (_NUM, _SWEEP) if flag.present]
    for flag in (_SAMPLES, _TOKENIZER):
        if flag.present and drawing:
            raise ValueError(
                f"{drawing[0]}: nothing is drawn with --{flag.name}; leave out one of them"
            )
    if _TOKENIZER.present and (_SAMPLES.present or _WORKDIR.present):
        raise ValueError("tokenizer: it goes without --samples and --workdir; leave these out")
    path = lambda flag: Path(flag.value) if flag.value else None
    request = Request(
        workdir=path(_WORKDIR),
        samples=path(_SAMPLES),
        tokenizer=path(_TOKENIZER),
        num=_NUM.value,
        seed=SEED.value,
        step=STEP.value,
        raw=RAW.value,
        batch_size=BATCH.value,
        sampling=sampling_fields(),
        sweep=_scales(),
        keep_samples=_KEEP.value,
        out=path(_OUT),
        cache=path(_CACHE),
        data=data_fields(),
        split=_SPLIT.value,
        reference=path(_REFERENCE),
        reference_split=_REFERENCE_SPLIT.value,
        inception=path(_INCEPTION),
        classifier=path(_CLASSIFIER),
        protocol=_PROTOCOL.value,
        metrics=_METRICS.value and tuple(_METRICS.value),
        most_kept=_MOST_KEPT.value,
        force=_FORCE.value,
    )
    carry_out(request)


def _scales() -> tuple[float, ...]:
    try:
        scales = tuple(float(word) for word in _SWEEP.value or ())
    except ValueError:
        scales = (-1.0,)
    if any(not scale >= 0 for scale in scales):
        raise ValueError(f"sweep: {','.join(_SWEEP.value)!r} must be scales such as 1,1.5,2")
    return scales


if __name__ == "__main__":
    run(evaluate)
