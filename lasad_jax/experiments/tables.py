"""The tables of finished runs: a row for each arm of a task."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from lasad_jax.benchmarks.tables import Column
from lasad_jax.experiments.arms import SOFTMAX
from lasad_jax.experiments.results import Result, by_arm, by_rate, decode_state, mean_and_error

Number = Callable[[Result], float | None]


def table_rows(results: Sequence[Result]) -> list[dict]:
    """A row for each arm of one task, best first.

    "bits", "train_bits", "fid_classifier", "class_agreement" and "bits_at_equal_loss" (held out,
    where training bits are those of the softmax baseline at its end) are a mean and its standard
    error; "state_256" and "state_1024" numbers that a layer remembers for each channel.
    """
    arms = by_arm(results)
    ends = [result.train_bits for result in arms.get(SOFTMAX, ())]
    numbers: dict[str, Number] = {
        "bits": lambda result: result.bits,
        "train_bits": lambda result: result.train_bits,
        "bits_at_equal_loss": lambda result: result.held_out_at(np.mean(ends)) if ends else None,
        "fid_classifier": lambda result: result.measured.get("fid_classifier"),
        "class_agreement": lambda result: result.measured.get("class_agreement"),
    }
    rows = []
    for arm, runs in arms.items():
        row = {"arm": arm} | _row(runs, numbers)
        model = runs[0].config.model
        for tokens in (256, 1024):
            row[f"state_{tokens}"] = decode_state(model, tokens) / model.width
        rows.append(row)
    return sorted(rows, key=lambda row: row["bits"][0])


def rate_rows(results: Sequence[Result], others: Sequence[Result]) -> list[dict]:
    """A row for each learning rate of those arms of one task that are among the others, which
    ran at other rates than the results."""
    numbers = {"bits": lambda result: result.bits, "train_bits": lambda result: result.train_bits}
    every = by_arm([*results, *others])
    return [
        {"arm": arm, "rate": rate} | _row(of_rate, numbers)
        for arm in by_arm(others)
        for rate, of_rate in by_rate(every[arm]).items()
    ]


def _row(runs: Sequence[Result], numbers: dict[str, Number]) -> dict:
    """Each number's mean and standard error over the runs that have it."""
    row = {"seeds": len(runs)}
    for name, number in numbers.items():
        values = [value for result in runs if (value := number(result)) is not None]
        if values:
            row[name] = mean_and_error(values)
    return row


def _measured(name: str, key: str, digits: int) -> Column:
    def cell(row):
        if key not in row:
            return None
        mean, error = row[key]
        return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")

    return Column(name, cell)


_ARM = Column("arm", lambda row: f"`{row['arm']}`")
_BITS = (
    Column("seeds", lambda row: str(row["seeds"])),
    _measured("held-out bits", "bits", 4),
    _measured("training bits", "train_bits", 3),
)
COLUMNS = (
    _ARM,
    *_BITS,
    _measured("held-out bits at equal training loss", "bits_at_equal_loss", 3),
    _measured("FID (classifier)", "fid_classifier", 3),
    _measured("class agreement", "class_agreement", 3),
    Column("state, 256", lambda row: f"{row['state_256']:.0f}"),
    Column("state, 1024", lambda row: f"{row['state_1024']:.0f}"),
)
RATE_COLUMNS = (_ARM, Column("learning rate", lambda row: f"{row['rate']:g}"), *_BITS)
