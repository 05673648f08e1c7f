"""Metrics of a generator while it is trained."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from lasad_jax.config import Config
from lasad_jax.data.tokens import Codec
from lasad_jax.evaluation import real_images
from lasad_jax.evaluation.evaluator import Evaluator, Samples
from lasad_jax.evaluation.extract import MadeImages

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
        self._shape = self._decode(np.zeros((1, config.model.num_tokens), np.int32)).shape[1:]
        self._evaluator = Evaluator(
            self._shape,
            count=config.metrics_num,
            count_field="config.metrics_num",
            labelled=True,
            cache=Path(workdir) / FOLDER,
            real=lambda: real_images.of_run(config, workdir),
            reference=Path(config.reference) if config.reference else None,
            reference_split="train",
            inception=Path(config.inception) if config.inception else None,
            metrics=config.metrics or None,
        )

    def __call__(
        self, tokens: Int[np.ndarray, "num N"], labels: Int[np.ndarray, " num"]
    ) -> dict[str, float]:
        """The metrics of drawn codes, by the names of a report.

        Images are decoded as they are looked at.
        """
        read = lambda first, last: self._decode(tokens[first:last])
        images = MadeImages(len(tokens), self._shape, read)
        described = {"name": "samples", "fingerprint": "", "num_images": len(tokens)}
        return dict(self._evaluator.measure(Samples(images, labels, described, {})).metrics)

    def _decode(self, tokens: Int[np.ndarray, "n N"]) -> np.ndarray:
        return self._codec.decode(tokens, self._config.model.grid)
