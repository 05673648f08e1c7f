"""Metrics of a generator while it is trained."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from lasad_jax.config import Config
from lasad_jax.data.tokens import Codec
from lasad_jax.evaluation import real_images
from lasad_jax.evaluation.evaluator import CLASSIFIER_FILE
from lasad_jax.evaluation.extract import Extraction, MadeImages
from lasad_jax.evaluation.measure import check_count, choose_metrics, measure, see
from lasad_jax.evaluation.protocol import check_meaningful
from lasad_jax.evaluation.reference import check_shapes, reference_of_split
from lasad_jax.evaluation.report import name_metrics
from lasad_jax.interop.inception_files import load_inception

# Of a run: its classifier, features of its real images, and what was measured.
FOLDER = "evaluation"


class TrainingMetrics:
    """Samples against the training images, by a network that is fixed before the first step.

    The network is `config.inception`, or a classifier of the run's own images, which is
    trained here if the run has none yet. Every process makes it and calls it together.

    Args:
      config: of the run.
      workdir: its folder.
      codec: of its codes.

    Raises:
      ValueError, FileNotFoundError: images, network or number of samples that do not fit;
        before any step is taken.
    """

    def __init__(self, config: Config, workdir: Path, codec: Codec):
        self._config, self._codec = config, codec
        folder, real = Path(workdir) / FOLDER, real_images.of_run(config, workdir)
        shape = real.shape("train")
        if config.inception:
            check_meaningful("inception", shape)
            extractor = load_inception(config.inception)
        else:
            extractor = real.classifier(folder / CLASSIFIER_FILE).extractor
        self._extraction = Extraction(extractor)
        self._metrics = choose_metrics(
            config.metrics or None, kind=extractor.kind, labelled=True, spatial=True, images=True
        )
        check_count(
            config.metrics_num, self._extraction.dims(shape), self._metrics, what="metrics_num"
        )
        self._shape = shape
        self._reference = reference_of_split(real, "train", self._extraction, folder)

    def __call__(
        self, tokens: Int[np.ndarray, "num N"], labels: Int[np.ndarray, " num"]
    ) -> dict[str, float]:
        """The metrics of drawn codes, by the names of a report.

        Images are decoded as they are looked at.
        """
        grid, kind = self._config.model.grid, self._extraction.extractor.kind
        shape = self._codec.decode(tokens[:1], grid).shape[1:]
        check_shapes(self._shape, shape)
        images = MadeImages(
            len(tokens), shape, lambda first, last: self._codec.decode(tokens[first:last], grid)
        )
        seen = see(self._extraction, images, labels, metrics=self._metrics)
        return name_metrics(measure(seen, self._reference, self._metrics), kind)
