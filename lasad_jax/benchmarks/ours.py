"""The operator's own rows of the benchmark."""

import statistics
from collections.abc import Callable

from lasad_jax import ops
from lasad_jax.benchmarks.cases import Case, call, random_tokens, with_learned
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.benchmarks.timing import NUM_SETS


def attention_of(case: Case, form: str) -> Callable:
    """The operator on a whole image, without prefix tokens, as `cases.call` takes it."""
    grid = case.shape.rows, case.shape.columns
    return lambda q, k, v, learned: ops.linear_attention(
        q,
        k,
        v,
        learned["decay"],
        grid=grid,
        num_prefix=0,
        log_gate=learned.get("log_gate"),
        implementation=form,
    )


def time_row(
    case: Case,
    decay: str,
    form: str,
    *,
    bytes_per_second: float,
    time_calls: Callable[..., list[float]],
    peers: dict[str, dict[Case, list[float]]],
) -> dict:
    """One row of the table.

    Args:
      case: shape, dtype and direction.
      decay: one of `cases.DECAYS`.
      form: one of `ops.IMPLEMENTATIONS`.
      bytes_per_second: of a plain copy.
      time_calls: (function, input_sets) to seconds of one call, once for each repeat.
      peers: name -> case -> the same of others.

    Returns:
      What `report` prints: medians in seconds, or under "skipped" why there are none.
    """
    row = {
        "shape": str(case.shape),
        "tokens": case.shape.tokens,
        "dtype": case.dtype,
        "direction": case.direction,
        "decay": decay,
        "form": form,
        "floor_bytes": case.floor_bytes,
        "floor_seconds": case.floor_bytes / bytes_per_second,
        "peers": {
            name: statistics.median(runs[case]) for name, runs in peers.items() if case in runs
        },
    }
    sets = with_learned(random_tokens(case, NUM_SETS), decay, case)
    try:
        runs = time_calls(call(attention_of(case, form), case.direction), sets)
    except Exception as error:  # a form that cannot run here says so; the others go on
        return row | {"skipped": one_line(error)}
    seconds = statistics.median(runs)
    return row | {
        "seconds": seconds,
        "runs": runs,
        "over_floor": seconds / row["floor_seconds"],
        "bytes_per_second": case.floor_bytes / seconds,
        "ratios": {name: seconds / theirs for name, theirs in row["peers"].items()},
    }
