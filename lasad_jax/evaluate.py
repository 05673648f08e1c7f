"""Measures samples against real images of their classes.

python -m lasad_jax.evaluate --samples=FILE.npz --source=digits

prints the share of samples that a classifier fitted on the real images recognises as the
class they were asked for, and the same classifier's accuracy on real images that it has not
seen: the share to hope for. It takes a second on digits, minutes on 60,000 larger images.
"""

import zipfile
from pathlib import Path

import numpy as np
from absl import flags

from lasad_jax.command import run
from lasad_jax.config import DataConfig
from lasad_jax.data.images import ImageSet, load_images
from lasad_jax.data.sources import SPLITS
from lasad_jax.evaluation.agreement import accuracy, check_samples, fit_classifier

_SAMPLES = flags.DEFINE_string(
    "samples", None, "Samples: .npz with images arr_0 (uint8 NHWC) and classes arr_1."
)
_SOURCE = flags.DEFINE_enum("source", "digits", ("digits", "idx"), "The real images.")
_DIRECTORY = flags.DEFINE_string("directory", "", "The folder of the IDX files.")
_SPLIT = flags.DEFINE_enum(
    "split", "train", (*SPLITS, "all"), "The real images to fit the classifier on."
)


def report(samples: str, source: str, *, directory: str = "", split: str = "train") -> str:
    """The measures as lines of text.

    Args:
      samples: path of an .npz with arr_0, uint8 (M, R, C, channels), and arr_1, (M,).
      source, directory: of the real images, as in `DataConfig`.
      split: what the classifier is fitted on: "train", "test" or "all".

    Raises:
      ValueError, FileNotFoundError: samples or real images that are missing or do not fit.
    """
    images, labels = _read_samples(samples)
    data = DataConfig(source=source, directory=directory)
    parts = {name: load_images(data, name) for name in SPLITS}
    real = _join(*parts.values()) if split == "all" else parts[split]
    check_samples(images, labels, real)
    classifier = fit_classifier(real)
    lines = [
        f"images           {len(images)}",
        f"class agreement  {accuracy(classifier, images, labels):.4f}",
    ]
    for name in SPLITS:
        if split not in (name, "all"):
            share = accuracy(classifier, parts[name].images, parts[name].labels)
            lines.append(f"real images      {share:.4f} ({len(parts[name].labels)}, {name} split)")
    return "\n".join(lines)


def _read_samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--samples={path}: no such file; lasad_jax.sample writes one")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"--samples={path} is no whole .npz file; lasad_jax.sample writes one")
    with np.load(path) as arrays:
        if missing := [name for name in ("arr_0", "arr_1") if name not in arrays]:
            raise ValueError(
                f"--samples={path} lacks {' and '.join(missing)}: it needs images arr_0 and "
                "classes arr_1, as lasad_jax.sample writes them"
            )
        return arrays["arr_0"], arrays["arr_1"]


def _join(a: ImageSet, b: ImageSet) -> ImageSet:
    return ImageSet(
        np.concatenate([a.images, b.images]),
        np.concatenate([a.labels, b.labels]),
        max(a.class_names, b.class_names, key=len),
    )


def main() -> None:
    """Prints the report."""
    print(report(_SAMPLES.value, _SOURCE.value, directory=_DIRECTORY.value, split=_SPLIT.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("samples")
    run(main)
