"""What the steps since the last row of numbers came to."""

import numpy as np
from absl import logging

# Of these the newest value is told, of all else the mean.
_NEWEST = ("learning_rate", "skipped_updates", "grad_norm_level")

StepMetrics = dict[str, np.ndarray]


def summary(steps: list[StepMetrics]) -> dict[str, float]:
    """Means over the steps whose updates were taken; if none was, of nothing but the counts.

    Args:
      steps: metrics of each, one step at least.
    """
    taken = [values for values in steps if not values["skipped_in_a_row"]]
    means = {
        name: float(np.mean([values[name] for values in taken]))
        for name in steps[-1]
        if taken and name not in (*_NEWEST, "skipped_in_a_row")
    }
    return means | {name: float(steps[-1][name]) for name in _NEWEST}


def check_skips(steps: list[StepMetrics], last: int, max_skips: int) -> None:
    """Tells of updates left out, and refuses to go on after too many in a row.

    Args:
      steps: metrics of each step up to `last`.
      last: the number of the newest.
      max_skips: as `OptimizerConfig` has it.

    Raises:
      FloatingPointError: naming the first of them.
    """
    for i, values in enumerate(steps):
        if not (in_a_row := int(values["skipped_in_a_row"])):
            continue
        step = last - len(steps) + 1 + i
        words = (
            f"loss {values['loss']}, gradient norm {values['grad_norm']} where "
            f"{values['grad_norm_level']:.3g} is usual"
        )
        if in_a_row >= max_skips:
            raise FloatingPointError(
                f"step {step}: {words}; {in_a_row} updates in a row have been left out. The last "
                "checkpoint is from before or without them; lower optimizer.learning_rate or "
                "optimizer.clip_norm, or raise optimizer.spike_factor where the norms are "
                "finite, and run the same command again"
            )
        logging.warning("step %s: update left out: %s", step, words)
