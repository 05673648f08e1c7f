"""What finished runs measured, and what is said of several of them."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import jax
import numpy as np

from lasad_jax.config import Config, load_config
from lasad_jax.experiments.arms import TASKS
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.decoder import start
from lasad_jax.models.generator import init_cache
from lasad_jax.training.metrics import read_metrics

HELD_OUT = "held_out_bits_per_token"
_SMOOTHED = 5  # rows of training loss that are one


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
      task, arm, seed: of its `Trial`.
      config: of the run.
      train: step -> training loss in bits per token, means over `log_every` steps, with dropout.
      held_out: step -> held-out bits per token.
      measured: of drawn images, by name, such as "fid_classifier"; {} if none were drawn.
    """

    task: str
    arm: str
    seed: int
    config: Config
    train: dict[int, float]
    held_out: dict[int, float]
    measured: dict[str, float]

    @property
    def bits(self) -> float:
        """Held-out bits per token: of the last step, or the best where a task overfits."""
        if TASKS[self.task].overfits:
            return min(self.held_out.values())
        return self.held_out[max(self.held_out)]

    @property
    def learning_rate(self) -> float:
        """The highest of the run."""
        return self.config.optimizer.learning_rate

    @property
    def train_bits(self) -> float:
        """Training bits per token over the last tenth of the steps."""
        last = max(self.train)
        return statistics.fmean(x for step, x in self.train.items() if step > 0.9 * last)

    def held_out_at(self, train_bits: float) -> float | None:
        """Held-out bits per token where training bits, smoothed, first are so low; None if never,
        or before the first evaluation.

        Between two evaluations it is the straight line.
        """
        smooth = np.convolve([*self.train.values()], np.full(_SMOOTHED, 1 / _SMOOTHED), "valid")
        reached = np.flatnonzero(smooth <= train_bits)
        if not len(reached):
            return None
        step = [*self.train][_SMOOTHED - 1 + reached[0]]
        bits = np.interp(step, [*self.held_out], [*self.held_out.values()], left=np.nan)
        return None if np.isnan(bits) else float(bits)


def read_results(out: Path) -> list[Result]:
    """All finished runs below the queue's folder."""
    found = []
    for done in sorted(Path(out).glob("*/*/seed*/trained")):
        folder = done.parent
        task, arm, seed = folder.parts[-3:]
        rows = read_metrics(folder / "metrics.jsonl")
        reports = sorted(folder.glob("measured_*.json"))
        found.append(
            Result(
                task=task,
                arm=arm,
                seed=int(seed.removeprefix("seed")),
                config=load_config(folder),
                train={row["step"]: row["loss"] / math.log(2) for row in rows if "loss" in row},
                held_out={row["step"]: row[HELD_OUT] for row in rows if HELD_OUT in row},
                measured=json.loads(reports[0].read_text())["metrics"] if reports else {},
            )
        )
    return found


def decode_state(config: ModelConfig, num_tokens: int) -> int:
    """Numbers that one layer remembers of one image after `num_tokens` tokens of a square grid."""
    side = math.isqrt(num_tokens)
    square = dataclasses.replace(config, grid=(side, side))
    cache = jax.eval_shape(lambda: start(square, init_cache(square, 1)).layers)
    return sum(x.size for x in jax.tree.leaves(cache)) // config.num_layers


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the latter is NaN of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each arm."""
    return _grouped(results, lambda result: result.arm)


def by_rate(results: Sequence[Result]) -> dict[float, list[Result]]:
    """The runs of each learning rate, the lowest first."""
    return dict(sorted(_grouped(results, lambda result: result.learning_rate).items()))


def at_best_rate(results: Sequence[Result]) -> list[Result]:
    """Of each task and arm the runs at the learning rate that gave the lowest held-out bits."""
    mean_bits = lambda runs: statistics.fmean(run.bits for run in runs)
    arms = _grouped(results, lambda result: (result.task, result.arm)).values()
    return [run for runs in arms for run in min(by_rate(runs).values(), key=mean_bits)]


def _grouped(results: Sequence[Result], key: Callable[[Result], Hashable]) -> dict:
    found = {}
    for result in results:
        found.setdefault(key(result), []).append(result)
    return found
