"""What the training loop asks of the thing it trains."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Array, PyTree
from PIL import Image

Batch = dict[str, np.ndarray]
Metrics = dict[str, Array]


class Task(Protocol):
    """A generator or a tokenizer, with its data.

    It is made of a configuration and a mesh; that reads the data and refuses a configuration
    that does not fit it.

    Attributes:
      objective: name of the held-out figure that ranks checkpoints; lower is better.
      curves: metric -> its legend in the picture of losses.
      unit: of those curves.
      measure_every: steps between measurements of what it draws; 0 for never.
      tokens_per_image: that a generator reads; 0 for none.
      flops_per_image: of a training step; None where they are not counted.
    """

    objective: str
    curves: dict[str, str]
    unit: str
    measure_every: int
    tokens_per_image: int
    flops_per_image: int | None

    def check(self, workdir: Path) -> None:
        """Refuses to go on with a run that was made with other data."""

    def store(self, workdir: Path) -> None:
        """Puts what later use of the run needs beside its config.json."""

    def prepare(self, workdir: Path) -> None:
        """Makes what takes long and is made once, before the first step."""

    def abstract_state(self) -> PyTree:
        """Shapes, dtypes and shardings of the state."""

    def init_state(self) -> PyTree:
        """The state before the first step."""

    def compile(self, state: PyTree, batch: PyTree) -> None:
        """Compiles `train_step` for such a state and batch, and leaves both as they are."""

    def train_step(self, state: PyTree, batch: PyTree) -> tuple[PyTree, Metrics]:
        """Takes one optimizer step, jitted; the old state is donated.

        Metrics are scalars; among them "loss", "grad_norm", "learning_rate" and those of
        `guard.metrics`.
        """

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """This process's part of every batch from `start_step` on."""

    def evaluate(self, state: PyTree) -> dict[str, float]:
        """Held-out figures, among them `objective`."""

    def measure(self, state: PyTree) -> dict[str, float]:
        """How good what it draws is."""

    def picture(self, state: PyTree) -> Image.Image:
        """What a person looks at during training."""
