"""Everything that an evaluation fixes before it looks at a sample: network, reference, metrics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from lasad_jax.evaluation.extract import Extraction, Images
from lasad_jax.evaluation.fit_classifier import read_classifier
from lasad_jax.evaluation.image_files import FileImages, npz_fingerprint
from lasad_jax.evaluation.measure import (
    MOST_KEPT,
    check_count,
    choose_metrics,
    measure,
    see,
)
from lasad_jax.evaluation.protocol import (
    PROTOCOLS,
    check_meaningful,
    check_protocol,
    split_of_file,
)
from lasad_jax.evaluation.real_images import RealImages
from lasad_jax.evaluation.reference import check_shapes, reference_of_file, reference_of_split
from lasad_jax.evaluation.report import (
    Report,
    describe_features,
    describe_reference,
    make_report,
    sample_comment,
)
from lasad_jax.interop.inception_files import load_inception

CLASSIFIER_FILE = "classifier.safetensors"
_WITH_REFERENCE = {"fid", "sfid", "precision_recall", "kid"}


class Samples(NamedTuple):
    """Images to measure.

    Attributes:
      images: to look at.
      labels: the classes that they were asked to be of, if known.
      described: their name, fingerprint and number.
      comment: what their file says of itself.
    """

    images: Images
    labels: Integer[np.ndarray, " N"] | None
    described: Mapping[str, Any]
    comment: Mapping[str, Any]

    @classmethod
    def of_file(cls, path: Path) -> "Samples":
        """Those of an .npz.

        Raises:
          FileNotFoundError, ValueError: no file, or one that does not hold images.
        """
        fingerprint, _ = npz_fingerprint("samples", path)
        images = FileImages("samples", path)
        described = {"name": str(path), "fingerprint": fingerprint, "num_images": len(images)}
        return cls(images, images.labels, described, sample_comment(path))


class Evaluator:
    """Measures samples of one shape, as many as there are; refuses whatever it can at once.

    Args:
      shape: rows, columns and channels of the samples.
      count: the number of samples; `count_field` names it in messages.
      labelled: their classes are known.
      cache: a folder for what is computed once.
      protocol: "generation" or "reconstruction".
      real: gives the real images; called only if they are needed.
      split: to compare with; None for what the protocol says.
      reference: an .npz to compare with in place of the real images.
      reference_split: that it is of, where its name does not tell.
      inception: file of Inception's weights; None for a classifier.
      classifier: file of the classifier; None for one in `cache`.
      metrics: names in `METRICS`; None for all that can be had.
      most_kept: images of each side for precision, recall and KID.
      force: measure even what means little.
      progress: show bars.

    Raises:
      FileNotFoundError, ValueError: a mix-up (see `lasad_jax.evaluation.protocol`), too few
        samples, or parts that are missing or do not fit together.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        count: int,
        labelled: bool,
        cache: Path,
        count_field: str = "samples",
        protocol: str = "generation",
        real: Callable[[], RealImages],
        split: str | None = None,
        reference: Path | None = None,
        reference_split: str | None = None,
        inception: Path | None = None,
        classifier: Path | None = None,
        metrics: Sequence[str] | None = None,
        most_kept: int = MOST_KEPT,
        force: bool = False,
        progress: bool = True,
    ):
        self._shape, self._progress = tuple(shape), progress
        self._protocol, self._most_kept, self._force = protocol, most_kept, force
        # ---- What may be compared with what
        if reference is not None:
            _, self._names = npz_fingerprint("reference", reference)
            split = split_of_file(reference, reference_split, force=force)
        split = split or PROTOCOLS.get(protocol, "train")
        check_protocol(protocol, split, force=force)
        kind = "classifier" if inception is None else "inception"
        check_meaningful(kind, shape, force=force)
        # ---- The metrics
        self.metrics = choose_metrics(
            metrics,
            kind=kind,
            labelled=labelled,
            spatial=reference is None
            or kind == "classifier"
            or "mu_s" in self._names
            or "mu" not in self._names,
            images=reference is None or "arr_0" in self._names,
        )
        # ---- The network
        self._accuracy = None
        if inception is not None:
            self.extractor = load_inception(inception, any_fingerprint=force)
        else:
            trained = self._classifier(classifier, cache, real)
            self.extractor, self._accuracy = trained.extractor, trained.accuracy
        self._extraction = Extraction(self.extractor)
        dims = self._extraction.dims(self._shape)
        check_count(count, dims, self.metrics, field=count_field, force=force)
        # ---- The reference
        options = {"shape": self._shape, "most_kept": most_kept, "progress": progress}
        if not _WITH_REFERENCE & set(self.metrics):
            self._reference = None
        elif reference is not None:
            self._reference = reference_of_file(reference, split, self._extraction, **options)
        else:
            self._reference = reference_of_split(real(), split, self._extraction, cache, **options)

    def _classifier(self, path: Path | None, cache: Path, real: Callable[[], RealImages]):
        if path is not None and Path(path).is_file():
            return read_classifier(path)
        images = real()
        check_shapes(images.shape("train"), self._shape)
        return images.classifier(path or Path(cache) / CLASSIFIER_FILE, progress=self._progress)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on beside the samples."""
        return {
            "features": describe_features(self.extractor),
            "reference": self._reference and describe_reference(self._reference),
            "protocol": self._protocol,
            "forced": self._force,
            "metrics": self.metrics,
            "kept_images": self._most_kept,
        }

    def measure(self, samples: Samples) -> Report:
        """Looks at the samples, once; all processes together.

        Raises:
          ValueError: samples of another shape, or labels that are no classes.
        """
        check_shapes(self._shape, samples.images.shape)
        seen = see(
            self._extraction,
            samples.images,
            samples.labels,
            metrics=self.metrics,
            most_kept=self._most_kept,
            name="samples" if self._progress else "",
        )
        return make_report(
            measure(seen, self._reference, self.metrics),
            self.extractor,
            self._reference,
            protocol=self._protocol,
            forced=self._force,
            samples=samples.described,
            comment=samples.comment,
            accuracy=self._accuracy,
        )
